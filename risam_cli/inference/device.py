"""Which device runs the network, in which precision, and what "out of memory" looks like there."""

from __future__ import annotations

import os

import torch

from risam_cli.errors import ConfigError, UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    except RuntimeError:
        raise UsageError(f"--device {name!r} is no device", "use auto, cpu, cuda or mps") from None
    if device.type == "cuda":
        return _checked_gpu(device)
    if device.type == "mps" and not _has_mps():
        raise UsageError("--device mps: this machine has no MPS", "use --device auto")
    if device.type not in {"cpu", "mps"}:
        raise UsageError(f"--device {name!r} is not supported", "use auto, cpu, cuda or mps")
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
        raise UsageError(f"--precision {name!r} is unknown", f"use auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 does not run on a CPU", "use bf16 or fp32")
    return PRECISIONS[name]


def precision_name(dtype: torch.dtype) -> str:
    """The name that ``--precision`` has for a number format."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def describe_device(device: torch.device) -> str:
    """The device in words, such as ``cuda:0 (NVIDIA H100)`` or ``cpu (2 threads)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
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


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _local_gpu() -> torch.device:
    rank = os.environ.get("LOCAL_RANK", "")
    if rank.isdigit() and int(rank) < torch.cuda.device_count():
        return torch.device("cuda", int(rank))
    return torch.device("cuda", torch.cuda.current_device())


def _checked_gpu(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this machine has no CUDA GPU", "use --device auto")
    if device.index is None:
        return _local_gpu()
    if device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f"--device {device}: this machine has {count} GPU(s), counted from 0")
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
