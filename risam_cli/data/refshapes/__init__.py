"""RefShapes: procedural scenes of coloured shapes, with expressions whose referents are exact."""

from risam_cli.data.refshapes.dataset import (
    FAMILIES,
    SPLIT_SCENES,
    RefShapes,
    SceneItem,
)
from risam_cli.data.refshapes.expressions import Referring
from risam_cli.data.refshapes.scene import SceneObject
from risam_cli.data.refshapes.vocabulary import COLORS, HELD_OUT, SHAPES, SIZES, VOCABULARY

__all__ = [
    "COLORS",
    "FAMILIES",
    "HELD_OUT",
    "SHAPES",
    "SIZES",
    "SPLIT_SCENES",
    "VOCABULARY",
    "RefShapes",
    "Referring",
    "SceneItem",
    "SceneObject",
]
