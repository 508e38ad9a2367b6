"""Faults of the machine under ``risam predict``: each is injected, none may cost what was done."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.power import recorded
from support.predict_runs import (
    CPU,
    Killed,
    Run,
    at_image,
    contents,
    draw,
    draw_pictures,
    kill_at,
    run_json,
    signals,
)

from risam_cli import interrupts
from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.errors import OutputError
from risam_cli.files import write
from risam_cli.inference.pipeline import PredictSettings
from risam_cli.runs import writer
from risam_cli.runs.writer import Saving

ALL = Saving(True, True, MAX_PIXELS)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "in")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and the folder of an unbroken run over them, masks and overlays saved."""
    base = tmp_path_factory.mktemp("whole")
    Run([draw_pictures(base / "in")], base / "out", saving=ALL).go()
    return base / "in", base / "out"


def failures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def staged(out: Path) -> list[Path]:
    return list((out / ".risam").glob("staging/*"))


# --- power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [0, 1, 3, 6, None])
def test_what_counts_as_done_survives_a_power_cut(
    whole: tuple[Path, Path], tmp_path: Path, image: int | None
) -> None:
    pictures, out = whole[0], tmp_path / "out"
    out.mkdir()
    run = Run([pictures], out, saving=ALL)
    with recorded(out) as disk:
        if image is None:
            assert run.go() == 3
        else:
            kill_at(run.model, image)
            with pytest.raises(Killed):
                run.go()
    counted = run_json(out)["counts"]
    found = tmp_path / "found"
    disk.after_power_cut(found)
    again = Run([pictures], found, saving=ALL)
    assert again.go() == 3
    assert contents(found) == contents(whole[1])
    assert again.encoded == 7 - counted["records"] // 2
    assert counted["records"] >= 2 * (run.encoded - 2)


def test_a_power_cut_loses_nothing_of_a_merge_or_of_a_splice(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    from risam_cli.runs.merge import find_parts, merge_parts
    from risam_cli.runs.shard import Shard

    pictures = tmp_path / "in"
    shutil.copytree(whole[0], pictures)
    Run([pictures], tmp_path / "fresh", saving=ALL).go()
    for index in range(2):
        part = tmp_path / f"part{index}"
        Run([pictures], part, saving=ALL, plan={"shard": Shard(index, 2)}).go()
    out = tmp_path / "out"
    out.mkdir()
    with recorded(out) as disk:
        merge_parts(find_parts([tmp_path / "part0", tmp_path / "part1"]), out)
    disk.after_power_cut(tmp_path / "found")
    assert contents(tmp_path / "found") == contents(tmp_path / "fresh")
    assert run_json(tmp_path / "found")["status"] == "complete"
    draw(pictures / "2.png", 9)
    with recorded(out) as disk:
        Run([pictures], out, saving=ALL).go()
    disk.after_power_cut(tmp_path / "spliced")
    rest = Run([pictures], tmp_path / "spliced", saving=ALL)
    rest.go()
    assert rest.encoded == 0
    Run([pictures], tmp_path / "changed", saving=ALL).go()
    assert contents(tmp_path / "spliced") == contents(tmp_path / "changed")


# --- the disk and the folder ----------------------------------------------------------------------


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "ENOENT"])
def test_a_disk_that_takes_no_mask_ends_the_run(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """Every later mask would fail as well: 200,000 failures help nobody."""
    pictures, out = whole[0], tmp_path / "out"
    left = 6
    real = open

    def opened(path: Any, *args: Any, **more: Any) -> Any:
        nonlocal left
        if "staging" in str(path) and Path(path).name.isdigit():
            left -= 1
            if left < 0:
                code = getattr(errno, number)
                raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(write, "open", opened, raising=False)
        with pytest.raises(OutputError) as caught:
            Run([pictures], out, saving=ALL).go()
    assert os.strerror(getattr(errno, number)) in str(caught.value)
    assert str(caught.value).endswith("continue with resume")
    assert not any(row["stage"] == "write" for row in failures(out))
    assert Run([pictures], out, saving=ALL).go() == 3
    assert contents(out) == contents(whole[1])


@pytest.mark.parametrize("save", [True, False])
def test_an_output_folder_that_is_deleted_ends_the_run(
    whole: tuple[Path, Path], tmp_path: Path, save: bool
) -> None:
    """Without masks nothing but the open files is written, and those are written to nowhere."""
    out = tmp_path / "out"
    run = Run([whole[0]], out, saving=Saving(save, False, MAX_PIXELS))
    at_image(run, 3, lambda: shutil.rmtree(out))
    with pytest.raises(OutputError, match=r"out"):
        run.go()


def test_a_file_where_the_masks_go_is_named(whole: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, out = whole[0], tmp_path / "out"
    out.mkdir()
    (out / "masks").write_text("mine")
    with pytest.raises(OutputError, match=r"masks.*finished work is kept"):
        Run([pictures], out, saving=ALL).go()
    assert (out / "masks").read_text() == "mine"
    (out / "masks").unlink()
    assert Run([pictures], out, saving=ALL).go() == 3
    assert contents(out) == contents(whole[1])


# --- images that go away --------------------------------------------------------------------------


@pytest.mark.parametrize("html", [False, True])
def test_an_image_gone_before_its_overlay_fails_alone(
    pictures: Path, tmp_path: Path, html: bool
) -> None:
    """The overlay reads the image a second time, after its masks are made."""
    out = tmp_path / "out"
    saving = Saving(True, not html, MAX_PIXELS, html)
    run = Run([pictures], out, saving=saving)
    at_image(run, 2, (pictures / "5.png").unlink)
    before = (pictures / "5.png").read_bytes()
    kept = pictures / "sub"
    assert run.go() == 3
    gone = [row for row in failures(out) if "5.png" in row["image"]]
    assert [row["id"] for row in gone] == [f"{pictures}/5.png#{k}" for k in (0, 1)]
    assert all("no such file" in row["message"] for row in gone)
    assert len(contents(out)) > 6
    assert kept.is_dir()
    assert staged(out) == []
    assert not any("/5.png__" in name for name in contents(out))
    (pictures / "5.png").write_bytes(before)
    assert Run([pictures], out, saving=saving, plan={"retry_failed": True}).go() == 3
    Run([pictures], tmp_path / "fresh", saving=saving).go()
    assert contents(out) == contents(tmp_path / "fresh")


def test_an_overlay_that_stalls_fails_alone(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer.open_rgb
    let_go = threading.Event()

    def stall(path: Path, *more: Any) -> Any:
        if path.name == "5.png":
            let_go.wait(60)
        return real(path, *more)

    monkeypatch.setattr(writer, "open_rgb", stall)
    out = tmp_path / "out"
    run = Run([pictures], out, saving=replace(ALL, timeout=0.3))
    assert run.go() == 3
    let_go.set()
    gone = [row for row in failures(out) if "5.png" in row["image"]]
    assert len(gone) == 2
    assert all("longer than 0.3 s" in row["message"] for row in gone)
    assert staged(out) == []
    assert Run([pictures], out, saving=ALL, plan={"retry_failed": True}).go() == 3
    Run([pictures], tmp_path / "fresh", saving=ALL).go()
    assert contents(out) == contents(tmp_path / "fresh")


# --- loader processes -----------------------------------------------------------------------------


def test_loader_processes_that_are_killed_cost_nothing(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """By the kernel, say, that was out of memory: their images are read again."""
    out = tmp_path / "out"
    settings = PredictSettings(CPU, batch_size=2, workers=2, lookahead=4)
    run = Run([whole[0]], out, saving=ALL, settings=settings)
    killed: list[int] = []

    def kill() -> None:
        for process in multiprocessing.active_children():
            if process.name == "risam-loader" and process.pid is not None:
                process.kill()
                killed.append(process.pid)

    at_image(run, 2, kill)
    assert run.go() == 3
    assert killed
    assert contents(out) == contents(whole[1])
    assert not [p for p in multiprocessing.active_children() if p.name == "risam-loader"]


# --- an impatient user ----------------------------------------------------------------------------


def test_a_second_ctrl_c_ends_at_once_and_costs_nothing(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run, send = Run([whole[0]], out, saving=ALL), signals(monkeypatch)

    def twice() -> None:
        send(signal.SIGINT)
        time.sleep(interrupts._PATIENCE + 0.01)  # or it is one that came twice
        send(signal.SIGINT)

    at_image(run, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert Run([whole[0]], out, saving=ALL).go() == 3
    assert contents(out) == contents(whole[1])
