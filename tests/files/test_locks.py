"""One process to an output folder, and no lock that outlives its holder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPO

from risam_cli.errors import OutputError
from risam_cli.files import locks
from risam_cli.files.locks import LEASE_SECONDS, FolderLock

HOLD = """
import errno, sys, time
from pathlib import Path
from risam_cli.files import locks
if sys.argv[2] == "lease":
    locks._flock = lambda file, folder: False
held = locks.FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive on which flock does not work, as some network drives."""

    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)


@pytest.fixture(params=["flock", "lease"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "lease":
        no_locks(monkeypatch)
    return str(request.param)


def test_the_second_is_refused_and_nothing_is_left(tmp_path: Path, kind: str) -> None:
    with FolderLock(tmp_path):
        with pytest.raises(OutputError, match="another run"):
            FolderLock(tmp_path)
        assert (tmp_path / ".risam" / "lock").exists()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path).release()


def test_a_process_that_is_killed_holds_nothing(tmp_path: Path, kind: str) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path, kind],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match="another run"):
        FolderLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert any((tmp_path / ".risam").iterdir())
    with FolderLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def lease_of(folder: Path, **who: object) -> Path:
    path = folder / ".risam" / "lease"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "", "token": "t", **who}))
    return path


def test_the_lease_of_another_machine_counts_while_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks(monkeypatch)
    path = lease_of(tmp_path)
    with pytest.raises(OutputError, match="process 1 on elsewhere"):
        FolderLock(tmp_path)
    long_ago = path.stat().st_mtime - LEASE_SECONDS - 60
    os.utime(path, (long_ago, long_ago))
    with FolderLock(tmp_path):
        held = json.loads(path.read_text())
        assert held["pid"] == os.getpid()
        with pytest.raises(OutputError, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_of_the_same_number_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks(monkeypatch)
    own = locks._born(os.getpid())
    if not own:
        pytest.skip("this system does not say when a process began")
    lease_of(tmp_path, host=locks.platform.node(), pid=os.getpid(), born=own + "0")
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"])
def test_a_lease_that_a_power_cut_spoilt_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    no_locks(monkeypatch)
    lease_of(tmp_path).write_text(content)
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch)
    monkeypatch.setattr(locks, "_RENEWED", 0.01)
    with FolderLock(tmp_path):
        path = tmp_path / ".risam" / "lease"
        os.utime(path, (1, 1))
        for _ in range(500):
            if path.stat().st_mtime > 1:
                break
            locks.threading.Event().wait(0.01)
        assert path.stat().st_mtime > 1


def test_a_folder_taken_away_while_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder removes the private folder between our making it and opening the file."""
    made = Path.mkdir
    times = iter(range(3))

    def mkdir(self: Path, *args: object, **more: object) -> None:
        made(self, *args, **more)  # type: ignore[arg-type]
        if next(times, None) is not None:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    FolderLock(tmp_path).release()


def test_what_a_run_leaves_is_deleted_while_its_lock_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next run would begin, and find its own files deleted."""
    from risam_cli.runs import folder

    rmtree = folder.shutil.rmtree
    refused = 0

    def deleting(path: Path, **more: bool) -> None:
        nonlocal refused
        with pytest.raises(OutputError, match="another run"):
            FolderLock(tmp_path)
        refused += 1
        rmtree(path, **more)
        with pytest.raises(OutputError, match="another run"):
            FolderLock(tmp_path)

    run = folder.RunFolder(tmp_path)
    monkeypatch.setattr(folder.shutil, "rmtree", deleting)
    run.close()
    assert refused
    assert list(tmp_path.iterdir()) == []
