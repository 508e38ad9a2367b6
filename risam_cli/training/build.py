"""From training settings to a run: model, data, stages. The training half of the bridge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from risam_cli.console.console import Console
from risam_cli.data.refshapes.vocabulary import COLORS, SHAPES, SIZES
from risam_cli.files.sizes import parse_size
from risam_cli.inference.device import choose_device, training_precision
from risam_cli.inference.feature_cache import CacheSettings, FeatureCache, open_feature_cache
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.settings.train import DenseStage, ReferringStage, TrainSettings
from risam_cli.training.cached_training import CachedEncoder, KeyedCollate
from risam_cli.training.checkpoint import Place
from risam_cli.training.data.build import DataBuilder
from risam_cli.training.data.collate import ReferringCollate, collate_dense
from risam_cli.training.data.dataset import DenseScenes
from risam_cli.training.dense_head import DenseHead
from risam_cli.training.distributed import Processes
from risam_cli.training.loop import TrainingRun
from risam_cli.training.losses import ReferringLoss
from risam_cli.training.optimize import Schedule, parameter_groups
from risam_cli.training.stage import LoopSettings, SaveModel, Stage, hash_settings
from risam_cli.training.start import start_model, train_text_encoder
from risam_cli.training.tasks import DenseTask, ReferringTask
from risam_cli.training.validate import Validation, validate_dense
from risam_cli.weights import folder as model_folders
from risam_cli.weights import frozen
from risam_cli.weights.export import NEEDS_TITLE
from risam_cli.weights.tokenizer import TextTokenizer


class TrainingBuilder:
    """Builds a run out of settings.

    Args:
        settings: checked; console: for messages; processes: of the run.

    Raises:
        RisamError: data or weights that are not there or do not fit.
    """

    def __init__(
        self, settings: TrainSettings, console: Console, processes: Processes | None = None
    ) -> None:
        self.settings = settings
        self.console = console
        self.processes = processes or Processes()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.device = choose_device(settings.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = training_precision(settings.precision, self.device)
        self.model, self.text, self.needs = start_model(settings, console)
        self.model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size = settings.model.image_encoder.image_size
        keyed = KeyedCollate if settings.feature_cache is not None else ReferringCollate
        self.collate = keyed(self.tokenizer, self.size)
        self.cached: CachedEncoder | None = None
        self.data = DataBuilder(settings, console)

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the text encoder."""
        return self.text.tokenizer

    def run(self, folder: Path) -> TrainingRun:
        """The run, without its stages."""
        loop = loop_settings(self.settings, self.device, self.dtype)
        hashes = stage_hashes(self.settings)
        save = self._saver(folder)
        return TrainingRun(folder, self.model, loop, hashes, save, self.console, self.processes)

    def stage(self, settings: DenseStage | ReferringStage) -> Stage:
        """One stage, finished. To be called when the stage before it is done."""
        self.close()
        if number := self.settings.stages.index(settings):
            # A head's random start must not depend on whether the run was cut before this stage.
            torch.manual_seed(self.settings.seed * 1_000_003 + number)
        if isinstance(settings, DenseStage):
            return self._dense(settings)
        return self._referring(settings)

    def _dense(self, settings: DenseStage) -> Stage:
        encoder = self.settings.model.image_encoder
        head = DenseHead(
            encoder.dim,
            encoder.out_dim,
            encoder.stem[1] if encoder.stem else 0,
            (len(SHAPES), len(COLORS), len(SIZES)),
        ).to(self.device)
        self.model.requires_grad_(False)
        self.model.image_encoder.requires_grad_(True)
        task = DenseTask(self.model.image_encoder, head, settings.background_weight)
        groups = parameter_groups([(task.module, settings.learning_rate)], self.settings.optimizer)
        cells = 4 * encoder.image_size // encoder.patch_size
        return Stage(
            name=settings.name,
            task=task,
            groups=groups,
            data=DenseScenes(self.data.scenes(self.settings.train), cells),
            collate=collate_dense,
            steps=settings.steps,
            images_per_step=settings.images_per_step,
            warmup=settings.warmup,
            accumulate=settings.accumulate,
            validate=lambda between: validate_dense(
                task, self.size, cells, self.device, self.processes, between
            ),
            answers=False,
        )

    def _referring(self, settings: ReferringStage) -> Stage:
        model, s = self.model, self.settings
        model.requires_grad_(True)
        train_text_encoder(model, s.model.text_encoder)
        encoder_parts = self._encoder_parts(settings)
        model.image_encoder.checkpoint_blocks = s.gradient_checkpointing
        loss = ReferringLoss(
            s.loss.mask,
            s.loss.dice,
            s.loss.no_target,
            s.loss.iou,
            s.loss.focal_gamma,
            s.loss.minimap,
        )
        frozen_encoder = not encoder_parts
        self.cached = self._cached_encoder() if frozen_encoder else None
        task = ReferringTask(model, loss, encoder_frozen=frozen_encoder, features=self.cached)
        text_rate = settings.text_learning_rate or settings.learning_rate
        # Read now, so that a damaged file is told of before the first step.
        held_out = self.data.held_out()
        validation = Validation(s, task, held_out, self.collate, self.processes)
        groups = parameter_groups(
            [
                *encoder_parts,
                (model.text_encoder.backbone, text_rate),
                (model, settings.learning_rate),
            ],
            s.optimizer,
        )
        return Stage(
            name=settings.name,
            task=task,
            groups=groups,
            data=self.data.train(),
            collate=self.collate,
            steps=settings.steps,
            images_per_step=settings.images_per_step,
            warmup=settings.warmup,
            accumulate=settings.accumulate,
            validate=validation,
            draw=validation.draw,
        )

    def close(self) -> None:
        """Ends what a stage has open."""
        if self.cached is not None:
            self.cached.close()
            self.cached = None

    def _cached_encoder(self) -> CachedEncoder | None:
        """The encoder behind its cache, if the settings name one."""
        asked, encoder = self.settings.feature_cache, self.model.image_encoder
        if asked is None:
            return None
        shape = self.settings.model.image_encoder
        kept = CacheSettings(Path(asked.folder), parse_size(asked.limit))
        images = len(self.data.train()) + sum(map(len, self.data.held_out().values()))

        def open_cache(runs: ImageEncoder) -> AbstractContextManager[FeatureCache]:
            device, precision = self.device, self.dtype
            return open_feature_cache(
                kept, runs, shape, device=device, precision=precision, images=images
            )

        return CachedEncoder(encoder, self.dtype, open_cache)

    def _encoder_parts(self, settings: ReferringStage) -> list[tuple[nn.Module, float]]:
        encoder = self.model.image_encoder
        rate = settings.encoder_learning_rate or settings.learning_rate
        if settings.train_encoder == "yes":
            return [(encoder, rate)]
        encoder.requires_grad_(False)
        if settings.train_encoder == "no":
            return []
        blocks: Any = encoder.blocks
        adapters = [block.adapter for block in blocks if block.adapter is not None]
        for adapter in adapters:
            adapter.requires_grad_(True)
        return [(nn.ModuleList(adapters), rate)]

    def _saver(self, folder: Path) -> SaveModel:
        def save(
            name: str,
            stage: Stage,
            figures: Mapping[str, float],
            place: Place,
            averaged: Sequence[int],
        ) -> None:
            seconds, expressions = place.seconds, place.expressions
            at = stage.name, place.step, seconds, expressions
            self.write_model(folder / name, card_of(self.settings, *at, figures, averaged))

        return save

    def write_model(self, folder: Path, card: dict[str, Any]) -> None:
        """Writes the model as it is to a folder that ``--model`` takes, frozen files left out."""
        weights = self.model.state_dict()
        model_folders.write_model_folder(
            folder,
            {name: t for name, t in weights.items() if not frozen.covers(self.needs, name)},
            self.settings.model.model_dump(mode="json"),
            json.loads(self.text.config.to_json_string(use_diff=False)),
            self.tokenizer.to_json(),
            card,
            model_readme(card, self.needs),
            frozen.plain(self.needs),
        )


_OPERATIONAL = {
    "averaging",
    "best_by",
    "checkpoint_every",
    "device",
    "gradient_checkpointing",
    "keep_last",
    "log_every",
    "output",
    "pictures",
    "val",
    "validate_every",
    "workers",
}
_STOPPING = {"best_by", "val", "validate_every"}  # these decide when a stage stops early
_EXPRESSIONS_ONLY = {"expressions_per_scene", "unknown_word_rate"}


def stage_hashes(settings: TrainSettings) -> list[str]:
    """For each stage, a hash of all settings that bear on the weights at its end.

    Later stages may be edited, and a run moved, without losing what is done. Settings at their
    defaults are left out, so that a version with more of them goes on with older checkpoints.
    """
    without = _OPERATIONAL - (_STOPPING if settings.early_stopping is not None else set())
    if settings.train.dataset == "mixed":
        without = without - {"val"}  # a mixture leaves out what this run validates on
    values = settings.model_dump(mode="json", exclude_defaults=True, exclude={*without, "stages"})
    # Dense stages know nothing of expressions.
    train = {k: v for k, v in values["train"].items() if k not in _EXPRESSIONS_ONLY}
    dense = {**values, "train": train, "loss": None}
    if "feature_cache" in values:
        values["feature_cache"] = "half precision"  # wherever it is
    for unknown in ("augment", "feature_cache"):
        dense.pop(unknown, None)
    hashes = []
    for number in range(len(settings.stages)):
        stages = settings.stages[: number + 1]
        only_dense = all(stage.kind == "dense" for stage in stages)
        done = [
            stage.model_dump(mode="json", exclude_defaults=True, exclude={"accumulate"})
            for stage in stages
        ]
        hashes.append(hash_settings([dense if only_dense else values, done]))
    return hashes


def model_readme(card: Mapping[str, Any], needs: Sequence[frozen.Needed] = ()) -> str:
    """A model folder's README.md out of its card and the frozen parts that it leaves out."""
    lines = [f"# {card['name']}", "", "Written by `risam train`.", ""]
    lines += [f"- {key}: {value}" for key, value in card.items() if key != "figures"]
    lines += ["", "| figure on held-out data while training | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4f} |" for name, value in card["figures"].items()]
    if needs:
        lines += ["", NEEDS_TITLE, ""]
        lines += [f"- {n.name}, {n.size} bytes, SHA-256 {n.sha256}" for n in needs]
    return "\n".join(lines) + "\n"


def loop_settings(
    settings: TrainSettings, device: torch.device, dtype: torch.dtype
) -> LoopSettings:
    """The loop's own settings."""
    s, stopping, averaging = settings, settings.early_stopping, settings.averaging
    return LoopSettings(
        seed=s.seed,
        device=device,
        dtype=dtype,
        workers=s.workers,
        beta2=s.optimizer.beta2,
        clip_norm=s.optimizer.clip_norm,
        ema_decay=s.optimizer.ema_decay,
        validate_every=s.validate_every,
        checkpoint_every=s.checkpoint_every,
        log_every=s.log_every,
        schedule=Schedule(s.optimizer.schedule, s.optimizer.power, s.optimizer.floor),
        patience=stopping.patience if stopping else None,
        min_delta=stopping.min_delta if stopping else 0.0,
        averaged=averaging.count if averaging else 0,
        average_of=averaging.of if averaging else "best",
        keep_last=s.keep_last,
    )


def card_of(
    settings: TrainSettings,
    stage: str,
    step: int,
    seconds: float,
    expressions: int,
    figures: Mapping[str, float],
    averaged: Sequence[int],
) -> dict[str, Any]:
    """What a model folder says of its making."""
    card: dict[str, Any] = {
        "name": settings.name,
        "stage": stage,
        "step": step,
        "seconds": round(seconds, 1),
        "expressions": expressions,
        "seed": settings.seed,
        "best_by": settings.best_by,
    }
    if averaged:
        card["averaged"] = list(averaged)
    return {**card, "figures": {k: v for k, v in figures.items() if v == v}}
