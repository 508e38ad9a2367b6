"""How the cores of a CPU are shared out, and that results do not depend on it."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from risam_cli.inference.device import MOST_LANES, Cores, share_cores
from risam_cli.model.fast.crew import threads_of

SIDES = st.sampled_from([128, 512, 768, 1024])


@pytest.mark.parametrize(
    ("side", "cores", "shared"),
    [
        (512, 1, Cores(1, 1, 1)),
        (512, 2, Cores(2, 1, 2)),
        (512, 64, Cores(8, 1, 64)),
        (1024, 1, Cores(1, 1, 1)),
        (1024, 2, Cores(2, 1, 2)),
        (1024, 4, Cores(2, 2, 4)),
        (1024, 16, Cores(4, 4, 16)),
        (1024, 64, Cores(8, 4, 64)),
    ],
)
def test_small_images_go_side_by_side_and_large_ones_get_more_threads(
    side: int, cores: int, shared: Cores
) -> None:
    assert share_cores("cpu", side, cores) == shared


@given(SIDES, st.integers(1, 256))
def test_no_more_cores_are_used_than_there_are(side: int, cores: int) -> None:
    shared = share_cores("cpu", side, cores)
    assert 1 <= shared.lanes <= MOST_LANES
    assert shared.threads >= 1
    assert shared.lanes * shared.threads <= cores


@pytest.mark.parametrize(("images", "threads"), [(1, 16), (2, 8), (3, 5), (5, 4), (9, 4)])
def test_the_last_images_share_out_all_cores(images: int, threads: int) -> None:
    assert share_cores("cpu", 1024, 16).for_one_of(images) == threads


def test_cores_are_those_that_torch_was_given() -> None:
    with threads_of(6):
        assert share_cores("cpu", 512) == Cores(6, 1, 6)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_leave_torch_alone(device: str) -> None:
    assert share_cores(device, 1024, 16) == Cores(1, 0)


def test_threads_are_as_before_afterwards_in_new_threads_too() -> None:
    before = torch.get_num_threads()
    with threads_of(before + 2):
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


_AGAIN = """
import resource, torch
from risam_cli.inference.device import keep_freed_memory
keep_freed_memory()
def again():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        held = [torch.ones(1 << 20) for _ in range(4)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
again()
print(again())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library gives out memory")
def test_memory_that_tensors_gave_back_is_not_asked_of_the_system_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AGAIN], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1000  # pages; all of them are 40,000
