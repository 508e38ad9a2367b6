"""Model folders that name the frozen files they need, LoRA, and folders made whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.made_parts import TEXT_MAKERS, frozen_run, sam_file
from support.networks import TEXTS, noise, relative_error
from support.training_runs import run, settings
from torch import Tensor

from risam_cli.cli import root
from risam_cli.console.console import Console
from risam_cli.errors import ConfigError, ModelError, OutputError
from risam_cli.training.stage import TrainingBuilder
from risam_cli.weights import folder as model_folders
from risam_cli.weights import frozen
from risam_cli.weights.export import export_model
from risam_cli.weights.load import LoadedModel, load_model, verify_model_folder
from risam_cli.weights.lora import merge_lora, split_lora

CPU = torch.device("cpu")
LORA = {"rank": 2, "alpha": 6.0}


@pytest.fixture(scope="module", params=["bert", "clip"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sam.pth, text/ and runs/best: two steps of adapters and LoRA; read-only."""
    folder = tmp_path_factory.mktemp(request.param)
    sam, text = sam_file(folder / "sam.pth"), TEXT_MAKERS[request.param](folder / "text")
    run(folder / "runs", **frozen_run(sam, text, lora=LORA))
    return folder


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Path:
    """The model folder alone, far from the files that it needs."""
    return shutil.copytree(made / "runs/best", tmp_path / "there/model")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(frozen.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def _answer(loaded: LoadedModel) -> Tensor:
    tokens = loaded.tokenizer.encode(TEXTS)
    with torch.no_grad():
        inputs = tokens.input_ids, tokens.attention_mask, torch.zeros(4).long()
        decoded = loaded.model(noise(1, 3, 128, 128), *inputs)
    return torch.as_tensor(decoded.mask_logits)


def _point_nowhere(folder: Path) -> None:
    """Takes the training machine's paths out of a model folder."""
    config = json.loads((folder / "config.json").read_text())
    for needed in config["needs"]:
        needed["path"] = f"/nowhere/{needed['name']}"
    model_folders.replace_config(folder, config)


# --- what is in a folder --------------------------------------------------------------------------


def test_a_folder_holds_what_was_trained_and_names_the_rest(made: Path) -> None:
    weights = load_file(made / "runs/best/model.safetensors")
    image = [name for name in weights if name.startswith("image_encoder.")]
    assert image
    assert all(".adapter." in name for name in image)
    text = [name for name in weights if name.startswith("text_encoder.backbone.")]
    assert text
    assert all(".lora_" in name for name in text)
    config = json.loads((made / "runs/best/config.json").read_text())
    assert config["format"] == 2
    needs = {needed["part"]: needed for needed in config["needs"]}
    assert needs["image_encoder"] == {
        "part": "image_encoder",
        "name": "sam.pth",
        "path": str(made / "sam.pth"),
        "size": (made / "sam.pth").stat().st_size,
        "sha256": _sha256(made / "sam.pth"),
    }
    assert needs["text_encoder"]["sha256"] == _sha256(made / "text/model.safetensors")
    assert _sha256(made / "sam.pth") in (made / "runs/best/README.md").read_text()


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_lora_is_trained_and_nothing_else_of_the_text_encoder(made: Path) -> None:
    changes = frozen_run(made / "sam.pth", made / "text", lora=LORA)
    builder = TrainingBuilder(settings(made / "other", **changes), Console())
    stage = builder.stage(builder.settings.stages[0])
    trained = {id(p) for group in stage.groups for p in group["params"]}
    for name, parameter in builder.model.named_parameters():
        if name.startswith("text_encoder.backbone."):
            assert (id(parameter) in trained) == (".lora_" in name), name
            assert parameter.requires_grad == (".lora_" in name), name
    before = load_model(made / "runs/best", device=CPU, keep_lora=True).model.state_dict()
    ups = [tensor for name, tensor in before.items() if "lora_B" in name]
    assert ups
    assert all(tensor.abs().sum() > 0 for tensor in ups), "LoRA starts at zero and was trained"


def test_merged_lora_answers_as_lora_beside_the_weights(made: Path) -> None:
    beside = load_model(made / "runs/best", device=CPU, keep_lora=True)
    merged = load_model(made / "runs/best", device=CPU)
    assert not [name for name in merged.model.state_dict() if "lora" in name]
    assert relative_error(_answer(merged), _answer(beside)) < 1e-4
    assert not [p for p in merged.model.parameters() if p.requires_grad]


# --- finding what it needs ------------------------------------------------------------------------


def _put_beside(made: Path, folder: Path) -> None:
    shutil.copy(made / "sam.pth", folder.parent)
    shutil.copytree(made / "text", folder.parent / "text")


def _put_inside(made: Path, folder: Path) -> None:
    shutil.copy(made / "sam.pth", folder)
    shutil.copytree(made / "text", folder / "text")


@pytest.mark.parametrize("where", ["path", "beside", "inside", "variable"])
def test_needed_files_are_found(
    made: Path, moved: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where != "path":
        _point_nowhere(moved)
        with pytest.raises(ModelError, match=r"needs sam\.pth"):
            load_model(moved, device=CPU)
    if where == "beside":
        _put_beside(made, moved)
    elif where == "inside":
        _put_inside(made, moved)
    elif where == "variable":
        monkeypatch.setenv(frozen.WEIGHTS_VARIABLE, f"/nothing{':'}{made}")
    assert torch.equal(
        _answer(load_model(moved, device=CPU)), _answer(load_model(made / "runs/best", device=CPU))
    )
    assert verify_model_folder(moved) == []


def test_a_missing_file_is_named_with_where_it_was_looked_for(moved: Path) -> None:
    _point_nowhere(moved)
    problems = verify_model_folder(moved)
    assert len(problems) == 1
    assert "\n" not in problems[0]
    for part in (
        "needs sam.pth (",
        "SHA-256 ",
        str(moved / "sam.pth"),
        str(moved.parent / "sam.pth"),
        "/nowhere/sam.pth",
        "RISAM_WEIGHTS",
        "risam models export",
    ):
        assert part in problems[0]


def test_another_file_of_that_name_is_refused(made: Path, moved: Path) -> None:
    _point_nowhere(moved)
    _put_beside(made, moved)
    sam_file(moved.parent / "sam.pth", seed=5)
    with pytest.raises(ModelError, match=r"sam\.pth is a different one"):
        load_model(moved, device=CPU)
    shutil.copy(made / "sam.pth", moved.parent)
    weights = moved.parent / "text/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match=r"needs text \(.*text is a different one"):
        load_model(moved, device=CPU)


@pytest.mark.parametrize(
    "needs",
    [
        "sam.pth",
        [3],
        [{"part": "image_encoder"}],
        [{"part": "mask_decoder", "name": "a", "path": "a", "size": 1, "sha256": ""}],
        [{"part": "image_encoder", "name": "a", "path": "a", "size": "1", "sha256": ""}],
        [{"part": "image_encoder", "name": "a", "path": "a", "size": 1, "sha256": ""}] * 2,
    ],
    ids=["text", "number", "short", "unknown part", "size", "twice"],
)
def test_a_damaged_list_of_needs_is_told(moved: Path, needs: Any) -> None:
    path = moved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "needs": needs}))
    with pytest.raises(ModelError, match=r"config\.json.*'needs' is damaged"):
        load_model(moved, device=CPU)
    assert len(verify_model_folder(moved)) == 1


def test_without_its_list_of_needs_a_folder_lacks_weights(moved: Path) -> None:
    path = moved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "needs": []}))
    with pytest.raises(ModelError, match=r"lacks \d+ tensors|asks for .* weights, its files hold"):
        load_model(moved, device=CPU)


# --- made whole -----------------------------------------------------------------------------------


def test_a_merged_folder_needs_nothing_and_answers_the_same(made: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    expected = _answer(load_model(made / "runs/best", device=CPU))
    export_model(made / "runs/best", whole, merged=True)
    config = json.loads((whole / "config.json").read_text())
    assert config["format"] == 1
    assert "needs" not in config
    assert config["model"]["text_encoder"]["lora"] is None
    assert config["model"]["image_encoder"]["checkpoint"] is None
    assert torch.equal(_answer(load_model(whole, device=CPU)), expected)
    assert verify_model_folder(whole) == []
    assert "Needs beside it" not in (whole / "README.md").read_text()
    card = json.loads((whole / "card.json").read_text())
    assert card["merged_from"]["hash"] == model_folders.hash_folder(made / "runs/best")
    with pytest.raises(OutputError, match="whole already exists"):
        export_model(made / "runs/best", whole, merged=True)


def test_a_plain_export_is_the_same_folder(made: Path, tmp_path: Path) -> None:
    export_model(made / "runs/best", tmp_path / "copy", merged=False)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_text() == (made / "runs/best" / name).read_text()
    held = load_file(made / "runs/best/model.safetensors")
    copy = load_file(tmp_path / "copy/model.safetensors")
    assert held.keys() == copy.keys()
    assert all(torch.equal(held[name], copy[name]) for name in held)


def test_the_commands_know_both_kinds(made: Path, tmp_path: Path) -> None:
    out, runner = tmp_path / "whole", CliRunner()
    export = ["models", "export", str(made / "runs/best"), "--merged", "-o", str(out)]
    assert runner.invoke(root, export, standalone_mode=False).exception is None
    thin = runner.invoke(root, ["models", "inspect", str(made / "runs/best")]).output
    assert "needs       sam.pth, " in thin
    assert _sha256(made / "sam.pth") in thin
    facts = json.loads(runner.invoke(root, ["models", "inspect", str(out), "--json"]).output)
    assert facts["needs"] == []
    assert facts["parameters_by_part"]["image_encoder"] > 30_000
    for folder in (made / "runs/best", out):
        found = runner.invoke(root, ["models", "verify", str(folder)], standalone_mode=False)
        assert found.return_value == 0


# --- going on from such a folder ------------------------------------------------------------------


def _builder(made: Path, tmp_path: Path, **text: Any) -> TrainingBuilder:
    changes = frozen_run(made / "sam.pth", made / "text", **text)
    changes["model"]["image_encoder"]["checkpoint"] = None
    return TrainingBuilder(
        settings(tmp_path / "run", init_from=str(made / "runs/best"), **changes), Console()
    )


def test_training_goes_on_from_a_folder_that_needs_files(made: Path, tmp_path: Path) -> None:
    builder = _builder(made, tmp_path, lora=LORA)
    expected = load_model(made / "runs/best", device=CPU, keep_lora=True).model.state_dict()
    found = builder.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {needed.part for needed in builder.needs} == {"image_encoder", "text_encoder"}
    builder.write_model(tmp_path / "again", {"name": "again", "figures": {}})
    assert torch.equal(
        _answer(load_model(tmp_path / "again", device=CPU)),
        _answer(load_model(made / "runs/best", device=CPU)),
    )


def test_lora_that_is_left_out_goes_into_weights_that_are_then_kept(
    made: Path, tmp_path: Path
) -> None:
    builder = _builder(made, tmp_path, trainable=False)
    assert [needed.part for needed in builder.needs] == ["image_encoder"]
    builder.write_model(tmp_path / "again", {"name": "again", "figures": {}})
    assert torch.equal(
        _answer(load_model(tmp_path / "again", device=CPU)),
        _answer(load_model(made / "runs/best", device=CPU)),
    )


def test_other_lora_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora is not that of init_from .*best"):
        _builder(made, tmp_path, lora={**LORA, "rank": 3})


def test_a_run_of_all_weights_keeps_them_all(made: Path, tmp_path: Path) -> None:
    changes = frozen_run(made / "sam.pth", made / "text")
    changes["stages"][0]["train_encoder"] = "yes"
    builder = TrainingBuilder(settings(tmp_path / "run", **changes), Console())
    assert builder.needs == ()


# --- LoRA that does not fit -----------------------------------------------------------------------


def test_lora_of_layers_that_are_not_there_is_told(made: Path, tmp_path: Path) -> None:
    changes = frozen_run(made / "sam.pth", made / "text", lora={**LORA, "targets": ["qeury"]})
    with pytest.raises(ConfigError, match=r"lora\.targets: no linear layer .* 'qeury'") as raised:
        TrainingBuilder(settings(tmp_path / "run", **changes), Console())
    assert "query" in raised.value.fix or "q_proj" in raised.value.fix


def test_lora_of_a_frozen_encoder_is_refused(made: Path, tmp_path: Path) -> None:
    changes = frozen_run(made / "sam.pth", made / "text", lora=LORA, trainable=False)
    with pytest.raises(ConfigError, match="leave trainable out"):
        settings(tmp_path / "run", **changes)


def test_half_a_lora_pair_is_refused(moved: Path) -> None:
    path = moved / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, path)
    for keep in (True, False):
        with pytest.raises(ModelError, match="LoRA weights"):
            load_model(moved, device=CPU, keep_lora=keep)


def test_merging_is_the_formula() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4))
    before = layer[0].weight.detach().clone()
    down, up = noise(2, 3, seed=1), noise(4, 2, seed=2)
    held = {"0.lora_A.default.weight": down, "0.lora_B.default.weight": up, "0.base_layer.bias": up}
    plain, side = split_lora(held)
    assert set(plain) == {"0.bias"}
    merge_lora(layer, side, 1.5, "here")
    assert torch.allclose(layer[0].weight, before + 1.5 * up @ down)


# --- text encoders by their name on the hub -------------------------------------------------------


def test_a_text_encoder_of_the_hub_is_found_in_the_local_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, whatever its place in the cache; never over the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="no weights at me/mine"):
        frozen.describe(frozen.TEXT_ENCODER, "me/mine")
    repository = tmp_path / "cache/models--me--mine"
    shutil.copytree(made / "text", repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    needed = frozen.describe(frozen.TEXT_ENCODER, "me/mine")
    assert (needed.name, needed.path) == ("me/mine", "me/mine")
    assert needed.sha256 == _sha256(made / "text/model.safetensors")
    assert frozen.find(needed, tmp_path / "model") == repository / "snapshots/abc"
    # A folder beside the model wins, under the last part of the name.
    shutil.copytree(made / "text", tmp_path / "mine")
    assert frozen.find(needed, tmp_path / "model") == tmp_path / "mine"
