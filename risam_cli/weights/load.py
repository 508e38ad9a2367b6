"""A network with its weights, ready to answer: from a model folder or one that comes along."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from risam_cli.errors import ModelError, RisamError, UsageError, setting
from risam_cli.files.caches import cache_folder
from risam_cli.model.fast.prepare import prepare_for_inference
from risam_cli.model.risam import Risam
from risam_cli.settings.load import check
from risam_cli.settings.model import ModelSettings, TextEncoderSettings
from risam_cli.weights import folder as model_folders
from risam_cli.weights import frozen, lora
from risam_cli.weights.build import add_lora, build_model
from risam_cli.weights.plausible import require_plausible
from risam_cli.weights.text import text_from_folder
from risam_cli.weights.tokenizer import TextTokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to predict.

    Attributes:
        model: in evaluation mode, on its device, float32 but for what ``load_model`` was told.
        image_size: side S of the encoder's square input.
        threshold, no_target_threshold: the model's own, in 0..1.
        name: its folder's name; hash: SHA-256 over its files.
        text_config: the text encoder's configuration as stored.
        needs: frozen parts that are not in its folder.
    """

    model: Risam
    tokenizer: TextTokenizer
    settings: ModelSettings
    image_size: int
    threshold: float
    no_target_threshold: float
    name: str
    hash: str
    text_config: Mapping[str, Any]
    needs: tuple[frozen.Needed, ...] = ()


def load_model(
    source: str | Path | None,
    *,
    device: torch.device,
    keep_lora: bool = False,
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
) -> LoadedModel:
    """Loads a model folder by path, a bundled model by name, or the default one.

    Args:
        precision: in which the image encoder holds its matrices and computes, for inference;
            the rest, a small part of the work, stays in float32.
        compiled: compile the image encoder's blocks, at the first image of a size.
        keep_lora: leave side paths of the text encoder beside its weights, to train them on;
            by default they are added into the weights, which gives the same answers sooner.

    Raises:
        ModelError: a missing or damaged file, or weights that do not fit the settings.
        UsageError: ``compiled`` on a device where that gains nothing.
    """
    if compiled and device.type != "cuda":
        raise UsageError(
            f"{setting('compile')} on {device}: compiled blocks are slower there than PyTorch's "
            "own kernels",
            f"leave {setting('compile')} out, or name a CUDA GPU by {setting('device')}",
        )

    folder = model_folders.find_model(source)
    stored = model_folders.read_model_folder(folder)
    settings = check(ModelSettings, stored.settings, str(folder / model_folders.CONFIG_FILE))
    needs = frozen.parse_needed(stored.needs, str(folder / model_folders.CONFIG_FILE))
    _require_plausible(stored, settings, needs)
    text = text_from_folder(stored, settings.text_encoder.max_tokens)
    model = build_model(settings, text)
    for needed in needs:
        frozen.fill(model, needed, folder)
    weights, side = lora.split_lora(model_folders.read_tensors(folder / model_folders.WEIGHTS_FILE))
    model_folders.load_weights(model, stored, weights, lambda name: frozen.covers(needs, name))
    _load_lora(model, side, settings.text_encoder, stored, keep=keep_lora)
    model.to(device).eval().requires_grad_(False)
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    prepare_for_inference(model, device, precision, compiled=compiled)
    return LoadedModel(
        model=model,
        tokenizer=text.tokenizer,
        settings=settings,
        image_size=settings.image_encoder.image_size,
        threshold=settings.threshold,
        no_target_threshold=settings.no_target_threshold,
        name=_name(folder),
        hash=stored.hash,
        text_config=stored.text_config,
        needs=needs,
    )


def _require_plausible(
    stored: model_folders.StoredModel, settings: ModelSettings, needs: Sequence[frozen.Needed]
) -> None:
    """Before any memory is taken on config.json's word; see :mod:`risam_cli.weights.plausible`."""
    elements, tensors = model_folders.count_weights(stored.folder / model_folders.WEIGHTS_FILE)
    for needed in needs:
        # A file with this size and hash is there; a weight takes a byte at least.
        frozen.find(needed, stored.folder)
        elements, tensors = elements + needed.size, tensors + needed.size
    where = stored.folder / model_folders.CONFIG_FILE
    require_plausible(settings, stored.text_config, elements, tensors, where)


def _load_lora(
    model: Risam,
    side: Mapping[str, Tensor],
    settings: TextEncoderSettings,
    stored: model_folders.StoredModel,
    *,
    keep: bool,
) -> None:
    where = str(stored.folder / model_folders.WEIGHTS_FILE)
    if (settings.lora is None) != (not side):
        raise ModelError(
            f"{where} holds {len(side)} LoRA weights, its config.json says otherwise",
            "copy or download the folder again",
        )
    if settings.lora is None:
        return
    if not keep:
        lora.merge_lora(model, side, settings.lora.scale, where)
        return
    add_lora(model.text_encoder.backbone, str(stored.text_config.get("model_type")), settings)
    own = {name: tensor for name, tensor in model.state_dict().items() if lora.is_lora(name)}
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in side.items()}:
        raise ModelError(
            f"{where}: its LoRA weights do not fit its layers", "copy or download the folder again"
        )
    model.load_state_dict(dict(side), strict=False)


def verify_model_folder(folder: Path) -> list[str]:
    """Loads a model folder as predict does; returns what is wrong with it, one line each."""
    problems = []
    try:
        loaded = load_model(folder, device=torch.device("cpu"))
        bad = [k for k, v in loaded.model.state_dict().items() if not torch.isfinite(v).all()]
        if bad:
            problems.append(f"{len(bad)} tensors hold NaN or infinity, first {bad[0]!r}")
    except RisamError as error:  # of the weights or of the settings
        problems.append(str(error))
    # A bit of a value that is still a number is told by its checksum alone.
    return problems or model_folders.damaged_files(folder)


def _name(folder: Path) -> str:
    """A model's name: its folder's, with the run's before it where that says nothing."""
    whole = folder.resolve()
    said = whole.name in ("best", "averaged") and whole.parent.name
    return f"{whole.parent.name}/{whole.name}" if said else folder.name
