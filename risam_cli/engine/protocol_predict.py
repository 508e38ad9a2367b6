"""Predicting for protocols that compare masks elsewhere than at the image's size.

The network runs as in :mod:`risam_cli.engine.predict`; only the step from logits to a mask is the
protocol's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from itertools import groupby, islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from risam_cli import masks
from risam_cli.engine.compute import Answer, Compute, Job, Model
from risam_cli.engine.evaluate import warp_through_letterbox
from risam_cli.engine.loader import ImageLoader, Loaded, LoaderSettings, default_workers
from risam_cli.engine.predict import ImageResult, PredictSettings, Raw, compute_settings
from risam_cli.metrics.protocols import Protocol
from risam_cli.transforms import fit_size, logits_to_size
from risam_cli.types import Expression, Failure, Prediction, Sample

if TYPE_CHECKING:
    from torch import Tensor

_POLL = 1.0  # seconds between two looks at images that stall


class ProtocolCompute(Compute):
    """Runs a model and makes masks by a protocol's resolution rule."""

    def __init__(self, loaded: Model, settings: PredictSettings, protocol: Protocol) -> None:
        super().__init__(loaded, compute_settings(loaded, settings))
        self._protocol = protocol

    def _masks(self, logits: Tensor, chunk: Sequence[Any]) -> list[NDArray[np.bool_]]:
        result: list[NDArray[np.bool_]] = []
        start = 0
        for _, same_image in groupby(chunk, key=attrgetter("number")):
            group = list(same_image)
            own = logits[start : start + len(group)]
            result += masks_by_protocol(
                own,
                group[0].job.image.size,
                self.loaded.image_size,
                self._protocol,
                self.settings.threshold,
            )
            start += len(group)
        return result


def masks_by_protocol(
    logits: Tensor, size: tuple[int, int], side: int, protocol: Protocol, threshold: float
) -> list[NDArray[np.bool_]]:
    """Masks where a protocol compares them.

    Args:
        logits: (E, h, w) of the encoder's padded square of ``side``.
        size: (H, W) of the image.

    Returns:
        E masks: of the protocol's canvas for ``stretch``, else (H, W).
    """
    out = (protocol.canvas, protocol.canvas) if protocol.resolution == "stretch" else size
    full = logits_to_size(logits, fit_size(*size, side), side, out).sigmoid()
    probabilities = np.asarray(full.cpu().numpy(), np.float32)
    if protocol.resolution == "letterbox":
        probabilities = np.stack(
            [warp_through_letterbox(one, protocol.canvas) for one in probabilities]
        )
    return list(probabilities > threshold)


def predict_by_protocol(
    samples: Iterable[Sample], loaded: Model, settings: PredictSettings, protocol: Protocol
) -> Iterator[ImageResult]:
    """Results in order, with raw masks at the protocol's resolution; one encoding an image.

    Raises:
        RisamError: what the samples raised, or a device that failed for good.
    """
    workers = settings.workers
    if workers is None:
        workers = default_workers(settings.device.type)
    loading = LoaderSettings(loaded.image_size, workers, settings.max_pixels, settings.timeout)
    bar = settings.no_target_threshold
    bar = loaded.no_target_threshold if bar is None else bar
    compute = ProtocolCompute(loaded, settings, protocol)
    with ImageLoader(loading) as loader:
        ahead = _load_ahead(samples, loader, 2 * settings.batch_size + loader.lanes)
        index = 0
        while batch := list(islice(ahead, settings.batch_size)):
            for result in _run_batch(batch, compute, bar, index):
                yield result
                index += 1


def _load_ahead(
    samples: Iterable[Sample], loader: ImageLoader, count: int
) -> Iterator[tuple[Sample, Loaded]]:
    """Samples with their loaded images, ``count`` images being loaded ahead."""
    waiting: deque[tuple[Sample, Future[Loaded]]] = deque()
    source = iter(samples)
    while True:
        for sample in islice(source, count - len(waiting)):
            waiting.append((sample, loader.submit(sample.path)))
        if not waiting:
            return
        sample, future = waiting.popleft()
        while True:
            try:
                loaded = future.result(timeout=_POLL)
                break
            except NotYet:
                loader.give_up_on_stalled()
        yield sample, loaded


def _run_batch(
    batch: Sequence[tuple[Sample, Loaded]], compute: ProtocolCompute, bar: float, first: int
) -> Iterator[ImageResult]:
    before = (compute.clock.encode, compute.clock.decode_mask)
    jobs = [
        Job(loaded.image, [e.text for e in sample.expressions])
        for sample, loaded in batch
        if loaded.image is not None
    ]
    by_job: dict[int, list[Answer]] = {}
    for answer in compute.run(jobs):
        by_job.setdefault(answer.job, []).append(answer)
    seconds = {
        "encode": (compute.clock.encode - before[0]) / len(batch),
        "decode": (compute.clock.decode_mask - before[1]) / len(batch),
    }
    number = 0
    for place, (sample, loaded) in enumerate(batch):
        spent = {**seconds, "load": loaded.seconds}
        if loaded.image is None:
            failures = tuple(
                Failure(e.id, sample.image, e.text, "decode", "ImageError", loaded.error)
                for e in sample.expressions
            )
            yield ImageResult(first + place, sample, (), failures, seconds=spent)
            continue
        yield _result(sample, by_job.get(number, []), bar, first + place, spent)
        number += 1


def _result(
    sample: Sample, answers: Sequence[Answer], bar: float, index: int, seconds: dict[str, float]
) -> ImageResult:
    predictions: list[Prediction] = []
    raws: list[Raw] = []
    failures: list[Failure] = []
    for answer in answers:
        expression = sample.expressions[answer.text]
        if answer.mask is None:
            failures.append(
                Failure(
                    expression.id,
                    sample.image,
                    expression.text,
                    "predict",
                    answer.error_kind,
                    f"{sample.image}: {expression.text!r}: {answer.error}",
                )
            )
            continue
        raw = Raw(masks.encode(answer.mask), answer.iou, answer.no_target)
        raws.append(raw)
        predictions.append(_prediction(sample, expression, raw, answer.no_target > bar))
    return ImageResult(
        index, sample, tuple(predictions), tuple(failures), tuple(raws), seconds=seconds
    )


def _prediction(sample: Sample, expression: Expression, raw: Raw, nothing: bool) -> Prediction:
    """The record that evaluation reads flag and score from; its mask is the raw one."""
    height, width = raw.mask["size"]
    return Prediction(
        id=expression.id,
        image=sample.image,
        expression=expression.text,
        height=height,
        width=width,
        segmentation=raw.mask,
        bbox=masks.bbox(raw.mask),
        area=masks.area(raw.mask),
        score=raw.no_target if nothing else raw.iou,
        no_target=nothing,
    )
