"""Sizes of the network by name: plain numbers, which the settings may override one by one.

``vit_b``, ``vit_l`` and ``vit_h`` are SAM's own encoders (segment_anything/build_sam.py); their
taps are ours, at the ends of thirds. ``tiny`` is ours, made to be trained on two CPU cores.
"""

from __future__ import annotations

from typing import Any


def _sam(
    dim: int, depth: int, heads: int, global_blocks: list[int], taps: list[int]
) -> dict[str, Any]:
    return {
        "image_encoder": {
            "image_size": 1024,
            "patch_size": 16,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": 4.0,
            "out_dim": 256,
            "window": 14,
            "global_blocks": global_blocks,
            "taps": taps,
            "adapter_dim": 64,
            "stem": None,
        },
        "fusion": {"dim": 256, "heads": 8, "blocks": 3, "ffn_dim": 1024},
        "decoder": {"heads": 8, "layers": 2, "ffn_dim": 2048, "mask_dim": 32, "fine": False},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "vit_b": _sam(768, 12, 12, [2, 5, 8, 11], [3, 7, 11]),
    "vit_l": _sam(1024, 24, 16, [5, 11, 17, 23], [7, 15, 23]),
    "vit_h": _sam(1280, 32, 16, [7, 15, 23, 31], [10, 20, 31]),
    "tiny": {
        "image_encoder": {
            "image_size": 256,
            "patch_size": 16,
            "dim": 192,
            "depth": 6,
            "heads": 6,
            "mlp_ratio": 4.0,
            "out_dim": 128,
            "window": 8,
            "global_blocks": [1, 3, 4, 5],
            "taps": [1, 3, 5],
            "adapter_dim": 0,
            "stem": [24, 48, 96],
        },
        "fusion": {"dim": 128, "heads": 4, "blocks": 3, "ffn_dim": 256},
        "decoder": {"heads": 4, "layers": 2, "ffn_dim": 256, "mask_dim": 16, "fine": True},
    },
}
