"""The named sizes: what they hold, name by name, and how much."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.networks import reference_encoder

from risam_cli.model.risam import Risam
from risam_cli.settings.load import check
from risam_cli.settings.model import ModelSettings
from risam_cli.settings.presets import PRESETS
from risam_cli.weights.build import build_model, new_text_parts
from risam_cli.weights.text import TextParts

# Of segment_anything's encoders, counted on its own modules below.
ENCODERS = {"vit_b": 89_670_912, "vit_l": 308_278_272, "vit_h": 637_026_048}
# Parameters: all; all but the two encoders'; adapters. With a BERT-base text encoder.
TOTALS = {
    "vit_b": (209_582_146, 9_829_954, 1_189_632),
    "vit_l": (430_302_786, 9_961_026, 3_171_840),
    "vit_h": (761_295_682, 10_092_098, 5_285_888),
}
TINY = {
    "image_encoder": 3_223_608,
    "text_encoder": 311_296,
    "feature_enhancement": 263_808,
    "attention": 695_808,
    "mask_decoder": 556_866,
    "project_position": 16_512,
}


def _meta(preset: str, **changes: Any) -> Risam:
    """The network without memory for its weights, a small BERT as its text encoder."""
    raw = {"preset": preset, "text_encoder": {"vocabulary": "refshapes"}, **changes}
    settings = check(ModelSettings, raw, preset)
    with torch.device("meta"):
        return build_model(settings, new_text_parts(settings.text_encoder))


def _meta_with_bert(preset: str) -> Risam:
    from transformers import BertConfig, BertModel

    raw = {"preset": preset, "text_encoder": {"vocabulary": "refshapes"}}
    settings, config = check(ModelSettings, raw, preset), BertConfig()
    tokenizer = new_text_parts(settings.text_encoder).tokenizer
    with torch.device("meta"):
        backbone = BertModel(config, add_pooling_layer=False)
        return build_model(settings, TextParts(backbone, config, tokenizer))


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("preset", ENCODERS)
def test_a_sam_presets_encoder_has_sams_weights_and_adapters(preset: str) -> None:
    values = PRESETS[preset]["image_encoder"]
    with torch.device("meta"):
        ours = _meta(preset).image_encoder
        reference = reference_encoder(
            grid=64, window=14, dim=values["dim"], depth=values["depth"], heads=values["heads"],
            global_blocks=values["global_blocks"], out_dim=256,
        )  # fmt: skip
    own = {n: p.shape for n, p in ours.state_dict().items() if ".adapter." not in n}
    assert own == {n: p.shape for n, p in reference.state_dict().items()}
    assert _count(reference.parameters()) == ENCODERS[preset]
    width, hidden = values["dim"], values["adapter_dim"]
    adapters = values["depth"] * (2 * width * hidden + width + hidden)
    assert _count(ours.parameters()) == ENCODERS[preset] + adapters


@pytest.mark.parametrize("preset", TOTALS)
def test_parameters_all_and_trainable(preset: str) -> None:
    """Trainable with a frozen text encoder: the adapters, and all behind the two encoders."""
    model = _meta_with_bert(preset)
    encoder = _count(model.image_encoder.parameters())
    total, adapters = _count(model.parameters()), encoder - ENCODERS[preset]
    text = _count(model.text_encoder.backbone.parameters())
    assert text == 108_891_648
    assert (total, total - encoder - text, adapters) == TOTALS[preset]
    held = sum(_count(b.adapter.parameters()) for b in model.image_encoder.blocks)
    assert held == adapters


def test_the_tiny_preset_part_by_part() -> None:
    found = {name: _count(part.parameters()) for name, part in _meta("tiny").named_children()}
    assert found == TINY
    assert sum(found.values()) == 5_067_898


# --- exact names: a saved model of today must load tomorrow ---------------------------------------


def _prefixes(model: Risam) -> set[str]:
    """Names of all weights without their last part, block numbers as #."""
    return {re.sub(r"\.\d+(?=\.|$)", ".#", n.rpartition(".")[0]) for n in model.state_dict()}


def _under(prefix: str, names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names.split()}


def _attention(prefix: str) -> set[str]:
    return _under(prefix, "query key value output")


_BRANCH = "value output norm1 norm2 ffn.layers.#"
_LAYER = "mask_decoder.layers.#"
COMMON = {
    "image_encoder",
    "mask_decoder",
    "project_position",
    *_under("image_encoder.blocks.#", "norm1 norm2 attn attn.qkv attn.proj mlp.lin1 mlp.lin2"),
    "image_encoder.neck.#",
    *_under("feature_enhancement", "shallow.# middle.# deep.# mix.# norm"),
    *_under("attention.#", "affinity_vision affinity_language"),
    *_under("attention.#.vision_guided", _BRANCH),
    *_under("attention.#.language_guided", _BRANCH),
    *_under(_LAYER, "norm1 norm2 norm3 norm4 mlp.layers.#"),
    *_attention(f"{_LAYER}.self_attention"),
    *_attention(f"{_LAYER}.tokens_to_pixels"),
    *_attention(f"{_LAYER}.pixels_to_tokens"),
    *_attention("mask_decoder.final_attention"),
    *_under("mask_decoder", "project_sentence final_norm up1 up1_norm up2"),
    *_under("mask_decoder", "mask_head.layers.# iou_head.layers.# no_target_head.layers.#"),
    *_under("text_encoder", "project_words.# project_sentence.#"),
    *_under("text_encoder.backbone.embeddings", "word_embeddings position_embeddings"),
    *_under("text_encoder.backbone.embeddings", "token_type_embeddings LayerNorm"),
    *_under("text_encoder.backbone.encoder.layer.#.attention.self", "query key value"),
    *_under("text_encoder.backbone.encoder.layer.#.attention.output", "dense LayerNorm"),
    *_under("text_encoder.backbone.encoder.layer.#", "intermediate.dense"),
    *_under("text_encoder.backbone.encoder.layer.#.output", "dense LayerNorm"),
}
OWN = {
    "tiny": {
        *_under("image_encoder.patch_embed.to_fine.#", "#"),
        *_under("image_encoder.patch_embed", "to_grid.# to_grid.#.#"),
        *_under("mask_decoder", "fine sharpen"),
    },
    "vit_b": {
        "image_encoder.patch_embed.proj",
        *_under("image_encoder.blocks.#.adapter", "down up"),
    },
}


@pytest.mark.parametrize("preset", OWN)
def test_the_names_of_all_weights(preset: str) -> None:
    assert _prefixes(_meta(preset)) == COMMON | OWN[preset]


# --------------------------------------------------------------------------------------------------


def test_the_taps_end_thirds_and_the_last_is_the_last_block() -> None:
    for name, preset in PRESETS.items():
        values = preset["image_encoder"]
        third = values["depth"] / 3
        assert values["taps"][2] == values["depth"] - 1, name
        for number, tap in enumerate(values["taps"][:2], start=1):
            assert abs(tap + 1 - number * third) < 1, name
        assert max(values["global_blocks"]) == values["depth"] - 1


def test_what_stands_beside_a_preset_wins_key_by_key() -> None:
    model = _meta("vit_b", image_encoder={"adapter_dim": 0}, fusion={"blocks": 1})
    assert all(block.adapter is None for block in model.image_encoder.blocks)
    assert len(model.attention) == 1
    assert _count(model.image_encoder.parameters()) == ENCODERS["vit_b"]
