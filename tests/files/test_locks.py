"""One process to an output folder, and no lock that outlives its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.paths import REPO

from risam_cli.console.text import sanitize
from risam_cli.errors import OutputError
from risam_cli.files import locks
from risam_cli.files.folder import OutputFolder
from risam_cli.files.locks import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from risam_cli.files import locks
if len(sys.argv) > 2:
    locks._RENEWED = float(sys.argv[2])
held = locks.FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are given up after a second."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(locks, "_RENEWED", 0.1)
    monkeypatch.setattr(locks, "_BEGUN", 0.2)
    monkeypatch.setattr(locks, "_LOOK", 0.05)


@contextmanager
def holder(folder: Path, *more: object) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, *map(str, more)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        with pytest.raises(OutputError, match="another run"):
            FolderLock(tmp_path)
        assert (tmp_path / ".risam" / "lock").exists()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path).release()


def test_a_process_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        with pytest.raises(OutputError, match=f"another run .* .process {other.pid} on"):
            FolderLock(tmp_path)
        other.kill()
        other.wait()
        assert any((tmp_path / ".risam").iterdir())
        with FolderLock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def lease_of(folder: Path, **more: object) -> Path:
    """A lease as filelock writes them."""
    path = folder / ".risam" / "lock"
    path.parent.mkdir(parents=True)
    said = {"pid": 1, "host": "elsewhere", "mode": "lease", "token": "t", "duration": 1.0, **more}
    path.write_text("".join(f"{key}={value}\n" for key, value in said.items()))
    path.write_text("filelock/2\n" + path.read_text())
    return path


@contextmanager
def renewed(path: Path) -> Iterator[None]:
    """A lease that its holder renews meanwhile."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_lease_of_another_machine_counts_while_it_is_renewed(
    tmp_path: Path, hasty: None
) -> None:
    path = lease_of(tmp_path)
    with renewed(path), pytest.raises(OutputError, match="process 1 on elsewhere"):
        FolderLock(tmp_path)
    begun = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - begun >= 1.0
        assert f"pid={os.getpid()}" in path.read_text()
    assert list(tmp_path.iterdir()) == []


def test_containers_of_one_host_name_see_each_other(tmp_path: Path, hasty: None) -> None:
    """Their process numbers mean nothing to one another: that of ours may be another's there."""
    space = os.stat("/proc/self/ns/pid").st_ino + 1
    host = f"{platform.node()}?pidns-{space:x}"
    for pid in (os.getpid(), 2**31 - 1):
        path = lease_of(tmp_path / str(pid), host=host, pid=pid)
        with renewed(path), pytest.raises(OutputError, match="another run"):
            FolderLock(tmp_path / str(pid))


def test_a_drive_without_flock_and_one_with_it_share_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with holder(tmp_path):
        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(fcntl, "lockf", flock)
        with pytest.raises(OutputError, match="another run"):
            FolderLock(tmp_path)
    with FolderLock(tmp_path), pytest.raises(OutputError, match="another run"):
        FolderLock(tmp_path)


def test_a_process_that_lost_its_lease_writes_no_further(tmp_path: Path, hasty: None) -> None:
    folder = OutputFolder(tmp_path, "eval", ["report.md"])
    folder.write("report.md", "first")
    lock = tmp_path / ".risam" / "lock"
    lock.unlink()  # as a process does that takes the lease over
    lock.write_text("another's")
    with pytest.raises(OutputError, match="taken over by another run"):
        folder.write("report.md", "second")
    assert (tmp_path / "report.md").read_text() == "first"
    folder.close()
    assert lock.read_text() == "another's"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "\x00\xff", "9" * 5000, "filelock/2\npid=" + "9" * 900 + "\nhost=x\n"],
)
def test_a_lease_that_a_power_cut_spoilt_holds_nobody_up(
    tmp_path: Path, hasty: None, content: str
) -> None:
    lease_of(tmp_path).write_text(content)
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more", [{"duration": 1e300}, {"mode": "odd"}, {"mode": "odd", "host": "\x1b[2J"}]
)
def test_a_lease_of_absurd_content_is_told_in_one_line(
    tmp_path: Path, hasty: None, more: dict[str, object]
) -> None:
    path = lease_of(tmp_path, **more)
    with pytest.raises(OutputError, match="another run") as told:
        FolderLock(tmp_path)
    assert f"delete {path}" in str(told.value)
    assert "\x1b" not in sanitize(str(told.value))


def test_a_lease_is_renewed(tmp_path: Path, hasty: None) -> None:
    with FolderLock(tmp_path):
        path = tmp_path / ".risam" / "lock"
        os.utime(path, (1, 1))
        for _ in range(500):
            if path.stat().st_mtime > 1:
                break
            time.sleep(0.01)
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
        if tmp_path not in Path(path).parents:
            rmtree(path, **more)
            return
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
