"""What the pipeline drives: any model that finds the masks of expressions in images.

::

    frames ──▶ encode_images ──┐
                               ├──▶ decode ──▶ instances: maps, owner, score, nothing
    texts ───▶ encode_texts  ──┘

A segmenter says how a picture becomes its input, encodes each image once, and decodes any number of
expressions about it. What it remembers of an image is in the features it returns and never in its
modules, for several images may be in it at a time, each in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from risam_cli.data.images.frames import Frame, Pixels

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Probabilities, 0..1.

    Attributes:
        mask: a pixel is in the mask where its probability is greater.
        no_target: the mask is emptied where the probability that nothing fits is greater; 1 leaves
            that to ``instance``.
        instance: an instance counts where its score is greater and its mask has a pixel; None where
            instances have no scores of their own. Where none counts, nothing fits.
        calibrated: a mask threshold that a protocol of evaluation asks for means what it says.
    """

    mask: float
    no_target: float
    instance: float | None = None
    calibrated: bool = True


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a segmenter can do beside masks.

    Attributes:
        instances: it tells instances from each other.
        any_threads: its encoder gives the same bits on a CPU with any number of threads.
    """

    instances: bool = False
    any_threads: bool = False


@dataclass(frozen=True, slots=True)
class Texts:
    """E expressions, encoded.

    Attributes:
        features: the segmenter's own.
        cut_to: for each, the tokens that it was cut to, or 0.
        unknown: for each, the words that the vocabulary does not have.
    """

    features: Any
    cut_to: Sequence[int]
    unknown: Sequence[tuple[str, ...]]


class Maps(Protocol):
    """Where I instances of one image are, at any resolution."""

    def __len__(self) -> int:
        """I."""

    def __getitem__(self, some: slice) -> Maps:
        """Some of the instances."""

    def logits(self, out: tuple[int, int]) -> Tensor:
        """(I, *out) float32 over the picture, without padding; infinite where it is certain."""

    def finite(self) -> Tensor:
        """(I,) bool: whether every number is finite that the network gave."""


@dataclass(frozen=True, slots=True)
class GridMaps:
    """Logits on a grid over a frame.

    Attributes:
        grid: (I, h, w) over the whole input, padding included.
        frame: of the input; size: (H, W) of the picture.
    """

    grid: Tensor
    frame: Frame
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, some: slice) -> GridMaps:
        return GridMaps(self.grid[some], self.frame, self.size)

    def logits(self, out: tuple[int, int]) -> Tensor:
        """See :class:`Maps`."""
        return self.frame.to_image(self.grid, self.size, out)

    def finite(self) -> Tensor:
        """See :class:`Maps`."""
        return self.grid.flatten(1).isfinite().all(1)


@dataclass(frozen=True, slots=True)
class Instances:
    """What one image's expressions refer to.

    Attributes:
        maps: of I instances, those of an expression together, in the order of the expressions.
        counts: how many instances each of the E expressions has; they sum up to I.
        score: (I,) 0..1, how sure each instance is.
        nothing: (E,) 0..1, the probability that nothing fits.
        notes: for each expression, what the user must know of its answer.
        distinct: for each expression, how many of its instances are none that it has already;
            these come first. Empty where all are distinct.
    """

    maps: Maps
    counts: Sequence[int]
    score: Tensor
    nothing: Tensor
    notes: Sequence[tuple[str, ...]] = field(default=())
    distinct: Sequence[int] = ()


class Segmenter(Protocol):
    """A model that finds the masks of expressions in images; see this module.

    Attributes:
        kind: such as ``risam`` or ``clipseg``.
        name: to show; hash: SHA-256 over every file that it was loaded from.
        folders: where those are.
        versions: of the packages beside torch that its results depend on.
        frames: how a picture becomes its input; some models look at it in two ways.
        thresholds: its own, before the user's.
        capabilities: what it can do beside masks.
        parameters: how many numbers its weights are.
        max_tokens: the most tokens of an expression, special ones included.
    """

    kind: str
    name: str
    hash: str
    folders: Mapping[str, str]
    versions: Mapping[str, str]
    frames: tuple[Frame, ...]
    thresholds: Thresholds
    capabilities: Capabilities
    parameters: int
    max_tokens: int
    device: torch.device

    def encode_images(self, inputs: Sequence[Pixels]) -> Any:
        """Encodes B images.

        Args:
            inputs: one entry for each frame, B images in each.

        Returns:
            Features that belong to whoever holds them; :meth:`decode` takes them.
        """

    def encode_texts(self, texts: Sequence[str]) -> Texts:
        """Encodes E expressions."""

    def decode(
        self,
        features: Any,
        texts: Texts,
        rows: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        instance_threshold: float | None = None,
    ) -> list[Instances]:
        """Finds E expressions in the images.

        Args:
            rows: for each expression, the number of its image among those encoded; those of an
                image stand together.
            sizes: (H, W) of each encoded image.
            instance_threshold: in place of the model's own.

        Returns:
            One entry for each run of equal rows.
        """
