"""Threads that share the pieces of one image's work."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from support.networks import encoder, noise, small_model

from risam_cli.model.fast import tuning
from risam_cli.model.fast.crew import share, threads_of
from risam_cli.model.fast.prepare import prepare_for_inference
from risam_cli.model.fast.tuning import Tuning


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_piece_is_worked_on_once(threads: int) -> None:
    done: list[int] = []
    share(list(range(40)), done.append, threads)
    assert sorted(done) == list(range(40))


def test_whoever_is_free_takes_the_next_piece() -> None:
    """A thread that is held up keeps one piece; the other works on all that are left."""
    held, by = threading.Event(), dict[int, int]()

    def work(piece: int) -> None:
        by[piece] = threading.get_ident()
        if piece == 0:
            assert held.wait(120)
        elif len(by.keys() - {0}) == 9:
            held.set()

    share(list(range(10)), work, 2)
    assert len({by[piece] for piece in range(1, 10)}) == 1
    assert by[0] != by[1]


def test_an_error_ends_the_work_and_comes_out() -> None:
    done: list[int] = []

    def work(piece: int) -> None:
        if piece == 3:
            raise ValueError("piece 3")
        time.sleep(0.05)
        done.append(piece)

    with pytest.raises(ValueError, match="piece 3"):
        share(list(range(200)), work, 2)
    assert len(done) < 20


def test_an_index_error_of_a_piece_is_not_taken_for_the_end() -> None:
    def work(piece: int) -> None:
        [][piece]

    with pytest.raises(IndexError):
        share([1, 2, 3], work, 2)


def test_helpers_compute_under_the_modes_of_the_caller() -> None:
    seen: list[tuple[bool, bool, torch.dtype, int]] = []
    both = threading.Barrier(2, timeout=120)

    def work(piece: int) -> None:
        both.wait()
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        seen.append((*modes, product.dtype, torch.get_num_threads()))

    with threads_of(1):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            share([0, 1], work, 2)
        with torch.no_grad():
            share([0, 1], work, 2)
    assert seen == 2 * [(True, False, torch.bfloat16, 1)] + 2 * [(False, False, torch.float32, 1)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_number_of_threads_gives_the_same_bits(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_in_use", Tuning(tile=48))  # so that there are several
    ours = encoder(grid=12, window=4, dim=64, adapter_dim=4)
    prepare_for_inference(ours, torch.device("cpu"), precision)
    pixels = noise(2, 3, 192, 192)
    found = []
    for threads in (1, 2, 3, 4):
        with torch.inference_mode(), threads_of(threads):
            found.append(ours(pixels))
            assert torch.get_num_threads() == threads
    for other in found[1:]:
        for name in ("shallow", "middle", "deep"):
            assert torch.equal(getattr(found[0], name), getattr(other, name))


def test_any_number_of_threads_gives_the_same_bits_behind_a_stem() -> None:
    """Whose norms PyTorch adds up by threads, where pixels lie channel by channel."""
    ours = small_model(image_encoder={"stem": [4, 8, 12]})[0].image_encoder
    prepare_for_inference(ours, torch.device("cpu"))
    pixels = noise(1, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    found = []
    for threads in (1, 2, 3):
        with torch.inference_mode(), threads_of(threads):
            found.append(ours(pixels))
    assert found[0].fine is not None
    for other in found[1:]:
        for name in ("shallow", "middle", "deep", "fine"):
            assert torch.equal(getattr(found[0], name), getattr(other, name)), name
