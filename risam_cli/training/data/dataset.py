"""Training examples: one image with all its expressions, as small arrays for the workers' pipe.

A data set of N items takes any index from 0: index ``epoch * N + item`` asks for an item as that
epoch has it, so that what is drawn again each epoch follows from the index alone.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.data.images.images import Bands, open_rgb
from risam_cli.data.images.transforms import fit_size, resize_for_encoder
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.data.refshapes.scene import SceneObject
from risam_cli.data.refshapes.vocabulary import COLORS, PLURALS, SHAPES, SIZES, STAND_INS
from risam_cli.errors import DataError
from risam_cli.masks import rle as masks
from risam_cli.training.data.augment import Augmentation, Picture
from risam_cli.types import Expression, Sample

UNKNOWN_WORD = "thingamajig"


class ExampleError(DataError):
    """One example that cannot be made, told in one line wherever it was made.

    A loader raises a worker's error anew, with the worker's traceback as its message.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2], fix)


@dataclass(frozen=True, slots=True)
class ReferringExample:
    """One image, its expressions and what they refer to.

    Attributes:
        image: (h, w, 3) uint8, longest side at the encoder's size.
        targets: (E, T, T) uint8, 255 times the part of each cell that the referent covers, on
            a grid over the padded square.
        no_target: (E,) bool.
        texts: E expressions; weights: theirs in the loss, (E,) float32.
    """

    image: NDArray[np.uint8]
    targets: NDArray[np.uint8]
    no_target: NDArray[np.bool_]
    texts: tuple[str, ...]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DenseExample:
    """One scene with a label for every cell of a grid.

    Attributes:
        image: (S, S, 3) uint8, zero-padded; fitted: height and width inside.
        labels: (3, t, t) uint8 classes of shape, colour and size from 1, 0 at background.
        centres: (2, t, t) float32, (x, y) way to the visible centroid in picture sides.
    """

    image: NDArray[np.uint8]
    fitted: tuple[int, int]
    labels: NDArray[np.uint8]
    centres: NDArray[np.float32]


class Examples(Protocol):
    """A data set of the referring stage; see the module for what an index means."""

    def __len__(self) -> int:
        """Items of an epoch."""

    def __getitem__(self, index: int) -> ReferringExample:
        """Item ``index % len`` as epoch ``index // len`` has it."""

    def expressions_of(self, index: int) -> int:
        """How many expressions the example will have; draws nothing."""

    def name_of(self, index: int) -> str:
        """The example's image, for messages."""


@dataclass(eq=False)
class ReferringScenes:
    """RefShapes scenes as training examples, drawn when asked for.

    Args:
        scenes: the split to draw from.
        size: side S of the encoder's input; target_size: side T of the targets.
        unknown_word_rate: share of expressions whose noun becomes an unknown word, so that the
            model learns to answer "nothing" to what it cannot know.
        augment: None changes nothing, so every epoch is the same.
    """

    scenes: RefShapes
    size: int
    target_size: int
    unknown_word_rate: float
    augment: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.scenes)

    def expressions_of(self, index: int) -> int:
        """The same for every scene."""
        return _at_most(self.scenes.expressions_per_scene, self.augment)

    def name_of(self, index: int) -> str:
        """Family, split and number of a scene."""
        return f"{self.scenes.family} {self.scenes.split} scene {index % len(self)}"

    def __getitem__(self, index: int) -> ReferringExample:
        epoch, index = divmod(index, len(self))
        item = self.scenes[index]
        texts = [referring.text for referring in item.expressions]
        chosen = [item.mask(referring) for referring in item.expressions]
        rng = np.random.default_rng([index, self.scenes.seed])
        for row in np.flatnonzero(rng.random(len(texts)) < self.unknown_word_rate):
            texts[row] = forget_nouns(texts[row])
            chosen[row] = np.zeros_like(chosen[row])
        picture = Picture(item.image, tuple(chosen), tuple(texts))
        if self.augment is not None:
            picture = self.augment(picture, epoch, index)
        return make_example(picture, self.size, self.target_size)


class PackedSamples(Sequence[Sample]):
    """Samples with known masks in one block of bytes, which worker processes share uncopied.

    A list of a hundred thousand Python objects is copied page by page into every worker that looks
    at it, because looking counts references; bytes are not. Expressions that share a mask share its
    bytes.

    Args:
        samples: drawn here, so that a damaged annotation is told of before anything is trained.

    Raises:
        DataError: an expression without ground truth, or whatever drawing a sample raises.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        block, ends, counts = bytearray(), array("q"), array("q")
        self.pseudo = 0  # expressions whose truth is a model's answer
        self.no_target = 0  # expressions to which nothing fits
        self.without_pixels: list[str] = []
        for given in samples:
            sample = replace(given, expressions=tuple(filter(self._may_teach, given.expressions)))
            if not sample.expressions:
                continue
            for expression in sample.expressions:
                if expression.target is None:
                    raise DataError(
                        f"expression {expression.id!r} of {sample.image} has no mask to learn from",
                        "give it ann_ids",
                    )
                # Where it is known that something fits, _may_teach has seen pixels.
                fits = expression.no_target is False or masks.area(expression.target)
                self.no_target += not fits
            counts.append(len(sample.expressions))
            self.pseudo += sum(map(is_pseudo, sample.expressions))
            block += pickle.dumps(_lean(sample), protocol=5)
            ends.append(len(block))
        self._block = np.frombuffer(bytes(block), np.uint8)
        self._ends = np.asarray(ends, np.int64)
        self._counts = np.asarray(counts, np.int64)

    def _may_teach(self, expression: Expression) -> bool:
        target = expression.target
        if target is None or expression.no_target is not False or masks.area(target):
            return True
        self.without_pixels.append(expression.id)
        return False

    @property
    def expressions(self) -> int:
        """Of all samples together."""
        return int(self._counts.sum())

    def expressions_of(self, index: int) -> int:
        """Of one sample, without unpacking it."""
        return int(self._counts[index])

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def nbytes(self) -> int:
        """Size of the block and its indices in bytes."""
        return self._block.nbytes + self._ends.nbytes + self._counts.nbytes

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        # Only what this class has packed itself is unpickled.
        sample: Sample = pickle.loads(self._block[start : int(self._ends[index])].tobytes())
        return sample


_PSEUDO: Mapping[str, Any] = {"pseudo": True}
_PLAIN: Mapping[str, Any] = {}


def is_pseudo(expression: Expression) -> bool:
    """Whether its ground truth is a model's answer."""
    return expression.attributes.get("pseudo") is True


def _lean(sample: Sample) -> Sample:
    """Without what only evaluation looks at."""
    kept = tuple(
        Expression(e.id, e.text, e.target, e.no_target, _PSEUDO if is_pseudo(e) else _PLAIN)
        for e in sample.expressions
    )
    return Sample(sample.image, sample.path, kept, sample.size)


@dataclass(eq=False)
class ReferringSamples:
    """Samples of a reader as training examples: one decode per image.

    Args:
        samples: with known masks.
        size: side S of the encoder's input; target_size: side T of the targets.
        augment: None changes nothing, so every epoch is the same.
        pseudo_weight: of pseudo-labels in the loss.
        bands: which bands of a TIFF of several are red, green and blue.
    """

    samples: PackedSamples
    size: int
    target_size: int
    augment: Augmentation | None = None
    pseudo_weight: float = 1.0
    bands: Bands | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def expressions_of(self, index: int) -> int:
        """Those of the image, or as many as are drawn of them."""
        return _at_most(self.samples.expressions_of(index % len(self)), self.augment)

    def name_of(self, index: int) -> str:
        """The image's file."""
        return str(self.samples[index % len(self)].path)

    def __getitem__(self, index: int) -> ReferringExample:
        epoch, index = divmod(index, len(self))
        sample = self.samples[index]
        try:
            picture = _picture(sample, self.pseudo_weight, self.bands)
        except DataError as error:
            raise ExampleError(error.message, error.fix) from error
        if self.augment is not None:
            picture = self.augment(picture, epoch, index)
        return make_example(picture, self.size, self.target_size)


def _picture(sample: Sample, pseudo_weight: float, bands: Bands | None) -> Picture:
    """Decodes the image and the masks. Raises DataError where they do not fit each other."""
    image = open_rgb(sample.path, bands=bands)
    chosen = tuple(masks.decode(e.target) for e in sample.expressions if e.target is not None)
    if chosen and chosen[0].shape != image.shape[:2]:
        raise DataError(
            f"{sample.path} is {image.shape[:2]} (H, W), its masks are {chosen[0].shape}",
            "fix height and width in the annotations",
        )
    weights = tuple(pseudo_weight if is_pseudo(e) else 1.0 for e in sample.expressions)
    return Picture(image, chosen, tuple(e.text for e in sample.expressions), weights=weights)


def _at_most(expressions: int, augment: Augmentation | None) -> int:
    most = augment.settings.expressions_per_image if augment is not None else None
    return expressions if most is None else min(expressions, most)


@dataclass(eq=False)
class DenseScenes:
    """RefShapes scenes with per-cell labels, for the encoder's first stage.

    Args:
        scenes: the split to draw from, at the encoder's own size.
        cells: side t of the label grid; the scene's size is a multiple of it.
    """

    scenes: RefShapes
    cells: int

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> DenseExample:
        item = self.scenes.scene(index % len(self), with_expressions=False)
        height, width = item.instances.shape
        padding = ((0, self.scenes.size - height), (0, self.scenes.size - width))
        labels, centres = dense_labels(item.objects, np.pad(item.instances, padding), self.cells)
        return DenseExample(
            np.pad(item.image, (*padding, (0, 0))), (height, width), labels, centres
        )


def make_example(picture: Picture, size: int, target_size: int) -> ReferringExample:
    """Brings an image and the masks of its expressions to the encoder's square.

    Args:
        picture: at least one expression; size: S; target_size: T.
    """
    longest = max(1, int(size * picture.scale + 0.5))
    targets = np.stack([soft_target(mask, size, target_size, longest) for mask in picture.masks])
    empty = np.array([not mask.any() for mask in picture.masks])
    weights = np.array(picture.weights or [1.0] * len(picture.texts), np.float32)
    return ReferringExample(
        resize_for_encoder(picture.image, longest), targets, empty, picture.texts, weights
    )


def soft_target(
    mask: NDArray[np.bool_], size: int, target_size: int, longest: int | None = None
) -> NDArray[np.uint8]:
    """The part of each of T×T cells of the padded square that a mask (H, W) covers, times 255.

    Args:
        longest: what the picture's longest side is brought to, in 1..S; None is S.
    """
    height, width = fit_size(mask.shape[0], mask.shape[1], longest or size)
    full = np.zeros((size, size), np.uint8)
    scaled = mask.view(np.uint8) * np.uint8(255)
    if (height, width) != mask.shape:
        shrinks = height < mask.shape[0] or width < mask.shape[1]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        scaled = np.asarray(cv2.resize(scaled, (width, height), interpolation=how), np.uint8)
    full[:height, :width] = scaled
    return np.asarray(
        cv2.resize(full, (target_size, target_size), interpolation=cv2.INTER_AREA), np.uint8
    )


def dense_labels(
    objects: Sequence[SceneObject], instances: NDArray[np.uint8], cells: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Labels of a scene, its (S, S) map padded, on a grid: see :class:`DenseExample`."""
    size = len(instances)
    step = size // cells
    grid = instances[step // 2 :: step, step // 2 :: step]
    table = np.zeros((3, len(objects) + 1), np.uint8)
    centre = np.zeros((2, len(objects) + 1), np.float32)
    for number, thing in enumerate(objects, start=1):
        table[:, number] = (
            SHAPES.index(thing.shape) + 1,
            COLORS.index(thing.color) + 1,
            SIZES.index(thing.size) + 1,
        )
        centre[:, number] = thing.cx, thing.cy
    place = np.arange(cells, dtype=np.float32) * step + step // 2
    here = np.stack(np.broadcast_arrays(place[None, :], place[:, None]))
    return table[:, grid], ((centre[:, grid] - here) / size).astype(np.float32)


_NOUNS = frozenset([*SHAPES, *PLURALS.values(), *STAND_INS])


def forget_nouns(text: str) -> str:
    """Replaces shape nouns and their stand-ins by a word that no vocabulary knows."""
    return " ".join(UNKNOWN_WORD if word in _NOUNS else word for word in text.split())
