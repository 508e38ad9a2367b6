"""The paper's baseline "directly using SAM": its own mask decoder, prompted by the sentence.

SAM's classes come out of the package ``segment_anything`` (Apache-2.0) and are not copied here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from risam_cli.model.layers import MLP
from risam_cli.model.mask_decoder import Decoded, MaskDecoder
from risam_cli.model.streams import LinguisticStream, VisualStream

_PRIVATE_NAME = "_risam_segment_anything_modeling"


def segment_anything_modeling() -> ModuleType:
    """The package ``segment_anything.modeling``, without running ``segment_anything`` itself.

    ``segment_anything/__init__.py`` needs torchvision, for its interactive predictor only; its
    folder ``modeling`` needs nothing but torch, so it is loaded by its place, under a name of
    our own.

    Raises:
        ModuleNotFoundError: where the package is not installed.
    """
    if _PRIVATE_NAME in sys.modules:
        return sys.modules[_PRIVATE_NAME]
    found = importlib.util.find_spec("segment_anything")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("no package segment_anything", name="segment_anything")
    folder = Path(found.submodule_search_locations[0]) / "modeling"
    spec = importlib.util.spec_from_file_location(
        _PRIVATE_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise ModuleNotFoundError(f"no {folder}", name="segment_anything.modeling")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PRIVATE_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_PRIVATE_NAME]
        raise
    return module


class DeepFeatures(nn.Module):
    """Stands in for Feature Enhancement: the deep features alone, as SAM's decoder knows them.

    Args:
        deep_dim, dim: channels in and out; a 1×1 convolution between them only where they
            differ, so that SAM's own decoder sees SAM's own features.
    """

    def __init__(self, deep_dim: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(deep_dim, dim, kernel_size=1) if deep_dim != dim else None

    def forward(self, shallow: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        """Maps the three taps to (B, dim, h, w); the first two are not looked at."""
        return deep if self.project is None else self.project(deep)


class SamMaskDecoder(MaskDecoder):
    """SAM's mask decoder with the sentence as its sparse prompt (Kirillov et al. 2023).

    SAM's: position encodings, the "no mask" embedding, IoU token, four mask tokens, two-way
    transformer, upscaling, mask 0 and its predicted IoU, with module names that its checkpoints
    fit. Ours: the projection that makes the sentence feature a prompt, and one more token,
    appended to the others, whose output tells whether anything fits at all. The heads for SAM's
    three ambiguous masks are left out; their tokens stay, since the others attend to them.

    It looks at neither words nor stride-4 features.

    Args:
        dim: width, a multiple of 8; heads, layers, ffn_dim: of the two-way transformer. SAM's
            own are 256, 8, 2 and 2048.

    Raises:
        ModuleNotFoundError: where the package ``segment_anything`` is not installed.
    """

    SAM_SIZE: ClassVar[tuple[int, int, int, int]] = (256, 8, 2, 2048)
    SAM_PARTS: ClassVar[tuple[str, ...]] = ("mask_decoder.", "pe_layer.", "no_mask_embed.")

    def __init__(self, dim: int, heads: int, layers: int, ffn_dim: int) -> None:
        super().__init__()
        if dim % 8 or (dim // 2) % heads:
            raise ValueError(f"dim {dim} must be divisible by 8, and its half by heads {heads}")
        self.size = (dim, heads, layers, ffn_dim)
        sam = segment_anything_modeling()
        prompt_encoder = sys.modules[f"{sam.__name__}.prompt_encoder"]
        self.pe_layer = prompt_encoder.PositionEmbeddingRandom(dim // 2)
        self.no_mask_embed = nn.Embedding(1, dim)
        decoder: Any = sam.MaskDecoder(
            transformer_dim=dim,
            transformer=sam.TwoWayTransformer(
                depth=layers, embedding_dim=dim, num_heads=heads, mlp_dim=ffn_dim
            ),
        )
        decoder.output_hypernetworks_mlps = decoder.output_hypernetworks_mlps[:1]
        self.mask_decoder = decoder
        self.project_sentence = nn.Linear(dim, dim)
        self.no_target_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.no_target_head = MLP([dim, dim, 1])

    def forward(self, visual: VisualStream, language: LinguisticStream) -> Decoded:
        """Decodes E expressions from deep features and the sentence; grids of any size."""
        features, grid = visual.of_expressions(), visual.grid  # (E, N, C)
        decoder = self.mask_decoder
        count = len(features)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])  # (1 + 4, C)
        tokens = torch.cat(
            [
                own.expand(count, -1, -1),
                self.project_sentence(language.sentence)[:, None],
                self.no_target_token.expand(count, 1, -1),
            ],
            dim=1,
        )  # (E, 7, C)

        # SAM's predict_masks takes many prompts of one image; here every row has its own.
        image = features.transpose(1, 2).unflatten(2, grid)  # (E, C, h, w)
        image = image + self.no_mask_embed.weight[:, :, None, None]
        position = self.pe_layer(grid)[None].to(image.dtype).expand(count, -1, -1, -1)
        tokens, pixels = decoder.transformer(image, position, tokens)

        pixels = pixels.transpose(1, 2).unflatten(2, grid)  # (E, C, h, w)
        pixels = decoder.output_upscaling(pixels)  # (E, C/8, 4h, 4w)
        weights = decoder.output_hypernetworks_mlps[0](tokens[:, 1])
        mask = torch.einsum("ec,echw->ehw", weights, pixels)
        iou = decoder.iou_prediction_head(tokens[:, 0])[:, 0]
        # SAM's head is free to leave 0..1. What is read is clamped, what is learned is not.
        iou = iou + (iou.clamp(0, 1) - iou).detach()
        return Decoded(mask, iou, self.no_target_head(tokens[:, -1])[:, 0])
