"""Figures on held-out data while training, by the one implementation of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from risam_cli.data.collate import ReferringBatch, ReferringCollate
from risam_cli.engine.distributed import Processes
from risam_cli.engine.optimize import to_device
from risam_cli.engine.plan import begin_worker
from risam_cli.engine.tasks import ReferringTask, inside
from risam_cli.metrics.figures import summarize
from risam_cli.metrics.table import ExpressionScore


@torch.no_grad()
def validate_referring(
    task: ReferringTask,
    data: Any,
    collate: ReferringCollate,
    threshold: float,
    no_target_threshold: float,
    *,
    images_per_step: int = 16,
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
    every = range(0, len(data), images_per_step)
    mine = [
        list(range(begin, min(begin + images_per_step, len(data))))
        for begin in every[processes.rank :: processes.world]
    ]
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=mine,
        collate_fn=collate,
        num_workers=min(workers, len(mine)),
        worker_init_fn=begin_worker,
    )
    device = next(task.module.parameters()).device
    found: list[tuple[int, Sequence[ExpressionScore]]] = []
    task.module.eval()
    try:
        for turn, batch in enumerate(loader):
            between()
            number = processes.rank + turn * processes.world
            batch = to_device(batch, device)
            scores = _scores(number, batch, task.decode(batch), threshold, no_target_threshold)
            found.append((number, scores))
    finally:
        task.module.train()
    together = sorted(part for parts in processes.gather(found) for part in parts)
    return summarize([score for _, scores in together for score in scores])


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
    target = (truth > 0.5) & within
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
