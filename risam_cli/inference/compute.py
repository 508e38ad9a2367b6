"""Images and expressions through the network: batches that fit the memory, masks on the host.

On a CPU images go through one by one, and expressions in chunks that never reach over the sample
that asks them. Batching more gains little there, and so the arithmetic of a sample never depends on
its neighbours (the last bits of a batched matrix product do). Elsewhere images are encoded in
batches and expressions decoded in chunks across images. Where memory runs out, first the batch,
then the chunk is halved, for the rest of the run; on a CPU, then the images side by side.

What can be got ready of an image beside the network is, in the thread that loaded it: with a
feature cache, what it holds of the image; for a GPU, a copy of that or of the pixels, through
pinned memory and in a stream of its own, so that the network finds its input there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from risam_cli.console.console import get_console
from risam_cli.data.images.images import EncoderImage
from risam_cli.data.images.transforms import normalize, to_pixels
from risam_cli.errors import ModelError
from risam_cli.inference.device import (
    Cores,
    Room,
    is_device_lost,
    is_out_of_memory,
    release_memory,
)
from risam_cli.inference.feature_cache import FeatureCache, HalfFeatures, image_key
from risam_cli.inference.mask_rules import Mask, MaskRule, at_image_size, to_host

if TYPE_CHECKING:
    from risam_cli.model.image_encoder import EncoderFeatures
    from risam_cli.model.risam import ImageFeatures, Risam
    from risam_cli.model.text_encoder import TextFeatures
    from risam_cli.weights.tokenizer import TokenBatch

_TEXTS_KEPT = 512  # expressions whose text features are kept


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Token ids of E expressions."""


class Model(Protocol):
    """What is needed of :class:`risam_cli.weights.load.LoadedModel`."""

    @property
    def model(self) -> Risam:
        """In evaluation mode, on its device."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of its text encoder."""

    @property
    def image_size(self) -> int:
        """Side of the encoder's square input."""

    @property
    def threshold(self) -> float:
        """Probability from where a pixel is in the mask."""

    @property
    def no_target_threshold(self) -> float:
        """Probability from where nothing fits."""


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """How the network runs.

    Attributes:
        device, precision: where and in which number format.
        threshold: a pixel is in the mask where its probability is greater; 0..1.
        images: images encoded at a time; a CPU takes one.
        expressions: expressions decoded at a time.
        mask_bytes: memory for full-size logits of a chunk.
        cores: how a CPU's are shared out, for whoever starts the threads.
    """

    device: torch.device
    precision: torch.dtype
    threshold: float
    images: int
    expressions: int = 64
    mask_bytes: int = 256 << 20
    cores: Cores = field(default_factory=Cores)


# --- beside the network ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is ready of one image.

    Attributes:
        key: in the feature cache; empty without one.
        features: what the cache holds; None where that is nothing.
        pixels: (h, w, 3) uint8 on a GPU; None where they are on the host only, or not needed.
    """

    key: str = ""
    features: HalfFeatures | None = None
    pixels: Tensor | None = None


class Preparer:
    """Gets images ready; called from several threads.

    Args:
        device: of the network.
        cache: of its encoder, if one is used.
    """

    def __init__(self, device: torch.device, cache: FeatureCache | None) -> None:
        self._device = device
        self._cache = cache
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, image: EncoderImage) -> Ahead:
        """What can be had of an image without the network."""
        key, features = "", None
        if self._cache is not None:
            key = image_key(image.rgb)
            features = self._cache.find(key)
        if self._stream is None:
            return Ahead(key, features)
        try:
            if features is None:
                return Ahead(key, None, self._moved(_pinned(image.rgb), self._stream))
            moved = {k: self._moved(v, self._stream) for k, v in features.tensors.items()}
            return Ahead(key, HalfFeatures(moved, features.computed))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Ahead(key, features)  # the network, which can make room, does it itself

    def _moved(self, tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """A copy on the device, done when this returns; the network goes on meanwhile."""
        with torch.cuda.stream(stream):
            moved = tensor.to(self._device, non_blocking=True)
        stream.synchronize()
        # Its memory must not be used again before the network's stream is done with it.
        moved.record_stream(torch.cuda.default_stream(self._device))
        return moved


def batch_pixels(
    images: Sequence[EncoderImage], ahead: Sequence[Ahead], size: int, device: torch.device
) -> Tensor:
    """The encoder's input (B, 3, size, size) of images, from their copies where there are some."""
    if all(one.pixels is None for one in ahead):
        return to_pixels([image.rgb for image in images], size, device)
    batch = torch.zeros(len(images), size, size, 3, dtype=torch.uint8, device=device)
    for row, image, one in zip(batch, images, ahead, strict=True):
        height, width = image.rgb.shape[:2]
        row[:height, :width] = torch.from_numpy(image.rgb) if one.pixels is None else one.pixels
    return normalize(batch, [image.rgb.shape[:2] for image in images])


def _pinned(rgb: NDArray[np.uint8]) -> Tensor:
    tensor = torch.from_numpy(rgb)
    if tensor.is_pinned():  # as it comes from worker processes
        return tensor
    pinned = torch.empty(rgb.shape, dtype=torch.uint8, pin_memory=True)
    pinned.numpy()[:] = rgb
    return pinned


# --- what is asked and answered -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One image with the texts that are asked of it.

    Attributes:
        groups: how many of the texts belong to each sample, in order; empty for one sample.
        ahead: what its loader got ready of the image; None where nobody has.
    """

    image: EncoderImage
    texts: Sequence[str]
    groups: Sequence[int] = ()
    ahead: Ahead | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the network says of one expression.

    Attributes:
        job, text: which one: index of the job, index of its text.
        mask: as the mask rule made it, before any no-target rule; None where it failed.
        iou: predicted IoU of the mask, 0..1.
        no_target: probability that nothing fits, 0..1.
        cut_to: tokens that the expression was cut to, or 0.
        error: one line, where it failed; else empty.
    """

    job: int
    text: int
    mask: Mask | None
    iou: float = 0.0
    no_target: float = 0.0
    cut_to: int = 0
    error: str = ""
    error_kind: str = "ModelError"


Batch = Sequence[tuple[int, Job]]
"""Jobs with their numbers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One expression on its way through the decoder.

    Attributes:
        number: of its job; position: among the job's texts.
        row: of the job's image among the features.
        group: its job, and the sample in it.
    """

    number: int
    position: int
    row: int
    group: tuple[int, int]
    job: Job

    @property
    def words(self) -> str:
        """As they were asked."""
        return self.job.texts[self.position]

    def failed(self, kind: str, error: str) -> Answer:
        """The answer that says what went wrong."""
        return Answer(self.number, self.position, None, error=error, error_kind=kind)


def flattened(batch: Batch) -> list[Asked]:
    """The expressions of a batch in order."""
    asked = []
    for row, (number, job) in enumerate(batch):
        position = 0
        for group, size in enumerate(job.groups or [len(job.texts)]):
            for _ in range(size):
                asked.append(Asked(number, position, row, (number, group), job))
                position += 1
    return asked


# --- the network ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    """Seconds spent, by part; the CPU's view, so a GPU's work shows where it is waited for."""

    encode: float = 0.0
    decode_mask: float = 0.0


@dataclass(slots=True)
class _Texts:
    features: TextFeatures
    cut_to: list[int]


class Compute:
    """Runs a model; remembers the sizes that fitted.

    Args:
        loaded: the model with its tokenizer.
        settings: where and how.
        rule: makes masks of logits.
        cache: of the model's image encoder, if features are kept.
        room: shared with those that run the same model side by side.

    Attributes:
        prepare: gets an image ready for a :class:`Job`, in any thread.
        images_at_once, expressions_at_once: what fits, as far as it is known.
        clock: seconds spent so far.
    """

    def __init__(
        self,
        loaded: Model,
        settings: ComputeSettings,
        rule: MaskRule = at_image_size,
        cache: FeatureCache | None = None,
        room: Room | None = None,
    ) -> None:
        self.loaded = loaded
        self.settings = settings
        self.prepare = Preparer(settings.device, cache)
        self._rule = rule
        self._cache = cache
        self._room = room or Room()
        self.clock = Clock()
        self._by_sample = settings.device.type == "cpu"
        self.images_at_once = 1 if self._by_sample else max(1, settings.images)
        self.expressions_at_once = max(1, settings.expressions)
        self._texts: OrderedDict[tuple[str, ...], _Texts] = OrderedDict()
        self._texts_kept = max(8, _TEXTS_KEPT // self.expressions_at_once)

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """The answers to all texts of all jobs, in order.

        An image or an expression that cannot be computed gives an answer with ``error``.

        Raises:
            ModelError: the device itself failed; nothing after it would succeed.
        """
        left = list(enumerate(jobs))
        while left:
            batch, left = left[: self.images_at_once], left[self.images_at_once :]
            yield from self._run(batch)

    def _run(self, batch: Batch) -> Iterator[Answer]:
        """One batch; cut in pieces where it fails as a whole."""
        why, size = None, 1
        try:
            with self._room:
                features = self._encode([job for _, job in batch])
        except Exception as error:
            full = is_out_of_memory(error)
            if full and self._made_room():
                size = len(batch)
            elif len(batch) == 1 or is_device_lost(error):
                why = _explained(error)
            elif full:
                size = self.images_at_once = self._halved("images a batch", len(batch))
        else:
            yield from self._decode_all(features, batch)
            return
        if why is not None:
            yield from (one.failed(*why) for one in flattened(batch))
            return
        # Out of the handler: an exception in hand keeps the memory of its frames. Unless memory was
        # short, one image may be at fault: each goes alone, so that the others go on.
        for start in range(0, len(batch), size):
            yield from self._run(batch[start : start + size])

    def _decode_all(self, features: ImageFeatures, batch: Batch) -> Iterator[Answer]:
        """Decodes the expressions of an encoded batch, chunk by chunk."""
        left = flattened(batch)
        while left:
            chunk = left[: self._fitting(left)]
            left = left[len(chunk) :]
            yield from self._decode_chunk(features, chunk)

    def _decode_chunk(self, features: ImageFeatures, chunk: Sequence[Asked]) -> Iterator[Answer]:
        """One chunk; cut in pieces where it fails as a whole."""
        answers: list[Answer] = []
        size = 1
        try:
            with self._room:
                answers = self._decode(features, chunk)
        except Exception as error:
            full = is_out_of_memory(error)
            if full and self._made_room():
                size = len(chunk)
            elif len(chunk) == 1 or is_device_lost(error):
                why = _explained(error)
                answers = [one.failed(*why) for one in chunk]
            elif full:
                size = self.expressions_at_once = self._halved("expressions a chunk", len(chunk))
        if answers:
            yield from answers
            return
        # Out of the handler, as in _run. Unless memory was short, one expression may be at fault.
        for start in range(0, len(chunk), size):
            yield from self._decode_chunk(features, chunk[start : start + size])

    def _fitting(self, asked: Sequence[Asked]) -> int:
        """How many expressions go together: as the full-size logits allow, at least one."""
        room = self.settings.mask_bytes
        for count, one in enumerate(asked[: self.expressions_at_once]):
            height, width = one.job.image.size
            room -= 4 * height * width
            if count and (room < 0 or (self._by_sample and one.group != asked[0].group)):
                return count
        return min(len(asked), self.expressions_at_once)

    def _made_room(self) -> bool:
        """Whether others were in the network too; from now on there are half as many."""
        was = self._room.halve()
        if was > 1:
            self._halved("images side by side", was)
        return was > 1

    def _halved(self, what: str, was: int) -> int:
        release_memory(self.settings.device)
        get_console().warn(f"out of memory with {was} {what}; going on with {was // 2}")
        return was // 2

    # --- in the network ---------------------------------------------------------------------------

    @torch.inference_mode()
    def _encode(self, jobs: Sequence[Job]) -> ImageFeatures:
        started = time.perf_counter()
        images = [job.image for job in jobs]
        ahead = [job.ahead or self.prepare(job.image) for job in jobs]
        size, device, model = self.loaded.image_size, self.settings.device, self.loaded.model
        with self._autocast():
            if self._cache is None:
                features = model.encode_image(batch_pixels(images, ahead, size, device))
            else:

                def encode(rows: Sequence[int]) -> EncoderFeatures:
                    some = [images[row] for row in rows], [ahead[row] for row in rows]
                    taps: EncoderFeatures = model.image_encoder(batch_pixels(*some, size, device))
                    return taps

                keys, found = [one.key for one in ahead], [one.features for one in ahead]
                taps = self._cache.features(keys, found, encode)
                features = model.enhance(taps.shallow, taps.middle, taps.deep, taps.fine)
        self.clock.encode += time.perf_counter() - started
        return features

    @torch.inference_mode()
    def _decode(self, features: ImageFeatures, chunk: Sequence[Asked]) -> list[Answer]:
        started = time.perf_counter()
        texts = self._text_features(tuple(one.words for one in chunk))
        rows = torch.tensor([one.row for one in chunk], device=self.settings.device)
        with self._autocast():
            decoded = self.loaded.model.decode(features, texts.features, rows)
        finite = (
            decoded.mask_logits.flatten(1).isfinite().all(1)
            & decoded.iou.isfinite()
            & decoded.no_target_logits.isfinite()
        )
        no_target = decoded.no_target_logits.float().sigmoid()
        numbers = torch.stack([finite.float(), decoded.iou.float(), no_target])  # (3, E)
        masks, columns = to_host(self._masks(decoded.mask_logits, chunk), numbers)
        self.clock.decode_mask += time.perf_counter() - started
        return [
            Answer(one.number, one.position, mask, iou, nothing, cut_to)
            if good
            else one.failed("ModelError", "the network gave numbers that are not finite")
            for one, mask, cut_to, good, iou, nothing in zip(
                chunk, masks, texts.cut_to, *columns, strict=True
            )
        ]

    def _masks(self, logits: Tensor, chunk: Sequence[Asked]) -> list[Tensor]:
        """Masks on the device, (e, h, w) bool for each image of the chunk."""
        masks = []
        start = 0
        for _, same_image in groupby(chunk, key=attrgetter("number")):
            group = list(same_image)
            own = logits[start : start + len(group)]
            size = group[0].job.image.size
            masks.append(self._rule(own, size, self.loaded.image_size, self.settings.threshold))
            start += len(group)
        return masks

    def _text_features(self, texts: tuple[str, ...]) -> _Texts:
        """Text features of a chunk; a folder asked the same of every image computes them once."""
        known = self._texts.get(texts)
        if known is None:
            tokens = self.loaded.tokenizer.encode(list(texts))
            device = self.settings.device
            with self._autocast():
                features = self.loaded.model.encode_text(
                    tokens.input_ids.to(device), tokens.attention_mask.to(device)
                )
            cut_to = [tokens.max_words if cut else 0 for cut in tokens.truncated]
            known = self._texts[texts] = _Texts(features, cut_to)
            if len(self._texts) > self._texts_kept:
                self._texts.popitem(last=False)
        self._texts.move_to_end(texts)
        return known

    def _autocast(self) -> torch.autocast:
        precision = self.settings.precision
        # An encoder that holds its matrices in that format asks for none of this, and the rest, a
        # small part of the work, stays in float32: the masks are ten times as close to float32's.
        encoder = getattr(self.loaded.model, "image_encoder", None)
        held = getattr(encoder, "precision", torch.float32) != torch.float32
        lower = precision != torch.float32 and not held
        return torch.autocast(
            self.settings.device.type, dtype=precision if lower else None, enabled=lower
        )


def _explained(error: Exception) -> tuple[str, str]:
    """Kind and one line of an error that fails an item.

    Raises:
        ModelError: instead, for an error that would fail every item after it as well.
    """
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if is_device_lost(error):
        raise ModelError(
            f"the device failed: {text}",
            "what was done is kept; go on with --resume once it is well",
        ) from error
    if is_out_of_memory(error):
        return "OutOfMemory", "out of memory even alone; take a smaller model or --device cpu"
    return type(error).__name__, text
