"""SAM files and text folders of the published layouts, made small; settings that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from risam_cli.model.rivals.sam import segment_anything_modeling
from support.networks import randomize, reference_encoder, save_pth
from support.text_folders import make_bert, make_clip
from support.training_runs import RAW

TEXT_MAKERS = {"bert": make_bert, "clip": make_clip}
# Settings of an image encoder that sam_file fits.
ENCODER: dict[str, Any] = {
    "stem": None,
    "image_size": 128,
    "patch_size": 16,
    "dim": 32,
    "depth": 3,
    "heads": 2,
    "mlp_ratio": 4.0,
    "out_dim": 256,
    "window": 4,
    "global_blocks": [2],
    "taps": [0, 1, 2],
    "adapter_dim": 4,
}


def sam_file(path: Path, seed: int = 0, dim: int = 32) -> Path:
    """A SAM of the small network's encoder, with a decoder as large as SAM's own."""
    reference = reference_encoder(
        grid=8, window=4, dim=dim, heads=2, depth=3, global_blocks=(2,), out_dim=256, seed=seed
    )
    sam: Any = segment_anything_modeling()
    decoder = sam.MaskDecoder(
        transformer_dim=256,
        transformer=sam.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048),
    )
    prompt = sam.PromptEncoder(
        embed_dim=256, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16
    )
    return save_pth(path, reference, mask_decoder=randomize(decoder), prompt_encoder=prompt)


def frozen_run(sam: Path, text: Path, **text_changes: Any) -> dict[str, Any]:
    """Changes to ``training_runs.RAW``: adapters in a SAM file, a text encoder from a folder."""
    return {
        "model": {
            "image_encoder": {**ENCODER, "checkpoint": str(sam)},
            "text_encoder": {
                "source": str(text),
                "vocabulary": None,
                "max_tokens": 12,
                **text_changes,
            },
            "decoder": {"fine": False},
        },
        "stages": [{**RAW["stages"][1], "steps": 2, "train_encoder": "adapters"}],
        "validate_every": 2,
    }
