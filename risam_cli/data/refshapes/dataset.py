"""RefShapes as a sequence of scenes, each a pure function of seed, family, split and number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.refshapes.expressions import Referring, draw_expressions
from risam_cli.data.refshapes.render import HELD_OUT_LOOK, paint, paint_wide
from risam_cli.data.refshapes.scene import Dice, Layout, SceneObject, draw_kinds, draw_layout
from risam_cli.errors import UsageError

FAMILIES: tuple[str, ...] = ("refshapes", "refshapes+", "refshapesg", "grefshapes")
SPLIT_SCENES: dict[str, int] = {
    "train": 40000,
    "val": 500,
    "testA": 500,
    "testB": 500,
    "testC": 500,
}
"""Splits and their numbers of scenes where none is asked for."""

VERSION = 1
"""Part of every seed: goes up when the same seed draws something else than before."""
_MIN_OBJECTS, _MAX_OBJECTS = 3, 9
# Of wide pictures: the share of square ones, and the others' shorter side at least, in longer ones.
_SQUARE, _SHORTEST = 0.4, 0.55
# Scenes tried before giving up on one that can say enough.
_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class SceneItem:
    """One scene.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        instances: (H, W) uint8; 0 background, k + 1 the visible pixels of ``objects[k]``.
        objects: from back to front.
        expressions: all different; empty where not asked for.
        family: whose expressions these are (for "mixed": the one that was drawn).
    """

    image: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    expressions: tuple[Referring, ...]
    family: str

    def mask(self, referring: Referring) -> NDArray[np.bool_]:
        """Visible pixels of what an expression refers to, (H, W); all False where nothing fits."""
        chosen = np.zeros(256, bool)
        chosen[[number + 1 for number in referring.objects]] = True
        return np.asarray(chosen[self.instances], bool)


class RefShapes:
    """A split of a family of RefShapes.

    Args:
        family: one of ``FAMILIES``, or "mixed", which draws one of them for every scene.
        split: "train", "val", "testA" (6 to 9 objects), "testB" (every scene with a shape in a
            colour that no other split shows it in) or "testC" (drawn and spoken of in ways that
            no other split has).
        scenes: length; None for the split's own. Scene i does not depend on it.
        expressions_per_scene: expressions of every scene.
        size: longer side in pixels, at least 128.
        seed: another one gives other scenes.
        mix: of "mixed": shares of the families, above 0; None for equal ones.
        variety: "plain", or "wide": pictures and shapes of many proportions, many looks, several
            grammars, and in every family phrases that refer to nothing. testC is always wide, and
            square. Plain pictures are square.

    Raises:
        UsageError: an unknown family or split, or a number out of its range.
    """

    def __init__(
        self,
        family: str,
        split: str,
        scenes: int | None = None,
        expressions_per_scene: int = 6,
        size: int = 256,
        seed: int = 0,
        mix: Mapping[str, float] | None = None,
        variety: str = "plain",
    ) -> None:
        if family not in (*FAMILIES, "mixed"):
            raise UsageError(
                f"unknown RefShapes family {family!r}", f"use one of {', '.join(FAMILIES)}, mixed"
            )
        if split not in SPLIT_SCENES:
            raise UsageError(
                f"unknown RefShapes split {split!r}", f"use one of {', '.join(SPLIT_SCENES)}"
            )
        if variety not in ("plain", "wide"):
            raise UsageError(f"unknown RefShapes variety {variety!r}", "use plain or wide")
        for name, value, least in (
            ("scenes", scenes, 1),
            ("expressions_per_scene", expressions_per_scene, 1),
            ("size", size, 128),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}", f"use at least {least}")
        if mix is not None and (family != "mixed" or not mix or min(mix.values()) <= 0):
            raise UsageError(
                f"mix is {dict(mix)} for family {family!r}",
                "give shares above 0, with the family mixed",
            )
        if unknown := sorted(set(mix or ()) - set(FAMILIES)):
            raise UsageError(
                f"unknown RefShapes family {unknown[0]!r} in mix",
                f"use some of {', '.join(FAMILIES)}",
            )
        self.mix = dict(mix) if mix is not None else None
        self.family = family
        self.split = split
        self.scenes = SPLIT_SCENES[split] if scenes is None else scenes
        self.expressions_per_scene = expressions_per_scene
        self.size = size
        self.seed = seed
        self.wide = variety == "wide" or split == "testC"

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> SceneItem:
        """Scene ``index`` with its expressions."""
        return self.scene(index, with_expressions=True)

    def scene(self, index: int, with_expressions: bool = False) -> SceneItem:
        """Scene ``index``; without expressions it costs less.

        A scene that has too little to say for its expressions is drawn anew. Without expressions
        nobody asks, so a few scenes (under 5 in 100) then differ from ``self[index]``.

        Raises:
            IndexError: outside 0..len-1.
        """
        if not 0 <= index < self.scenes:
            raise IndexError(f"scene {index} of {self.scenes}")
        key = f"refshapes/{VERSION}/{self.seed}/{self.family}/{self.split}/{index}"
        if self.wide:
            key = f"wide/{key}"
        family = self.family
        if family == "mixed":
            family = self._drawn_family(Dice(f"{key}/family"))
        for attempt in range(_ATTEMPTS):
            layout = self._layout(f"{key}/{attempt}")
            if layout is None:
                continue
            said: tuple[Referring, ...] | None = ()
            if with_expressions:
                said = self._expressions(f"{key}/{attempt}", family, layout)
            if said is not None:
                image = self._paint(Dice(f"{key}/{attempt}/paint"), layout)
                return SceneItem(image, layout.instances, layout.objects, said, family)
        raise UsageError(
            f"scenes of {family} have less than {self.expressions_per_scene} expressions in them",
            "ask for fewer expressions per scene",
        )

    def _paint(self, dice: Dice, layout: Layout) -> NDArray[np.uint8]:
        if not self.wide:
            return paint(dice, layout)
        return paint_wide(dice, layout, HELD_OUT_LOOK if self.split == "testC" else None)

    def _drawn_family(self, dice: Dice) -> str:
        if self.mix is None:
            return dice.pick(FAMILIES)
        return dice.weighted(tuple(self.mix), tuple(self.mix.values()))

    def _layout(self, key: str) -> Layout | None:
        dice = Dice(key)
        frame = self._frame(f"{key}/frame")
        fewest = 6 if self.split == "testA" else _MIN_OBJECTS - self.wide
        count = fewest + dice.below(_MAX_OBJECTS - fewest + 1)
        kinds = draw_kinds(dice, count, held_out=self.split == "testB")
        return draw_layout(dice, kinds, frame, wide=self.wide)

    def _frame(self, key: str) -> tuple[int, int]:
        """Height and width of a picture."""
        if not self.wide or self.split == "testC" or (dice := Dice(key)).unit() < _SQUARE:
            return self.size, self.size
        short = round(self.size * dice.between(_SHORTEST, 1.0))
        return (short, self.size) if dice.unit() < 0.5 else (self.size, short)

    def _expressions(self, key: str, family: str, layout: Layout) -> tuple[Referring, ...] | None:
        return draw_expressions(
            Dice(f"{key}/words"),
            family,
            layout.objects,
            layout.size,
            self.expressions_per_scene,
            held_out=self.split == "testB",
            wide=self.wide,
            clauses=self.split == "testC",
        )
