"""Published models by short name: where they are, under which terms, and what they are good at.

Needs neither torch nor transformers. Quality is what the publishers say of their own models.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    "clipseg": ("clipseg",),
    "florence2": ("florence2",),
    "sam3": ("sam3", "sam3_video"),
    "grounded-sam": ("grounding-dino", "mm-grounding-dino"),
}
"""The kinds, and the ``model_type`` of the config.json of their (first) folder."""

BOX_SEGMENTERS = ("sam", "sam_hq", "sam2", "sam2_video")
"""``model_type`` of the second folder of ``grounded-sam``."""

DEFAULT_SECOND = "facebook/sam-vit-base"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A recommended published model.

    Attributes:
        short: its name here; kind: a key of :data:`KINDS`.
        parts: names on the Hugging Face hub, in order.
        licence: in words; gated: whether the hub asks for permission first.
        parameters: in billions, all parts together.
        good_at: in one line.
        figures: the publishers' own, with their source.
    """

    short: str
    kind: str
    parts: tuple[str, ...]
    licence: str
    gated: bool
    parameters: float
    good_at: str
    figures: str


KNOWN = {
    one.short: one
    for one in (
        KnownModel(
            "florence2",
            "florence2",
            ("florence-community/Florence-2-base-ft",),
            "MIT",
            False,
            0.23,
            "referring expressions, on any machine; always answers, polygons",
            "RefCOCO val mIoU 78.0 (arXiv 2311.06242)",
        ),
        KnownModel(
            "florence2-large",
            "florence2",
            ("florence-community/Florence-2-large-ft",),
            "MIT",
            False,
            0.77,
            "as florence2, better and slower",
            "RefCOCO val mIoU 80.5 (arXiv 2311.06242)",
        ),
        KnownModel(
            "clipseg",
            "clipseg",
            ("CIDAS/clipseg-rd64-refined",),
            "Apache-2.0",
            False,
            0.15,
            "quick and small; coarse edges",
            "none on RefCOCO",
        ),
        KnownModel(
            "sam3",
            "sam3",
            ("facebook/sam3",),
            "SAM License",
            True,
            0.84,
            "noun phrases, every instance, the best masks; ignores left and right",
            "none on RefCOCO",
        ),
        KnownModel(
            "grounded-sam",
            "grounded-sam",
            ("IDEA-Research/grounding-dino-tiny", DEFAULT_SECOND),
            "Apache-2.0",
            False,
            0.27,
            "boxes, then masks; several instances; weak on left and right",
            "RefCOCO val P@1 of boxes 50.8 (arXiv 2401.02361)",
        ),
    )
}
