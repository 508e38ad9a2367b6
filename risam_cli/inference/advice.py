"""Which settings suit this machine: a few seconds of measuring, and what follows from it."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from risam_cli.data.images.images import read_for_encoder
from risam_cli.inference.cores import share_cores, threads_of
from risam_cli.inference.device import is_out_of_memory, precision_name, release_memory
from risam_cli.inference.loader import default_workers
from risam_cli.model.fast.prepare import prepare_for_inference

if TYPE_CHECKING:
    from risam_cli.model.image_encoder import ImageEncoder

_SIDE = (960, 1280)  # of the photo that is read: what a common camera's small setting gives
_WORTH = 1.25  # times faster from where a lower precision is worth its rounding
_GAIN = 1.1  # times more images a second for which a batch is doubled
_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured.

    Attributes:
        device_type: ``cpu``, ``cuda`` or ``mps``; cores: that this process may use.
        read: seconds in which one thread decodes and shrinks a photo of 1280x960.
        encode: seconds to encode one image, by precision.
        rates: images encoded a second, by batch size, in the fastest precision; GPUs only.
        lanes: images that go through the network side by side.
    """

    device_type: str
    cores: int
    read: float
    encode: Mapping[str, float]
    rates: Mapping[int, float]
    lanes: int = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """One option of ``risam predict`` and ``eval``: its value here, and why."""

    option: str
    value: str
    why: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def measure(encoder: ImageEncoder, device: torch.device, cores: int, seconds: float) -> Measured:
    """Times reading and encoding; for each thing at most so many seconds, and one run at least.

    Args:
        encoder: in float32, on the device; is left as it is.
    """
    shared = share_cores(device.type, encoder.image_size)
    kinds = [torch.float32]
    if device.type != "mps":
        kinds.append(torch.bfloat16)
    encode: dict[str, float] = {}
    fastest, best = encoder, math.inf
    for kind in kinds:
        held = encoder
        if kind != torch.float32:
            held = copy.deepcopy(encoder)
            prepare_for_inference(held, device, kind)
        with threads_of(shared.threads):
            took = _shortest(_encoding(held, device, 1), device, seconds)
        encode[precision_name(kind)] = took
        if took < best:
            fastest, best = held, took
    rates = {} if device.type == "cpu" else _rates(fastest, device, seconds)
    read = _read_seconds(encoder.image_size, seconds)
    return Measured(device.type, cores, read, encode, rates, shared.lanes)


def advise(measured: Measured) -> list[Setting]:
    """What to give ``risam predict`` and ``eval`` on this machine."""
    return [_precision(measured), _batch_size(measured), _workers(measured), _compile(measured)]


# --- what follows ---------------------------------------------------------------------------------


def _precision(measured: Measured) -> Setting:
    plain, lower = measured.encode["fp32"], measured.encode.get("bf16", math.inf)
    if plain / lower >= _WORTH:
        why = f"{plain / lower:.1f} times as fast here as fp32; masks differ in few pixels"
        return Setting("--precision", "bf16", why)
    if lower == math.inf:
        return Setting("--precision", "fp32", "bf16 is no faster on this kind of device")
    return Setting("--precision", "fp32", f"bf16 is {plain / lower:.1f} times as fast here")


def _batch_size(measured: Measured) -> Setting:
    if not measured.rates:
        return Setting("--batch-size", "8", "the default: a CPU takes images one by one anyway")
    sizes = sorted(measured.rates)
    chosen = sizes[0]
    for size in sizes[1:]:
        if measured.rates[size] >= _GAIN * measured.rates[chosen]:
            chosen = size
    why = f"{measured.rates[chosen]:.1f} images/s encoded; the next size gains less than a tenth"
    return Setting("--batch-size", str(chosen), why)


def _workers(measured: Measured) -> Setting:
    rate = max([measured.lanes / min(measured.encode.values()), *measured.rates.values()])
    needed = measured.read * rate  # processes that are busy reading while the network never waits
    default = default_workers(measured.device_type)
    told = (
        f"reading a photo takes {measured.read * 1e3:.0f} ms, one is encoded every "
        f"{1e3 / rate:.0f} ms"
    )
    if measured.lanes > 1:
        told += f" ({measured.lanes} side by side)"
    if measured.device_type == "cpu" and needed <= measured.lanes:
        return Setting("--workers", str(default), f"the default: {told}, and threads keep up")
    wanted = max(1, min(math.ceil(needed * 1.25), measured.cores - 1))
    short = f"; {measured.cores} cores cannot read as fast" if wanted < needed else ""
    return Setting("--workers", str(wanted), told + short)


def _compile(measured: Measured) -> Setting:
    if measured.device_type == "cuda":
        return Setting("--compile", "for long runs", "minutes before the first image, once")
    return Setting("--compile", "no", "on this device PyTorch's own kernels are faster")


# --- measuring ------------------------------------------------------------------------------------


def _encoding(encoder: ImageEncoder, device: torch.device, batch: int) -> Callable[[], object]:
    pixels = torch.zeros(batch, 3, encoder.image_size, encoder.image_size, device=device)

    def encode() -> object:
        with torch.inference_mode():
            return encoder(pixels)

    return encode


def _rates(encoder: ImageEncoder, device: torch.device, seconds: float) -> dict[int, float]:
    """Images a second by batch size, up to what fits the memory or gains no more."""
    rates: dict[int, float] = {}
    for size in _BATCHES:
        try:
            rates[size] = size / _shortest(_encoding(encoder, device, size), device, seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        if size > 1 and rates[size] < _GAIN * rates[size // 2]:
            break
    release_memory(device)
    return rates


def _read_seconds(size: int, seconds: float) -> float:
    """Seconds to read one JPEG as the loader does."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        coarse.resize(_SIDE[::-1], Image.Resampling.BICUBIC).save(path, quality=90)
        return _shortest(lambda: read_for_encoder(path, size), torch.device("cpu"), seconds / 2)


def _shortest(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of up to ten runs within the time; the first, which warms up, only if alone."""
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < 11:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - start)
        if time.perf_counter() - began > seconds:
            break
    return min(times[1:] or times)
