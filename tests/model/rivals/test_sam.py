"""The baseline "directly using SAM" against segment_anything's and transformers' own decoders."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import (
    TEXTS,
    in_double,
    noise,
    prepared,
    randomize,
    reference_encoder,
    relative_error,
    save_pth,
    small_model,
    small_settings,
    streams,
)
from torch import Tensor, nn

from risam_cli.errors import ModelError
from risam_cli.model.mask_decoder import Decoded
from risam_cli.model.rivals import sam
from risam_cli.model.rivals.sam import DeepFeatures, SamMaskDecoder, segment_anything_modeling
from risam_cli.weights.build import build_model, new_text_parts
from risam_cli.weights.folder import write_model_folder
from risam_cli.weights.load import load_model
from risam_cli.weights.sam import load_sam_decoder

SAM: dict[str, Any] = {"kind": "sam"}


def _reference(dim: int, heads: int, layers: int, ffn_dim: int) -> tuple[nn.Module, nn.Module]:
    """segment_anything's prompt encoder and mask decoder, as its ``build_sam`` makes them."""
    sam: Any = segment_anything_modeling()
    prompt = sam.PromptEncoder(
        embed_dim=dim, image_embedding_size=(5, 7), input_image_size=(80, 112), mask_in_chans=16
    )
    decoder = sam.MaskDecoder(
        transformer_dim=dim,
        transformer=sam.TwoWayTransformer(
            depth=layers, embedding_dim=dim, num_heads=heads, mlp_dim=ffn_dim
        ),
    )
    return randomize(prompt, 1).eval(), randomize(decoder, 2).eval()


def _decode(decoder: SamMaskDecoder, image: Tensor, sentence: Tensor) -> Decoded:
    """Runs the baseline on (E, C, h, w), with nonsense for all that it must not look at."""
    count, dim, height, width = image.shape
    decoded: Decoded = decoder(
        *streams(
            image.flatten(2).transpose(1, 2),
            torch.full((height * width, dim), float("nan")),
            torch.full((count, 3, dim), float("nan")),
            torch.zeros(count, 3, dtype=torch.bool),
            owner=torch.full((count,), 99),
            sentence=sentence,
            grid=(height, width),
            per_expression=True,
        )
    )
    return decoded


@torch.no_grad()
def test_it_is_sams_decoder_prompted_by_sentence_and_no_target_token(tmp_path: Path) -> None:
    """The reference decodes one image at a time; any grid, here 5 by 7."""
    prompt, reference = _reference(*SamMaskDecoder.SAM_SIZE)
    path = save_pth(
        tmp_path / "sam.pth", reference_encoder(), prompt_encoder=prompt, mask_decoder=reference
    )
    ours = randomize(SamMaskDecoder(*SamMaskDecoder.SAM_SIZE), 5).eval()
    load_sam_decoder(ours, path)
    image, sentence = noise(3, 256, 5, 7), noise(3, 256, seed=1)
    found = _decode(ours, image, sentence)
    for row in range(3):
        sparse = torch.stack([ours.project_sentence(sentence[row]), ours.no_target_token])[None]
        _, dense = prompt(None, None, None)
        masks, iou = reference(
            image_embeddings=image[row : row + 1],
            image_pe=prompt.get_dense_pe(),  # type: ignore[operator]
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        assert relative_error(found.mask_logits[row], masks[0, 0]) < 1e-5
        assert torch.allclose(found.iou[row], iou[0, 0].clamp(0, 1), atol=1e-5)


@torch.no_grad()
def test_hugging_face_weights_make_the_same_decoder(tmp_path: Path) -> None:
    from transformers import SamConfig, SamModel

    vision = {
        "hidden_size": 32, "output_channels": 256, "num_hidden_layers": 2, "mlp_dim": 64,
        "num_attention_heads": 4, "image_size": 96, "window_size": 4, "global_attn_indexes": [1],
    }  # fmt: skip
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"image_size": 96},
        # transformers' default is 1e-6, segment_anything's own blocks have PyTorch's 1e-5.
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )
    theirs = randomize(SamModel(config), 4)
    theirs.eval().save_pretrained(tmp_path)
    ours = randomize(SamMaskDecoder(*SamMaskDecoder.SAM_SIZE), 5).eval()
    load_sam_decoder(ours, tmp_path)
    image, sentence = noise(1, 256, 6, 6), noise(1, 256, seed=1)
    found = _decode(ours, image, sentence)
    sparse = torch.stack([ours.project_sentence(sentence[0]), ours.no_target_token])
    masks, iou = theirs.mask_decoder(
        image_embeddings=image,
        image_positional_embeddings=theirs.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse[None, None],
        dense_prompt_embeddings=theirs.prompt_encoder.no_mask_embed.weight.reshape(
            1, -1, 1, 1
        ).expand(1, -1, 6, 6),
        multimask_output=False,
    )[:2]
    assert relative_error(found.mask_logits[0], masks[0, 0, 0]) < 1e-5
    assert torch.allclose(found.iou[0], iou[0, 0, 0].clamp(0, 1), atol=1e-5)


def test_a_decoder_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    prompt, reference = _reference(32, 2, 2, 24)
    path = save_pth(
        tmp_path / "sam.pth", reference_encoder(), prompt_encoder=prompt, mask_decoder=reference
    )
    with pytest.raises(ModelError, match=r"is \(.*\), the model's is"):
        load_sam_decoder(SamMaskDecoder(64, 2, 2, 24), path)
    encoder_only = save_pth(tmp_path / "encoder.pth", reference_encoder())
    with pytest.raises(ModelError, match=r"lacks \d+ tensors of SAM's mask decoder"):
        load_sam_decoder(SamMaskDecoder(32, 2, 2, 24), encoder_only)


def test_predicted_iou_is_within_bounds_and_still_learns_from_outside() -> None:
    decoder = randomize(SamMaskDecoder(32, 2, 1, 24))
    last = decoder.mask_decoder.iou_prediction_head.layers[-1]
    for shift, bound in ((-5.0, 0.0), (5.0, 1.0)):
        nn.init.constant_(last.bias, shift)
        decoder.zero_grad()
        found = _decode(decoder, noise(2, 32, 4, 4), noise(2, 32, seed=1))
        assert torch.equal(found.iou, torch.full((2,), bound))
        (found.iou - 0.5).square().sum().backward()
        assert last.bias.grad[0] != 0


# --- in the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", [None, [4, 8, 12]])
def test_the_setting_builds_deep_features_and_no_blocks(stem: list[int] | None) -> None:
    model, _ = small_model(image_encoder={"stem": stem}, kind="sam", decoder={"fine": True})
    assert isinstance(model.mask_decoder, SamMaskDecoder)
    assert isinstance(model.feature_enhancement, DeepFeatures)
    assert not list(model.feature_enhancement.parameters())
    assert len(model.attention) == 0
    with torch.no_grad():
        pixels = noise(1, 3, 64, 64)
        features = model.encode_image(pixels)
        assert torch.equal(features.visual, model.image_encoder(pixels).deep)
    assert features.fine is None


def test_another_width_than_the_encoders_is_projected() -> None:
    model, tokenizer = small_model(fusion={"dim": 32}, **SAM)
    tokens = tokenizer.encode(TEXTS[:1])
    with torch.no_grad():
        found = model(
            noise(1, 3, 64, 64), tokens.input_ids, tokens.attention_mask, torch.tensor([0])
        )
    assert found.mask_logits.shape == (1, 16, 16)
    assert {n.split(".")[0] for n, _ in model.feature_enhancement.named_parameters()} == {"project"}


@torch.no_grad()
def test_a_ragged_batch_is_its_expressions_one_by_one() -> None:
    model, tokenizer = small_model(**SAM)
    in_double(model)
    image, tokens = model.encode_image(noise(3, 3, 64, 64).double()), tokenizer.encode(TEXTS)
    owner = torch.tensor([2, 0, 2, 2])
    text = model.encode_text(tokens.input_ids, tokens.attention_mask)
    together = model.decode(image, text, owner)
    for row, text_of_row in enumerate(TEXTS):
        one = tokenizer.encode([text_of_row])
        alone = model.decode(
            image.select(owner[row : row + 1]),
            model.encode_text(one.input_ids, one.attention_mask),
            torch.tensor([0]),
        )
        assert relative_error(together.mask_logits[row], alone.mask_logits[0]) < 1e-9
        assert torch.allclose(together.iou[row], alone.iou[0], atol=1e-6)
        assert torch.allclose(together.no_target_logits[row], alone.no_target_logits[0], atol=1e-5)
    assert relative_error(together.mask_logits[0], together.mask_logits[2]) > 0.01


def test_gradients_reach_all_that_the_baseline_uses() -> None:
    model, tokenizer = small_model(**SAM)
    tokens = tokenizer.encode(TEXTS[:2])
    found = model(
        noise(1, 3, 64, 64), tokens.input_ids, tokens.attention_mask, torch.tensor([0, 0])
    )
    (found.mask_logits.square().mean() + found.iou.sum() + found.no_target_logits.sum()).backward()
    without = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.grad is None}
    # A sentence is all that it reads of the text, and it has positions of its own.
    assert without == {
        "project_position",
        "text_encoder.project_words.0",
        "text_encoder.project_words.1",
    }


def test_a_model_folder_with_it_is_saved_and_loaded(tmp_path: Path) -> None:
    settings = small_settings(**SAM)
    text = new_text_parts(settings.text_encoder)
    model = randomize(build_model(settings, text)).eval()
    write_model_folder(
        tmp_path / "baseline",
        model.state_dict(),
        settings.model_dump(mode="json"),
        text.config.to_dict(),
        text.tokenizer.to_json(),
        {"name": "baseline", "figures": {}},
        "",
    )
    loaded = load_model(tmp_path / "baseline", device=torch.device("cpu"))
    tokens = loaded.tokenizer.encode(TEXTS)
    inputs = (noise(1, 3, 64, 64), tokens.input_ids, tokens.attention_mask, torch.zeros(4).long())
    prepared(model)
    with torch.no_grad():
        assert torch.equal(model(*inputs).mask_logits, loaded.model(*inputs).mask_logits)


def test_segment_anything_itself_is_never_run() -> None:
    """Its ``__init__`` needs torchvision, which nothing here may need."""
    module = segment_anything_modeling()
    assert module is segment_anything_modeling()
    assert Path(str(module.__file__)).parts[-3:] == ("segment_anything", "modeling", "__init__.py")
    assert "segment_anything" not in sys.modules
    assert "torchvision" not in sys.modules


def test_without_the_package_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "segment_anything" else find(name, *rest),
    )
    monkeypatch.delitem(sys.modules, sam._PRIVATE_NAME, raising=False)
    settings = small_settings(**SAM)
    with pytest.raises(ModelError, match="segment_anything is not installed") as raised:
        build_model(settings, new_text_parts(settings.text_encoder))
    assert raised.value.fix == "pip install segment-anything"


def test_a_width_that_sams_decoder_cannot_have_is_told() -> None:
    settings = small_settings(fusion={"dim": 12}, **SAM)
    with pytest.raises(ModelError, match="dim 12 must be divisible by 8"):
        build_model(settings, new_text_parts(settings.text_encoder))
