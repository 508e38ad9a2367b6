"""CLIP and BERT out of small folders as their publishers lay them out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import TEXTS, noise, randomize, relative_error, small_settings
from support.text_folders import clip_config, clip_tokenizer_files, make_bert, make_clip

from risam_cli.errors import ModelError
from risam_cli.model.text_encoder import TextEncoder, TextFeatures
from risam_cli.settings.model import TextEncoderSettings
from risam_cli.weights.build import build_model, new_text_parts
from risam_cli.weights.folder import write_model_folder
from risam_cli.weights.load import load_model
from risam_cli.weights.text import TextParts

MAKERS: dict[str, Callable[[Path], Path]] = {"clip": make_clip, "bert": make_bert}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("text") / request.param)


def _settings(source: Path | str, **changes: Any) -> dict[str, Any]:
    text = {"source": str(source), "vocabulary": None, "max_tokens": 12, **changes}
    return {"text_encoder": text}


def _built(source: Path, **changes: Any) -> tuple[TextEncoder, TextParts]:
    settings = small_settings(**_settings(source, **changes))
    text = new_text_parts(settings.text_encoder)
    return build_model(settings, text).text_encoder.eval(), text


def _encode(encoder: TextEncoder, text: TextParts, texts: list[str]) -> TextFeatures:
    tokens = text.tokenizer.encode(texts)
    with torch.no_grad():
        features: TextFeatures = encoder(tokens.input_ids, tokens.attention_mask)
    return features


def test_the_words_of_a_folder_come_with_its_special_tokens(folder: Path) -> None:
    _, text = _built(folder)
    ends = {"clip": ("<|startoftext|>", "<|endoftext|>"), "bert": ("[CLS]", "[SEP]")}[folder.name]
    words = [piece.text for piece in text.tokenizer.pieces("Red circle")]
    assert (words[0], words[-1]) == ends
    assert [word.removesuffix("</w>") for word in words[1:-1]] == ["red", "circle"]


def test_the_sentence_is_the_vector_that_the_model_itself_pools(folder: Path) -> None:
    encoder, text = _built(folder)
    tokens = text.tokenizer.encode(TEXTS)
    with torch.no_grad():
        output = encoder.backbone(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        hidden = output.last_hidden_state
        pooled = output.pooler_output if folder.name == "clip" else hidden[:, 0]
        expected = encoder.project_sentence(pooled)
        words = encoder.project_words(hidden)
    found = _encode(encoder, text, TEXTS)
    assert torch.allclose(found.sentence, expected, atol=1e-6)
    assert torch.allclose(found.words, words, atol=1e-6)
    assert torch.equal(found.valid, tokens.attention_mask.bool())
    # Four sentences, four vectors: that of an opening token would be one and the same in CLIP.
    assert (found.sentence[0] - found.sentence[1]).abs().max() > 0.1


def test_openais_wrong_eos_token_id_does_no_harm(tmp_path: Path) -> None:
    """Their config.json says 2, which is some letter; transformers knows, and so must we."""
    encoder, text = _built(make_clip(tmp_path / "clip", eos_token_id=2))
    tokens = text.tokenizer.encode(TEXTS)
    with torch.no_grad():
        output = encoder.backbone(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        expected = encoder.project_sentence(output.pooler_output)
    assert torch.allclose(_encode(encoder, text, TEXTS).sentence, expected, atol=1e-6)


def test_company_and_padding_change_no_expression(folder: Path) -> None:
    encoder, text = _built(folder)
    together = _encode(encoder, text, TEXTS)
    for row, one in enumerate(TEXTS):
        alone = _encode(encoder, text, [one])
        length = alone.words.shape[1]
        assert together.valid[row].sum() == length
        assert relative_error(together.words[row, :length], alone.words[0]) < 1e-5
        assert relative_error(together.sentence[row], alone.sentence[0]) < 1e-5


def test_long_expressions_are_cut_and_keep_their_end(folder: Path) -> None:
    _, text = _built(folder, max_tokens=5)
    tokens = text.tokenizer.encode(["red circle", "the small blue square left"])
    assert tokens.truncated == [False, True]
    assert tokens.input_ids.shape == (2, 5)
    assert tokens.input_ids[1, -1] == tokens.input_ids[0, 3]
    # The model's own limit holds where the settings allow more.
    assert _built(folder, max_tokens=99)[1].tokenizer.max_tokens == 16


def test_a_frozen_backbone_stays_in_evaluation_mode_without_gradients(folder: Path) -> None:
    encoder, text = _built(folder, trainable=False)
    encoder.train()
    assert not any(module.training for module in encoder.backbone.modules())
    assert encoder.project_words.training
    tokens = text.tokenizer.encode(TEXTS[:2])
    features = encoder(tokens.input_ids, tokens.attention_mask)
    (features.words.square().sum() + features.sentence.sum()).backward()
    with_gradient = {n.split(".")[0] for n, p in encoder.named_parameters() if p.grad is not None}
    assert with_gradient == {"project_words", "project_sentence"}


def test_a_trained_backbone_gets_gradients_in_every_weight(folder: Path) -> None:
    encoder, text = _built(folder)
    encoder.train()
    tokens = text.tokenizer.encode(TEXTS)
    features = encoder(tokens.input_ids, tokens.attention_mask)
    (features.words * noise(*features.words.shape)).sum().backward()
    assert [n for n, p in encoder.backbone.named_parameters() if p.grad is None] == []


def test_a_model_folder_keeps_the_text_encoder_whole(folder: Path, tmp_path: Path) -> None:
    settings = small_settings(**_settings(folder))
    text = new_text_parts(settings.text_encoder)
    model = randomize(build_model(settings, text), 3).eval()
    write_model_folder(
        tmp_path / "model",
        model.state_dict(),
        settings.model_dump(mode="json"),
        json.loads(text.config.to_json_string(use_diff=False)),
        text.tokenizer.to_json(),
        {"name": "model", "figures": {}},
        "",
    )
    loaded = load_model(tmp_path / "model", device=torch.device("cpu"))
    ours, theirs = text.tokenizer.encode(TEXTS), loaded.tokenizer.encode(TEXTS)
    kept = ours.attention_mask.bool()
    assert torch.equal(kept, theirs.attention_mask.bool())
    assert torch.equal(ours.input_ids[kept], theirs.input_ids[kept])
    with torch.no_grad():
        expected = model.encode_text(ours.input_ids, ours.attention_mask)
        found = loaded.model.encode_text(ours.input_ids, ours.attention_mask)
    assert torch.equal(found.words, expected.words)
    assert torch.equal(found.sentence, expected.sentence)


def test_half_precision_folders_become_float32(folder: Path, tmp_path: Path) -> None:
    """transformers 5 keeps what a file holds; the layers behind it are float32."""
    import shutil

    from transformers import AutoModel

    half = shutil.copytree(folder, tmp_path / "half")
    AutoModel.from_pretrained(folder).to(torch.float16).save_pretrained(half)
    encoder, text = _built(half)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.isfinite(_encode(encoder, text, TEXTS).words).all()


def test_the_text_half_of_a_whole_clip_is_taken(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    alone = make_clip(tmp_path / "text")
    whole = tmp_path / "whole"
    whole.mkdir()
    clip_tokenizer_files(whole)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    config = CLIPConfig(
        text_config=clip_config(whole).to_dict(), vision_config=vision, projection_dim=8
    )
    clip = randomize(CLIPModel(config), 5)
    clip.save_pretrained(whole)
    encoder, text = _built(whole)
    tokens = text.tokenizer.encode(TEXTS)
    assert torch.equal(tokens.input_ids, _built(alone)[1].tokenizer.encode(TEXTS).input_ids)
    with torch.no_grad():
        expected = clip.eval().text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
    found = encoder.backbone.eval()(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
    )
    assert relative_error(found.last_hidden_state, expected.last_hidden_state) < 1e-5


@pytest.mark.parametrize(
    "problem", ["absent", "no weights", "cut weights", "a weight less", "no tokenizer", "t5"]
)
def test_a_folder_that_cannot_be_loaded_is_named(tmp_path: Path, problem: str) -> None:
    source = tmp_path / "text"
    if problem != "absent":
        make_bert(source)
    if problem == "no weights":
        (source / "model.safetensors").unlink()
    if problem == "cut weights":
        path = source / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-64])
    if problem == "a weight less":
        path = source / "model.safetensors"
        tensors = load_file(path)
        del tensors["encoder.layer.1.output.dense.weight"]
        save_file(tensors, path, {"format": "pt"})
    if problem == "no tokenizer":
        (source / "vocab.txt").unlink()
        (source / "tokenizer_config.json").unlink()
    if problem == "t5":
        (source / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    settings = TextEncoderSettings(source=str(source))
    with pytest.raises(ModelError) as raised:
        new_text_parts(settings)
    assert str(source) in raised.value.message
    assert "\n" not in str(raised.value)
    assert raised.value.fix
