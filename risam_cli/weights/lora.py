"""LoRA (Hu et al. 2022) in a text encoder, through peft; merging needs torch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from risam_cli.errors import ConfigError, ModelError

TARGETS: Mapping[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "clip_text_model": ("q_proj", "v_proj"),
}
"""Layers that are tuned where none are named, by the kind of the text encoder."""

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(
    backbone: nn.Module,
    kind: str,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
) -> None:
    """Puts a low-rank side path beside layers of a backbone, in place; it begins at no change.

    The layer's own weights stay, under ``base_layer``, and no longer ask for gradients.

    Args:
        kind: the backbone's model type in Hugging Face's naming.
        rank: width of the side path; alpha: its output is scaled by alpha / rank.
        dropout: of the side path's input, in training.
        targets: ends of the layers' names; None takes those of ``TARGETS``.

    Raises:
        ConfigError: no layer is named so, or the kind has no default and no targets are given;
            ModelError: peft is not there.
    """
    chosen = list(targets or TARGETS.get(kind, ()))
    if not chosen:
        raise ConfigError(
            f"text_encoder.lora.targets is not given, and a {kind} has no default",
            "name the linear layers to tune, such as [query, value]",
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModelError("text_encoder.lora needs the package peft", "pip install peft") from error
    linear = {name for name, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    for target in chosen:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"text_encoder.lora.targets: no linear layer of the {kind} is named {target!r}",
                f"use some of {', '.join(ends)}",
            )
    scaled: Any = alpha  # peft only divides by it, and calls it whole
    settings = LoraConfig(
        r=rank, lora_alpha=scaled, lora_dropout=dropout, target_modules=chosen, bias="none"
    )
    inject_adapter_in_model(settings, backbone)


def is_lora(name: str) -> bool:
    """Whether a weight is a side path's."""
    return ".lora_" in name


def split_lora(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain weights under their plain names, and those of the side paths under their own."""
    side = {name: tensor for name, tensor in weights.items() if is_lora(name)}
    plain = {n.replace(".base_layer.", "."): t for n, t in weights.items() if n not in side}
    return plain, side


@torch.no_grad()
def merge_lora(model: nn.Module, side: Mapping[str, Tensor], scale: float, where: str) -> None:
    """Adds side paths to the weights of a model that has none: W + scale · B A.

    Args:
        side: pairs of weights, as :func:`split_lora` gives them; scale: alpha / rank.
        where: the file, for messages.

    Raises:
        ModelError: a side path that is not whole, or that fits no layer of the model.
    """
    own: dict[str, Any] = dict(model.named_parameters())
    bases = {name.removesuffix(_DOWN).removesuffix(_UP) for name in side}
    for base in sorted(bases):
        weight = own.get(f"{base}.weight")
        down, up = side.get(base + _DOWN), side.get(base + _UP)
        fits = (
            weight is not None
            and down is not None
            and up is not None
            and down.ndim == up.ndim == 2
            and (up.shape[0], down.shape[1]) == tuple(weight.shape)
            and up.shape[1] == down.shape[0]
        )
        if not fits or weight is None or down is None or up is None:
            raise ModelError(
                f"{where}: the LoRA weights of {base!r} are incomplete or fit no layer",
                "copy or download the folder again",
            )
        weight += scale * (up.float() @ down.float())
