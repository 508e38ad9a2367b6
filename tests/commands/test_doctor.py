"""``risam doctor``: what it says of a machine that can and of one that cannot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from risam_cli.cli import main
from risam_cli.commands import doctor
from risam_cli.inference.device import Advice, Measured, advise
from risam_cli.model.fast.crew import threads_of


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.01)


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
    assert facts["measured"]["read_seconds"] > 0
    assert set(facts["measured"]["encode_seconds"]) == {"fp32", "bf16"}
    assert facts["measured"]["images_per_second"] == {}
    options = [setting["option"] for setting in facts["settings"]]
    assert options == ["--precision", "--batch-size", "--workers", "--compile"]


def test_quick_loads_no_model_and_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--model", "no such model"]) == 0
    text = capsys.readouterr().out
    assert "forward pass" not in text
    assert text.endswith("nothing is missing\n")
    script = (
        "import sys; from risam_cli.cli import main; code = main(['doctor', '--quick']); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def _chosen(measured: Measured) -> dict[str, Advice]:
    return {setting.setting: setting for setting in advise(measured)}


def test_a_cpu_with_fast_bf16_and_one_without() -> None:
    fast = _chosen(Measured("cpu", 4, 0.02, {"fp32": 3.0, "bf16": 1.0}, {}))
    assert fast["precision"].value == "bf16"
    assert "3.0 times" in fast["precision"].why
    assert fast["workers"].value == "0"
    assert fast["compile"].value == "no"
    slow = _chosen(Measured("cpu", 4, 0.02, {"fp32": 1.0, "bf16": 4.0}, {}))
    assert slow["precision"].value == "fp32"


def test_a_small_model_on_a_cpu_wants_processes_that_read() -> None:
    chosen = _chosen(Measured("cpu", 8, 0.06, {"fp32": 0.02}, {}))
    assert chosen["workers"].value == "4"  # three busy ones, and a quarter more
    few = _chosen(Measured("cpu", 2, 0.06, {"fp32": 0.02}, {}))["workers"]
    assert few.value == "1"
    assert "2 cores cannot read as fast" in few.why


def test_images_side_by_side_want_images_sooner_and_have_more_threads_that_read() -> None:
    beside = _chosen(Measured("cpu", 4, 0.02, {"fp32": 0.1}, {}, lanes=4))["workers"]
    assert beside.value == "0"
    assert "every 25 ms (4 side by side)" in beside.why
    behind = _chosen(Measured("cpu", 8, 0.15, {"fp32": 0.1}, {}, lanes=4))["workers"]
    assert behind.value == "7"  # six busy ones, a quarter more, but a core for the network


def test_a_gpu_gets_the_batch_from_where_more_gains_little() -> None:
    rates = {1: 30.0, 2: 50.0, 4: 70.0, 8: 72.0}
    chosen = _chosen(Measured("cuda", 16, 0.05, {"fp32": 0.2, "bf16": 0.03}, rates))
    assert chosen["batch_size"].value == "4"
    assert chosen["precision"].value == "bf16"
    assert chosen["workers"].value == "5"  # 0.05 s each for 72 images a second, and a quarter
    assert chosen["compile"].value == "try it"


def test_the_report_is_readable(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with threads_of(1):
        assert main(["doctor", "--model", str(model_folder), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("risam ")
    assert any(re.match(r"torch threads +1: 1 image at a time, 1 thread each$", x) for x in lines)
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
