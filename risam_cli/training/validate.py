"""Figures on held-out data while training, by the one implementation of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.drawing.overlay import draw_overlay
from risam_cli.errors import ConfigError
from risam_cli.metrics.figures import ExpressionScore, summarize
from risam_cli.model.fast.prepare import inference_forms
from risam_cli.settings.train import TrainSettings
from risam_cli.training.data.collate import (
    ReferringBatch,
    ReferringCollate,
    begin_worker,
    collate_dense,
)
from risam_cli.training.data.dataset import (
    DenseScenes,
    Examples,
    ReferringExample,
    ReferringSamples,
)
from risam_cli.training.distributed import Processes
from risam_cli.training.log import Example
from risam_cli.training.losses import DenseTask, ReferringTask, inside
from risam_cli.training.optimize import to_device

_IMAGES = 16  # of a batch


@torch.no_grad()
def validate_referring(
    task: ReferringTask,
    data: Any,
    collate: ReferringCollate,
    threshold: float,
    no_target_threshold: float,
    *,
    workers: int = 0,
    processes: Processes | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Figures of the contract on a data set of examples, at the resolution of the targets.

    They steer the training (best checkpoint); the ones to quote come from ``risam eval``, at
    the pictures' own resolution. Several processes take a batch each in turn; all get the figures
    of all, the same as one alone would.

    Args:
        between: called before each batch; what it raises ends the validation.
    """
    processes = processes or Processes()
    device = next(task.module.parameters()).device
    found: list[tuple[int, Sequence[ExpressionScore]]] = []
    with answering(task.module, device):
        for number, batch in _own_batches(data, collate, processes, device, between, workers):
            scores = _scores(number, batch, task.decode(batch), threshold, no_target_threshold)
            found.append((number, scores))
    together = sorted(part for parts in processes.gather(found) for part in parts)
    return summarize([score for _, scores in together for score in scores])


def _own_batches(
    data: Any,
    collate: Callable[[Any], Any],
    processes: Processes,
    device: torch.device,
    between: Callable[[], None],
    workers: int = 0,
) -> Iterator[tuple[int, Any]]:
    """The batches of this process on its device, with their numbers among those of all."""
    starts = range(processes.rank * _IMAGES, len(data), processes.world * _IMAGES)
    mine = [list(range(k, min(k + _IMAGES, len(data)))) for k in starts]
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=mine,
        collate_fn=collate,
        num_workers=min(workers, len(mine)),
        worker_init_fn=begin_worker,
    )
    for turn, batch in enumerate(loader):
        between()
        yield processes.rank + turn * processes.world, to_device(batch, device)


@contextmanager
def answering(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it a module in training answers as it would in ``risam predict``."""
    module.eval()
    try:
        with inference_forms(module, device):
            yield
    finally:
        module.train()


def _scores(
    number: int, batch: ReferringBatch, decoded: Any, threshold: float, no_target_threshold: float
) -> Sequence[ExpressionScore]:
    truth = batch.targets.float() / 255
    logits = torch.nn.functional.interpolate(
        decoded.mask_logits.float()[:, None],
        size=truth.shape[-2:],
        mode="bilinear",
        align_corners=False,
    )[:, 0]
    within = inside(batch, truth) > 0
    mask = (logits.sigmoid() > threshold) & within
    none = decoded.no_target_logits.float().sigmoid() > no_target_threshold
    # An object smaller than a cell is the cells that it covers most of: it is not nothing.
    most = truth.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    target = ((truth > 0.5) | ((most <= 0.5) & (truth >= most))) & within
    both = (mask & target).sum(dim=(1, 2)).tolist()
    either = (mask | target).sum(dim=(1, 2)).tolist()
    predicted, true = mask.sum(dim=(1, 2)).tolist(), target.sum(dim=(1, 2)).tolist()
    return [
        ExpressionScore(
            id=f"{number}/{row}",
            image=f"{number}/{int(image)}",
            intersection=both[row],
            union=either[row],
            pred_area=predicted[row],
            gt_area=true[row],
            gt_no_target=bool(batch.no_target[row] > 0.5),
            pred_no_target=bool(none[row]),
        )
        for row, image in enumerate(batch.image_index)
    ]


DENSE_VALIDATION_SCENES = 128


_SHOWN = ("miou", "oiou", "giou", "pr@0.5", "pr@0.9", "n_acc", "t_acc")


@dataclass(eq=False)
class Validation:
    """Figures and pictures of the present weights on the validation sets.

    Args:
        held_out: examples by the set's name; processes: that share the work.
    """

    settings: TrainSettings
    task: ReferringTask
    held_out: Mapping[str, Examples]
    collate: ReferringCollate
    processes: Processes

    def __post_init__(self) -> None:
        self.chosen = fixed_examples(self.held_out, self.settings.pictures)

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
        figures["best"] = _one("best_by", s.best_by, found)
        if s.early_stopping is not None and s.early_stopping.figure is not None:
            watched = s.early_stopping.figure
            figures["watched"] = _one("early_stopping.figure", watched, found)
        return figures

    @torch.no_grad()
    def draw(self) -> list[Example]:
        """The fixed examples with the true mask and the present answer."""
        model = self.task.model
        device = next(model.parameters()).device
        drawn = []
        with answering(model, device):
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
                        image=self.held_out[name].name_of(index),
                        text=text,
                        truth=_drawn(example, truth, text),
                        answer=_drawn(example, answer, text),
                    )
                )
        return drawn


def require_figures(settings: TrainSettings, held_out: Mapping[str, Examples]) -> None:
    """Make sure that the figures to go by have a value, before hours of training have passed.

    Of scenes that are drawn while they are used, this is not known in advance.

    Raises:
        ConfigError: the validation sets have no expressions that they speak of.
    """
    found = {}
    for name, data in held_out.items():
        if not isinstance(data, ReferringSamples):
            return
        nothing = data.samples.no_target
        answers = []  # one right one of each kind
        if data.samples.expressions > nothing:
            answers.append(ExpressionScore("", "", 1, 1, 1, 1))
        if nothing:
            answers.append(ExpressionScore("", "", 0, 0, 0, 0, True, True))
        found[name] = summarize(answers)
    _one("best_by", settings.best_by, found)
    if settings.early_stopping is not None and settings.early_stopping.figure is not None:
        _one("early_stopping.figure", settings.early_stopping.figure, found)


def _one(key: str, figure: str, found: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over the sets that have the figure, or one set's."""
    own = [figures[figure] for figures in found.values() if figure in figures]
    one = [f[key] for name, f in found.items() for key in f if f"{name}.{key}" == figure]
    values = [value for value in own or one if value == value]
    if not values:
        raise ConfigError(
            f"{key} is {figure!r}, but no validation set has such expressions",
            "use another figure, or another validation set",
        )
    return sum(values) / len(values)


def _drawn(example: ReferringExample, mask: NDArray[np.bool_], text: str) -> NDArray[np.uint8]:
    """The mask over a picture that is dark elsewhere, so that it shows at a thumbnail's size."""
    dark = example.image // 2
    return draw_overlay(np.where(mask[..., None], example.image, dark), [mask], [text])


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
    data = DenseScenes(scenes, cells)
    found: list[tuple[int, dict[str, float]]] = []
    with torch.no_grad(), answering(task.module, device):
        for number, batch in _own_batches(data, collate_dense, processes, device, between):
            figures = task.loss(batch)[1]
            found.append((number, {name: float(value) for name, value in figures.items()}))
    sums: dict[str, float] = {}
    together = [part for parts in processes.gather(found) for part in parts]
    for _, part in sorted(together, key=lambda part: part[0]):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value / len(together)
    # Below zero, so that any referring stage is better: this model cannot answer yet.
    return {**sums, "best": -1 + (sums["shape"] + sums["color"] + sums["size"]) / 4}
