"""Loading ahead: order, time limits, and workers that die."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.predict_loaders import load_or_die, load_or_die_once, load_or_raise, load_or_stall

from risam_cli.inference.loader import ImageLoader, LoaderSettings, default_workers


def picture(path: Path) -> Path:
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def settings(workers: int, timeout: float = 60) -> LoaderSettings:
    return LoaderSettings(16, workers, timeout=timeout)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_and_failures_come_back(tmp_path: Path, workers: int) -> None:
    good = [picture(tmp_path / f"{n}.png") for n in range(5)]
    bad = tmp_path / "none.png"
    with ImageLoader(settings(workers)) as loader:
        futures = [loader.submit(path) for path in [*good, bad]]
        loaded = [future.result(120) for future in futures]
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
        with ImageLoader(settings(workers)) as loader:
            results.append(loader.submit(path).result(120).image)
    assert (results[0].rgb == results[1].rgb).all()
    assert results[0].sha256 == results[1].sha256


def test_a_process_that_dies_is_replaced_and_the_image_tried_again(tmp_path: Path) -> None:
    deadly, good = picture(tmp_path / "deadly.png"), picture(tmp_path / "good.png")
    with ImageLoader(settings(1), load_or_die_once) as loader:
        assert loader.submit(deadly).result(120).image is not None
    (tmp_path / "deadly.tried").unlink()
    with ImageLoader(settings(1), load_or_die) as loader:
        first, second = loader.submit(deadly), loader.submit(good)
        died = first.result(120)
        assert died.image is None
        assert f"{deadly}: the loader process died on it twice (signal 9, SIGKILL)" in died.error
        assert died.stamp is not None
        assert second.result(120).image is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_stalls_fails_alone(tmp_path: Path, workers: int) -> None:
    stalled, good = picture(tmp_path / "stalled.png"), picture(tmp_path / "good.png")
    with ImageLoader(settings(workers, timeout=3 if workers else 0.3), load_or_stall) as loader:
        futures = [loader.submit(path) for path in (stalled, stalled, good)]
        deadline = time.monotonic() + 120
        while not all(future.done() for future in futures) and time.monotonic() < deadline:
            loader.give_up_on_stalled()
            time.sleep(0.02)
        results = [future.result(0) for future in futures]
    assert [one.image is None for one in results] == [True, True, False]
    assert "took longer than" in results[0].error


def test_a_bug_fails_the_image_not_the_loader(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    with ImageLoader(settings(0), load_or_raise) as loader:
        results = [loader.submit(path).result(60) for _ in range(5)]
    assert {one.error for one in results} == {f"{path}: LookupError: a bug"}


def test_no_thread_and_no_process_is_left(tmp_path: Path) -> None:
    import multiprocessing

    path = picture(tmp_path / "a.png")
    before = set(threading.enumerate())
    for workers in (0, 1):
        with ImageLoader(settings(workers)) as loader:
            loader.submit(path).result(120)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = set(threading.enumerate()) - before
        if not left and not multiprocessing.active_children():
            break
        time.sleep(0.05)
    assert not left
    assert not multiprocessing.active_children()


def test_a_cpu_decodes_in_threads_and_a_gpu_has_processes() -> None:
    assert default_workers("cpu") == 0
    assert 1 <= default_workers("cuda") <= 8
