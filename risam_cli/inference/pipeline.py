"""The way from samples to results: images loaded ahead, encoded once, masks finished behind.

::

    samples ──▶ feeder ──▶ loader (threads or processes) ──▶ network ──▶ finishers ──▶ results
               (reads ahead,  decode and scale              (Compute,    RLE, PNG      in order
                groups by image)                         on a CPU several
                                                          side by side)

Everything between two arrows is bounded, so memory does not grow with the number of images.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch

from risam_cli.data.images.images import MAX_PIXELS, Bands, EncoderImage
from risam_cli.errors import ModelError, UsageError, reason_of, setting
from risam_cli.inference.calibration import calibration
from risam_cli.inference.compute import Compute, ComputeSettings, Job, Select
from risam_cli.inference.device import (
    Room,
    count_workers,
    is_out_of_memory,
    share_cores,
)
from risam_cli.inference.feature_cache import FeatureCache
from risam_cli.inference.feeder import Feeder, ImageJob
from risam_cli.inference.finish import Finishers, ImageResult, MaskSink
from risam_cli.inference.loader import open_loader
from risam_cli.inference.loading import TIMEOUT, Loaded, LoaderSettings
from risam_cli.inference.mask_rules import MaskRule, at_image_size
from risam_cli.model.fast.crew import threads_of
from risam_cli.model.fast.tuning import Product
from risam_cli.model.mutual_aware_attention import AttentionMaps
from risam_cli.segmenters.risam import RisamSegmenter
from risam_cli.segmenters.segmenter import Segmenter
from risam_cli.types import Sample

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PredictSettings:
    """How a run predicts. What changes results: precision, thresholds, and ``full_decode``.

    Attributes:
        device, precision: see :mod:`risam_cli.inference.device`.
        batch_size: images encoded at a time; a CPU takes them one by one.
        workers: loader processes, 0 for threads; None chooses by the device.
        threshold: a pixel is in the mask where its probability is greater; None is the model's.
        no_target_threshold: the mask is emptied where the probability that nothing fits is
            greater; None is the model's.
        expressions: expressions decoded at a time; on a CPU only those of one sample.
        max_pixels: larger images are refused.
        timeout: seconds that reading one image may take.
        lookahead: samples read ahead, within which those of one image are put together.
        keep_raw: also give the mask before the no-target rule.
        full_decode: decode every pixel of a large JPEG before it is scaled down.
        cores: of a CPU, for the network; None takes as many as torch's threads.
        select: what becomes of several instances of an expression.
        instance_threshold: an instance counts where its score is greater; None is the model's.
        bands: which bands of a TIFF of several are red, green and blue, from 1.
        product: the kernel of a CPU's large products; None goes by what was measured here.
    """

    device: torch.device
    precision: torch.dtype = torch.float32
    batch_size: int = 8
    workers: int | None = None
    threshold: float | None = None
    no_target_threshold: float | None = None
    expressions: int = 32
    max_pixels: int = MAX_PIXELS
    timeout: float = TIMEOUT
    lookahead: int = 64
    keep_raw: bool = False
    full_decode: bool = False
    cores: int | None = None
    select: Select = "union"
    instance_threshold: float | None = None
    bands: Bands | None = None
    product: Product | None = None


def predict_samples(
    samples: Iterable[tuple[Sample, T]],
    segmenter: Segmenter,
    settings: PredictSettings,
    *,
    sink: MaskSink | None = None,
    stop: threading.Event | None = None,
    rule: MaskRule = at_image_size,
    cache: FeatureCache | None = None,
) -> Generator[tuple[T, ImageResult], None, None]:
    """Predicts a stream of samples; results come in its order, each beside what its sample brought.

    Each image is decoded and encoded once for all samples within the look-ahead that name it. An
    image that cannot be read, or an expression that fails, is a failure in its result. A sample
    without expressions gives an empty result, and its image is not read.

    Args:
        samples: each with anything of the caller's that is wanted beside its result; read in a
            thread of its own, as far ahead as ``settings.lookahead``.
        segmenter: the model.
        sink: keeps full-size masks; without one, results hold RLE only.
        stop: once set, no new batch is begun; what was begun still comes out.
        rule: makes masks of maps, at the image's size or elsewhere.
        cache: of the model's image encoder, if features are kept.

    Raises:
        RisamError: what the source or the sink raised, or a device that failed for good.
    """
    no_target_threshold = settings.no_target_threshold
    if no_target_threshold is None:
        no_target_threshold = segmenter.thresholds.no_target
    _require_instances(segmenter, settings)
    # A CPU takes images one by one anyway: then each leaves as soon as it is done.
    batch = 1 if settings.device.type == "cpu" else settings.batch_size
    computing = compute_settings(segmenter, settings)
    lanes = computing.cores.lanes
    room = Room(lanes)
    runs = [Compute(segmenter, computing, rule, cache, room) for _ in range(lanes)]
    with (
        threads_of(0),  # the lanes set it for themselves, and for whatever thread is new
        open_loader(_loading(segmenter, settings, lanes), prepare=runs[0].prepare) as loader,
        Finishers[T](no_target_threshold, settings.keep_raw, sink) as finishers,
    ):
        feeder = Feeder(samples, loader, settings.lookahead, 2 * batch * lanes + loader.lanes)
        network = _Network(feeder, finishers, runs, batch, stop)
        feeder.start()
        network.start()
        try:
            for found in finishers.results():
                feeder.answered(1)
                yield found
        finally:
            feeder.stop()
            network.join()


def _loading(segmenter: Segmenter, settings: PredictSettings, lanes: int) -> LoaderSettings:
    """How images are loaded for so many lanes of the network."""
    return LoaderSettings(
        segmenter.frames,
        count_workers(settings.workers, settings.device.type),
        settings.max_pixels,
        settings.timeout,
        settings.full_decode,
        threads=max(2, lanes),
        pinned=settings.device.type == "cuda",
        bands=settings.bands,
    )


def compute_settings(segmenter: Segmenter, settings: PredictSettings) -> ComputeSettings:
    """The part of the settings that the network runs by."""
    side = side_of(segmenter)
    measured = calibration().of(side)
    tuning = measured.tuning()
    if settings.product is not None:
        tuning = replace(tuning, products={settings.precision: settings.product})
    return ComputeSettings(
        settings.device,
        segmenter.thresholds.mask if settings.threshold is None else settings.threshold,
        settings.batch_size,
        settings.expressions,
        cores=share_cores(settings.device.type, side, settings.cores, measured.threads),
        tuning=tuning,
        select=settings.select,
        instance_threshold=settings.instance_threshold,
    )


def _require_instances(segmenter: Segmenter, settings: PredictSettings) -> None:
    """Raises UsageError where instances are asked of a model that knows none."""
    if settings.select == "all" and not segmenter.capabilities.instances:
        raise UsageError(
            f"{segmenter.name}, a {segmenter.kind}, does not distinguish instances",
            "use one mask per expression",
        )
    if settings.instance_threshold is not None and segmenter.thresholds.instance is None:
        raise UsageError(
            f"{segmenter.name}, a {segmenter.kind}, scores no instances",
            "leave the instance threshold out",
        )


def instance_rules(segmenter: Segmenter, settings: PredictSettings) -> dict[str, Any]:
    """What decides which instances an answer is made of; nothing where a model knows none.

    Raises:
        UsageError: instances are asked of such a model.
    """
    _require_instances(segmenter, settings)
    if not segmenter.capabilities.instances:
        return {}
    own, given = segmenter.thresholds.instance, settings.instance_threshold
    return {"instances": settings.select, "instance_threshold": own if given is None else given}


def side_of(segmenter: Segmenter) -> int:
    """The longest side of the network's inputs, in pixels."""
    return max(max(frame.height, frame.width) for frame in segmenter.frames)


class _Network(Generic[T]):
    """Takes batch after batch through the network, while results leave in another thread.

    Args:
        runs: one a lane; each lane has a thread of its own.
    """

    def __init__(
        self,
        feeder: Feeder[T],
        finishers: Finishers[T],
        runs: Sequence[Compute],
        batch: int,
        stop: threading.Event | None,
    ) -> None:
        self._feeder = feeder
        self._finishers = finishers
        self._batch = batch
        self._stop_asked = stop
        self._lock = threading.Lock()
        self._running = len(runs)
        self._busy = 0
        self._error: BaseException | None = None
        self._lanes = [
            threading.Thread(target=self._run, args=(run,), daemon=True, name="risam-network")
            for run in runs
        ]

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()

    def join(self) -> None:
        for lane in self._lanes:
            lane.join()

    @contextmanager
    def _busy_with(self, compute: Compute) -> Iterator[None]:
        """Counts who has images in hand: the last ones of a run may share out all cores."""
        with self._lock:
            self._busy += 1
            compute.alone = self._busy if self._feeder.is_idle() else 0
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def _run(self, compute: Compute) -> None:
        """One lane."""
        error: BaseException | None = None
        try:
            with threads_of(compute.settings.cores.threads):
                while jobs := self._feeder.take(self._batch, self._stop_asked):
                    with self._busy_with(compute):
                        _run_batch(jobs, compute, self._finishers)
        except BaseException as caught:  # raised again where the results leave
            error = caught
            self._feeder.stop()  # the other lanes end with what they have in hand
        with self._lock:
            self._error = self._error or error
            self._running -= 1
            last = not self._running
        if last:
            self._finishers.end(self._error)


def _run_batch(jobs: Sequence[ImageJob[T]], compute: Compute, finishers: Finishers[T]) -> None:
    """Encodes and decodes the jobs' images and hands every mask to the finishers."""
    work: list[Job] = []
    places: list[list[tuple[int, int]]] = []  # per job, per text: its sample and number there
    for job in jobs:
        loaded = job.loaded
        begun = [
            (index, sample)
            for index, sample, item in job.samples
            if finishers.begin(index, sample, item, loaded)
        ]
        if loaded.image is not None and begun:
            texts = [one.text for _, sample in begun for one in sample.expressions]
            groups = [len(sample.expressions) for _, sample in begun]
            work.append(Job(loaded.image, texts, groups, loaded.ahead))
            places.append([(index, k) for index, one in begun for k in range(len(one.expressions))])
    before = replace(compute.clock)
    for answer in compute.run(work):
        finishers.finish(*places[answer.job][answer.text], answer)
    finishers.computed(
        [index for job in jobs for index, _, _ in job.samples],
        load=sum(job.loaded.seconds for job in jobs),
        encode=compute.clock.encode - before.encode,
        decode=compute.clock.decode_mask - before.decode_mask,
    )


# --- one image, encoded once and asked again and again --------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image with its features, on the device."""

    image: EncoderImage
    features: Any


class Session(Compute):
    """Runs a model step by step, with the arithmetic of a whole run."""

    def encode(self, image: EncoderImage) -> Encoded:
        """Encodes one image.

        Raises:
            ModelError: the network failed on it.
        """
        self.alone = 1
        try:
            with threads_of(self._encoding_threads() or self.settings.cores.threads):
                return Encoded(image, self._encode([Job(image, ())]))
        except Exception as error:
            raise _explained(error) from error

    def ask(self, encoded: Encoded, sample: Sample, no_target_threshold: float) -> ImageResult:
        """The result for a sample whose image was encoded before, as a whole run gives it.

        Args:
            no_target_threshold: probability of "nothing fits" above which the mask is emptied.
        """
        texts = [expression.text for expression in sample.expressions]
        with (
            threads_of(self.settings.cores.threads),
            Finishers[None](no_target_threshold, False, None) as finishers,
        ):
            finishers.begin(0, sample, None, Loaded(encoded.image, "", None, 0.0))
            job = Job(encoded.image, texts, [len(texts)])
            for answer in self._decode_all(encoded.features, [(0, job)]):
                finishers.finish(0, answer.text, answer)
            finishers.computed([0])
            finishers.end(None)
            return next(finishers.results())[1]

    @torch.inference_mode()
    def attention(self, encoded: Encoded, texts: Sequence[str]) -> list[AttentionMaps]:
        """The two attention maps of every block for E expressions; see :class:`AttentionMaps`.

        Returns:
            One entry a block; none where the model has no Mutual-Aware Attention.

        Raises:
            ModelError: the network failed on them.
        """
        segmenter, rows = cast(RisamSegmenter, self.segmenter), [0] * len(texts)
        try:
            with threads_of(self.settings.cores.threads):
                known = self._text_features(tuple(texts))
                return segmenter.attention(encoded.features, known, rows)
        except Exception as error:
            raise _explained(error) from error


def _explained(error: Exception) -> ModelError:
    fix = f"use a smaller model or {setting('device', 'cpu')}" if is_out_of_memory(error) else ""
    return ModelError(f"the network failed: {reason_of(error)}", fix)
