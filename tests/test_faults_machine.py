"""Faults of the machine as the machine makes them: full disks, drives that stall, other limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.records import contents

from risam_cli.cli import main

Predict = Callable[..., int]

HOLD = """
import fcntl, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = open(sys.argv[1], "r+b")
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(6):
        picture = rng.integers(0, 256, (40 + 10 * number, 90, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def predict(model_folder: Path, images: Path) -> Predict:
    def run(out: Path, *arguments: str) -> int:
        given = ["-q", "predict", images, "-e", "the star", "-e", "all", "-o", out]
        more = ["--model", model_folder, "--device", "cpu", *arguments]
        return main([str(one) for one in [*given, *more]])

    return run


def failures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


# --- a drive that stalls --------------------------------------------------------------------------


@pytest.fixture
def stalled(images: Path) -> Iterator[Path]:
    """An image whose opening blocks in the system, as on a network drive that is gone.

    Another process has a write lease on it: who opens it waits until the lease is given back.
    """
    fcntl = pytest.importorskip("fcntl")
    if not hasattr(fcntl, "F_SETLEASE"):
        pytest.skip("this system knows no leases")
    path = images / "2.png"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    held = holder.stdout.readline()
    if held != "held\n":
        pytest.skip("this file system knows no leases")
    yield path
    holder.kill()
    holder.wait()
    holder.stdout.close()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_on_a_drive_that_stalls_fails_alone(
    predict: Predict, stalled: Path, tmp_path: Path, workers: str
) -> None:
    out = tmp_path / "out"
    began = time.monotonic()
    assert predict(out, "--workers", workers, "--image-timeout", "3") == 3
    assert time.monotonic() - began < 40  # the system itself gives up after 45 s
    rows = failures(out)
    assert [row["image"] for row in rows] == [str(stalled)] * 2
    assert all("longer than 3 s" in row["message"] for row in rows)
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 10


# --- a disk that is full, then read-only ----------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 60 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60k", "none", str(place)]
    try:
        made = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def test_a_full_disk_keeps_what_was_done_and_a_larger_one_ends_the_same(
    predict: Predict, disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert predict(tmp_path / "whole") == 0
    assert predict(disk / "out") == 1
    said = capfd.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    remount(disk, "size=8m")
    remount(disk, "ro")
    assert predict(disk / "out", "--resume") == 1
    assert predict(disk / "other") == 1
    said = capfd.readouterr().err
    assert said.count("Read-only file system") == 2
    assert "Traceback" not in said
    remount(disk, "rw")
    assert predict(disk / "out", "--resume") == 0
    assert contents(disk / "out") == contents(tmp_path / "whole")


# --- what a run is resumed with -------------------------------------------------------------------


def test_what_failed_by_a_limit_is_tried_again_by_another(
    predict: Predict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(out, "--max-pixels", "6000") == 3
    assert len(failures(out)) == 2 * 3
    assert predict(out, "--max-pixels", "6000", "--resume") == 3
    assert len(failures(out)) == 2 * 3
    assert predict(out, "--resume") == 0
    assert predict(tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_another_version_than_before_is_told(
    predict: Predict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(out, "--limit", "3") == 0
    run = json.loads((out / "run.json").read_text())
    run["versions"]["torch"] = "1.0"
    (out / "run.json").write_text(json.dumps(run))
    capfd.readouterr()
    assert predict(out, "--resume") == 0
    assert "torch 1.0 -> " in capfd.readouterr().err
    assert predict(out, "--resume") == 0
    assert "computed differently" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["deleted", "cut", "emptied", "exchanged"])
def test_a_mask_that_is_not_what_was_written_is_made_again(
    predict: Predict, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(out) == 0
    before = contents(out)
    mask, other = sorted(out.rglob("masks/**/*.png"))[3:5]
    if damage == "deleted":
        mask.unlink()
    elif damage == "cut":
        os.truncate(mask, mask.stat().st_size - 1)
    elif damage == "emptied":
        mask.write_bytes(b"")
    else:
        mask.write_bytes(other.read_bytes())
    assert predict(out, "--resume") == 0
    assert "damaged; computed again" in capfd.readouterr().err
    assert contents(out) == before
