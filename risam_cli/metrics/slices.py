"""Slices: by what an expression says and what it asks for. All bins and words are ours.

Relation phrases are taken out before place words are looked for: "left of the car" relates,
"the left car" places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from risam_cli.metrics.figures import Ints


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


RELATION_WORDS = _words(
    "to the left of|to the right of|on the left of|on the right of|left of|right of|next to|"
    "in front of|on top of|on the back of|at the back of|at the top of|at the bottom of|close to|"
    "closest to|nearest to|nearest|closest|near|beside|besides|behind|between|among|above|below|"
    "beneath|under|underneath|over|against|across|around|inside|outside|holding|wearing|riding|"
    "facing|touching|carrying|looking at|talking to|sitting on|sitting in|standing on|standing in|"
    "lying on|leaning on|attached to|belonging to|surrounded by|covered by|with"
)
PLACE_WORDS = _words(
    "left|right|top|bottom|upper|lower|middle|center|centre|central|leftmost|rightmost|topmost|"
    "bottommost|left-most|right-most|far|front|back|foreground|background|corner|edge|side|"
    "first|second|third|fourth|last|end|lefty|righty"
)
ATTRIBUTE_WORDS = _words(
    "red|green|blue|yellow|purple|orange|cyan|pink|brown|gray|grey|white|black|tan|beige|gold|"
    "golden|silver|maroon|teal|violet|turquoise|dark|light|bright|colorful|colored|"
    "small|smaller|smallest|large|larger|largest|big|bigger|biggest|tiny|huge|little|tall|taller|"
    "tallest|short|shorter|shortest|long|longer|longest|wide|narrow|thin|thick|fat|skinny|"
    "round|square|circular|rectangular|triangular|striped|stripes|plaid|checkered|dotted|spotted|"
    "plain|wooden|metal|metallic|plastic|glass|leather|brick|stone|furry|fuzzy|shiny|old|young|"
    "older|younger|new|empty|full|open|closed|broken|wet|dry|blond|blonde|bald|bearded|"
    "blurry|clear|bare|dirty|clean"
)
COCO_CATEGORIES = _words(
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|"
    "stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|"
    "backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|"
    "baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|"
    "bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|"
    "potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|"
    "oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush"
)


def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])", re.I)


_RELATION, _PLACE, _ATTRIBUTE = map(_pattern, (RELATION_WORDS, PLACE_WORDS, ATTRIBUTE_WORDS))


@dataclass(frozen=True, slots=True)
class Facts:
    """What slices look at.

    Attributes:
        share: area of the ground truth over the image's, 0..1.
        attributes: of the expression, see :class:`risam_cli.types.Expression`.
    """

    text: str
    share: float
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Slice:
    """One way to part the expressions.

    Attributes:
        levels: labels; a level number counts them from 0.
        level: gives an expression's level number, or -1 where the slice does not apply.
        definition: how it is decided, in words.
        open: its levels are the values that were seen, however many.
    """

    name: str
    title: str
    levels: tuple[str, ...]
    level: Callable[[Facts], int]
    definition: str
    open: bool = False


SLICE_FIGURES = ("miou", "oiou", "pr@0.5", "giou")
"""Figures that are given level by level."""
_MOST_LEVELS = 40


def shown_levels(
    sizes: Sequence[int] | Ints, labels: Sequence[str], *, most_frequent: bool
) -> tuple[list[int], int]:
    """The levels that hold anything, and how many are left out.

    Args:
        sizes: how many expressions each level holds.
        most_frequent: the largest first, and those over 40 left out.
    """
    present = [k for k in range(len(labels)) if sizes[k]]
    if most_frequent:
        present.sort(key=lambda k: (-sizes[k], labels[k]))
    shown = present[:_MOST_LEVELS] if most_frequent else present
    return shown, len(present) - len(shown)


def _length(facts: Facts) -> int:
    words = len(facts.text.split())
    return 0 if words <= 2 else 1 if words <= 4 else 2 if words <= 7 else 3 if words <= 11 else 4


def _place(facts: Facts) -> int:
    return int(_PLACE.search(_RELATION.sub(" ", facts.text)) is not None)


def _size(facts: Facts) -> int:
    if facts.share <= 0:
        return -1
    return sum(facts.share >= edge for edge in (0.01, 0.05, 0.20))


def _ranked(key: str, edges: tuple[int, ...]) -> Callable[[Facts], int]:
    def level(facts: Facts) -> int:
        rank = facts.attributes.get(key)
        return -1 if rank is None else sum(rank > edge for edge in edges)

    return level


def _first(key: str, most: int) -> Callable[[Facts], int]:
    def level(facts: Facts) -> int:
        rank = facts.attributes.get(key)
        return -1 if rank is None else int(rank <= most)

    return level


def _up_to(most: int, key: str) -> Callable[[Facts], int]:
    def level(facts: Facts) -> int:
        number = facts.attributes.get(key)
        return -1 if number is None else min(int(number), most)

    return level


def _in_coco(facts: Facts) -> int:
    if "phrasecut_attributes" not in facts.attributes:
        return -1
    return int(facts.attributes.get("category") in COCO_CATEGORIES)


def _both(facts: Facts) -> int:
    numbers = [facts.attributes.get(f"phrasecut_{key}") for key in ("attributes", "relations")]
    return -1 if None in numbers else int(all(numbers))


def _of_kind(kind: str) -> Callable[[Facts], int]:
    def level(facts: Facts) -> int:
        kinds = facts.attributes.get("phrasecut_kinds")
        return -1 if kinds is None else int(kind in kinds)

    return level


_TYPES = ("name", "attribute", "relation", "verbose")


def _phrase_type(facts: Facts) -> int:
    kind = facts.attributes.get("phrase_type")
    return _TYPES.index(kind) if kind in _TYPES else -1


def _phrasecut_instances(facts: Facts) -> int:
    if "phrasecut_attributes" not in facts.attributes:
        return -1
    number = int(facts.attributes.get("referents", 0))
    return -1 if number < 1 else (number > 1) + (number > 4)


def _phrasecut_size(facts: Facts) -> int:
    if "phrasecut_attributes" not in facts.attributes:
        return -1
    return 0 if facts.share < 0.02 else 2 if facts.share > 0.2 else 1


ATTRIBUTE_KINDS = (
    "color", "shape", "material", "texture", "state", "adj", "noun", "loc", "count", "bad",
)  # fmt: skip
"""Kinds of attributes that PhraseCut's code has word lists for."""

PHRASECUT_SLICES: tuple[Slice, ...] = (
    Slice(
        "phrasecut_category",
        "PhraseCut: rank of the category",
        ("c20", "c21-100", "c101-500", "c500+"),
        _ranked("phrasecut_category_rank", (20, 100, 500)),
        "By the frequencies in the data set's name_att_rel_count.json.",
    ),
    Slice(
        "phrasecut_coco",
        "PhraseCut: COCO categories",
        ("others", "c_coco"),
        _in_coco,
        "The category is one of COCO's 80.",
    ),
    Slice(
        "phrasecut_instances",
        "PhraseCut: instances",
        ("i_single", "i_multi", "i_many"),
        _phrasecut_instances,
        "One, two to four, or five and more, as in the data set's own code.",
    ),
    Slice(
        "phrasecut_size",
        "PhraseCut: size of the target",
        ("s_small", "s_mid", "s_large"),
        _phrasecut_size,
        "Under 2 %, 2 to 20 %, over 20 % of the image.",
    ),
    Slice(
        "phrasecut_type",
        "PhraseCut: what tells the target apart",
        ("p_name", "p_att+", "p_rel+", "p_verbose"),
        _phrase_type,
        "phrase_structure.type: the name alone, attributes, relations, or none of them.",
    ),
    Slice(
        "phrasecut_attributes",
        "PhraseCut: attributes",
        ("none", "p_att, one", "p_att, p_attm"),
        _up_to(2, "phrasecut_attributes"),
        "Attributes in phrase_structure; p_att has any, p_attm more than one.",
    ),
    Slice(
        "phrasecut_relations",
        "PhraseCut: relations",
        ("none", "p_rel, one", "p_rel, p_relm"),
        _up_to(2, "phrasecut_relations"),
        "Relations in phrase_structure; p_rel has any, p_relm more than one.",
    ),
    Slice(
        "phrasecut_attribute",
        "PhraseCut: rank of the attribute",
        ("a20", "a21-100", "a101-200", "a200+"),
        _ranked("phrasecut_attribute_rank", (20, 100, 200)),
        "Of the most frequent attribute of the phrase; a200+ is also where there is none.",
    ),
    Slice(
        "phrasecut_both",
        "PhraseCut: attributes and relations",
        ("others", "p_att_rel"),
        _both,
        "The phrase has both.",
    ),
    Slice(
        "phrasecut_image",
        "PhraseCut: images of COCO",
        ("d_notcocotv", "d_cocotv"),
        _up_to(1, "phrasecut_in_coco"),
        "The image list gives the image an id of COCO, whose train and val it may be in.",
    ),
    *(
        Slice(
            f"phrasecut_{name}",
            f"PhraseCut: {name}",
            (f"{name[0]}{most}+", name),
            _first(f"phrasecut_{key}_rank", most),
            f"Rank of the {key} as above, {most} at most.",
        )
        for key, name, most in (
            ("category", "c100", 100),
            ("category", "c500", 500),
            ("attribute", "a100", 100),
            ("attribute", "a200", 200),
        )
    ),
    Slice(
        "phrasecut_stuff",
        "PhraseCut: stuff",
        ("t_obj", "t_stuff"),
        _up_to(1, "phrasecut_stuff"),
        "A word of stuff_names in the data set's utils/subset.py is in the category's name.",
    ),
    *(
        Slice(
            f"phrasecut_a_{kind}",
            f"PhraseCut: a_{kind}",
            ("others", f"a_{kind}"),
            _of_kind(kind),
            f"An attribute of the phrase is in att_{kind} of the data set's utils/subset.py.",
        )
        for kind in ATTRIBUTE_KINDS
    ),
)
"""The subsets of PhraseCut's paper and code; they apply to PhraseCut's own files only."""

SLICES: tuple[Slice, ...] = (
    Slice(
        "length",
        "Expression length",
        ("1–2 words", "3–4 words", "5–7 words", "8–11 words", "12 words or more"),
        _length,
        "Words are what white space parts.",
    ),
    Slice(
        "place",
        "Place words",
        ("without", "with"),
        _place,
        f"One of: {', '.join(PLACE_WORDS)}; after relation words were taken out.",
    ),
    Slice(
        "relation",
        "Relation words",
        ("without", "with"),
        lambda facts: int(_RELATION.search(facts.text) is not None),
        f"One of: {', '.join(RELATION_WORDS)}.",
    ),
    Slice(
        "attribute",
        "Attribute words",
        ("without", "with"),
        lambda facts: int(_ATTRIBUTE.search(facts.text) is not None),
        f"One of: {', '.join(ATTRIBUTE_WORDS)}.",
    ),
    Slice(
        "referents",
        "Number of referents",
        ("none", "one", "two", "three", "four or more"),
        _up_to(4, "referents"),
        "Objects that the expression refers to, by the annotation.",
    ),
    Slice(
        "size",
        "Size of the target",
        ("under 1 %", "1–5 %", "5–20 %", "20 % or more"),
        _size,
        "Share of the image's pixels; expressions without a target are in none.",
    ),
    Slice(
        "distractors",
        "Other objects of the same category",
        ("none", "one", "two or three", "four or more"),
        _ranked("distractors", (0, 1, 3)),
        "Objects of the referents' category in the image that are not meant, crowds left out.",
    ),
    *PHRASECUT_SLICES,
)
CATEGORY = "category"
