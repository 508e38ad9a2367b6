"""What this machine's processor does best with: measured, kept, and gone by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cli import Cli
from support.networks import encoder, noise, relative_error

from risam_cli.inference import calibration as under_test
from risam_cli.inference.calibration import (
    Choice,
    calibrate,
    calibration,
    keep,
    path_of_calibration,
)
from risam_cli.inference.device import Cores, share_cores
from risam_cli.model.fast import tuning
from risam_cli.model.fast.encoder import HostImageEncoder
from risam_cli.model.fast.prepare import prepare_for_inference
from risam_cli.model.fast.tuning import DEFAULT, Tuning, in_use


@pytest.fixture(autouse=True)
def _no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and the defaults in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_in_use", DEFAULT)
    calibration.cache_clear()
    yield
    calibration.cache_clear()


def held(precision: torch.dtype) -> HostImageEncoder:
    """A small encoder, its weights in some precision."""
    one = encoder(grid=8, window=4)
    prepare_for_inference(one, torch.device("cpu"), precision)
    assert isinstance(one, HostImageEncoder)
    return one


def test_the_fastest_is_chosen_and_the_default_unless_another_gains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {("torch", 768): 0.99, ("onednn", 768): 1.0, ("onednn", 2048): 0.5}

    def timed(one: HostImageEncoder, threads: int, lanes: int = 1) -> float:
        chosen = in_use()
        if lanes > 1 or threads > 1:
            return lanes * {1: 1.0, 2: 0.4, 4: 0.3}[threads]
        return seconds.get((chosen.product(one.precision), chosen.tile), 2.0)

    monkeypatch.setattr(under_test, "_seconds", timed)
    monkeypatch.setattr(under_test, "has_fast_products", lambda kind: True)
    found = calibrate([held(torch.float32)], 4)
    assert found == Choice(products={"fp32": "onednn"}, tile=2048, threads=4)
    assert in_use() is DEFAULT, "what was tried is not left in use"


def test_a_measurement_of_this_machine_is_a_choice() -> None:
    found = calibrate([held(torch.float32), held(torch.bfloat16)], 2)
    assert set(found.products) <= {"fp32", "bf16"}
    assert found.tile in under_test.TILES
    assert found.threads in {1, 2}


def test_what_is_kept_is_gone_by_for_its_size_alone() -> None:
    keep(1024, Choice(products={"bf16": "torch"}, tile=512, threads=2))
    keep(256, Choice(tile=1024))
    assert calibration().of(1024).tuning() == Tuning({torch.bfloat16: "torch"}, 512)
    assert calibration().of(256) == Choice(tile=1024)
    assert calibration().of(512) == Choice()


def test_generations_of_one_name_are_different_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n"
    found = set()
    for family, model in ((25, 17), (26, 2), (25, 1)):
        shown = text.format(family, model) * 2
        monkeypatch.setattr(Path, "read_text", lambda *_a, shown=shown, **_k: shown)
        found.add(under_test.processor())
    assert found == {
        f"AMD EPYC, cpu family {family}, model {model}"
        for family, model in ((25, 17), (26, 2), (25, 1))
    }


def test_of_another_machine_or_torch_it_is_not_gone_by() -> None:
    keep(256, Choice(tile=1024))
    for key in ("processor", "torch"):
        kept = json.loads(path_of_calibration().read_bytes())
        path_of_calibration().write_text(json.dumps({**kept, key: "another"}))
        calibration.cache_clear()
        assert calibration().of(256) == Choice()
        path_of_calibration().write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"processor": 1}', '{"processor": "a", "torch": "b", "by_side": {"x": {}}}'],
)
def test_a_damaged_file_is_told_of_and_not_gone_by(
    content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path_of_calibration().parent.mkdir(parents=True)
    path_of_calibration().write_text(content)
    assert calibration().by_side == {}
    assert "is damaged and not used; `risam doctor` writes it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "shared"), [(None, Cores(2, 2, 4)), (1, Cores(4, 1, 4)), (9, Cores(1, 4, 4))]
)
def test_measured_threads_come_before_the_rule(measured: int | None, shared: Cores) -> None:
    assert share_cores("cpu", 1024, 4, measured) == shared


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_other_kernel_gives_the_same_up_to_rounding(precision: torch.dtype) -> None:
    ours = encoder(grid=24, heads=2, dim=64)
    prepare_for_inference(ours, torch.device("cpu"), precision)
    pixels, found = noise(1, 3, 384, 384), []
    for product in tuning.PRODUCTS:
        tuning.use(Tuning({precision: product}))
        with torch.inference_mode():
            found.append(ours(pixels).deep)
    assert relative_error(*found) < (1e-5 if precision == torch.float32 else 2e-2)


def test_a_run_says_its_kernel_and_keeps_to_it_when_it_goes_on(
    cli: Cli, tiny_images: Path, tmp_path: Path
) -> None:
    """Measured anew between a run and its end, the machine's choice is for new runs alone."""
    run = ["predict", tiny_images, "-e", "the red circle", "--device", "cpu"]
    out = tmp_path / "out"

    def product() -> str:
        stored = json.loads((out / "run.json").read_bytes())
        return str(stored["run_settings"]["product"])

    assert cli(*run, "-o", out, "--limit", "1").returncode == 0
    assert product() == "onednn"
    keep(256, Choice(products={"fp32": "torch"}))
    assert cli(*run, "-o", out, "--resume").returncode == 0
    assert product() == "onednn"
    assert cli(*run, "-o", out, "--overwrite").returncode == 0
    assert product() == "torch"
