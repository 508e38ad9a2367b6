"""Small networks for the tests, and the reference implementations they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from risam_cli.model.fast.prepare import prepare_for_inference
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.rivals.sam import segment_anything_modeling
from risam_cli.model.streams import LinguisticStream, VisualStream
from risam_cli.model.text_encoder import TextFeatures
from risam_cli.settings.load import check, merge
from risam_cli.settings.model import ModelSettings
from risam_cli.weights.build import build_model, new_text_parts
from risam_cli.weights.tokenizer import TextTokenizer

AnyModule = TypeVar("AnyModule", bound=nn.Module)

TEXTS = [
    "red circle",
    "the small blue square left of the green star",
    "leftmost triangle",
    "every yellow shape that is not small",
]

SMALL: dict[str, Any] = {
    "image_encoder": {
        "image_size": 64,
        "patch_size": 16,
        "dim": 24,
        "depth": 3,
        "heads": 2,
        "mlp_ratio": 2.0,
        "out_dim": 16,
        "window": 3,
        "global_blocks": [2],
        "taps": [0, 1, 2],
        "adapter_dim": 4,
        "stem": None,
    },
    "text_encoder": {"vocabulary": "refshapes", "hidden": 16, "layers": 1, "heads": 2},
    "fusion": {"dim": 16, "heads": 2, "blocks": 2, "ffn_dim": 24},
    "decoder": {"heads": 2, "layers": 2, "ffn_dim": 24, "mask_dim": 8},
}
WITH_STEM: dict[str, Any] = {
    "image_encoder": {"stem": [4, 8, 12], "adapter_dim": 0},
    "decoder": {"fine": True},
}
BLOCK_FORMS: dict[str, dict[str, Any]] = {
    "language-guided in the last block alone": {"fusion": {"language_blocks": "last"}},
    "vision-guided reads text": {"fusion": {"vision_guided_reads": "text"}},
    "vision-guided reads both": {"fusion": {"vision_guided_reads": "both"}},
    "decoder reads text": {"fusion": {"decoder_reads": "text"}},
    "decoder reads both": {"fusion": {"decoder_reads": "both"}},
    "own temperature": {"fusion": {"own_temperature": True}},
}
"""The forms of the Mutual-Aware Attention block that the settings offer."""
SWITCHES: dict[str, dict[str, Any]] = {
    "full": {},
    "stem": WITH_STEM,
    "evidence": {"decoder": {"no_target_evidence": True}},
    "no Vision-Guided Attention": {"fusion": {"vision_guided": False}},
    "no Language-Guided Attention": {"fusion": {"language_guided": False}},
    "neither": {"fusion": {"vision_guided": False, "language_guided": False}},
    "no query token": {"decoder": {"query_token": False}},
    "one layer": {"decoder": {"layers": 1}},
    **BLOCK_FORMS,
}
"""Parts switched off or on, and the forms of the block."""


def small_settings(**changes: Any) -> ModelSettings:
    """``SMALL`` with some sections changed key by key."""
    return check(ModelSettings, merge(SMALL, changes), "a test")


def small_model(seed: int = 0, **changes: Any) -> tuple[Risam, TextTokenizer]:
    """A whole network whose every weight is random: nothing is left at zero, nothing at one."""
    settings = small_settings(**changes)
    text = new_text_parts(settings.text_encoder)
    model = randomize(build_model(settings, text), seed)
    return model.eval(), text.tokenizer


@torch.no_grad()
def randomize(module: AnyModule, seed: int = 0) -> AnyModule:
    """Fills all parameters: matrices about as large as in training, scales near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * (2.0 / parameter[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return module


def prepared(module: AnyModule, precision: torch.dtype = torch.float32) -> AnyModule:
    """The same module in the forms that a CPU runs for inference."""
    prepare_for_inference(module, torch.device("cpu"), precision)
    return module


def streams(
    visual: Tensor,
    visual_position: Tensor,
    words: Tensor,
    valid: Tensor,
    *,
    owner: Tensor | None,
    word_position: Tensor | None = None,
    text: Tensor | None = None,
    sentence: Tensor | None = None,
    fine: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    per_expression: bool = False,
) -> tuple[VisualStream, LinguisticStream]:
    """The two streams; NaN in place of what is not given. Without an owner, row e is its own."""
    count, length, dim = words.shape
    own = per_expression or owner is None
    return (
        VisualStream(
            visual,
            visual_position,
            grid or (1, visual.shape[1]),
            torch.arange(count) if owner is None else owner,
            fine,
            per_expression=own,
        ),
        LinguisticStream(
            words,
            words if text is None else text,
            words.new_full((length, dim), torch.nan) if word_position is None else word_position,
            valid,
            words.new_full((count, dim), torch.nan) if sentence is None else sentence,
        ),
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(
    *,
    grid: int = 10,
    window: int = 4,
    dim: int = 32,
    heads: int = 4,
    depth: int = 4,
    global_blocks: Sequence[int] = (1, 3),
    taps: tuple[int, int, int] = (0, 2, 3),
    adapter_dim: int = 0,
    out_dim: int = 16,
) -> ImageEncoder:
    """A small encoder with SAM's patch embedding, all weights random."""
    return randomize(
        ImageEncoder(
            image_size=16 * grid,
            patch_size=16,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=4.0,
            out_dim=out_dim,
            window=window,
            global_blocks=global_blocks,
            taps=taps,
            adapter_dim=adapter_dim,
            stem=None,
        ),
        seed=7,
    ).eval()


def reference_encoder(
    *,
    grid: int = 10,
    window: int = 4,
    dim: int = 32,
    heads: int = 4,
    depth: int = 4,
    global_blocks: Sequence[int] = (1, 3),
    out_dim: int = 16,
    seed: int = 0,
) -> nn.Module:
    """segment_anything's own encoder, relative-position tables and all else random."""
    sam: Any = segment_anything_modeling()
    made: nn.Module = sam.ImageEncoderViT(
        img_size=16 * grid,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        out_chans=out_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=tuple(global_blocks),
    )
    return randomize(made, seed).eval()


def save_pth(path: Path, image_encoder: nn.Module, **others: nn.Module) -> Path:
    """A file as segment-anything's authors publish them: one plain state dict."""
    parts = {"image_encoder": image_encoder, **others}
    torch.save({f"{p}.{k}": v for p, m in parts.items() for k, v in m.state_dict().items()}, path)
    return path


def in_double(model: Risam) -> Risam:
    """The same network in double precision, where a batch's order of sums does not show."""
    model.double()
    for part in model.modules():
        if hasattr(part, "positional_encoding_gaussian_matrix"):
            part.float()  # SAM's own code multiplies it with single-precision places
    return model


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def features(
    model: Risam, grid: tuple[int, int], images: int, lengths: list[int]
) -> tuple[ImageFeatures, TextFeatures]:
    """Random ones in double precision; what stands at padded words must not matter."""
    height, width = grid
    dim, mask_dim = SMALL["fusion"]["dim"], SMALL["decoder"]["mask_dim"]
    fine = None
    if model.mask_decoder.fine is not None:
        fine = noise(images, mask_dim, 4 * height, 4 * width, seed=4).double()
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    words = noise(len(lengths), longest, dim, seed=2).double()
    text = TextFeatures(words, valid, noise(len(lengths), dim, seed=3).double())
    return ImageFeatures(noise(images, dim, height, width, seed=1).double(), fine), text
