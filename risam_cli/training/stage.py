"""What a training run is made of: its network, its data and its stages, out of the settings."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from risam_cli.console.console import Console
from risam_cli.data.images.transforms import normalize
from risam_cli.data.refshapes.vocabulary import COLORS, SHAPES, SIZES
from risam_cli.errors import ConfigError, setting
from risam_cli.files.sizes import parse_size
from risam_cli.inference.device import choose_device, training_precision
from risam_cli.inference.feature_cache import CacheSettings, FeatureCache, open_feature_cache
from risam_cli.model.fast.prepare import prepare_for_inference, prepare_for_training
from risam_cli.model.image_encoder import EncoderFeatures, ImageEncoder
from risam_cli.settings.train import DenseStage, ReferringStage, TrainSettings
from risam_cli.training.checkpoint import Place
from risam_cli.training.data.build import DataBuilder
from risam_cli.training.data.collate import (
    KeyedBatch,
    KeyedCollate,
    ReferringCollate,
    collate_dense,
)
from risam_cli.training.data.dataset import DenseScenes
from risam_cli.training.distributed import Processes
from risam_cli.training.log import Example
from risam_cli.training.losses import DenseHead, DenseTask, ReferringLoss, ReferringTask, Task
from risam_cli.training.optimize import parameter_groups
from risam_cli.training.validate import Validation, require_figures, validate_dense
from risam_cli.weights import folder as model_folders
from risam_cli.weights import frozen
from risam_cli.weights.export import NEEDS_TITLE
from risam_cli.weights.plausible import require_affordable
from risam_cli.weights.start import start_model, train_text_encoder
from risam_cli.weights.tokenizer import TextTokenizer
from risam_cli.weights.trained_on import KEY, entries_of, inherited, to_card

_READERS = 8  # threads that read cached features


@dataclass(frozen=True)
class Stage:
    """One stage, finished by the builder: what to train, on what, and how long.

    Attributes:
        groups: AdamW's parameter groups, each with its ``base_lr``.
        data: examples, by epoch too (see :class:`risam_cli.training.data.collate.PlannedBatches`).
            Where it has them, ``expressions_of(index)`` evens out the processes, and
            ``name_of(index)`` names an example in messages.
        collate: makes a batch of examples.
        validate: gives figures of the present weights, ``best`` to maximize, ``watched`` for early
            stopping; raises what ``stopping`` raises, which it calls between its batches.
        draw: the fixed validation examples as they are answered now.
        answers: whether the network can answer expressions after this stage, so that it is worth
            a model folder.
    """

    settings: DenseStage | ReferringStage
    task: Task
    groups: list[dict[str, Any]]
    data: Any
    collate: Callable[[Any], Any]
    validate: Callable[[Callable[[], None]], dict[str, float]]
    draw: Callable[[], list[Example]] = list
    answers: bool = True


def check_paths(settings: TrainSettings) -> None:
    """Looks whether what the settings name is there, before anything is built.

    Raises:
        ConfigError: naming key, path, and a name beside it that is nearly the same; or sizes that
            no machine has room for.
    """
    require_affordable(settings.model, settings.name)
    for key, path in _paths(settings):
        if path.exists():
            continue
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {str(path.with_name(near[0]))!r}?" if near else "give its path"
        raise ConfigError(f"{key} = {str(path)!r}: no such file or folder", hint)


def require_start_kept(settings: TrainSettings, replaced: Sequence[Path]) -> None:
    """Make sure that a new run does not replace the model that it starts from.

    Raises:
        ConfigError: one of ``replaced`` is that model, or holds it.
    """
    for key in ("init_from", "init_encoder_from"):
        source = getattr(settings, key)
        if source is not None and Path(source).exists():
            path = Path(source).resolve()
            if any(path.is_relative_to(one.resolve()) for one in replaced):
                raise ConfigError(
                    f"{key} = {source!r} is in the output folder, where the new run replaces it",
                    f"give another folder by {setting('output', 'OTHER')}",
                )


def _paths(settings: TrainSettings) -> Iterator[tuple[str, Path]]:
    if settings.init_from is None and settings.model.image_encoder.checkpoint is not None:
        yield "model.image_encoder.checkpoint", Path(settings.model.image_encoder.checkpoint)
    for key, data in [
        ("train", settings.train),
        *((f"val.{name}", data) for name, data in settings.val.items()),
    ]:
        for part, path in data.paths():
            yield f"{key}.{part}", path


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
        self.data = DataBuilder(settings, console)
        self.model, self.text, self.needs = start_model(settings, console, self.data.texts)
        # What it starts from has seen is seen by this model too.
        self.inherited = inherited(settings.init_from or settings.init_encoder_from)
        self.model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size = settings.model.image_encoder.image_size
        keyed = KeyedCollate if settings.feature_cache is not None else ReferringCollate
        self.collate = keyed(self.tokenizer, self.size)
        self.cached: CachedEncoder | None = None
        if any(stage.kind == "referring" for stage in settings.stages):
            # Now, so that what is wrong with them is told before anything is written or trained.
            self.data.check_words(self.tokenizer)
            require_figures(settings, self.data.held_out())

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the text encoder."""
        return self.text.tokenizer

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
        for part in (self.model, head):
            prepare_for_training(part, self.device)
        self.model.requires_grad_(False)
        self.model.image_encoder.requires_grad_(True)
        task = DenseTask(self.model.image_encoder, head, settings.background_weight)
        groups = parameter_groups([(task.module, settings.learning_rate)], self.settings.optimizer)
        cells = 4 * encoder.image_size // encoder.patch_size
        return Stage(
            settings=settings,
            task=task,
            groups=groups,
            data=DenseScenes(self.data.scenes(self.settings.train), cells),
            collate=collate_dense,
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
        loss = ReferringLoss(**s.loss.model_dump(exclude={"target_size"}))
        frozen_encoder = not encoder_parts
        prepare_for_training(model, self.device, recompute_blocks=s.gradient_checkpointing)
        if frozen_encoder:
            prepare_for_inference(model.image_encoder, self.device)
        self.cached = self._cached_encoder() if frozen_encoder else None
        task = ReferringTask(model, loss, encoder_frozen=frozen_encoder, features=self.cached)
        text_rate = settings.text_learning_rate or settings.learning_rate
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
            settings=settings,
            task=task,
            groups=groups,
            data=self.data.train(),
            collate=self.collate,
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
        # What starts at zero beside SAM's own blocks: adapters, and the stem in the deep features.
        deep = [] if encoder.stem_in_deep is None else [encoder.stem_in_deep]
        if settings.train_encoder == "yes":
            # The latter has as far to go as the rest of the network.
            return [(nn.ModuleList(deep), settings.learning_rate), (encoder, rate)]
        encoder.requires_grad_(False)
        if settings.train_encoder == "no":
            return []
        blocks: Any = encoder.blocks
        adapters = [block.adapter for block in blocks if block.adapter is not None]
        return [(nn.ModuleList([*adapters, *deep]).requires_grad_(True), rate)]

    def save_model(
        self,
        folder: Path,
        stage: Stage,
        figures: Mapping[str, float],
        place: Place,
        averaged: Sequence[int] = (),
    ) -> None:
        """Writes the model as it is to a folder that can be loaded, with its card.

        Args:
            averaged: the steps whose weights are averaged in it, if they are.
        """
        card = card_of(self.settings, stage, figures, place, averaged)
        data = entries_of({KEY: place.trained_on}) or self.data.trained_on
        self.write_model(folder, {**card, KEY: to_card([*data, *self.inherited])})

    def write_model(self, folder: Path, card: dict[str, Any]) -> None:
        """Writes the model as it is to a folder that can be loaded, frozen files left out."""
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


def model_readme(card: Mapping[str, Any], needs: Sequence[frozen.Needed] = ()) -> str:
    """A model folder's README.md out of its card and the frozen parts that it leaves out."""
    lines = [f"# {card['name']}", "", "Written by `risam train`.", ""]
    lines += [f"- {key}: {value}" for key, value in card.items() if key not in ("figures", KEY)]
    lines += [f"- trained on: {one.told()}" for one in entries_of(card)]
    lines += ["", "| figure on held-out data while training | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4f} |" for name, value in card["figures"].items()]
    if needs:
        lines += ["", NEEDS_TITLE, ""]
        lines += [f"- {n.name}, {n.size} bytes, SHA-256 {n.sha256}" for n in needs]
    return "\n".join(lines) + "\n"


def card_of(
    settings: TrainSettings,
    stage: Stage,
    figures: Mapping[str, float],
    place: Place,
    averaged: Sequence[int],
) -> dict[str, Any]:
    """What a model folder says of its making."""
    card: dict[str, Any] = {
        "name": settings.name,
        "stage": stage.settings.name,
        "step": place.step,
        "seconds": round(place.seconds, 1),
        "expressions": place.expressions,
        "seed": settings.seed,
        "best_by": settings.best_by,
    }
    if averaged:
        card["averaged"] = list(averaged)
    return {**card, "figures": {k: v for k, v in figures.items() if v == v}}


class CachedEncoder:
    """Gives the encoder's features of batches from disk, or computes and keeps them.

    The cache is opened with the first batch: what a resumed run loads is then in the encoder.

    Args:
        encoder: frozen. In half precision a copy runs in its place, which holds its weights as
            predict and eval do, so that features are theirs to the bit.
        precision: of the training.
        open_cache: opens the cache of the encoder that runs.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        precision: torch.dtype,
        open_cache: Callable[[ImageEncoder], AbstractContextManager[FeatureCache]],
    ) -> None:
        self._encoder = encoder
        self._precision = precision
        self._open_cache = open_cache
        self._closing = ExitStack()
        self._cache: FeatureCache | None = None
        self._readers = ThreadPoolExecutor(_READERS, "risam-features")

    @torch.no_grad()
    def __call__(self, batch: KeyedBatch) -> EncoderFeatures:
        """The taps of B images, on the device of the batch."""
        cache = self._cache or self._open()
        fitted = batch.fitted.tolist()

        def encode(rows: Sequence[int]) -> EncoderFeatures:
            pixels = normalize(batch.images[list(rows)], [fitted[row] for row in rows])
            features: EncoderFeatures = self._encoder(pixels)
            return features

        found = list(self._readers.map(cache.find, batch.keys))
        with torch.autocast(batch.images.device.type, enabled=False):
            return cache.features(batch.keys, found, encode)

    def _open(self) -> FeatureCache:
        if self._precision != torch.float32:
            self._encoder = copy.deepcopy(self._encoder).eval()
            device = self._encoder.pos_embed.device
            prepare_for_inference(self._encoder, device, self._precision)
        self._cache = self._closing.enter_context(self._open_cache(self._encoder))
        return self._cache

    def close(self) -> None:
        """Waits until all is written, and says what the cache did."""
        self._readers.shutdown()
        self._closing.close()
