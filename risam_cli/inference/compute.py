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

import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from risam_cli.console.console import get_console
from risam_cli.data.images.frames import Frame, Pixels
from risam_cli.data.images.images import EncoderImage
from risam_cli.errors import ModelError, reason_of, require_machine, setting, told
from risam_cli.inference.device import (
    Cores,
    Room,
    is_device_lost,
    is_out_of_memory,
    keep_freed_memory,
    release_memory,
)
from risam_cli.inference.feature_cache import FeatureCache, HalfFeatures, image_key
from risam_cli.inference.mask_rules import Mask, MaskRule, at_image_size, to_bits, to_host
from risam_cli.model.fast.crew import threads_of
from risam_cli.model.fast.tuning import DEFAULT, Tuning, use
from risam_cli.segmenters.risam import RisamSegmenter
from risam_cli.segmenters.segmenter import Instances, Maps, Segmenter, Texts

if TYPE_CHECKING:
    from risam_cli.model.image_encoder import EncoderFeatures

Select = Literal["union", "best", "all"]
"""What becomes of several instances of an expression: one mask of all, the best alone, or each."""

_TEXTS_KEPT = 512  # expressions whose text features are kept
_NOT_FINITE = "the network returned numbers that are not finite"


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """How the network runs.

    Attributes:
        device: where.
        threshold: a pixel is in the mask where its probability is greater; 0..1.
        images: images encoded at a time; a CPU takes one.
        expressions: expressions decoded at a time.
        mask_bytes: memory for full-size logits of a chunk.
        cores: how a CPU's are shared out, for whoever starts the threads.
        tuning: what suits the CPU.
        select: what becomes of several instances of an expression.
        instance_threshold: an instance counts where its score is greater; None is the model's.
    """

    device: torch.device
    threshold: float
    images: int
    expressions: int = 64
    mask_bytes: int = 256 << 20
    cores: Cores = field(default_factory=Cores)
    tuning: Tuning = DEFAULT
    select: Select = "union"
    instance_threshold: float | None = None


# --- beside the network ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is ready of one image.

    Attributes:
        key: in the feature cache; empty without one.
        features: what the cache holds; None where that is nothing.
        views: (h, w, 3) uint8 each, on a GPU; empty where they are on the host only, or not
            needed.
    """

    key: str = ""
    features: HalfFeatures | None = None
    views: tuple[Tensor, ...] = ()


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
                views = [self._moved(_pinned(view), self._stream) for view in image.views]
                return Ahead(key, None, tuple(views))
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


def inputs_of(
    images: Sequence[EncoderImage],
    ahead: Sequence[Ahead],
    frames: Sequence[Frame],
    device: torch.device,
) -> list[Pixels]:
    """A network's input of B images, one entry a frame, from their copies where there are some."""
    return [
        frame.batch(
            [
                one.views[number] if one.views else image.views[number]
                for image, one in zip(images, ahead, strict=True)
            ],
            device,
        )
        for number, frame in enumerate(frames)
    ]


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
class NetworkAnswer:
    """What the network says of one expression.

    Attributes:
        job, text: which one: index of the job, index of its text.
        masks: as the mask rule made them, before any no-target rule; none where it failed. One, or
            as many as there are instances where those are wanted one by one.
        scores: of each mask, 0..1: its predicted IoU, or how sure the model is of it.
        no_target: probability that nothing fits, 0..1.
        empty: no instance counts and has a pixel, so nothing fits whatever ``no_target`` says; the
            only mask is then empty.
        by_instance: the masks are single instances.
        notes: what the user must know.
        unknown: words that the vocabulary does not have.
        error: one line, where it failed; else empty.
    """

    job: int
    text: int
    masks: tuple[Mask, ...]
    scores: tuple[float, ...] = ()
    no_target: float = 0.0
    empty: bool = False
    by_instance: bool = False
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    error: str = ""
    error_kind: str = "ModelError"


Batch = Sequence[tuple[int, Job]]
"""Jobs with their numbers."""


@dataclass(frozen=True, slots=True)
class Question:
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

    def failed(self, kind: str, error: str) -> NetworkAnswer:
        """The answer that says what went wrong."""
        return NetworkAnswer(self.number, self.position, (), error=error, error_kind=kind)


def flattened(batch: Batch) -> list[Question]:
    """The expressions of a batch in order."""
    asked = []
    for row, (number, job) in enumerate(batch):
        position = 0
        for group, size in enumerate(job.groups or [len(job.texts)]):
            for _ in range(size):
                asked.append(Question(number, position, row, (number, group), job))
                position += 1
    return asked


# --- the network ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    """Seconds spent, by part; the CPU's view, so a GPU's work shows where it is waited for."""

    encode: float = 0.0
    decode_mask: float = 0.0


class Compute:
    """Runs a model; remembers the sizes that fitted.

    Args:
        segmenter: the model.
        settings: where and how.
        rule: makes masks of maps.
        cache: of the model's backbone, if features are kept.
        room: shared with those that run the same model side by side.

    Attributes:
        prepare: gets an image ready for a :class:`Job`, in any thread.
        alone: how many images, this one among them, have the cores to themselves now; 0 where
            more are to come.
        images_at_once, expressions_at_once: what fits, as far as it is known.
        clock: seconds spent so far.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: ComputeSettings,
        rule: MaskRule = at_image_size,
        cache: FeatureCache | None = None,
        room: Room | None = None,
    ) -> None:
        self.segmenter = segmenter
        self.settings = settings
        self.prepare = Preparer(settings.device, cache)
        self._rule = rule
        self._cache = cache
        self._room = room or Room()
        self.clock = Clock()
        self.alone = 0
        use(settings.tuning)
        keep_freed_memory()
        self._by_sample = settings.device.type == "cpu"
        self.images_at_once = 1 if self._by_sample else max(1, settings.images)
        # Hundreds of instances of several expressions would add up, and are decoded one by one.
        several = not segmenter.capabilities.instances
        self.expressions_at_once = max(1, settings.expressions if several else 1)
        self._texts: OrderedDict[tuple[str, ...], Texts] = OrderedDict()
        self._texts_kept = max(8, _TEXTS_KEPT // self.expressions_at_once)

    def run(self, jobs: Sequence[Job]) -> Iterator[NetworkAnswer]:
        """The answers to all texts of all jobs, in order.

        An image or an expression that cannot be computed gives an answer with ``error``.

        Raises:
            ModelError: the device itself failed; nothing after it would succeed.
        """
        left = list(enumerate(jobs))
        while left:
            batch, left = left[: self.images_at_once], left[self.images_at_once :]
            yield from self._run(batch)

    def _run(self, batch: Batch) -> Iterator[NetworkAnswer]:
        """One batch; cut in pieces where it fails as a whole."""
        why, size = None, 1
        try:
            with self._room, threads_of(self._encoding_threads()):
                features = self._encode([job for _, job in batch])
        except Exception as error:
            require_machine(error)
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

    def _decode_all(self, features: Any, batch: Batch) -> Iterator[NetworkAnswer]:
        """Decodes the expressions of an encoded batch, chunk by chunk."""
        left = flattened(batch)
        while left:
            chunk = left[: self._fitting(left)]
            left = left[len(chunk) :]
            yield from self._decode_chunk(features, chunk)

    def _decode_chunk(self, features: Any, chunk: Sequence[Question]) -> Iterator[NetworkAnswer]:
        """One chunk; cut in pieces where it fails as a whole."""
        answers: list[NetworkAnswer] = []
        size = 1
        try:
            with self._room:
                answers = self._decode(features, chunk)
        except Exception as error:
            require_machine(error)
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

    def _fitting(self, asked: Sequence[Question]) -> int:
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
        get_console().warn(f"out of memory with {was} {what}; continuing with {was // 2}")
        return was // 2

    # --- in the network ---------------------------------------------------------------------------

    def _encoding_threads(self) -> int:
        """0 leaves them as they are."""
        alone = self.alone and self.segmenter.capabilities.any_threads
        return self.settings.cores.for_one_of(self.alone) if alone else 0

    @torch.inference_mode()
    def _encode(self, jobs: Sequence[Job]) -> Any:
        started = time.perf_counter()
        images = [job.image for job in jobs]
        ahead = [job.ahead or self.prepare(job.image) for job in jobs]
        device, segmenter = self.settings.device, self.segmenter
        frames = segmenter.frames
        if self._cache is None:
            features = segmenter.encode_images(inputs_of(images, ahead, frames, device))
        else:
            keeper = cast(RisamSegmenter, segmenter)

            def encode(rows: Sequence[int]) -> EncoderFeatures:
                some = [images[row] for row in rows], [ahead[row] for row in rows]
                return keeper.backbone(inputs_of(*some, frames, device))

            keys, found = [one.key for one in ahead], [one.features for one in ahead]
            features = keeper.from_backbone(self._cache.features(keys, found, encode))
        self.clock.encode += time.perf_counter() - started
        return features

    @torch.inference_mode()
    def _decode(self, features: Any, chunk: Sequence[Question]) -> list[NetworkAnswer]:
        started = time.perf_counter()
        texts = self._text_features(tuple(one.words for one in chunk))
        rows = [one.row for one in chunk]
        sizes = [(0, 0)] * (max(rows) + 1)
        for one in chunk:
            sizes[one.row] = one.job.image.size
        found = self.segmenter.decode(
            features, texts, rows, sizes, self.settings.instance_threshold
        )
        groups = [list(group) for _, group in groupby(chunk, key=attrgetter("row"))]
        read = self._several if self.segmenter.capabilities.instances else self._one_each
        told = [self._notes(texts, found, k) for k in range(len(chunk))]
        answers = [
            answer if answer.error else replace(answer, notes=notes, unknown=texts.unknown[k])
            for k, (answer, notes) in enumerate(zip(read(found, groups), told, strict=True))
        ]
        self.clock.decode_mask += time.perf_counter() - started
        return answers

    def _one_each(
        self, found: Sequence[Instances], groups: Sequence[Sequence[Question]]
    ) -> list[NetworkAnswer]:
        """The answers of a model that has one instance an expression: one copy to the host."""
        score = torch.cat([one.score for one in found])
        nothing = torch.cat([one.nothing for one in found])
        finite = torch.cat([one.maps.finite() for one in found])
        finite = finite & score.isfinite() & nothing.isfinite()
        masks = [
            self._rule(one.maps, group[0].job.image.size, self.settings.threshold)
            for one, group in zip(found, groups, strict=True)
        ]
        host, columns = to_host(masks, torch.stack([finite.float(), score, nothing]))
        return [
            NetworkAnswer(one.number, one.position, (mask,), (score,), no_target)
            if good
            else one.failed("ModelError", _NOT_FINITE)
            for one, mask, good, score, no_target in zip(
                chain.from_iterable(groups), host, *columns, strict=True
            )
        ]

    def _several(
        self, found: Sequence[Instances], groups: Sequence[Sequence[Question]]
    ) -> list[NetworkAnswer]:
        """The answers where expressions have any number of instances."""
        answers = []
        for instances, group in zip(found, groups, strict=True):
            finite = (instances.maps.finite() & instances.score.isfinite()).tolist()
            scores, nothing = instances.score.tolist(), instances.nothing.tolist()
            every = self.settings.select == "all"
            distinct = (every and instances.distinct) or instances.counts
            start = 0
            for one, count, wanted, no_target in zip(
                group, instances.counts, distinct, nothing, strict=True
            ):
                own = slice(start, start + wanted)
                start += count
                if not all(finite[own]) or not math.isfinite(no_target):
                    answers.append(one.failed("ModelError", _NOT_FINITE))
                    continue
                size = one.job.image.size
                masks, kept = self._chosen(instances.maps[own], scores[own], size)
                if empty := not masks:
                    none = self._rule(instances.maps[:0], size, self.settings.threshold)
                    masks, kept = (np.zeros(none.shape[1:], np.bool_),), (0.0,)
                answers.append(
                    NetworkAnswer(
                        one.number,
                        one.position,
                        masks,
                        kept,
                        no_target,
                        empty=empty,
                        by_instance=every and not empty,
                    )
                )
        return answers

    def _chosen(
        self, maps: Maps, scores: list[float], size: tuple[int, int]
    ) -> tuple[tuple[Mask, ...], tuple[float, ...]]:
        """Masks and scores of one expression's instances, as they were wanted.

        One without a pixel is none. Some at a time, and on the host in bits: there may be hundreds.
        """
        select = self.settings.select
        step = max(1, self.settings.mask_bytes // (8 * size[0] * size[1]))
        starts: Sequence[int] = range(0, len(scores), step)
        if select == "best":
            starts, step = sorted(range(len(scores)), key=lambda k: -scores[k]), 1
        union: Tensor | None = None
        masks: list[Mask] = []
        kept: list[float] = []
        for start in starts:
            some = self._rule(maps[start : start + step], size, self.settings.threshold)
            seen = some.flatten(1).any(1)
            kept += [scores[start + k] for k in seen.nonzero().flatten().tolist()]
            if select == "all":
                masks += to_bits(some[seen])
            elif seen.any():
                together = some.any(0)
                union = together if union is None else union | together
                if select == "best":
                    break
        if union is not None:
            masks, kept = [union.cpu().numpy()], [max(kept)]
        return tuple(masks), tuple(kept)

    def _notes(self, texts: Texts, found: Sequence[Instances], number: int) -> tuple[str, ...]:
        """What must be known of the answer to an expression of a chunk."""
        cut = texts.cut_to[number]
        notes = (f"expression cut to {cut} tokens",) if cut else ()
        for one in found:
            if number < len(one.counts):
                return notes + (one.notes[number] if one.notes else ())
            number -= len(one.counts)
        return notes

    def _text_features(self, texts: tuple[str, ...]) -> Texts:
        """Text features of a chunk; a folder asked the same of every image computes them once."""
        known = self._texts.get(texts)
        if known is None:
            known = self._texts[texts] = self.segmenter.encode_texts(texts)
            if len(self._texts) > self._texts_kept:
                self._texts.popitem(last=False)
        self._texts.move_to_end(texts)
        return known


def _explained(error: Exception) -> tuple[str, str]:
    """Kind and one line of an error that fails an item.

    Raises:
        ModelError: instead, for an error that would fail every item after it as well.
    """
    if is_device_lost(error):
        raise ModelError(
            f"the device failed: {reason_of(error)}",
            f"finished work is kept; continue with {setting('resume')} once it works again",
        ) from error
    if is_out_of_memory(error):
        fix = told(f"use a smaller model or {setting('device', 'cpu')}")
        return "OutOfMemory", f"out of memory even alone; {fix}"
    return type(error).__name__, reason_of(error)
