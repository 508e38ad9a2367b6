"""A model's answers for evaluation, from the predict engine; kept on disk while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from risam_cli.console.console import get_console
from risam_cli.data.readers.predictions import Answer
from risam_cli.data.readers.source import OnFailure, SampleSource
from risam_cli.errors import OutputError, UsageError, setting
from risam_cli.evaluation.answer_log import ASKED, AnswerLog, gather_answers
from risam_cli.evaluation.protocol import mask_rule
from risam_cli.evaluation.report.assemble import Done
from risam_cli.evaluation.report.schema import AnswersPart, NoTargetFitPart, TimingPart
from risam_cli.evaluation.request import (
    PART_FILE,
    EvalRequest,
    cannot_fit,
    count,
    require_both_kinds,
)
from risam_cli.evaluation.scoring import (
    Answered,
    EvalRun,
    FailureLog,
    drop_missing_images,
    run_evaluation,
)
from risam_cli.evaluation.seen import Seen, seen_in_training
from risam_cli.files.folder import OutputFolder
from risam_cli.files.jsonlines import load_json
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
from risam_cli.inference.pipeline import PredictSettings, instance_rules, predict_samples
from risam_cli.inference.unknown_words import UnknownWords
from risam_cli.metrics.curves import fit_no_target
from risam_cli.metrics.protocols import Protocol
from risam_cli.runs.ranks import Ranks
from risam_cli.runs.run import versions
from risam_cli.runs.shard import Dealer, cost_of
from risam_cli.segmenters.resolve import load_segmenter, parse_model, require_risam_name
from risam_cli.segmenters.segmenter import Segmenter
from risam_cli.types import Expression, Failure, Prediction, Sample
from risam_cli.version import __version__
from risam_cli.weights import folder as model_folders

T = TypeVar("T")

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


def answers_from_model(
    source: SampleSource,
    run: Run,
    log: AnswerLog,
    protocol: Protocol,
    seconds: StageSeconds,
    on_failure: OnFailure,
) -> Iterator[Answered]:
    """Every image of a split with the model's answers, in order; failures go to ``on_failure``.

    Args:
        run: the predict engine, giving raw masks and probabilities.
        log: keeps the answers; what it knows from an interrupted run is not asked again.
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
        answered = _answered(result, protocol, on_failure)
        log.write(answered, result.sha256)
        yield answered


def _answered(result: ImageResult, protocol: Protocol, on_failure: OnFailure) -> Answered:
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
        answers.append(_answer(prediction, raw, protocol))
    return Answered(replace(sample, expressions=tuple(kept)), tuple(answers))


def _answer(prediction: Prediction, raw: Raw, protocol: Protocol) -> Answer:
    """Where the head is not asked, the score is the mask's own."""
    score = raw.iou if protocol.no_target == "mask" else prediction.score
    assert score is not None  # a model always gives one
    return Answer(raw.mask, prediction.no_target, min(1.0, max(0.0, score)), raw.no_target)


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


# --- how a model is asked -------------------------------------------------------------------------


def answer_and_score(
    asked: EvalRequest,
    source: SampleSource,
    protocol: Protocol,
    folder: OutputFolder,
    failures: FailureLog,
) -> Done:
    """Load the model, have it answer every image that is there, and score it."""
    asking = _Asking.of(asked, source, protocol)
    source, absent = drop_missing_images(source, failures)
    skipped = failures.by_stage["decode"]
    if asked.answered:
        gather_answers(folder, asked.answered)
    seconds = StageSeconds()
    with asking.answers(source, source.planned, asked.output, failures, seconds) as (log, answers):
        done = run_evaluation(source, answers, protocol, folder, get_console(), asked.custom)
    segmenter, settings = asking.segmenter, asking.settings
    threshold = asking.no_target_threshold
    seen = seen_in_training(asked, source) if segmenter.kind == "risam" else Seen()
    return Done(
        done,
        AnswersPart(
            kind="model",
            name=segmenter.name,
            sha256=segmenter.hash,
            no_target_threshold=threshold,
            **instance_rules(segmenter, settings),
            versions=dict(segmenter.versions),
            device=describe_device(settings.device),
            precision=precision_name(settings.precision),
            images_in_training=seen.images,
            remarks=list(seen.remarks),
        ),
        count(done, failed=len(failures) - skipped, skipped=skipped, images_missing=absent),
        _timing(seconds, done),
        threshold=settings.threshold,
        no_target_fit=_fit(asked, done, threshold) if asked.fit_no_target else None,
        finish=log.finished,
    )


@dataclass(frozen=True, slots=True)
class _Asking:
    """A model and how it is asked."""

    asked: EvalRequest
    protocol: Protocol
    segmenter: Segmenter
    settings: PredictSettings

    @classmethod
    def of(cls, asked: EvalRequest, source: SampleSource, protocol: Protocol) -> _Asking:
        """The model is loaded here."""
        device = choose_device(asked.device)
        precision = choose_precision(asked.precision, device)
        warm_up(count_workers(asked.workers, device.type))
        segmenter = _load(asked, source, device, precision)
        get_console().info(
            f"{segmenter.name} on {describe_device(device)}, {precision_name(precision)}"
        )
        settings = _settings(asked, segmenter, protocol, device, precision)
        return cls(asked, protocol, segmenter, settings)

    @property
    def no_target_threshold(self) -> float:
        """Probability above which the answer is "nothing fits"."""
        assert self.settings.no_target_threshold is not None
        return self.settings.no_target_threshold

    def identity(self, source: SampleSource, planned: int) -> dict[str, object]:
        """What the answers depend on; a resumed run must agree in all of it."""
        asked, segmenter, settings = self.asked, self.segmenter, self.settings
        return {
            "model": segmenter.hash,
            "data": f"{source.dataset} {source.split}",
            ASKED: planned,
            "protocol": self.protocol.name,
            "threshold": settings.threshold,
            "no-target threshold": settings.no_target_threshold,
            "precision": precision_name(settings.precision),
            **({"part": list(asked.part)} if asked.part else {}),
            "shuffle": asked.shuffle,
            "full decode": asked.full_decode,
            "features": "float32" if asked.feature_cache is None else "half (feature cache)",
            **({"bands": list(asked.bands)} if asked.bands else {}),
            **instance_rules(segmenter, settings),
            **segmenter.versions,
        }

    @contextmanager
    def answers(
        self,
        source: SampleSource,
        planned: int,
        folder: Path,
        failures: OnFailure,
        seconds: StageSeconds,
    ) -> Iterator[tuple[AnswerLog, Iterator[Answered]]]:
        """The answers to a source as they come, and where they are kept.

        Args:
            planned: expressions of the whole evaluation.
        """
        asked, side = self.asked, self.protocol.canvas
        log = AnswerLog(
            folder,
            self.identity(source, planned),
            size=(side, side) if self.protocol.resolution == "stretch" else None,
            resume=asked.resume,
            overwrite=asked.overwrite,
        )
        log.tell_changes(source)
        images = min(len(source), source.limit or len(source))
        unknown = UnknownWords(self.segmenter.name)
        with log, cache_for(asked.kept_features(), self.segmenter, images) as cache:
            predict = partial(
                predict_samples,
                segmenter=self.segmenter,
                settings=self.settings,
                rule=mask_rule(self.protocol),
                cache=cache,
            )

            def run(samples: Iterable[tuple[Sample, T]]) -> Iterator[tuple[T, ImageResult]]:
                for item, result in predict(samples):
                    unknown.see(result.predictions)
                    yield item, result

            yield log, answers_from_model(source, run, log, self.protocol, seconds, failures)
        unknown.tell()


def answer_part(
    asked: EvalRequest,
    source: SampleSource,
    protocol: Protocol,
    folder: OutputFolder,
    failures: FailureLog,
    ranks: Ranks,
) -> None:
    """The part of one process of torchrun: its images answered, and the answers kept in a folder.

    Raises:
        UsageError: another process works by other settings or versions.
    """
    asking = _Asking.of(asked, source, protocol)
    source, _ = drop_missing_images(source, failures)
    planned = source.planned
    noted = {
        "status": "running",
        "launch": ranks.launch,
        "settings": asking.identity(source, planned),
        "risam": __version__,
        "versions": versions(asking.segmenter),
    }
    known = json.loads(json.dumps(noted))  # as the others read it
    ranks.require_alike(PART_FILE, known, asked.output)  # before anything is left that differs
    dealer = Dealer(ranks.shard.count)
    own = [
        group
        for group in source.chosen()
        if dealer.deal(cost_of(len(group.phrases), group.size)) == ranks.shard.index
    ]
    source = replace(source, groups=own, order=None, limit=None)
    spent, phrases = StageSeconds(), sum(len(group.phrases) for group in own)
    progress = get_console().progress("answer", phrases, "expressions")
    answering = asking.answers(source, planned, folder.path, failures, spent)
    with progress as shown, answering as (_, answers):
        folder.write(PART_FILE, json.dumps(noted))
        ranks.require_alike(PART_FILE, known, asked.output)  # or they begin together
        for answered in answers:
            shown.advance(len(answered.sample.expressions))
    folder.write(PART_FILE, json.dumps({**noted, "status": "complete"}))


def _load(
    asked: EvalRequest, source: SampleSource, device: torch.device, precision: torch.dtype
) -> Segmenter:
    """The model; refuses a fit that would write into a folder not the user's own, or cannot be."""
    if asked.feature_cache is not None:
        require_risam_name(asked.model, "a feature cache")
    if asked.fit_no_target and parse_model(asked.model).kind != "risam":
        raise UsageError(
            f"{setting('fit_no_target')} would write into the folder of {asked.model}, a "
            "published model",
            f"give the threshold by {setting('no_target_threshold')}",
        )
    if asked.fit_no_target:
        folder = model_folders.find_model(asked.model).resolve()
        if folder.is_relative_to(model_folders.BUNDLED):
            raise UsageError(
                f"{setting('fit_no_target')} would change the bundled model for every later "
                "command",
                f"give a model of your own, or a copy of it, by {setting('model')}",
            )
        require_both_kinds(source)
    return load_segmenter(asked.model, device=device, precision=precision, compiled=asked.compiled)


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
        bands=asked.bands,
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


def _fit(asked: EvalRequest, run: EvalRun, before: float) -> NoTargetFitPart:
    """Choose the no-target threshold on this split and store it in the model's folder.

    Raises:
        DataError: expressions with a target, or those without one, all failed.
        OutputError: the folder cannot be written.
    """
    point = fit_no_target(run.scored.table)
    if point is None:
        raise cannot_fit()
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
    config = load_json(path.read_text(encoding="utf-8"))
    config["model"]["no_target_threshold"] = threshold
    try:
        model_folders.replace_config(folder, config)
    except OutputError as error:
        raise OutputError(
            f"{error.message}: the threshold {threshold:.6g} is not stored",
            f"copy the model folder to a place of your own and give it as {setting('model')}",
        ) from error
