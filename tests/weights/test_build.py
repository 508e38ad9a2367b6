"""The bridge between settings and modules: what is built, started from and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_parts import sam_file
from support.networks import (
    TEXTS,
    noise,
    randomize,
    relative_error,
    small_model,
    small_settings,
)
from support.training_runs import RAW, settings
from torch import nn

from risam_cli.console.console import Console
from risam_cli.errors import ConfigError, ModelError
from risam_cli.model.risam import Risam
from risam_cli.model.rivals.sam import SamMaskDecoder
from risam_cli.settings.train import OptimizerSettings
from risam_cli.training.identity import stage_hashes
from risam_cli.training.optimize import parameter_groups
from risam_cli.training.stage import TrainingBuilder
from risam_cli.weights.build import build_model, new_text_parts
from risam_cli.weights.folder import hash_folder
from risam_cli.weights.load import load_model

FUSION = RAW["stages"][1]
PATCHES: dict[str, Any] = {"stem": None, "adapter_dim": 4}


def _builder(tmp_path: Path, **changes: Any) -> TrainingBuilder:
    return TrainingBuilder(settings(tmp_path / "run", **changes), Console())


# --- parameter groups -----------------------------------------------------------------------------


def _net() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "a": nn.Linear(3, 2),
            "b": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
            "c": nn.Linear(2, 1),
        }
    )


def test_each_trained_weight_is_in_one_group_at_its_own_rate() -> None:
    net = _net()
    net["c"].requires_grad_(False)
    groups = parameter_groups([(net["b"], 0.1), (net, 0.2)], OptimizerSettings(weight_decay=0.3))
    members = [(id(p), g["lr"], g["weight_decay"]) for g in groups for p in g["params"]]
    assert len(members) == len({key for key, _, _ in members})
    expected = {
        id(net["a"].weight): (0.2, 0.3),
        id(net["a"].bias): (0.2, 0.0),
        id(net["b"][0].weight): (0.1, 0.3),
        id(net["b"][0].bias): (0.1, 0.0),
        id(net["b"][1].weight): (0.1, 0.0),
        id(net["b"][1].bias): (0.1, 0.0),
    }
    assert {key: (rate, decay) for key, rate, decay in members} == expected
    assert all(g["base_lr"] == g["lr"] for g in groups)


@pytest.mark.parametrize("train_encoder", ["no", "adapters", "yes"])
@pytest.mark.parametrize("trainable", [True, False])
def test_a_stage_trains_what_it_says(tmp_path: Path, train_encoder: str, trainable: bool) -> None:
    stage = {
        **FUSION,
        "train_encoder": train_encoder,
        "learning_rate": 0.01,
        "encoder_learning_rate": 0.002,
        "text_learning_rate": 0.003,
    }
    builder = _builder(
        tmp_path,
        model={
            "image_encoder": PATCHES,
            "decoder": {"fine": False},
            "text_encoder": {"trainable": trainable},
        },
        stages=[stage],
    )
    groups = builder.stage(builder.settings.stages[0]).groups
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, parameter in builder.model.named_parameters():
        if name.startswith("image_encoder"):
            trained = train_encoder == "yes" or (
                train_encoder == "adapters" and ".adapter." in name
            )
            expected = 0.002 if trained else None
        elif name.startswith("text_encoder.backbone"):
            expected = 0.003 if trainable else None
        else:
            expected = 0.01
        assert rates.get(id(parameter)) == expected, name
        assert parameter.requires_grad == (expected is not None), name


# --- models to start from -------------------------------------------------------------------------


def test_load_model_gives_all_that_predicting_needs(model_folder: Path) -> None:
    loaded = load_model(model_folder, device=torch.device("cpu"))
    assert (loaded.image_size, loaded.threshold, loaded.no_target_threshold) == (64, 0.5, 0.5)
    assert (loaded.name, loaded.hash) == ("small", hash_folder(model_folder))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_written_model_is_the_same_model(tmp_path: Path) -> None:
    builder = _builder(tmp_path)
    randomize(builder.model)
    builder.write_model(tmp_path / "best", {"name": "x", "figures": {"held out.miou": 0.5}})
    loaded = load_model(tmp_path / "best", device=torch.device("cpu"))
    tokens = loaded.tokenizer.encode(TEXTS)
    inputs = (noise(1, 3, 128, 128), tokens.input_ids, tokens.attention_mask, torch.zeros(4).long())
    with torch.no_grad():
        expected = builder.model.eval()(*inputs)
        found = loaded.model(*inputs)
    # Training holds its weights channels last, which adds up in another order.
    assert relative_error(found.mask_logits, expected.mask_logits) < 2e-5
    assert "| held out.miou | 0.5000 |" in (tmp_path / "best" / "README.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of the small training run's own network."""
    builder = _builder(tmp_path)
    randomize(builder.model, 5)
    builder.write_model(tmp_path / "base", {"name": "base", "figures": {}})
    return tmp_path / "base"


def _weights(model: Risam) -> dict[str, torch.Tensor]:
    """All but what starts at zero beside the encoder's blocks."""
    new = (".adapter.", ".stem_in_deep.")
    return {n: t for n, t in model.state_dict().items() if not any(part in n for part in new)}


@pytest.mark.parametrize("new", [{"adapter_dim": 6}, {"stem_in_deep": True}], ids=str)
@torch.no_grad()
def test_init_from_takes_every_weight_and_what_starts_at_zero_may_be_new(
    folder: Path, tmp_path: Path, new: dict[str, Any]
) -> None:
    base = load_model(folder, device=torch.device("cpu"))
    builder = _builder(tmp_path, init_from=str(folder), model={"image_encoder": new})
    expected = _weights(base.model)
    found = _weights(builder.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert all(p.requires_grad for p in builder.model.parameters())
    pixels = noise(1, 3, 128, 128)
    assert torch.allclose(
        builder.model.eval().encode_image(pixels).visual,
        base.model.encode_image(pixels).visual,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"fusion": {"blocks": 1}}, "model.fusion.blocks is 1, init_from .* has 2"),
        ({"image_encoder": {"taps": [0, 1, 2], "window": 2}}, "image_encoder.window is 2"),
        ({"decoder": {"query_token": False}}, "decoder.query_token is False"),
        ({"kind": "sam"}, "model.kind is 'sam', init_from .* has 'risam'"),
        ({"kind": "cris"}, "model.kind is 'cris'"),
        ({"text_encoder": {"hidden": 32}}, "model.text_encoder.hidden is 32"),
        ({"text_encoder": {"vocabulary": None, "source": "bert"}}, "text_encoder.source is 'bert'"),
        ({"text_encoder": {"vocabulary": "data"}}, "model.text_encoder.vocabulary is 'data'"),
    ],
)
def test_init_from_another_network_is_refused(
    folder: Path, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _builder(tmp_path, init_from=str(folder), model=model)


def test_init_from_cuts_expressions_where_the_model_that_it_makes_will(
    folder: Path, tmp_path: Path
) -> None:
    model = {"text_encoder": {"max_tokens": 5}}
    assert _builder(tmp_path, init_from=str(folder), model=model).tokenizer.max_tokens == 5


@pytest.mark.parametrize("size", ["SAM's", "another"])
def test_a_sam_checkpoint_fills_the_encoder_and_the_baselines_decoder(
    tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sam_file(tmp_path / "sam.pth")
    decoder = {"heads": 8, "layers": 2, "ffn_dim": 2048 if size == "SAM's" else 64}
    builder = _builder(
        tmp_path,
        model={
            "image_encoder": {
                "stem": None, "checkpoint": str(path), "out_dim": 256, "mlp_ratio": 4.0,
                "adapter_dim": 4,
            },
            "fusion": {"dim": 256},
            "decoder": decoder,
            "kind": "sam",
        },
        stages=[FUSION],
    )  # fmt: skip
    held = torch.load(path, weights_only=True)
    own = builder.model.image_encoder.blocks[1].attn.qkv.weight
    assert torch.equal(own, held["image_encoder.blocks.1.attn.qkv.weight"])
    assert isinstance(builder.model.mask_decoder, SamMaskDecoder)
    token = builder.model.mask_decoder.mask_decoder.iou_token.weight
    same = torch.equal(token, held["mask_decoder.iou_token.weight"])
    assert same == (size == "SAM's")
    told = capsys.readouterr().err
    assert "SHA-256" in told
    assert ("the mask decoder starts from scratch" in told) == (size == "another")


# --- what does not go together --------------------------------------------------------------------


def test_sharp_edges_need_a_stem() -> None:
    broken = small_settings(decoder={"fine": True})
    with pytest.raises(ModelError, match=r"decoder\.fine needs stride-4 features"):
        build_model(broken, new_text_parts(broken.text_encoder))


def test_the_stem_in_the_deep_features_needs_a_stem() -> None:
    broken = small_settings(image_encoder={"stem": None, "stem_in_deep": True})
    with pytest.raises(ModelError, match=r"stem_in_deep needs a convolutional stem"):
        build_model(broken, new_text_parts(broken.text_encoder))


def test_without_either_branch_there_are_no_blocks() -> None:
    """Else their affinity would be computed for nobody, and never trained."""
    model, _ = small_model(fusion={"vision_guided": False, "language_guided": False})
    assert len(model.attention) == 0
    assert len(small_model(fusion={"vision_guided": False})[0].attention) == 2


def test_stage_hashes_bind_what_bears_on_the_weights(tmp_path: Path) -> None:
    base = stage_hashes(settings(tmp_path))
    assert len(set(base)) == 2

    def changed(**changes: Any) -> list[bool]:
        found = stage_hashes(settings(changes.pop("output", tmp_path), **changes))
        return [a != b for a, b in zip(found, base, strict=True)]

    assert changed(seed=4) == [True, True]
    assert changed(model={"fusion": {"blocks": 1}}) == [True, True]
    assert changed(loss={"dice": 3.0}) == [False, True]
    assert changed(train={**RAW["train"], "unknown_word_rate": 0.2}) == [False, True]
    assert changed(train={**RAW["train"], "scenes": 13}) == [True, True]
    assert changed(stages=[RAW["stages"][0], {**FUSION, "steps": 3}]) == [False, True]
    assert changed(log_every=9, validate_every=3, workers=1) == [False, False]
    assert changed(output=tmp_path / "elsewhere") == [False, False]
