"""From training settings to a run: model, data, stages. The training half of the bridge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from risam_cli import checkpoints
from risam_cli.build import TextParts, build_model, load_model, new_text_parts, parameter_groups
from risam_cli.config import (
    CocoData,
    DataSettings,
    DenseStage,
    ModelSettings,
    ReferringStage,
    RefShapesData,
    TrainSettings,
)
from risam_cli.console import Console
from risam_cli.data.collate import DenseBatch, ReferringCollate, collate_dense
from risam_cli.data.dataset import DenseScenes, ReferringSamples, ReferringScenes
from risam_cli.data.readers.coco import read_coco
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.data.refshapes.vocabulary import COLORS, SHAPES, SIZES
from risam_cli.encoder_start import start_encoder
from risam_cli.engine.device import choose_device, choose_precision
from risam_cli.engine.tasks import DenseTask, ReferringTask
from risam_cli.engine.train import LoopSettings, Stage, TrainingRun, hash_settings
from risam_cli.engine.training_state import Place
from risam_cli.engine.validate import validate_referring
from risam_cli.errors import ConfigError
from risam_cli.losses import ReferringLoss
from risam_cli.model.dense_head import DenseHead
from risam_cli.model.risam import Risam
from risam_cli.model.sam_baseline import SamMaskDecoder
from risam_cli.tokenizer import TextTokenizer

DENSE_VALIDATION_SCENES = 128


class TrainingBuilder:
    """Builds a run out of settings.

    Args:
        settings: checked; console: for messages.

    Raises:
        RisamError: data or weights that are not there or do not fit.
    """

    def __init__(self, settings: TrainSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.device = choose_device(settings.device)
        self.dtype = choose_precision(settings.precision, self.device)
        self.model, self.text = self._model()
        self.model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size = settings.model.image_encoder.image_size
        self.collate = ReferringCollate(self.tokenizer, self.size)

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the text encoder."""
        return self.text.tokenizer

    def run(self, folder: Path) -> TrainingRun:
        """The run, without its stages."""
        s = self.settings
        loop = LoopSettings(
            seed=s.seed,
            device=self.device,
            dtype=self.dtype,
            workers=s.workers,
            beta2=s.optimizer.beta2,
            clip_norm=s.optimizer.clip_norm,
            ema_decay=s.optimizer.ema_decay,
            validate_every=s.validate_every,
            checkpoint_every=s.checkpoint_every,
            log_every=s.log_every,
        )
        return TrainingRun(
            folder, self.model, loop, stage_hashes(s), self._saver(folder), self.console
        )

    def stage(self, settings: DenseStage | ReferringStage) -> Stage:
        """One stage, finished. To be called when the stage before it is done."""
        if number := self.settings.stages.index(settings):
            # A head's random start must not depend on whether the run was cut before this stage.
            torch.manual_seed(self.settings.seed * 1_000_003 + number)
        if isinstance(settings, DenseStage):
            return self._dense(settings)
        return self._referring(settings)

    def _model(self) -> tuple[Risam, TextParts]:
        s = self.settings
        if s.init_from is not None:
            return _from_model_folder(s.init_from, s.model)
        text = new_text_parts(s.model.text_encoder)
        model = build_model(s.model, text)
        if s.init_encoder_from is not None:
            start_encoder(model.image_encoder, s.init_encoder_from)
        if s.model.image_encoder.checkpoint is not None:
            self._load_sam(model, Path(s.model.image_encoder.checkpoint))
        return model, text

    def _load_sam(self, model: Risam, path: Path) -> None:
        from risam_cli.sam_weights import load_sam_decoder, load_sam_encoder

        digest = load_sam_encoder(model.image_encoder, path)
        self.console.info(f"image encoder from {path}, SHA-256 {digest}")
        decoder = model.mask_decoder
        if not isinstance(decoder, SamMaskDecoder):
            return
        if decoder.size == SamMaskDecoder.SAM_SIZE:
            load_sam_decoder(decoder, path)
        else:
            self.console.warn(
                f"the mask decoder starts from nothing: its (dim, heads, layers, ffn_dim) are "
                f"{decoder.size}, SAM's {SamMaskDecoder.SAM_SIZE}"
            )

    def _dense(self, settings: DenseStage) -> Stage:
        encoder = self.settings.model.image_encoder
        head = DenseHead(
            encoder.dim,
            encoder.out_dim,
            encoder.stem[1] if encoder.stem else 0,
            (len(SHAPES), len(COLORS), len(SIZES)),
        ).to(self.device)
        self.model.image_encoder.requires_grad_(True)
        task = DenseTask(self.model.image_encoder, head, settings.background_weight)
        groups = parameter_groups([(task.module, settings.learning_rate)], self.settings.optimizer)
        cells = 4 * encoder.image_size // encoder.patch_size
        return Stage(
            name=settings.name,
            task=task,
            groups=groups,
            data=DenseScenes(self._scenes(self.settings.train), cells),
            collate=collate_dense,
            steps=settings.steps,
            images_per_step=settings.images_per_step,
            warmup=settings.warmup,
            validate=lambda: self._validate_dense(task, cells),
        )

    def _validate_dense(self, task: DenseTask, cells: int) -> dict[str, float]:
        scenes = RefShapes("mixed", "val", DENSE_VALIDATION_SCENES, size=self.size)
        data: Any = DenseScenes(scenes, cells)
        loader: DataLoader[DenseBatch] = DataLoader(data, 16, collate_fn=collate_dense)
        sums: dict[str, float] = {}
        task.module.eval()
        with torch.no_grad():
            for batch in loader:
                for name, value in task.loss(batch)[1].items():
                    sums[name] = sums.get(name, 0.0) + float(value) / len(loader)
        task.module.train()
        # Below zero, so that any referring stage is better: this model cannot answer yet.
        return {**sums, "best": -1 + (sums["shape"] + sums["color"] + sums["size"]) / 4}

    def _referring(self, settings: ReferringStage) -> Stage:
        model, s = self.model, self.settings
        model.requires_grad_(True)
        model.text_encoder.backbone.requires_grad_(s.model.text_encoder.trainable)
        encoder_parts = self._encoder_parts(settings)
        loss = ReferringLoss(
            s.loss.mask, s.loss.dice, s.loss.no_target, s.loss.iou, s.loss.focal_gamma
        )
        task = ReferringTask(model, loss, encoder_frozen=not encoder_parts)
        text_rate = settings.text_learning_rate or settings.learning_rate
        # Read now, so that a damaged file is told of before the first step.
        held_out = {name: self._examples(data) for name, data in s.val.items()}
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
            data=self._examples(s.train),
            collate=self.collate,
            steps=settings.steps,
            images_per_step=settings.images_per_step,
            warmup=settings.warmup,
            validate=lambda: self._validate(task, held_out),
        )

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

    def _validate(
        self, task: ReferringTask, held_out: Mapping[str, ReferringScenes | ReferringSamples]
    ) -> dict[str, float]:
        s = self.settings
        figures: dict[str, float] = {}
        for name, data in held_out.items():
            found = validate_referring(
                task,
                data,
                self.collate,
                s.model.threshold,
                s.model.no_target_threshold,
            )
            kept = ("miou", "oiou", "pr@0.5", "pr@0.9", "n_acc", "t_acc")
            figures.update({f"{name}.{key}": found[key] for key in kept})
        means = [figures[f"{name}.miou"] for name in s.val]
        return {**figures, "best": sum(means) / len(means)}

    def _scenes(self, data: DataSettings) -> RefShapes:
        if not isinstance(data, RefShapesData):
            raise ConfigError("dense stages need RefShapes scenes", "set train.dataset: refshapes")
        return RefShapes(
            data.family,
            data.split,
            data.scenes,
            data.expressions_per_scene,
            self.size,
            data.seed,
            data.mix,
        )

    def _examples(self, data: DataSettings) -> ReferringScenes | ReferringSamples:
        target = self.settings.loss.target_size
        if isinstance(data, CocoData):
            root = Path(data.images) if data.images else None
            samples = list(read_coco(Path(data.annotations), root))[: data.limit]
            if not samples:
                raise ConfigError(f"{data.annotations} holds no expressions", "give another file")
            return ReferringSamples(samples, self.size, target)
        return ReferringScenes(self._scenes(data), self.size, target, data.unknown_word_rate)

    def _saver(self, folder: Path) -> Callable[[Stage, dict[str, float], Place], None]:
        def save(stage: Stage, figures: dict[str, float], place: Place) -> None:
            if isinstance(stage.task, DenseTask):
                return  # A model that cannot answer yet is not worth a folder.
            card = {
                "name": self.settings.name,
                "stage": stage.name,
                "step": place.step,
                "seconds": round(place.seconds, 1),
                "expressions": place.expressions,
                "seed": self.settings.seed,
                "figures": {k: v for k, v in figures.items() if v == v},
            }
            self.write_model(folder / "best", card)

        return save

    def write_model(self, folder: Path, card: dict[str, Any]) -> None:
        """Writes the model as it is to a folder that ``--model`` takes."""
        checkpoints.write_model_folder(
            folder,
            self.model.state_dict(),
            self.settings.model.model_dump(mode="json"),
            json.loads(self.text.config.to_json_string(use_diff=False)),
            self.tokenizer.to_json(),
            card,
            model_readme(card),
        )


def _from_model_folder(source: str, settings: ModelSettings) -> tuple[Risam, TextParts]:
    """The network of ``settings`` with all weights of a model folder; only parts that start
    at zero may be new (adapters, no-target evidence).

    Raises:
        ModelError: a folder that cannot be read; ConfigError: one of another network.
    """
    loaded = load_model(source, device=torch.device("cpu"))
    theirs, ours = loaded.settings.model_dump(), settings.model_dump()
    for section in ("image_encoder", "fusion", "decoder"):
        for key, value in ours[section].items():
            held = theirs[section][key]
            # Parts that start at zero change nothing where they are new.
            new = key in ("adapter_dim", "no_target_evidence") and not held
            if value != held and key != "checkpoint" and not new:
                raise ConfigError(
                    f"model.{section}.{key} is {value!r}, init_from {source} has {held!r}",
                    "give the model section the values of that folder's config.json",
                )
    backbone = loaded.model.text_encoder.backbone
    config: Any = backbone.config
    text = TextParts(backbone, config, loaded.tokenizer)
    model = build_model(settings, text)
    model.load_state_dict(loaded.model.state_dict(), strict=False)  # The sections are equal.
    return model.train().requires_grad_(True), text


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
    values = settings.model_dump(mode="json", exclude_defaults=True, exclude={*without, "stages"})
    # Dense stages know nothing of expressions.
    train = {k: v for k, v in values["train"].items() if k not in _EXPRESSIONS_ONLY}
    dense = {**values, "train": train, "loss": None}
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


def model_readme(card: dict[str, Any]) -> str:
    """A model folder's README.md out of its card."""
    lines = [f"# {card['name']}", "", "Written by `risam train`.", ""]
    lines += [f"- {key}: {value}" for key, value in card.items() if key != "figures"]
    lines += ["", "| figure on held-out data while training | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4f} |" for name, value in card["figures"].items()]
    return "\n".join(lines) + "\n"
