"""``risam doctor``: what it says of a machine that can and of one that cannot."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from risam_cli.cli import main
from risam_cli.commands import doctor


def test_it_looks_at_every_dependency(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(doctor.LIBRARIES) == {re.split(r"[<>=;\[ ]", d)[0] for d in project["dependencies"]}


def test_a_machine_that_can(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(model_folder), "--device", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"]
    assert facts["problems"] == []
    assert facts["libraries"]["numpy"] == metadata.version("numpy")
    assert facts["device"]["chosen"] == "cpu"
    assert facts["precision"]["chosen"] == "float32"
    assert facts["model"]["image_size"] == 64
    seconds = facts["forward"]["seconds"]
    assert set(seconds) == {"total", "image", "text", "decode"}
    assert all(0 < value < 60 for value in seconds.values())
    assert facts["image_formats"]["JPEG"]


def test_the_report_is_readable(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(model_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("risam ")
    assert any(re.match(r"forward pass +[\d.]+ ms for one 256x256 image and 4", x) for x in lines)
    assert lines[-1] == "predict can run"


def test_a_missing_model_is_a_problem_with_a_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--model", str(tmp_path / "none")]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^problem: .*none", text, re.MULTILINE)
    assert re.search(r"^    fix: \w", text, re.MULTILINE)
    assert text.endswith("predict cannot run\n")


def test_a_missing_library_and_a_missing_format_are_problems(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import features

    version, check = metadata.version, features.check

    def without_rich(name: str) -> str:
        if name == "rich":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_rich)
    monkeypatch.setattr(features, "check", lambda name: name not in {"jpg", "webp"} and check(name))
    assert main(["doctor", "--model", str(model_folder), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["libraries"]["rich"] is None
    assert not facts["image_formats"]["WebP"]
    assert [entry["problem"] for entry in facts["problems"]] == [
        "rich is not installed",
        "Pillow was built without JPEG",
    ]
    assert all(entry["fix"] for entry in facts["problems"])


def test_torch_that_does_not_load_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "cannot import torch" in text
    assert "Traceback" not in text
