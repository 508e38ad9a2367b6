"""Changed pictures whose expressions are still true (ours).

See :mod:`risam_cli.training.data.wording`.

Everything drawn is a function of seed, epoch and item, so that a resumed run, and a run with
other workers, sees the very same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.settings.data import AugmentSettings
from risam_cli.training.data.wording import flipped, speaks_of_color, survives_cutting

Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with its expressions, before it is brought to the encoder's square.

    Attributes:
        image: (H, W, 3) uint8; masks: E masks (H, W); texts: E expressions.
        scale: part of the square that the longest side is to take, in 0..1.
        weights: of the E expressions in the loss; none given are 1.
    """

    image: Rgb
    masks: tuple[Mask, ...]
    texts: tuple[str, ...]
    scale: float = 1.0
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What may be done to training pictures, as the settings say.

    A picture is not mirrored if one of its expressions cannot be turned for sure, not cropped if
    one speaks of places or of other things in the picture, and keeps its colours if one speaks of
    colour.

    Attributes:
        seed: another one draws other changes.
    """

    settings: AugmentSettings
    seed: int = 0

    def __call__(self, picture: Picture, epoch: int, item: int) -> Picture:
        """The picture as item ``item`` has it in epoch ``epoch``."""
        # One generator a change: switching one off leaves what the others draw as it was.
        chosen, mirror, cut, size, color = (
            np.random.default_rng([self.seed, epoch, item, number]) for number in range(5)
        )
        s = self.settings
        picture = choose(picture, s.expressions_per_image, chosen)
        if mirror.random() < s.flip:
            picture = flip(picture)
        if cut.random() < s.crop:
            picture = crop(picture, s.crop_least, cut)
        if color.random() < s.jitter and not any(map(speaks_of_color, picture.texts)):
            picture = replace(picture, image=jittered(picture.image, color))
        scale = float(size.uniform(s.shrink, 1.0)) if s.shrink < 1 else 1.0
        return replace(picture, scale=scale)


def choose(picture: Picture, most: int | None, rng: np.random.Generator) -> Picture:
    """At most ``most`` of the expressions, in their order."""
    if most is None or len(picture.texts) <= most:
        return picture
    kept = sorted(rng.choice(len(picture.texts), most, replace=False).tolist())
    return replace(
        picture,
        masks=tuple(picture.masks[k] for k in kept),
        texts=tuple(picture.texts[k] for k in kept),
        weights=tuple(picture.weights[k] for k in kept) if picture.weights else (),
    )


def flip(picture: Picture) -> Picture:
    """The picture mirrored left to right, its words turned; as it is if one word cannot be."""
    turned = [flipped(text) for text in picture.texts]
    texts = tuple(text for text in turned if text is not None)
    if len(texts) < len(turned):
        return picture
    image = np.ascontiguousarray(picture.image[:, ::-1])
    masks = tuple(np.ascontiguousarray(mask[:, ::-1]) for mask in picture.masks)
    return replace(picture, image=image, masks=masks, texts=texts)


def crop(picture: Picture, least: float, rng: np.random.Generator) -> Picture:
    """A part of the picture with every referent whole, at least ``least`` of each side.

    As it is where an expression would not be true, or not clear, of a part.
    """
    if not all(map(survives_cutting, picture.texts)):
        return picture
    height, width = picture.image.shape[:2]
    y0, y1, x0, x1 = _bounds(picture.masks, (height, width))
    top, rows = _span(height, y0, y1, least, rng)
    left, columns = _span(width, x0, x1, least, rng)
    window = np.s_[top : top + rows, left : left + columns]
    return replace(
        picture,
        image=np.ascontiguousarray(picture.image[window]),
        masks=tuple(np.ascontiguousarray(mask[window]) for mask in picture.masks),
    )


def _bounds(masks: Sequence[Mask], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows y0..y1 and columns x0..x1 (ends excluded) around all masks; the middle if all empty."""
    held = np.zeros(size, np.bool_)
    for mask in masks:
        held |= mask
    x, y, width, height = cv2.boundingRect(held.view(np.uint8))
    if not width:
        return size[0] // 2, size[0] // 2, size[1] // 2, size[1] // 2
    return y, y + height, x, x + width


def _span(
    side: int, first: int, last: int, least: float, rng: np.random.Generator
) -> tuple[int, int]:
    """Start and length of a part of a side that holds [first, last)."""
    length = max(int(np.ceil(side * rng.uniform(least, 1.0))), last - first, 1)
    length = min(length, side)
    lowest, highest = max(0, last - length), min(first, side - length)
    return int(rng.integers(lowest, highest + 1)), length


def jittered(image: Rgb, rng: np.random.Generator) -> Rgb:
    """Brightness, contrast and saturation by up to 30 %, hue by up to 10 degrees."""
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, 3)
    turn = int(rng.integers(-5, 6))  # OpenCV counts hue in steps of two degrees
    levels = np.arange(256, dtype=np.float64)
    table = np.clip((levels - 128) * contrast + 128 * brightness, 0, 255).astype(np.uint8)
    hsv = cv2.cvtColor(np.asarray(cv2.LUT(image, table)), cv2.COLOR_RGB2HSV)
    hues = ((levels + turn) % 180).astype(np.uint8)
    strengths = np.clip(levels * saturation, 0, 255).astype(np.uint8)
    same = levels.astype(np.uint8)
    changed = cv2.LUT(hsv, np.stack([hues, strengths, same], axis=-1)[None])
    return np.asarray(cv2.cvtColor(changed, cv2.COLOR_HSV2RGB), np.uint8)
