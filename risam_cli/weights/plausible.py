"""Whether a model's settings can belong to its weights, before memory is taken for them (ours).

A network is built before its weights are loaded into it, so a folder of a few kilobytes that claims
a width of a hundred thousand would cost all memory first and be refused then. Every size below is
part of some weight, so none can exceed what the weight files hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from risam_cli.errors import ConfigError, ModelError
from risam_cli.settings.model import ModelSettings

_MOST_WINDOW = 64  # SAM's is 14; a larger one pads small images to its size
_MOST_WEIGHTS = 1 << 33
_MOST_LAYERS = 1 << 12
_LAYERS = re.compile(r"layer|depth|block")
_WIDTHS = ("vocab_size", "max_position_embeddings", "type_vocab_size")


def require_plausible(
    settings: ModelSettings, text: Mapping[str, Any], elements: int, tensors: int, where: Path
) -> None:
    """Compare sizes with the number of values and of tensors that the weight files hold.

    Args:
        text: the stored Hugging Face configuration.
        elements: values in all weight files together, or more.
        tensors: their number, or more.

    Raises:
        ModelError: a setting asks for more than there is.
    """
    found = _beyond(settings, text, elements)
    if found is not None:
        raise ModelError(
            f"{where}: {found} weights, its files hold {elements}",
            "copy or download the folder again",
        )
    counts = {
        "image_encoder.depth": settings.image_encoder.depth,
        "fusion.blocks": settings.fusion.blocks,
        "decoder.layers": settings.decoder.layers,
        **{f"text.{k}": v for k, v in text.items() if type(v) is int and _LAYERS.search(k)},
    }
    for what, count in counts.items():
        if count > tensors:
            raise ModelError(
                f"{where}: {what} is {count}, its files hold {tensors} tensors",
                "copy or download the folder again",
            )
    grid = settings.image_encoder.image_size // settings.image_encoder.patch_size
    if settings.image_encoder.window > max(grid, _MOST_WINDOW):
        raise ModelError(
            f"{where}: image_encoder.window is {settings.image_encoder.window}, its grid {grid}",
            "copy or download the folder again",
        )


def require_affordable(settings: ModelSettings, where: str) -> None:
    """Likewise of a network that is to be trained: no machine holds what it asks for.

    Raises:
        ConfigError: a setting asks for too many weights.
    """
    text = settings.text_encoder
    sizes = {"hidden_size": text.hidden, "num_hidden_layers": text.layers}
    sizes |= {"intermediate_size": 4 * text.hidden, "max_position_embeddings": text.max_tokens}
    found = _beyond(settings, {} if text.source else sizes, _MOST_WEIGHTS)
    if found is not None:
        raise ConfigError(f"{where}: model.{found} weights", "use a smaller size")
    e, f, d = settings.image_encoder, settings.fusion, settings.decoder
    for what, count in (
        ("image_encoder.depth", e.depth),
        ("fusion.blocks", f.blocks),
        ("decoder.layers", d.layers),
        ("text_encoder.layers", text.layers),
    ):
        if count > _MOST_LAYERS:
            raise ConfigError(f"{where}: model.{what} is {count}", f"use at most {_MOST_LAYERS}")


def _beyond(settings: ModelSettings, text: Mapping[str, Any], elements: int) -> str | None:
    """What asks for more weights than there are, and for how many."""
    for what, needed in (*_network(settings), *_text(text)):
        if not needed <= elements:  # NaN is not either
            return f"{what} asks for {float(min(needed, 10**300)):.3g}"
    return None


def _network(settings: ModelSettings) -> Iterator[tuple[str, float]]:
    """Setting and the least number of weights that it stands for."""
    e, f, d = settings.image_encoder, settings.fusion, settings.decoder
    grid = e.image_size // e.patch_size
    yield "image_encoder.image_size", grid * grid * e.dim
    yield "image_encoder.dim", e.depth * e.dim * e.dim
    yield "image_encoder.mlp_ratio", e.depth * e.dim * math.floor(min(e.mlp_ratio, 1e9)) * e.dim
    yield "image_encoder.out_dim", e.out_dim * e.out_dim
    yield "image_encoder.adapter_dim", e.depth * e.dim * e.adapter_dim
    if e.stem is None:
        yield "image_encoder.patch_size", e.patch_size * e.patch_size * e.dim
    else:
        yield "image_encoder.stem", e.stem[0] * e.stem[1] + e.stem[1] * e.stem[2]
    blocks = f.blocks if f.vision_guided or f.language_guided else 0
    yield "fusion.dim", f.dim * f.dim + blocks * f.dim
    if blocks:
        yield "fusion.ffn_dim", blocks * f.dim * f.ffn_dim
    yield "decoder.ffn_dim", d.layers * f.dim * d.ffn_dim
    yield "decoder.mask_dim", d.mask_dim


def _text(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The same for a text encoder; of a kind that is not known, only what its names tell."""

    def number(key: str) -> int:
        value = values.get(key, 0)
        return value if type(value) is int and value > 0 else 0

    hidden, layers = number("hidden_size"), max(1, number("num_hidden_layers"))
    yield "text.hidden_size", layers * hidden * hidden
    yield "text.intermediate_size", layers * hidden * number("intermediate_size")
    for key in _WIDTHS:
        yield f"text.{key}", number(key) * max(hidden, 1)
