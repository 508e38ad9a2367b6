"""One step of the optimizer: parts, processes, precision, clipping; and the rate over the steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from risam_cli.settings.train import OptimizerSettings
from risam_cli.training.distributed import Processes
from risam_cli.training.losses import Task

_OVERFLOWS = 30  # fp16 steps in a row that may be left out while the scale is sought


def rate_factor(settings: OptimizerSettings, step: int, steps: int, warmup: int) -> float:
    """The factor of the base rate: linear warm-up, then down to ``floor``, or constant.

    Args:
        step: of ``steps``, of which the first ``warmup`` warm up.
    """
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    part = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "polynomial":
        left = (1 - part) ** settings.power
    else:
        left = 0.5 * (1 + math.cos(math.pi * part))
    return settings.floor + (1 - settings.floor) * left


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; no weight has been touched.

    Attributes:
        parts: of the step's parts, in the order of processes, which ones it came from.

    Args:
        what: "loss" or "gradient"; value: what it is.
    """

    def __init__(self, what: str, value: float, parts: list[list[int]]) -> None:
        self.parts = parts
        super().__init__(f"{what} is {value}")


class Stepper:
    """AdamW's steps over one stage.

    The losses of a step's parts, here and in the other processes, are divided by the numbers of
    the whole step before they are added, so that neither changes what is learned.

    Args:
        groups: AdamW's, each with its ``base_lr``.
        dtype: float32; bfloat16 or float16 compute under autocast, and float16 with loss scaling.
    """

    def __init__(
        self,
        task: Task,
        groups: list[dict[str, Any]],
        device: torch.device,
        dtype: torch.dtype,
        processes: Processes,
        settings: OptimizerSettings,
    ) -> None:
        self.task = task
        self.device = device
        self.dtype = dtype
        self.processes = processes
        self.settings = settings
        # On a CPU it otherwise takes one parameter after the other.
        fused = True if device.type == "cpu" else None
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, settings.beta2), fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.overflows = 0
        self.network: nn.Module = _Loss(task)
        if processes.world > 1:
            # It remarks on 1x1 convolutions, whose strides may be told in two ways.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            # Some parts of the network serve no loss in some ablations, or in some batches.
            self.network = DistributedDataParallel(self.network, find_unused_parameters=True)

    def __call__(self, parts: Sequence[Any], rate: float, seed: int) -> dict[str, Tensor]:
        """One step on the batches of this process.

        Args:
            rate: factor of the base rates; seed: of the step's random numbers.

        Returns:
            Figures of the whole step, ``loss`` first; ``expressions`` among them.

        Raises:
            NotFinite: before any weight has moved.
        """
        torch.manual_seed(seed + 15_485_863 * self.processes.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        with self.processes.together():
            figures, losses = self._backward(parts)
        self._descend(figures, losses)
        return figures

    def _backward(self, parts: Sequence[Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
        own = torch.stack([self.task.counts(batch) for batch in parts]).sum(dim=0)
        expressions = sum(self.task.expressions(batch) for batch in parts)
        numbers = self.processes.sum(torch.cat([own.double(), own.new_tensor([expressions])]))
        counts = numbers[:-1].float().to(self.device)
        sums: dict[str, Tensor] = {}
        losses = []
        for number, batch in enumerate(parts):
            with self._unshared(number < len(parts) - 1):
                with autocast(self.device, self.dtype):
                    loss, figures = self.network(to_device(batch, self.device), counts)
                # DDP gives the mean over the processes; the sum is what is meant.
                self.scaler.scale(loss * self.processes.world).backward()
            losses.append(loss.detach())
            for name, value in {"loss": losses[-1], **figures}.items():
                sums[name] = sums[name] + value if name in sums else value
        whole = self.processes.sum(torch.stack(list(sums.values())))
        return {**dict(zip(sums, whole, strict=True)), "expressions": numbers[-1]}, losses

    def _unshared(self, more: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged once, with the last part."""
        if more and isinstance(self.network, DistributedDataParallel):
            context: AbstractContextManager[None] = self.network.no_sync()
            return context
        return nullcontext()

    def _descend(self, figures: dict[str, Tensor], losses: list[Tensor]) -> None:
        if not torch.isfinite(figures["loss"]):
            self._stop("loss", figures["loss"], [not bool(torch.isfinite(loss)) for loss in losses])
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self.settings.clip_norm)
        if not torch.isfinite(norm):
            self.overflows += 1
            # With float16 it is the scale that was too large, unless it is so ever again.
            if not self.scaler.is_enabled() or self.overflows > _OVERFLOWS:
                # One bad gradient would spoil the weights, and a checkpoint of them, before any
                # loss shows.
                self._stop("gradient", norm, [True] * len(losses))
        else:
            self.overflows = 0
        self.scaler.step(self.optimizer)  # Left out by itself where a float16 gradient overflowed.
        self.scaler.update()

    def _stop(self, what: str, value: Tensor, bad: list[bool]) -> None:
        parts = self.processes.gather([number for number, is_bad in enumerate(bad) if is_bad])
        raise NotFinite(what, float(value), parts)


class _Loss(nn.Module):
    """A task's loss as a module, which is what DDP wraps."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self.task = task

    def forward(self, batch: Any, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(batch, counts)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computes in ``dtype`` where that is a half precision, else changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on a device."""
    if device.type == "cpu":
        return batch
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    return type(batch)(**moved)


def parameter_groups(
    parts: list[tuple[nn.Module, float]], settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """AdamW's groups: each part at its own rate, weight decay on matrices alone.

    Norms, biases, learned tokens, embeddings and position tables have none: to pull them to zero
    is no regularization, and rows of rare words, without a gradient, would fade away.

    Args:
        parts: modules and their learning rates; a parameter belongs to the first part that
            holds it, and only parameters that require gradients take part.
    """
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for module, rate in parts:
        free = _without_decay(module)
        for decays in (True, False):
            chosen = [
                p
                for p in module.parameters()
                if p.requires_grad and id(p) not in seen and (id(p) not in free) == decays
            ]
            seen.update(id(p) for p in chosen)
            if chosen:
                decay = settings.weight_decay if decays else 0.0
                groups.append(
                    {"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": decay}
                )
    return groups


def _without_decay(module: nn.Module) -> set[int]:
    """Identities of norms, biases and tokens (one dimension), embeddings and position tables."""
    tables = {
        id(p)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for p in part.parameters(recurse=False)
    }
    named = ("pos_embed", "rel_pos_h", "rel_pos_w")
    return tables | {
        id(p)
        for name, p in module.named_parameters()
        if p.ndim <= 1 or name.rpartition(".")[2] in named
    }
