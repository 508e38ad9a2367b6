"""Loading ahead: order, time limits, and workers that die."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.predict_loaders import (
    load_or_die,
    load_or_die_once,
    load_or_die_or_stall,
    load_or_hang_apart,
    load_or_raise,
    load_or_stall,
    load_out_of_files,
    load_slowly,
)

from risam_cli.data.images.files import file_sha256
from risam_cli.data.images.frames import sam_frame
from risam_cli.errors import MachineError
from risam_cli.inference import loader as loaders
from risam_cli.inference.apart import LoaderProcess
from risam_cli.inference.device import count_workers
from risam_cli.inference.feeder import ImageJob
from risam_cli.inference.loader import (
    ImageLoader,
    ProcessLoader,
    _fit_shared_memory,
    _Hands,
    _Task,
    open_loader,
)
from risam_cli.inference.loading import Loaded, LoaderSettings, load_image


def picture(path: Path) -> Path:
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def settings(workers: int, timeout: float = 60) -> LoaderSettings:
    return LoaderSettings((sam_frame(16),), workers, timeout=timeout)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_and_failures_come_back(tmp_path: Path, workers: int) -> None:
    good = [picture(tmp_path / f"{n}.png") for n in range(5)]
    bad = tmp_path / "none.png"
    with open_loader(settings(workers)) as loader:
        futures = [loader.submit(path) for path in [*good, bad]]
        loaded = [future.result(600) for future in futures]
        assert loader.lanes == 2
    for path, one in zip(good, loaded, strict=False):
        assert one.image is not None
        assert one.image.rgb.shape == (11, 16, 3)
        assert one.image.size == (20, 30)
        assert one.stamp == one.image.stamp
        assert one.seconds > 0, path
    assert loaded[-1].image is None
    assert loaded[-1].stamp is None
    assert f"{bad}: no such file" in loaded[-1].error


def test_threads_and_processes_load_the_same(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    results = []
    for workers in (0, 1):
        with open_loader(settings(workers)) as loader:
            results.append(loader.submit(path).result(600).image)
    assert (results[0].rgb == results[1].rgb).all()
    assert results[0].sha256 == results[1].sha256


def test_a_process_that_dies_is_replaced_and_the_image_tried_again(tmp_path: Path) -> None:
    deadly, good = picture(tmp_path / "deadly.png"), picture(tmp_path / "good.png")
    with open_loader(settings(1), load_or_die_once) as loader:
        assert loader.submit(deadly).result(600).image is not None
    (tmp_path / "deadly.tried").unlink()
    with open_loader(settings(1), load_or_die) as loader:
        first, second = loader.submit(deadly), loader.submit(good)
        died = first.result(600)
        assert died.image is None
        assert f"{deadly}: the loader process died on it twice (signal 9, SIGKILL)" in died.error
        assert died.stamp is not None
        assert second.result(600).image is not None


def test_a_death_costs_nothing_but_its_own_image(tmp_path: Path) -> None:
    names = ["a", "b", "deadly", "c", "d", "deadly2", "e", "f"]
    paths = [picture(tmp_path / f"{name}.png") for name in names]
    with open_loader(settings(2), load_slowly) as loader:
        futures = [loader.submit(path) for path in paths]
        results = [future.result(600) for future in futures]
    assert [one.image is None for one in results] == ["deadly" in name for name in names]
    for path, one in zip(paths, results, strict=True):
        if one.image is not None:
            assert one.image.sha256 == file_sha256(path)


def test_a_death_that_is_known_late_costs_the_image_that_was_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dead process' last image the rest cannot be read, some time before its end is known."""
    monkeypatch.setattr(loaders, "_GRACE", 60.0)  # however late
    with open_loader(settings(2)) as loader:
        assert isinstance(loader, ProcessLoader)
        innocent, deadly = (
            _Task(number, tmp_path / f"{number}.png", Future()) for number in range(2)
        )
        loader._in_flight = {0: innocent, 1: deadly}
        processes = [loader._context.Process(target=time.sleep, args=(60,)) for _ in range(2)]
        for process in processes:
            process.start()
        hands = _Hands(loader._context, 2)
        hands.take(1, deadly.number)
        threading.Timer(0.2, processes[1].kill).start()
        loader._died(hands, ConnectionResetError())
        assert (innocent.deaths, deadly.deaths) == (0, 1)
        loader._in_flight = {}
        processes[0].kill()


def test_processes_that_die_between_two_images_are_replaced(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png") for n in range(4)]
    before = set(multiprocessing.active_children())
    with open_loader(settings(2)) as loader:
        assert loader.submit(paths[0]).result(600).image is not None
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        futures = [loader.submit(path) for path in paths]
        assert all(future.result(600).image is not None for future in futures)


def test_images_that_stall_side_by_side_fail_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["good", *(f"stalled{n}" for n in range(6)), "also good"]
    paths = [picture(tmp_path / f"{name}.png") for name in names]
    begun = []
    drive = ProcessLoader._drive

    def counted(self: ProcessLoader) -> None:
        begun.append(self)
        drive(self)

    monkeypatch.setattr(ProcessLoader, "_drive", counted)
    with open_loader(settings(2, timeout=2), load_or_stall) as loader:
        futures = [loader.submit(path) for path in paths]
        results = [future.result(600) for future in futures]
    assert [one.image is None for one in results] == [False, *[True] * 6, False]
    assert len(begun) < 6, "each waited for the one before it"


def _run_script(folder: Path, code: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a user's script that has what it needs to open a loader; its argument is a picture."""
    head = (
        "import multiprocessing, os, signal, sys\n"
        "from pathlib import Path\n"
        "from risam_cli.data.images.frames import sam_frame\n"
        "from risam_cli.inference.loader import open_loader\n"
        "from risam_cli.inference.loading import LoaderSettings\n"
    )
    (folder / "script.py").write_text(head + code)
    command = [sys.executable, folder / "script.py", picture(folder / "a.png")]
    return subprocess.run(command, capture_output=True, timeout=600)


def test_processes_do_not_run_the_script_that_they_were_asked_from(tmp_path: Path) -> None:
    # As a user writes it: nothing says what is for the main process alone.
    done = _run_script(
        tmp_path,
        "print('begun', flush=True)\n"
        "with open_loader(LoaderSettings((sam_frame(16),), 1)) as loader:\n"
        "    print(loader.submit(Path(sys.argv[1])).result(600).image is not None)\n",
    )
    assert done.stdout.split() == [b"begun", b"True"], done.stderr.decode()


def test_a_process_that_is_killed_takes_its_workers_with_it(tmp_path: Path) -> None:
    done = _run_script(
        tmp_path,
        "if __name__ == '__main__':\n"
        "    loader = open_loader(LoaderSettings((sam_frame(16),), 2))\n"
        "    assert loader.submit(Path(sys.argv[1])).result(600).image is not None\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2, done.stderr.decode()
    deadline = time.monotonic() + 600
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, workers))


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("free", "expected"), [(1 << 40, (8, 2)), (64 << 20, (5, 1)), (8 << 20, (1, 1)), (0, (1, 1))]
)
def test_no_more_goes_through_shared_memory_than_it_holds(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    workers, ahead = _fit_shared_memory(LoaderSettings((sam_frame(1024),), 8))
    assert (workers, ahead) == expected
    if free >= 64 << 20:
        assert workers * ahead * 3 * 1024**2 <= free // 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_stalls_fails_alone(tmp_path: Path, workers: int) -> None:
    stalled, good = picture(tmp_path / "stalled.png"), picture(tmp_path / "good.png")
    with open_loader(settings(workers, timeout=3), load_or_stall) as loader:
        results = wait_for(loader, [loader.submit(path) for path in (stalled, stalled, good)])
    assert [one.image is None for one in results] == [True, True, False]
    assert "took longer than" in results[0].error


def wait_for(loader: ImageLoader, futures: list[Future[Loaded]]) -> list[Loaded]:
    """As the feeder does."""
    deadline = time.monotonic() + 600
    while not all(future.done() for future in futures) and time.monotonic() < deadline:
        loader.give_up_on_stalled()
        time.sleep(0.02)
    return [future.result(0) for future in futures]


def own_threads() -> set[threading.Thread]:
    """Those of loaders; of tests before, there may be some that still stall."""
    return {thread for thread in threading.enumerate() if thread.name == "risam-loader"}


def test_an_image_that_may_take_long_is_ended_with_its_process(tmp_path: Path) -> None:
    names = ["slow-and-stalled", "slow", "good", "slow-and-stalled-2", "slow-2"]
    paths = [picture(tmp_path / f"{name}.png") for name in names]
    before = own_threads()
    with open_loader(settings(0, timeout=4), load_or_hang_apart) as loader:
        results = wait_for(loader, [loader.submit(path) for path in paths])
        assert len(own_threads() - before) == 2, "none was left behind"
    assert [one.image is None for one in results] == ["stalled" in name for name in names]
    assert "took longer than 4 s" in results[0].error
    whole = load_image(paths[1], settings(1)).image
    assert (results[1].image.rgb == whole.rgb).all()


def test_no_more_than_a_few_threads_are_left_behind(tmp_path: Path) -> None:
    names = [*(f"stalled{n}" for n in range(5)), "good", "deadly"]
    paths = [picture(tmp_path / f"{name}.png") for name in names]
    before = own_threads()
    with open_loader(settings(0, timeout=3), load_or_die_or_stall) as loader:
        results = wait_for(loader, [loader.submit(path) for path in paths])
        assert len(own_threads() - before) <= 4
    assert [one.image is None for one in results] == [*[True] * 5, False, True]
    assert "the loader process died on it (signal 9, SIGKILL)" in results[-1].error


def test_a_file_that_cannot_be_ended_at_all_ends_the_run_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a drive that is gone, where not even a process can be killed."""
    monkeypatch.setattr(LoaderProcess, "load", lambda self, *asked: (asked[-1](), time.sleep(30)))
    monkeypatch.setattr(loaders, "_MOST_LEFT", 5)
    path = picture(tmp_path / "stalled.png")
    with open_loader(settings(0, timeout=0.1), load_or_stall) as loader:
        futures = [loader.submit(path) for _ in range(9)]
        with pytest.raises(MachineError, match="5 files could not be read in time"):
            wait_for(loader, futures)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_machine_lacks_is_not_the_image_s_fault(tmp_path: Path, workers: int) -> None:
    path = picture(tmp_path / "late.png")
    with open_loader(settings(workers), load_out_of_files) as loader:
        loaded = loader.submit(path).result(600)
    assert loaded.by_machine
    with pytest.raises(MachineError, match="run out of resources: Too many open files"):
        _ = ImageJob(path, [], loader_future(loaded)).loaded


def loader_future(loaded: Loaded) -> Future[Loaded]:
    future: Future[Loaded] = Future()
    future.set_result(loaded)
    return future


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_fails_the_image_not_the_loader(tmp_path: Path, workers: int) -> None:
    path = picture(tmp_path / "a.png")
    with open_loader(settings(workers), load_or_raise) as loader:
        results = [loader.submit(path).result(600) for _ in range(5)]
    assert {one.error for one in results} == {f"{path}: LookupError: a bug"}


def test_no_thread_and_no_process_is_left(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    before = {*threading.enumerate(), *multiprocessing.active_children()}
    for workers in (0, 1):
        with open_loader(settings(workers)) as loader:
            loader.submit(path).result(600)
    deadline = time.monotonic() + 600
    while left := {*threading.enumerate(), *multiprocessing.active_children()} - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_cpu_decodes_in_threads_and_a_gpu_has_processes() -> None:
    assert count_workers(None, "cpu") == 0
    assert 1 <= count_workers(None, "cuda") <= 8
