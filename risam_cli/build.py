"""The only bridge from settings to model, data, loss and optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from risam_cli import checkpoints, frozen, lora
from risam_cli.config import (
    ImageEncoderSettings,
    ModelSettings,
    TextEncoderSettings,
    check,
)
from risam_cli.errors import ModelError, RisamError, UsageError
from risam_cli.model.feature_enhancement import FeatureEnhancement
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.model.mask_decoder import MutualAwareMaskDecoder
from risam_cli.model.mutual_aware_attention import MutualAwareAttention
from risam_cli.model.risam import Risam
from risam_cli.model.sam_baseline import DeepFeatures, SamMaskDecoder
from risam_cli.model.text_encoder import TextEncoder
from risam_cli.plausible import require_plausible
from risam_cli.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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


@dataclass(frozen=True)
class TextParts:
    """A text backbone with all that is needed to build it again."""

    backbone: nn.Module
    config: PretrainedConfig
    tokenizer: TextTokenizer


def build_image_encoder(settings: ImageEncoderSettings) -> ImageEncoder:
    """SAM's encoder with random weights; see :mod:`risam_cli.sam_weights` for its checkpoints."""
    return ImageEncoder(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        dim=settings.dim,
        depth=settings.depth,
        heads=settings.heads,
        mlp_ratio=settings.mlp_ratio,
        out_dim=settings.out_dim,
        window=settings.window,
        global_blocks=settings.global_blocks,
        taps=settings.taps,
        adapter_dim=settings.adapter_dim,
        stem=settings.stem,
    )


def build_model(settings: ModelSettings, text: TextParts) -> Risam:
    """The network, with a finished text backbone and all else at random weights.

    Raises:
        ModelError: parts that do not go together, or a baseline without its package.
    """
    encoder, dim = settings.image_encoder, settings.fusion.dim
    if settings.decoder.kind == "mutual_aware" and settings.decoder.fine and encoder.stem is None:
        raise ModelError(
            "decoder.fine needs stride-4 features, which only a convolutional stem gives",
            "set image_encoder.stem, or decoder.fine to false",
        )
    baseline = settings.decoder.kind == "sam"
    try:
        return Risam(
            image_encoder=build_image_encoder(encoder),
            text_encoder=TextEncoder(
                text.backbone,
                text.config.hidden_size,
                dim,
                eos_token_id=_end_of_sentence(text),
                trainable=settings.text_encoder.trainable,
            ),
            **(_sam_parts(settings) if baseline else _mutual_aware_parts(settings)),
            dim=dim,
        )
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes that no machine has
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"cannot build the network: {reason}", "set smaller sizes") from error


def _mutual_aware_parts(settings: ModelSettings) -> dict[str, Any]:
    """What stands between the two encoders and the mask in the paper's Figure 3."""
    fusion, decoder, encoder = settings.fusion, settings.decoder, settings.image_encoder
    return {
        "feature_enhancement": FeatureEnhancement(
            encoder.dim, encoder.out_dim, fusion.dim, enabled=fusion.feature_enhancement
        ),
        "attention": [
            MutualAwareAttention(
                fusion.dim,
                fusion.heads,
                fusion.ffn_dim,
                vision_guided=fusion.vision_guided,
                language_guided=fusion.language_guided,
            )
            # Without either branch a block is an affinity that nobody reads.
            for _ in range(fusion.blocks if fusion.vision_guided or fusion.language_guided else 0)
        ],
        "mask_decoder": MutualAwareMaskDecoder(
            fusion.dim,
            decoder.heads,
            decoder.layers,
            decoder.ffn_dim,
            decoder.mask_dim,
            fine_dim=encoder.stem[1] if decoder.fine and encoder.stem else 0,
            query_token=decoder.query_token,
            no_target_evidence=decoder.no_target_evidence,
        ),
    }


def _sam_parts(settings: ModelSettings) -> dict[str, Any]:
    """The paper's baseline: deep features, no Mutual-Aware blocks, SAM's own decoder."""
    dim, decoder = settings.fusion.dim, settings.decoder
    try:
        mask_decoder = SamMaskDecoder(dim, decoder.heads, decoder.layers, decoder.ffn_dim)
    except ModuleNotFoundError as error:
        raise ModelError(
            "decoder.kind is 'sam', but the package segment_anything is not installed",
            "pip install segment-anything",
        ) from error
    except ValueError as error:
        raise ModelError(
            f"decoder.kind 'sam': {error}", "change fusion.dim or decoder.heads"
        ) from error
    return {
        "feature_enhancement": DeepFeatures(settings.image_encoder.out_dim, dim),
        "attention": [],
        "mask_decoder": mask_decoder,
    }


def _end_of_sentence(text: TextParts) -> int | None:
    """The token whose vector stands for the sentence: CLIP's closing one; None is BERT's first."""
    if "clip" not in text.config.model_type:
        return None
    # Of the tokenizer, since OpenAI's CLIP folders name a wrong eos_token_id in config.json.
    return int(text.tokenizer.encode([""]).input_ids[0, -1])


def new_text_parts(settings: TextEncoderSettings) -> TextParts:
    """A text encoder to start from: a pretrained one from ``source``, or the small BERT."""
    from risam_cli.text_source import pretrained_text, small_bert

    if settings.source is not None:
        parts = TextParts(*pretrained_text(settings.source, settings.max_tokens))
    else:
        parts = TextParts(
            *small_bert(settings.hidden, settings.layers, settings.heads, settings.max_tokens)
        )
    add_lora(parts.backbone, parts.config.model_type, settings)
    return parts


def add_lora(backbone: nn.Module, kind: str, settings: TextEncoderSettings) -> None:
    """Adds the side paths of the settings, if they ask for any; see :mod:`risam_cli.lora`."""
    side = settings.lora
    if side is not None:
        lora.add_lora(backbone, kind, side.rank, side.alpha, side.dropout, side.targets)


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
    from risam_cli.text_source import text_from_folder

    if compiled and device.type != "cuda":
        raise UsageError(
            f"--compile on {device}: compiled blocks are slower there than PyTorch's own kernels",
            "leave --compile out, or name a CUDA GPU by --device",
        )

    folder = checkpoints.find_model(source)
    stored = checkpoints.read_model_folder(folder)
    settings = check(ModelSettings, stored.settings, str(folder / checkpoints.CONFIG_FILE))
    needs = frozen.parse_needed(stored.needs, str(folder / checkpoints.CONFIG_FILE))
    _require_plausible(stored, settings, needs)
    text = TextParts(*text_from_folder(stored, settings.text_encoder.max_tokens))
    model = build_model(settings, text)
    for needed in needs:
        frozen.fill(model, needed, folder)
    weights, side = lora.split_lora(checkpoints.read_tensors(folder / checkpoints.WEIGHTS_FILE))
    checkpoints.load_weights(model, stored, weights, lambda name: frozen.covers(needs, name))
    _load_lora(model, side, settings.text_encoder, stored, keep=keep_lora)
    if precision != torch.float32:
        model.image_encoder.hold_weights_in(precision)
    model.to(device).eval().requires_grad_(False)
    if compiled:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "risam" / "compiled"))
        model.image_encoder.compile_blocks()
    return LoadedModel(
        model=model,
        tokenizer=text.tokenizer,
        settings=settings,
        image_size=settings.image_encoder.image_size,
        threshold=settings.threshold,
        no_target_threshold=settings.no_target_threshold,
        name=folder.name,
        hash=stored.hash,
        text_config=stored.text_config,
        needs=needs,
    )


def _require_plausible(
    stored: checkpoints.StoredModel, settings: ModelSettings, needs: Sequence[frozen.Needed]
) -> None:
    """Before any memory is taken on the word of config.json; see :mod:`risam_cli.plausible`."""
    elements, tensors = checkpoints.count_weights(stored.folder / checkpoints.WEIGHTS_FILE)
    for needed in needs:
        # A file with this size and hash is there; a weight takes a byte at least.
        frozen.find(needed, stored.folder)
        elements, tensors = elements + needed.size, tensors + needed.size
    where = stored.folder / checkpoints.CONFIG_FILE
    require_plausible(settings, stored.text_config, elements, tensors, where)


def _load_lora(
    model: Risam,
    side: Mapping[str, Tensor],
    settings: TextEncoderSettings,
    stored: checkpoints.StoredModel,
    *,
    keep: bool,
) -> None:
    where = str(stored.folder / checkpoints.WEIGHTS_FILE)
    if (settings.lora is None) != (not side):
        raise ModelError(
            f"{where} holds {len(side)} LoRA weights, its config.json says otherwise",
            "take the folder anew",
        )
    if settings.lora is None:
        return
    if not keep:
        lora.merge_lora(model, side, settings.lora.scale, where)
        return
    add_lora(model.text_encoder.backbone, str(stored.text_config.get("model_type")), settings)
    own = {name: tensor for name, tensor in model.state_dict().items() if lora.is_lora(name)}
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in side.items()}:
        raise ModelError(f"{where}: its LoRA weights fit no other layers", "take the folder anew")
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
    return problems
