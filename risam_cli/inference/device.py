"""Which device runs the network, in which precision, and what "out of memory" looks like there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.utils.data import DataLoader

from risam_cli.config import TrainSettings
from risam_cli.data.collate import DenseBatch, ReferringCollate, collate_dense
from risam_cli.data.dataset import DenseScenes, Examples, ReferringExample
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.drawing.overlay import draw_overlay
from risam_cli.engine.distributed import Processes
from risam_cli.engine.optimize import Schedule, to_device
from risam_cli.engine.stage import LoopSettings
from risam_cli.engine.tasks import DenseTask, ReferringTask
from risam_cli.engine.training_log import Example
from risam_cli.engine.validate import validate_referring
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


DENSE_VALIDATION_SCENES = 128
_SHOWN = ("miou", "oiou", "giou", "pr@0.5", "pr@0.9", "n_acc", "t_acc")


def loop_settings(
    settings: TrainSettings, device: torch.device, dtype: torch.dtype
) -> LoopSettings:
    """The loop's own settings."""
    s, stopping, averaging = settings, settings.early_stopping, settings.averaging
    return LoopSettings(
        seed=s.seed,
        device=device,
        dtype=dtype,
        workers=s.workers,
        beta2=s.optimizer.beta2,
        clip_norm=s.optimizer.clip_norm,
        ema_decay=s.optimizer.ema_decay,
        validate_every=s.validate_every,
        checkpoint_every=s.checkpoint_every,
        log_every=s.log_every,
        schedule=Schedule(s.optimizer.schedule, s.optimizer.power, s.optimizer.floor),
        patience=stopping.patience if stopping else None,
        min_delta=stopping.min_delta if stopping else 0.0,
        averaged=averaging.count if averaging else 0,
        average_of=averaging.of if averaging else "best",
        keep_last=s.keep_last,
    )


class Validation:
    """Figures and pictures of the present weights on the validation sets.

    Args:
        held_out: examples by the set's name; processes: that share the work.
    """

    def __init__(
        self,
        settings: TrainSettings,
        task: ReferringTask,
        held_out: Mapping[str, Examples],
        collate: ReferringCollate,
        processes: Processes,
    ) -> None:
        self.settings = settings
        self.task = task
        self.held_out = held_out
        self.collate = collate
        self.processes = processes
        self.chosen = fixed_examples(held_out, settings.pictures)

    def __call__(self, between: Callable[[], None]) -> dict[str, float]:
        """Figures as ``SET.figure``; ``best`` and, for early stopping, ``watched``.

        Raises:
            ConfigError: the figure to go by has no value on these sets.
        """
        s = self.settings
        found: dict[str, dict[str, float]] = {}
        for name, data in self.held_out.items():
            found[name] = validate_referring(
                self.task,
                data,
                self.collate,
                s.model.threshold,
                s.model.no_target_threshold,
                workers=s.workers,
                processes=self.processes,
                between=between,
            )
        figures = {f"{name}.{key}": found[name][key] for name in found for key in _SHOWN}
        figures["best"] = self._one("best_by", s.best_by, found)
        if s.early_stopping is not None and s.early_stopping.figure is not None:
            watched = s.early_stopping.figure
            figures["watched"] = self._one("early_stopping.figure", watched, found)
        return figures

    def _one(self, key: str, figure: str, found: Mapping[str, Mapping[str, float]]) -> float:
        """The mean over the sets that have the figure, or one set's."""
        own = [figures[figure] for figures in found.values() if figure in figures]
        one = [f[key] for name, f in found.items() for key in f if f"{name}.{key}" == figure]
        values = [value for value in own or one if value == value]
        if not values:
            raise ConfigError(
                f"{key} is {figure!r}, but no validation set has such expressions",
                "take another figure, or another validation set",
            )
        return sum(values) / len(values)

    @torch.no_grad()
    def draw(self) -> list[Example]:
        """The fixed examples with the true mask and the present answer."""
        model = self.task.model
        device = next(model.parameters()).device
        drawn = []
        model.eval()
        try:
            for number, (name, index, row) in enumerate(self.chosen):
                example = self.held_out[name][index]
                row %= len(example.texts)
                batch = self.collate([example])
                decoded = self.task.decode(to_device(batch, device))
                none = float(decoded.no_target_logits[row].float().sigmoid())
                found = decoded.mask_logits[row].float().sigmoid()
                mask = _to_image(found.cpu(), example, batch.images.shape[1])
                answer = mask > self.settings.model.threshold
                if none > self.settings.model.no_target_threshold:
                    answer = np.zeros_like(answer)
                target = torch.from_numpy(example.targets[row]).float() / 255
                truth = _to_image(target, example, batch.images.shape[1]) > 0.5
                text = example.texts[row]
                drawn.append(
                    Example(
                        key=f"example{number:02d}",
                        held_out=name,
                        image=name_of(self.held_out[name], index),
                        text=text,
                        truth=_drawn(example, truth, text),
                        answer=_drawn(example, answer, text),
                    )
                )
        finally:
            model.train()
        return drawn


def _drawn(example: ReferringExample, mask: NDArray[np.bool_], text: str) -> NDArray[np.uint8]:
    """The mask over a picture that is dark elsewhere, so that it shows at a thumbnail's size."""
    dark = example.image // 2
    return draw_overlay(np.where(mask[..., None], example.image, dark), [mask], [text])


def name_of(data: Any, index: int) -> str:
    """An example's own name, or its number."""
    name: Callable[[int], str] = getattr(data, "name_of", str)
    return name(index)


def fixed_examples(held_out: Mapping[str, Examples], count: int) -> list[tuple[str, int, int]]:
    """(set, index, row of the expression) of ``count`` examples, evenly from all sets."""
    names = list(held_out)
    per_set = -(-count // len(names))
    chosen = []
    for number in range(count):
        turn, name = number // len(names), names[number % len(names)]
        size = len(held_out[name])
        if turn < size:
            chosen.append((name, turn * max(1, size // per_set), number))
    return chosen


def _to_image(square: torch.Tensor, example: ReferringExample, size: int) -> NDArray[np.float32]:
    """A grid over the padded square of ``size`` pixels as (h, w) over the image in it."""
    height, width = example.image.shape[:2]
    whole = F.interpolate(square[None, None], size=(size, size), mode="bilinear")[0, 0]
    return np.asarray(whole[:height, :width].numpy(), np.float32)


def validate_dense(
    task: DenseTask,
    size: int,
    cells: int,
    device: torch.device,
    processes: Processes,
    between: Callable[[], None],
) -> dict[str, float]:
    """Accuracies of the dense head on scenes of the validation split; processes take turns."""
    scenes = RefShapes("mixed", "val", DENSE_VALIDATION_SCENES, size=size)
    data: Any = DenseScenes(scenes, cells)
    batches = [list(range(k, min(k + 16, len(data)))) for k in range(0, len(data), 16)]
    loader: DataLoader[DenseBatch] = DataLoader(
        data, batch_sampler=batches[processes.rank :: processes.world], collate_fn=collate_dense
    )
    found: list[tuple[int, dict[str, float]]] = []
    task.module.eval()
    try:
        with torch.no_grad():
            for turn, batch in enumerate(loader):
                between()
                figures = task.loss(to_device(batch, device))[1]
                number = processes.rank + turn * processes.world
                found.append((number, {name: float(value) for name, value in figures.items()}))
    finally:
        task.module.train()
    sums: dict[str, float] = {}
    together = [part for parts in processes.gather(found) for part in parts]
    for _, part in sorted(together, key=lambda part: part[0]):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value / len(batches)
    # Below zero, so that any referring stage is better: this model cannot answer yet.
    return {**sums, "best": -1 + (sums["shape"] + sums["color"] + sums["size"]) / 4}


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


def card_of(
    settings: TrainSettings,
    stage: str,
    step: int,
    seconds: float,
    expressions: int,
    figures: Mapping[str, float],
    averaged: Sequence[int],
) -> dict[str, Any]:
    """What a model folder says of its making."""
    card: dict[str, Any] = {
        "name": settings.name,
        "stage": stage,
        "step": step,
        "seconds": round(seconds, 1),
        "expressions": expressions,
        "seed": settings.seed,
        "best_by": settings.best_by,
    }
    if averaged:
        card["averaged"] = list(averaged)
    return {**card, "figures": {k: v for k, v in figures.items() if v == v}}
