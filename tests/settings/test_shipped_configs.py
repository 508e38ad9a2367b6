"""Every settings file that comes along trains: two steps of it, made small, on made data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from support.made_parts import ENCODER, sam_file
from support.paths import REPO
from support.settings_files import complete, load_settings
from support.text_folders import make_bert

from risam_cli.cli import root
from risam_cli.data.refshapes.vocabulary import VOCABULARY
from risam_cli.settings.load import check, merge, read_settings_file
from risam_cli.settings.model import ModelSettings
from risam_cli.settings.train import TrainSettings
from risam_cli.training.loop import train
from risam_cli.weights.load import load_model

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
FULL_SIZE = [path for path in CONFIGS if "vit" in path.stem]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, sam.pth, bert/ and my.json; read-only."""
    folder = tmp_path_factory.mktemp("made")
    asked = ["--splits", "train,val", "--scenes", "4", "--expressions", "3", "--size", "128"]
    for more in ([], ["--family", "refshapes", "--format", "coco"]):
        own = ["-o", str(folder / "data"), *asked, *more]
        done = CliRunner().invoke(root, ["refshapes", *own], standalone_mode=False)
        assert done.exception is None, done.exception
    sam_file(folder / "sam.pth")
    make_bert(folder / "bert", VOCABULARY)
    return folder


def _small(path: Path, made: Path, output: Path) -> dict[str, Any]:
    """The file's settings with every size made small and every path led to what was made."""
    raw = read_settings_file(path)
    model: dict[str, Any] = {}
    if raw["model"]["preset"].startswith("vit"):
        model = {
            "image_encoder": {**ENCODER, "checkpoint": str(made / "sam.pth")},
            "text_encoder": {"source": str(made / "bert")},
            "fusion": {"dim": 32, "heads": 2, "blocks": 2, "ffn_dim": 32},
            "decoder": {"heads": 2, "layers": 2, "ffn_dim": 32, "mask_dim": 8},
        }
    small = {
        "output": str(output), "workers": 0, "threads": 1, "device": "cpu", "precision": "fp32",
        "model": model, "loss": {"target_size": 64}, "validate_every": 2, "checkpoint_every": 2,
        "log_every": 1, "pictures": 1,
    }  # fmt: skip
    raw = merge(raw, small)
    raw["stages"] = [
        {
            **stage,
            "steps": 2,
            "images_per_step": 2,
            "accumulate": min(2, stage.get("accumulate", 1)),
        }
        for stage in raw["stages"]
    ]
    for data in [raw["train"], *filter(None, raw["val"].values())]:
        for one in data.get("members", {"": data}).values():
            if one["dataset"] == "refshapes":
                one["scenes"] = 2
            elif one["dataset"] == "coco":
                one["limit"] = 2
                if "annotations" in one:
                    one["annotations"] = str(made / "data/refshapes/coco/train.json")
            else:
                one.update(root=str(made / "data"), limit=2)
    return raw


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_a_full_size_file_trains_once_it_is_made_small(
    path: Path, made: Path, tmp_path: Path
) -> None:
    raw = complete(_small(path, made, tmp_path / "run"))
    settings = check(TrainSettings, raw, str(path))
    best = train(settings, resume=False)
    config = json.loads((best / "config.json").read_text())
    assert {needed["name"] for needed in config["needs"]} == {"sam.pth", "bert"}
    assert not load_model(best, device=torch.device("cpu")).model.training
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    # The figure that best/ is chosen by is there under its name.
    assert any(key.endswith(f".{settings.best_by}") for row in rows for key in row)


@pytest.mark.parametrize(
    "name",
    [
        "refshapes_tiny",
        "refshapes_tiny_more",
        "refshapes_tiny_wide",
        "refshapes_tiny_deep",
        "refshapes_tiny_long",
        "refshapes_wide",
        "refshapes_wide_more",
    ],
)
def test_the_small_models_files_train(name: str, made: Path, tmp_path: Path) -> None:
    raw = _small(REPO / f"configs/{name}.yaml", made, tmp_path / "run")
    model = raw["model"]
    if raw.get("init_from") is not None:
        # The first half's best is not shipped, its heir is, whose block has another form.
        raw["init_from"] = "refshapes-tiny"
        form = {"vision_guided_reads": "words", "identity_start": "none"}
        model = merge(model, {"fusion": form, "image_encoder": {"stem_in_deep": True}})
    else:
        model = merge(model, {"fusion": {"blocks": 1}, "image_encoder": {"image_size": 128}})
    settings = check(TrainSettings, complete({**raw, "model": model}), name)
    assert train(settings, resume=False).is_dir()


def test_every_shipped_file_is_tried(made: Path) -> None:
    tried = {*FULL_SIZE, *(p for p in CONFIGS if p.stem.startswith("refshapes"))}
    assert {p.stem for p in CONFIGS} - {p.stem for p in tried} == {"finetune_own_data"}


# --- data of one's own ----------------------------------------------------------------------------

QUICK = ("stages.0.steps=2", "workers=0", "threads=1", "device=cpu", "pictures=1")


def test_own_data_need_one_setting(made: Path, tmp_path: Path) -> None:
    annotations = made / "data/refshapes/coco/train.json"
    settings = load_settings(
        REPO / "configs/finetune_own_data.yaml",
        [f"train.annotations={annotations}", f"output={tmp_path / 'run'}", *QUICK],
    )
    bundled = json.loads((REPO / "risam_cli/bundled/refshapes-tiny/config.json").read_text())
    own = merge(bundled["model"], {"text_encoder": {"learn_words": True}})
    assert settings.model == check(ModelSettings, own, "the bundled model")
    best = train(settings, resume=False)
    load_model(best, device=torch.device("cpu"))
    resolved = yaml.safe_load((tmp_path / "run/config.resolved.yaml").read_text())
    assert resolved["val"]["mine"]["annotations"] == str(annotations)


def test_the_network_may_be_left_to_the_folder_or_changed_beside_it(made: Path) -> None:
    path = REPO / "configs/finetune_own_data.yaml"
    settings = load_settings(path, ["model.image_encoder.adapter_dim=8"])
    assert settings.model.image_encoder.adapter_dim == 8
    assert settings.model.image_encoder.dim == load_settings(path).model.image_encoder.dim


def test_a_validation_file_of_its_own_wins(made: Path) -> None:
    settings = load_settings(
        REPO / "configs/finetune_own_data.yaml",
        ["val.mine.annotations=val.json", "val.mine.only_every=null", "train.images=here"],
    )
    mine: Any = settings.val["mine"]
    assert (mine.annotations, mine.images, mine.only_every) == ("val.json", None, None)


def test_a_set_that_is_null_is_left_out_and_other_data_take_a_section_as_a_whole(
    tmp_path: Path,
) -> None:
    base = yaml.safe_dump(_minimal())
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "more.yaml").write_text(
        "extends: base.yaml\n"
        "train: {dataset: coco, annotations: a.json}\n"
        "val: {one: null, two: {dataset: coco}}\n"
    )
    settings = load_settings(tmp_path / "more.yaml")
    assert settings.train.model_dump()["annotations"] == "a.json"
    assert list(settings.val) == ["two"]


def _minimal() -> dict[str, Any]:
    return {
        "name": "x", "output": "x",
        "model": {"preset": "tiny", "text_encoder": {"vocabulary": "refshapes"}},
        "train": {"dataset": "refcoco", "root": "data", "split": "train"},
        "val": {"one": {"dataset": "refcoco", "root": "data", "split": "val"}},
        "stages": [{"name": "a", "kind": "referring", "steps": 1, "images_per_step": 1,
                    "learning_rate": 0.001}],
    }  # fmt: skip
