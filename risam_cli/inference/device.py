"""Which device runs the network, in which precision, and how its cores are shared out.

Images do not wait for each other, but threads that work on one small image spend much of their time
waiting, and, spinning as they wait, take it from whatever reads and writes beside them. So a CPU's
cores work on a few images side by side, each by a few threads.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from risam_cli.console.text import counted
from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.images import read_for_encoder
from risam_cli.errors import ConfigError, UsageError, setting
from risam_cli.model.fast.crew import threads_of
from risam_cli.model.fast.prepare import prepare_for_inference

if TYPE_CHECKING:
    from risam_cli.model.image_encoder import ImageEncoder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MOST_LANES = 8
"""Images at a time; Python itself, which they share, would not keep up with more."""

_SIDE_A_THREAD = 512  # pixels of the encoder's square input that keep one thread busy

_SIDE = (960, 1280)  # of the photo that is read: what a common camera's small setting gives
_WORTH = 1.25  # times faster from where a lower precision is worth its rounding
_GAIN = 1.1  # times more images a second for which a batch is doubled
_BATCHES = (1, 2, 4, 8, 16, 32)


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name such as ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    ``auto`` takes CUDA, then MPS, then the CPU. ``auto`` and ``cuda`` follow torchrun's
    ``LOCAL_RANK``, so that the processes of one machine spread over its GPUs.

    Raises:
        UsageError: the device is unknown or this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _local_gpu()
        return torch.device("mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UsageError(
            f"{setting('device')} {name!r} is not a device", "use auto, cpu, cuda or mps"
        ) from None
    if device.type == "cuda":
        return _checked_gpu(device)
    if device.type == "mps" and not _has_mps():
        raise UsageError(
            f"{setting('device', 'mps')}: this machine has no MPS",
            f"use {setting('device', 'auto')}",
        )
    if device.type not in {"cpu", "mps"}:
        raise UsageError(
            f"{setting('device')} {name!r} is not supported", "use auto, cpu, cuda or mps"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format of ``auto``, ``fp32``, ``bf16`` or ``fp16`` on a device.

    ``auto`` is bfloat16 on a GPU that computes it natively (Ampere and later) and float32
    elsewhere: on a CPU the results must not depend on the machine, and MPS emulates it.

    Raises:
        UsageError: the precision is unknown or the device cannot do it.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    if name not in PRECISIONS:
        raise UsageError(
            f"{setting('precision')} {name!r} is unknown", f"use auto, {', '.join(PRECISIONS)}"
        )
    if name == "fp16" and device.type == "cpu":
        raise UsageError(
            f"{setting('precision', 'fp16')} does not run on a CPU", "use bf16 or fp32"
        )
    return PRECISIONS[name]


def precision_name(dtype: torch.dtype) -> str:
    """The name that the setting ``precision`` has for a number format."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def describe_device(device: torch.device) -> str:
    """The device in words, such as ``cuda:0 (NVIDIA H100)`` or ``cpu (2 threads)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({counted(torch.get_num_threads(), 'thread')})"
    return str(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's, or the machine's, memory is full."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    # "can't allocate memory" is the CPU allocator; MPS and cuBLAS say the others.
    return any(
        sign in text
        for sign in ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether the device fails every later call too, so that going on would fail all images."""
    if is_out_of_memory(error):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", ())
    if isinstance(error, accelerator_error):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def release_memory(device: torch.device) -> None:
    """Gives cached blocks back after memory ran out; they may be too small or too scattered."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> None:
    """Has glibc keep the memory of tensors that are gone for the next ones, 64 MiB at most.

    Otherwise it gives large ones back to the system at once, which clears each of their pages when
    it is asked for them again. How large is "large" follows the largest block that was ever freed,
    up to 32 MiB; this one is never touched, and takes no memory.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _local_gpu() -> torch.device:
    rank = os.environ.get("LOCAL_RANK", "")
    if rank.isdigit() and int(rank) < torch.cuda.device_count():
        return torch.device("cuda", int(rank))
    return torch.device("cuda", torch.cuda.current_device())


def _checked_gpu(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise UsageError(
            f"{setting('device', device)}: this machine has no CUDA GPU",
            f"use {setting('device', 'auto')}",
        )
    if device.index is None:
        return _local_gpu()
    if device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"{setting('device', device)}: this machine has {count} GPU(s), counted from 0"
        )
    return device


def training_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format of ``precision``: as everywhere else, but float16 on CUDA alone.

    Raises:
        ConfigError: the device cannot train in it.
    """
    if name == "fp16" and device.type != "cuda":  # Its losses are scaled, and scales sought.
        raise ConfigError(
            f"precision = {name!r}: {device.type} cannot train in it", "set precision: bf16 or fp32"
        )
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"precision = {name!r}: {torch.cuda.get_device_name(device)} cannot compute in it",
            "set precision: fp16 or fp32",
        )
    return choose_precision(name, device)


def count_workers(workers: int | None, device_type: str) -> int:
    """Loader processes: as many as the user says, else what suits the device.

    On a CPU the network takes all cores and decoding hides in a thread beside it; a GPU wants its
    images from several processes.
    """
    if workers is not None:
        return workers
    return 0 if device_type == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))


# --- cores ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cores:
    """A share of a machine's cores.

    Attributes:
        lanes: images that go through the network side by side.
        threads: that work on each; 0 leaves the number to torch.
        all: threads that work on an image which has the machine to itself.
    """

    lanes: int = 1
    threads: int = 0
    all: int = 0

    def for_one_of(self, images: int) -> int:
        """Threads that work on each of so many images, where no more are to come."""
        return max(self.threads, self.all // max(1, images))


def share_cores(
    device_type: str, side: int, cores: int | None = None, measured: int | None = None
) -> Cores:
    """Shares out the cores for images of some size (ours).

    The threads of an image depend on its size and on the machine, never on how many images there
    are or on their neighbours: the last bits of a result may depend on them. All cores go to an
    image that is alone only where a model's encoder gives the same bits with any number
    (:class:`risam_cli.segmenters.segmenter.Capabilities`).

    Args:
        device_type: on other devices than a CPU there is one lane, and torch is left alone.
        side: of the encoder's square input, in pixels.
        cores: to share out; None takes as many as torch's threads, and so ``OMP_NUM_THREADS``.
        measured: threads an image that were found to be best here; None goes by the size.
    """
    if device_type != "cpu":
        return Cores()
    cores = max(1, torch.get_num_threads() if cores is None else cores)
    # Two images at least: what one does alone, such as its last few words, hides behind the other.
    threads = min(max(1, cores // 2), max(1, side * side // _SIDE_A_THREAD**2))
    if measured is not None:
        threads = min(cores, measured)
    return Cores(min(MOST_LANES, cores // threads), threads, cores)


class Room:
    """How many images may be in the network at a time; entered by its lanes for each step.

    Args:
        places: at first.
    """

    def __init__(self, places: int = 1) -> None:
        self._places = places
        self._inside = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            while self._inside >= self._places:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def halve(self) -> int:
        """Halves the places for good and gives how many there were; 1 stays 1."""
        with self._changed:
            before = self._places
            self._places = max(1, before // 2)
            return before


# --- what suits a machine -------------------------------------------------------------------------


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
class Advice:
    """One setting of ``risam predict`` and ``eval``: its key, its value here, and why."""

    setting: str
    value: str
    why: str


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


def advise(measured: Measured) -> list[Advice]:
    """What to give ``risam predict`` and ``eval`` on this machine."""
    return [_precision(measured), _batch_size(measured), _workers(measured), _compile(measured)]


def _precision(measured: Measured) -> Advice:
    plain, lower = measured.encode["fp32"], measured.encode.get("bf16", math.inf)
    if plain / lower >= _WORTH:
        why = f"{plain / lower:.1f} times as fast here as fp32; masks differ in few pixels"
        return Advice("precision", "bf16", why)
    if lower == math.inf:
        return Advice("precision", "fp32", "bf16 is no faster on this kind of device")
    return Advice("precision", "fp32", f"bf16 is {plain / lower:.1f} times as fast here")


def _batch_size(measured: Measured) -> Advice:
    if not measured.rates:
        return Advice("batch_size", "8", "the default: a CPU takes images one by one anyway")
    sizes = sorted(measured.rates)
    chosen = sizes[0]
    for size in sizes[1:]:
        if measured.rates[size] >= _GAIN * measured.rates[chosen]:
            chosen = size
    why = f"{measured.rates[chosen]:.1f} images/s encoded; the next size gains less than a tenth"
    return Advice("batch_size", str(chosen), why)


def _workers(measured: Measured) -> Advice:
    rate = max([measured.lanes / min(measured.encode.values()), *measured.rates.values()])
    needed = measured.read * rate  # processes that are busy reading while the network never waits
    default = count_workers(None, measured.device_type)
    told = (
        f"reading a photo takes {measured.read * 1e3:.0f} ms, one is encoded every "
        f"{1e3 / rate:.0f} ms"
    )
    if measured.lanes > 1:
        told += f" ({measured.lanes} side by side)"
    if measured.device_type == "cpu" and needed <= measured.lanes:
        return Advice("workers", str(default), f"the default: {told}, and threads keep up")
    wanted = max(1, min(math.ceil(needed * 1.25), measured.cores - 1))
    short = f"; {measured.cores} cores cannot read as fast" if wanted < needed else ""
    return Advice("workers", str(wanted), told + short)


def _compile(measured: Measured) -> Advice:
    if measured.device_type == "cuda":
        return Advice("compile", "try it", "experimental; minutes before the first image, once")
    return Advice("compile", "no", "on this device PyTorch's own kernels are faster")


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
        read = partial(read_for_encoder, path, [sam_frame(size)])
        return _shortest(read, torch.device("cpu"), seconds / 2)


def _shortest(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of up to ten runs within the time; the first, which warms up, only if alone."""
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < 11:
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
        if time.perf_counter() - began > seconds:
            break
    return min(times[1:] or times)
