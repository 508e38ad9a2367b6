"""The part of ``risam eval`` that has a model answer; imports torch."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from risam_cli.console.console import get_console
from risam_cli.data.readers.source import SampleSource
from risam_cli.errors import DataError, OutputError, UsageError, setting
from risam_cli.evaluation.answers import AnswerLog, StageSeconds, answers_from_model
from risam_cli.evaluation.protocol import mask_rule
from risam_cli.evaluation.report.schema import AnswersPart, NoTargetFitPart, TimingPart
from risam_cli.evaluation.request import Asked, Done, count
from risam_cli.evaluation.run import EvalRun, FailureLog, drop_missing_images, run_evaluation
from risam_cli.files.write import write_atomic
from risam_cli.inference.device import (
    choose_device,
    choose_precision,
    describe_device,
    precision_name,
)
from risam_cli.inference.feature_cache import cache_for
from risam_cli.inference.pipeline import PredictSettings, instance_rules, predict_samples
from risam_cli.metrics.curves import fit_no_target
from risam_cli.metrics.protocols import Protocol
from risam_cli.segmenters.resolve import load_segmenter
from risam_cli.segmenters.segmenter import Segmenter
from risam_cli.weights import folder as model_folders


def answer_and_score(
    asked: Asked, source: SampleSource, protocol: Protocol, failures: FailureLog
) -> Done:
    """Load the model, have it answer every image that is there, and score it."""
    console = get_console()
    device = choose_device(asked.device)
    precision = choose_precision(asked.precision, device)
    segmenter = _load(asked, device, precision)
    source, absent = drop_missing_images(source, failures)
    skipped = failures.by_stage["decode"]
    settings = _settings(asked, segmenter, protocol, device, precision)
    bar = settings.no_target_threshold
    assert bar is not None
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
    images = min(len(source), source.limit or len(source))
    with log, cache_for(asked.kept_features(), segmenter, settings, images) as cache:
        run = partial(
            predict_samples,
            segmenter=segmenter,
            settings=settings,
            rule=mask_rule(protocol),
            cache=cache,
        )
        answers = answers_from_model(source, run, log, bar, protocol, seconds, failures)
        done = run_evaluation(source, answers, protocol, asked.output, console)
    fit = _fit(asked, done, bar) if asked.fit_no_target else None
    return Done(
        done,
        AnswersPart(
            kind="model",
            name=segmenter.name,
            sha256=segmenter.hash,
            no_target_threshold=bar,
            device=describe_device(device),
            precision=precision_name(precision),
        ),
        count(done, failed=len(failures) - skipped, skipped=skipped, images_missing=absent),
        _timing(seconds, done),
        threshold=None if segmenter.thresholds.calibrated else segmenter.thresholds.mask,
        no_target_fit=fit,
        finish=log.finished,
    )


def _load(asked: Asked, device: torch.device, precision: torch.dtype) -> Segmenter:
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
    asked: Asked,
    segmenter: Segmenter,
    protocol: Protocol,
    device: torch.device,
    precision: torch.dtype,
) -> PredictSettings:
    """How the model answers: by the protocol's threshold, where it means what it says."""
    own, bar, threshold = segmenter.thresholds, asked.no_target_threshold, asked.threshold
    if threshold is None:
        threshold = protocol.threshold if own.calibrated else own.mask
    return PredictSettings(
        device,
        precision,
        asked.batch_size,
        asked.workers,
        threshold=threshold,
        no_target_threshold=own.no_target if bar is None else bar,
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
    asked: Asked,
    source: SampleSource,
    protocol: Protocol,
    segmenter: Segmenter,
    settings: PredictSettings,
) -> dict[str, object]:
    """What the answers depend on; a resumed run must agree in all of it."""
    return {
        "model": segmenter.hash,
        "data": f"{source.dataset} {source.split}",
        "expressions": source.planned,
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


def _fit(asked: Asked, run: EvalRun, before: float) -> NoTargetFitPart:
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
            f"take grefcoco, or refshapes with {setting('family', 'grefshapes')}",
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
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    try:
        write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))
    except OutputError as error:
        raise OutputError(
            f"{error.message}: the threshold {threshold:.6g} is not stored",
            f"copy the model folder to a place of your own and give it as {setting('model')}",
        ) from error
