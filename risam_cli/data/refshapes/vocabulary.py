"""The words of RefShapes and what they stand for. Ours: the data set belongs to this project."""

from __future__ import annotations

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "hexagon",
    "cross",
    "diamond",
)
COLORS: tuple[str, ...] = (
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
    "cyan",
    "pink",
    "brown",
    "gray",
    "white",
    "black",
)
SIZES: tuple[str, ...] = ("small", "medium", "large")
"""Size classes of objects; only "small" and "large" are ever said."""

PLURALS: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "ring": "rings",
    "hexagon": "hexagons",
    "cross": "crosses",
    "diamond": "diamonds",
    "object": "objects",
    "thing": "things",
}
STAND_INS: tuple[str, ...] = ("object", "thing")
EXTREMES: tuple[str, ...] = ("leftmost", "rightmost", "topmost", "bottommost")
PLACES: dict[str, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
RELATIONS: tuple[str, ...] = ("left", "right", "above", "below", "next")
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
    "next": ("next to",),
}
COUNTS: dict[int, str] = {2: "two", 3: "three", 4: "four"}

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("hexagon", "red"),
        ("cross", "green"),
        ("triangle", "blue"),
        ("square", "yellow"),
        ("ring", "purple"),
        ("star", "orange"),
        ("diamond", "cyan"),
        ("circle", "pink"),
        ("triangle", "brown"),
        ("star", "gray"),
        ("square", "white"),
        ("ring", "black"),
    }
)
"""(shape, colour) pairs kept for testB: each colour once, no shape more than twice. No other split
draws one or speaks of one."""

PLACE_WORDS: frozenset[str] = frozenset(
    {*EXTREMES, "left", "right", "top", "bottom", "above", "below", "next"}
)
"""Words that mark a place or a relation; ``refshapes+`` uses none of them."""

_FUNCTION_WORDS = ("the", "a", "all", "both", "that", "is", "are", "and", "on", "at", "of", "to")

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            *SHAPES,
            *COLORS,
            "small",
            "large",
            *PLURALS,
            *PLURALS.values(),
            *COUNTS.values(),
            *PLACE_WORDS,
            *_FUNCTION_WORDS,
        }
    )
)
"""Every word that an expression can hold, lower case, sorted."""
