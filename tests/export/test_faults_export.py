"""Faults under ``risam export-masks``: a cut export says so, and the next one starts clean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.export_cases import record, write_jsonl
from support.power import recorded

from risam_cli.cli import main
from risam_cli.export.folder import ExportFolder
from risam_cli.files.locks import FolderLock

KINDS = ["coco", "yolo", "labelme", "cvat", "png"]


class Killed(BaseException):
    """Stands for the end of the process: nothing of the project catches it."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    rows = [
        record(f"{'sub/' * (k % 2)}{k}.jpg", f"thing {k}", noise.random((20, 30 + k)) < 0.3)
        for k in range(5)
    ]
    return write_jsonl(tmp_path / "p.jsonl", rows)


def export(source: Path, kind: str, out: Path, *more: str) -> int:
    arguments = ["export-masks", source, "--to", kind, "-o", out, "-q", *more]
    return main([str(one) for one in arguments])


def files(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ends the process at its n-th file that is moved to its place."""
    left, replace = number, os.replace

    def counted(source: Any, target: Any, **more: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        replace(source, target, **more)

    # Whoever is dead tidies up nothing.
    monkeypatch.setattr(ExportFolder, "close", lambda self: None)
    monkeypatch.setattr(os, "replace", counted)


@pytest.mark.parametrize("kind", KINDS)
def test_wherever_it_is_cut_a_rerun_ends_the_same_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert export(source, kind, whole) == 0
    cuts = 0
    for number in range(40):
        with monkeypatch.context() as patched:
            cut_at(patched, number)
            try:
                export(source, kind, out, "--overwrite")
                break
            except Killed:
                cuts += 1
        done = out / "export.json"
        now = {name: data for name, data in files(out).items() if not name.startswith(".risam")}
        cut = not done.exists() or json.loads(done.read_text())["complete"] is False
        assert cut or now == files(whole)  # or it had not begun
        assert export(source, kind, out, "--overwrite") == 0
        assert files(out) == files(whole)
    assert cuts >= 3


def test_a_cut_export_is_told_from_a_folder_of_something_else(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        cut_at(patched, 3)
        with pytest.raises(Killed):
            export(source, "png", out)
    assert export(source, "png", out) == 1
    assert "an interrupted export; start over with --overwrite" in capsys.readouterr().err


def test_a_second_export_into_the_folder_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FolderLock(tmp_path / "out"):
        assert export(source, "coco", tmp_path / "out") == 1
        assert "another run is writing to this folder" in capsys.readouterr().err
    assert export(source, "coco", tmp_path / "out") == 0


def test_results_of_predict_are_not_written_over(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    (out / "masks" / "a.png").write_text("theirs")
    (out / "ledger.jsonl").write_text("{}\n")
    (out / "export.json").write_text('{"owns": ["masks"], "complete": true}')
    before = files(out)
    assert export(source, "png", out, "--overwrite") == 1
    assert "holds files of `risam predict`" in capsys.readouterr().err
    assert files(out) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_be_complete_survives_a_power_cut(
    source: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with recorded(out) as disk:
        assert export(source, kind, out) == 0
    disk.after_power_cut(tmp_path / "found")
    found = files(tmp_path / "found")
    assert {k: v for k, v in found.items() if not k.startswith(".risam")} == files(out)
