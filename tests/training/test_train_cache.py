"""Training on cached features: the same weights whatever it held, each image encoded once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.encodes import count_encodes
from support.training_runs import RAW, last_weights, rows, run, settings, write_coco

from risam_cli.cli import main
from risam_cli.errors import ConfigError

# The data set is gone through several times, and the encoder trained before.
STAGES = [RAW["stages"][0], {**RAW["stages"][1], "steps": 18}]


def cached(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"stages": STAGES, "feature_cache": {"folder": str(folder), **changes}}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through the encoder without gradients."""
    return count_encodes(monkeypatch, lambda: not torch.is_grad_enabled())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that makes its cache, ``cache`` beside it."""
    folder = tmp_path_factory.mktemp("first")
    run(folder / "run", **cached(folder / "cache"))
    return folder / "run"


def test_what_the_cache_held_changes_no_weight(
    first: Path, tmp_path: Path, encoded: list[int]
) -> None:
    shutil.copytree(first.parent / "cache", tmp_path / "cache")
    run(tmp_path / "run", **cached(tmp_path / "cache"))
    assert [size for size in encoded if size == 1] == []  # the dense stage's validation has more
    assert rows(tmp_path / "run") == rows(first)
    for name, weight in last_weights(first).items():
        assert torch.equal(weight, last_weights(tmp_path / "run")[name]), name


def test_each_image_is_encoded_once(first: Path, tmp_path: Path, encoded: list[int]) -> None:
    run(tmp_path / "run", **cached(tmp_path / "cache"))
    scenes = RAW["train"]["scenes"] + RAW["val"]["held out"]["scenes"]
    assert encoded.count(1) == scenes
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == scenes


def test_half_precision_learns_as_well(first: Path, tmp_path: Path) -> None:
    run(tmp_path / "plain", stages=STAGES)
    with_cache, without = (
        [row["loss"] for row in rows(folder) if row["kind"] == "train" and row["stage"] == 1]
        for folder in (first, tmp_path / "plain")
    )
    assert with_cache == pytest.approx(without, rel=0.02)


def test_a_run_cut_in_its_cached_stage_goes_on_to_the_same_bits(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is of the weights that it loads, not of those that it was built with."""
    from risam_cli.training.losses import ReferringTask

    class Killed(BaseException):
        pass

    loss, steps = ReferringTask.loss, iter(range(9))

    def killed(self: ReferringTask, *args: Any, **kwargs: Any) -> Any:
        if next(steps, None) is None:
            raise Killed
        return loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ReferringTask, "loss", killed)
        with pytest.raises(Killed):
            run(tmp_path / "run", **cached(tmp_path / "cache"))
    run(tmp_path / "run", **cached(tmp_path / "cache"), resume=True)
    for name, weight in last_weights(first).items():
        assert torch.equal(weight, last_weights(tmp_path / "run")[name]), name
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predict_and_eval_read_what_training_kept(
    tmp_path: Path, encoded: list[int], capfd: pytest.CaptureFixture[str], precision: str
) -> None:
    data = write_coco(tmp_path / "data")
    stages = [{**STAGES[1], "steps": 2}]
    run(
        tmp_path / "run", **{**cached(tmp_path / "cache"), "stages": stages},
        train=data, val={"own": data}, validate_every=2, checkpoint_every=2, precision=precision,
    )  # fmt: skip
    encoded.clear()
    asked = ["--model", tmp_path / "run" / "best", "--feature-cache", tmp_path / "cache"]
    asked += ["--device", "cpu", "--precision", precision]
    pictures = ["predict", tmp_path / "data" / "images", "-e", "red square", "-o", tmp_path / "p"]
    assert main([str(word) for word in [*pictures, *asked]]) == 0
    scored = ["eval", "--dataset", "coco", "--root", data["annotations"], "-o", tmp_path / "e"]
    scored += ["--images", data["images"]]
    assert main([str(word) for word in [*scored, *asked]]) == 0
    assert encoded == []
    assert capfd.readouterr().err.count("2 read, 0 added") == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"augment": {"flip": 0.5}}, "feature_cache needs pictures that stay the same"),
        ({"stages": [{**STAGES[1], "train_encoder": "yes"}]}, "for a frozen image encoder"),
        ({"stages": STAGES[:1]}, "for a frozen image encoder"),
        ({"feature_cache": {"folder": "x", "limit": "lots"}}, "'lots' is not a size"),
        ({"feature_cache": {"folder": "x", "limits": "1GB"}}, "did you mean 'limit'"),
    ],
)
def test_settings_that_a_cache_does_not_go_with(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises((ConfigError, ValidationError), match=told):
        settings(tmp_path, **{**cached(tmp_path / "cache"), **changes})


def test_augmentation_of_words_alone_goes_with_a_cache(tmp_path: Path) -> None:
    asked = {**cached(tmp_path), "augment": {"expressions_per_image": 2}}
    assert settings(tmp_path, **asked).feature_cache is not None
