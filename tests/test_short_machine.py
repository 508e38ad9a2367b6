"""A machine that runs out of files, threads, or room for a file: the run's fault, no item's."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.paths import REPO
from support.predict_runs import contents, draw_pictures

from risam_cli import cli
from risam_cli.cli import main
from risam_cli.errors import MachineError, OutputError, machine_error
from risam_cli.files import patience
from risam_cli.files.patience import within
from risam_cli.files.write import writing


@pytest.mark.parametrize("kind", ["files", "file size", "threads"])
def test_what_the_machine_lacks_ends_the_run_and_costs_nothing(kind: str, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "in")
    command = ["-q", "predict", str(pictures), "-e", "x", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "support.short_machine", kind, json.dumps(command), tmp_path],
        cwd=REPO / "tests",
        env={"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode()
    whole, *short = (json.loads(line) for line in done.stdout.splitlines())
    assert whole["code"] == 3  # one file is not an image
    assert len(short) >= 2
    for one in short:
        *_, last = one["said"].splitlines()
        assert one["code"] == 1, one
        assert last.startswith("error: "), one
        assert "internal error" not in last
        assert "Traceback" not in one["said"]
        assert one["again"] == 3, one
        assert contents(tmp_path / str(one["number"])) == contents(tmp_path / "whole")


def test_it_is_told_apart_from_the_disk_s_and_the_file_s() -> None:
    with pytest.raises(MachineError, match="Too many open files"), writing(Path("a")):
        raise OSError(24, "Too many open files")
    with pytest.raises(OutputError, match="cannot write a: No space left"), writing(Path("a")):
        raise OSError(28, "No space left on device")
    assert machine_error(RuntimeError("can't start new thread")) is not None
    assert machine_error(RuntimeError("shapes differ")) is None
    caused = OutputError("x")
    caused.__cause__ = OSError(12, "Cannot allocate memory")
    assert "Cannot allocate memory" in str(machine_error(caused))


def test_no_more_than_a_few_threads_wait_for_a_drive_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "_MOST_LEFT", 3)
    monkeypatch.setattr(patience, "_left", [])
    release = threading.Event()
    try:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                within(0.01, release.wait)
        with pytest.raises(MachineError, match="3 files"):
            within(0.01, release.wait)
    finally:
        release.set()
    for thread in patience._left:
        thread.join(120)
    assert within(20, lambda: 7) == 7


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so"),
        ("raise ImportError('undefined symbol: _ZN5')", "undefined symbol"),
        ("import no_such_module_at_all", "No module named"),
        ("raise RuntimeError('compiled against another version')", "another version"),
    ],
)
def test_a_torch_that_cannot_be_loaded_is_told_in_one_line(
    error: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(error)
    draw_pictures(tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-m", "risam_cli", "predict", "in", "-e", "x", "-o", "out"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{REPO}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch cannot be loaded: ")
    assert said in line
    assert line.endswith("install it again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_nothing_is_called_an_internal_error_that_is_the_machine_s(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(cli.root, "main", broken)
    assert main(["doctor"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "internal error" not in line
    assert line.startswith("error: ")
