"""A model's answers for evaluation, from the predict engine; kept on disk while a run goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch

from risam_cli.console.console import get_console
from risam_cli.data.images.files import file_sha256
from risam_cli.data.readers.predictions import Answer, PredictionIndex
from risam_cli.data.readers.results import MAX_LINE
from risam_cli.data.readers.source import OnFailure, SampleSource
from risam_cli.errors import DataError, OutputError, UsageError, setting
from risam_cli.evaluation.protocol import mask_rule
from risam_cli.evaluation.report.schema import AnswersPart, NoTargetFitPart, TimingPart
from risam_cli.evaluation.request import Done, EvalRequest, count
from risam_cli.evaluation.scoring import (
    ANSWERS_FILE,
    Answered,
    EvalRun,
    FailureLog,
    drop_missing_images,
    run_evaluation,
)
from risam_cli.files.folder import OutputFolder
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.files.patience import within
from risam_cli.files.write import write_file, writing
from risam_cli.inference.device import (
    choose_device,
    choose_precision,
    count_workers,
    describe_device,
    precision_name,
)
from risam_cli.inference.feature_cache import cache_for
from risam_cli.inference.finish import ImageResult, Raw
from risam_cli.inference.loader import warm_up
from risam_cli.inference.loading import TIMEOUT
from risam_cli.inference.pipeline import PredictSettings, instance_rules, predict_samples
from risam_cli.inference.unknown_words import UnknownWords
from risam_cli.metrics.curves import fit_no_target
from risam_cli.metrics.protocols import Protocol
from risam_cli.segmenters.resolve import load_segmenter
from risam_cli.segmenters.segmenter import Segmenter
from risam_cli.types import Expression, Failure, Prediction, Sample
from risam_cli.weights import folder as model_folders

T = TypeVar("T")

SYNCED = 2.0
"""Seconds after which answers are made to be on the disk."""

_HEADER = "\0settings"  # an id that no expression has
_ASKED = "expressions"  # the setting that says how many there were; they may change

Run = Callable[
    [Iterable[tuple[Sample, Answered | None]]], Iterator[tuple[Answered | None, ImageResult]]
]


@dataclass(slots=True)
class StageSeconds:
    """Seconds by stage, summed over images; stages overlap, so they may exceed the clock's.

    Attributes:
        expressions: how many were answered in these seconds.
    """

    decode: float = 0.0
    encode: float = 0.0
    decode_mask: float = 0.0
    expressions: int = 0

    def add(self, spent: Mapping[str, float], expressions: int) -> None:
        """Take one image's seconds in."""
        self.expressions += expressions
        self.decode += spent.get("load", 0.0)
        self.encode += spent.get("encode", 0.0)
        self.decode_mask += spent.get("decode", 0.0) + spent.get("finish", 0.0)


class AnswerLog:
    """Answers of a run in progress, so that an interrupted one can go on.

    The first line holds the settings, every other one an answer, under a key of what it was an
    answer to (the image's name, the expression's id and text) and with the hash of the image file.
    So an image or a text that changed since is asked again, and what was added or taken away costs
    the others nothing.

    Args:
        settings: what results depend on; a resumed run must have the same.
        size: (H, W) of all masks, where the protocol compares them at a size of its own.
        resume, overwrite: go on with, or replace, what an interrupted run left.

    Attributes:
        known: the answers of the interrupted run; None where there is none.

    Raises:
        OutputError: an interrupted run lies there and neither was asked for, or it had other
            settings, or the file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        size: tuple[int, int] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = folder / ANSWERS_FILE
        self.known: PredictionIndex | None = None
        self._size = size
        self._synced = time.monotonic()
        self._header = header = {"id": _HEADER, "settings": dict(settings)}
        held = self.path.exists() and self.path.stat().st_size > 0
        if held and not (resume or overwrite):
            raise OutputError(
                f"{folder} holds an interrupted run",
                f"continue with {setting('resume')}, or start over with {setting('overwrite')}",
            )
        with writing(self.path):
            if held and resume:
                self._require(header)
                write_file(self.path, self._copy_whole_lines)
                self.known = PredictionIndex(self.path, lambda failure: None, size)
            else:
                write_file(self.path, seal(header))
            self._stream = self.path.open("ab")

    def _copy_whole_lines(self, part: Path) -> None:
        """Leaves out what a kill or a power cut left torn or damaged: it is asked again."""
        with open(self.path, "rb") as old, open(part, "wb") as new:
            old.readline(MAX_LINE)
            new.write(seal(self._header))
            for line in iter(partial(old.readline, MAX_LINE), b""):
                with suppress(ValueError):
                    unseal(line)
                    new.write(line)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()
        if self.known is not None:
            self.known.close()

    def write(self, answered: Answered, image: str | None) -> None:
        """Append the answers of one image; they are with the system before it counts as done.

        A power cut costs no more than the answers of some :data:`SYNCED` seconds.

        Args:
            image: SHA-256 of the image file.
        """
        for expression, answer in zip(answered.sample.expressions, answered.answers, strict=True):
            if answer is not None and image is not None:
                row = _row(answered.sample, expression, answer, image)
                self._stream.write(seal(row))
        self._stream.flush()
        if time.monotonic() - self._synced > SYNCED:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def tell_changes(self, source: SampleSource) -> None:
        """Say how a data set that changed differs from what the interrupted run answered."""
        if self.known is None:
            return
        found = [
            len(self.known.records(_key(group.image, phrase.id, phrase.text)))
            for group in source.chosen()
            for phrase in group.phrases
        ]
        gone = len(self.known) - sum(found) - 1  # the header
        if gone or self._asked != source.planned:
            get_console().info(
                f"the expressions changed: {sum(map(bool, found))} answered before are kept, "
                f"{gone} are gone, {found.count(0)} are to be answered"
            )

    def recall(self, sample: Sample) -> Answered | None:
        """The answers of an image that the interrupted run finished, else None.

        The image file is hashed only where the run answered all that is asked of it.
        """
        if self.known is None:
            return None
        try:
            lines = [
                self.known.records(_key(sample.image, one.id, one.text))
                for one in sample.expressions
            ]
        except DataError:  # a line that a power cut spoilt
            return None
        if not all(lines):
            return None
        try:
            image = within(TIMEOUT, lambda: file_sha256(sample.path))
        except TimeoutError:  # the loader will say so
            return None
        answers = []
        for known in lines:
            same = [line for line in known if line.get("sha256") == image]
            if not same:
                return None
            try:
                size = self._size or sample.size
                answers.append(self.known.answer(same[-1], size, str(self.path)))
            except DataError:  # a line that a power cut spoilt
                return None
        return Answered(sample, tuple(answers))

    def finished(self) -> None:
        """The run is done and scored: the file is not needed any more."""
        self.path.unlink(missing_ok=True)

    def _require(self, header: Mapping[str, Any]) -> None:
        with self.path.open("rb") as stream:
            first = stream.readline(MAX_LINE)
        try:
            own = unseal(first)["settings"]
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self.path} is damaged", f"start over with {setting('overwrite')}"
            ) from None
        wanted = json.loads(json.dumps(header["settings"]))
        self._asked = own.get(_ASKED)
        for key in sorted({*own, *wanted} - {_ASKED}):
            if own.get(key) != wanted.get(key):
                raise OutputError(
                    f"the interrupted run in {self.path.parent} had {key} {own.get(key)!r}, this "
                    f"one has {wanted.get(key)!r}",
                    f"give the same settings, or start over with {setting('overwrite')}",
                )


def answers_from_model(
    source: SampleSource,
    run: Run,
    log: AnswerLog,
    no_target_threshold: float,
    protocol: Protocol,
    seconds: StageSeconds,
    on_failure: OnFailure,
) -> Iterator[Answered]:
    """Every image of a split with the model's answers, in order; failures go to ``on_failure``.

    Args:
        run: the predict engine, giving raw masks and probabilities.
        log: keeps the answers; what it knows from an interrupted run is not asked again.
        no_target_threshold: probability above which the answer is "nothing fits".
    """

    def todo() -> Iterator[tuple[Sample, Answered | None]]:
        for sample in source.iterate(on_failure):
            recalled = log.recall(sample)
            # What is known already keeps its place among the others, and nothing is asked of it.
            yield (sample if recalled is None else replace(sample, expressions=())), recalled

    for recalled, result in run(todo()):
        if recalled is not None:
            yield recalled
            continue
        seconds.add(result.seconds, len(result.sample.expressions))
        answered = _answered(result, no_target_threshold, protocol, on_failure)
        log.write(answered, result.sha256)
        yield answered


def _answered(
    result: ImageResult, no_target_threshold: float, protocol: Protocol, on_failure: OnFailure
) -> Answered:
    """The expressions of an image that were predicted; the others are failures, not zeros."""
    for failure in result.failures:
        on_failure(failure)
    by_id = {p.id: (p, raw) for p, raw in zip(result.predictions, result.raw, strict=True)}
    sample = result.sample
    kept: list[Expression] = []
    answers: list[Answer | None] = []
    for expression in sample.expressions:
        if expression.id not in by_id:
            continue
        prediction, raw = by_id[expression.id]
        if protocol.resolution != "stretch" and sample.size not in (None, _size(raw)):
            on_failure(_wrong_size(sample, expression, _size(raw)))
            continue
        kept.append(expression)
        answers.append(_answer(prediction, raw, no_target_threshold, protocol))
    return Answered(replace(sample, expressions=tuple(kept)), tuple(answers))


def _answer(
    prediction: Prediction, raw: Raw, no_target_threshold: float, protocol: Protocol
) -> Answer:
    """Where the head is not asked, the score is the mask's own."""
    score = raw.iou if protocol.no_target == "mask" else prediction.score
    nothing = raw.no_target > no_target_threshold
    return Answer(raw.mask, nothing, min(1.0, max(0.0, score)), raw.no_target)


def _size(raw: Raw) -> tuple[int, int]:
    height, width = raw.mask["size"]
    return height, width


def _wrong_size(sample: Sample, expression: Expression, own: tuple[int, int]) -> Failure:
    height, width = sample.size or (0, 0)
    message = (
        f"{sample.path} is {own[0]}x{own[1]} (height x width), its annotation says "
        f"{height}x{width}; the image is not the one that was annotated"
    )
    return Failure(expression.id, sample.image, expression.text, "decode", "DataError", message)


def _key(image: str, name: str, text: str) -> str:
    asked = json.dumps([image, name, text])
    return blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _row(sample: Sample, expression: Expression, answer: Answer, image: str) -> dict[str, Any]:
    return {
        "id": _key(sample.image, expression.id, expression.text),
        "sha256": image,
        "asked": expression.id,
        "segmentation": answer.segmentation,
        "score": answer.score,
        "no_target": answer.no_target,
        "no_target_probability": answer.no_target_probability,
    }


# --- how a model is asked -------------------------------------------------------------------------


def answer_and_score(
    asked: EvalRequest,
    source: SampleSource,
    protocol: Protocol,
    folder: OutputFolder,
    failures: FailureLog,
) -> Done:
    """Load the model, have it answer every image that is there, and score it."""
    console = get_console()
    device = choose_device(asked.device)
    precision = choose_precision(asked.precision, device)
    warm_up(count_workers(asked.workers, device.type))
    segmenter = _load(asked, device, precision)
    source, absent = drop_missing_images(source, failures)
    skipped = failures.by_stage["decode"]
    settings = _settings(asked, segmenter, protocol, device, precision)
    no_target_threshold = settings.no_target_threshold
    assert no_target_threshold is not None
    console.info(f"{segmenter.name} on {describe_device(device)}, {precision_name(precision)}")

    seconds = StageSeconds()
    side = protocol.canvas
    log = AnswerLog(
        asked.output,
        _identity(asked, source, protocol, segmenter, settings),
        size=(side, side) if protocol.resolution == "stretch" else None,
        resume=asked.resume,
        overwrite=asked.overwrite,
    )
    log.tell_changes(source)
    images = min(len(source), source.limit or len(source))
    with log, cache_for(asked.kept_features(), segmenter, settings, images) as cache:
        predict = partial(
            predict_samples,
            segmenter=segmenter,
            settings=settings,
            rule=mask_rule(protocol),
            cache=cache,
        )
        unknown = UnknownWords(segmenter.name)

        def run(samples: Iterable[tuple[Sample, T]]) -> Iterator[tuple[T, ImageResult]]:
            for item, result in predict(samples):
                unknown.see(result.predictions)
                yield item, result

        answers = answers_from_model(
            source, run, log, no_target_threshold, protocol, seconds, failures
        )
        done = run_evaluation(source, answers, protocol, folder, console)
    unknown.tell()
    fit = _fit(asked, done, no_target_threshold) if asked.fit_no_target else None
    return Done(
        done,
        AnswersPart(
            kind="model",
            name=segmenter.name,
            sha256=segmenter.hash,
            no_target_threshold=no_target_threshold,
            device=describe_device(device),
            precision=precision_name(precision),
        ),
        count(done, failed=len(failures) - skipped, skipped=skipped, images_missing=absent),
        _timing(seconds, done),
        threshold=None if segmenter.thresholds.calibrated else segmenter.thresholds.mask,
        no_target_fit=fit,
        finish=log.finished,
    )


def _load(asked: EvalRequest, device: torch.device, precision: torch.dtype) -> Segmenter:
    """The model; refuses what would write into a folder that is not the user's own."""
    segmenter = load_segmenter(
        asked.model, device=device, precision=precision, compiled=asked.compiled
    )
    if asked.fit_no_target and not segmenter.capabilities.trainable:
        raise UsageError(
            f"{setting('fit_no_target')} would write into the folder of {segmenter.name}, a "
            f"published {segmenter.kind}",
            f"give the threshold by {setting('no_target_threshold')}",
        )
    return segmenter


def _settings(
    asked: EvalRequest,
    segmenter: Segmenter,
    protocol: Protocol,
    device: torch.device,
    precision: torch.dtype,
) -> PredictSettings:
    """How the model answers: by the protocol's threshold, where it means what it says."""
    own, threshold = segmenter.thresholds, asked.threshold
    no_target = asked.no_target_threshold
    if threshold is None:
        threshold = protocol.threshold if own.calibrated else own.mask
    return PredictSettings(
        device,
        precision,
        asked.batch_size,
        asked.workers,
        threshold=threshold,
        no_target_threshold=own.no_target if no_target is None else no_target,
        keep_raw=True,
        full_decode=asked.full_decode,
        select=asked.select,
        instance_threshold=asked.instance_threshold,
    )


def _timing(seconds: StageSeconds, done: EvalRun) -> TimingPart:
    return TimingPart(
        decode=seconds.decode,
        encode=seconds.encode,
        decode_mask=seconds.decode_mask,
        score=done.scored.seconds,
        total=done.seconds,
        expressions_per_second=seconds.expressions / done.seconds,
    )


def _identity(
    asked: EvalRequest,
    source: SampleSource,
    protocol: Protocol,
    segmenter: Segmenter,
    settings: PredictSettings,
) -> dict[str, object]:
    """What the answers depend on; a resumed run must agree in all of it."""
    return {
        "model": segmenter.hash,
        "data": f"{source.dataset} {source.split}",
        _ASKED: source.planned,
        "protocol": protocol.name,
        "threshold": settings.threshold,
        "no-target threshold": settings.no_target_threshold,
        "precision": precision_name(settings.precision),
        "shuffle": asked.shuffle,
        "full decode": asked.full_decode,
        "features": "float32" if asked.feature_cache is None else "half (feature cache)",
        **instance_rules(segmenter, settings),
        **segmenter.versions,
    }


def _fit(asked: EvalRequest, run: EvalRun, before: float) -> NoTargetFitPart:
    """Choose the no-target threshold on this split and store it in the model's folder.

    Raises:
        DataError: the split lacks expressions with or without a target.
        OutputError: the folder cannot be written.
    """
    point = fit_no_target(run.scored.table)
    if point is None:
        raise DataError(
            f"{setting('fit_no_target')} needs expressions with and without a target, and this "
            "split does not have both",
            f"use grefcoco, or refshapes with {setting('family', 'grefshapes')}",
        )
    folder = model_folders.find_model(asked.model)
    _store(folder, point.threshold)
    return NoTargetFitPart(
        threshold=point.threshold,
        before=before,
        n_acc=point.n_acc,
        t_acc=point.t_acc,
        giou=point.giou,
        stored_in=folder.name,
        sha256_after=model_folders.hash_folder(folder),
    )


def _store(folder: Path, threshold: float) -> None:
    """Put the threshold into the folder's ``config.json``; everything else stays as it is."""
    path = folder / model_folders.CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["no_target_threshold"] = threshold
    try:
        model_folders.replace_config(folder, config)
    except OutputError as error:
        raise OutputError(
            f"{error.message}: the threshold {threshold:.6g} is not stored",
            f"copy the model folder to a place of your own and give it as {setting('model')}",
        ) from error
