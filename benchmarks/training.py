"""Expressions a second in training: an image encoded once, once an expression, or read from disk.

Whole optimizer steps of the training loop on one batch of RefShapes scenes, in turns, with weights
made at random, since only the work matters. "Once an expression" gives every expression a copy of
its image, which is what a loop over pairs does. On a CPU the seconds are those of processors, so
that what else the machine does falls out of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Options, Row, Times, in_turns, ratio

from risam_cli.console.console import Console
from risam_cli.settings.load import check
from risam_cli.settings.train import TrainSettings
from risam_cli.training.data.collate import ReferringBatch
from risam_cli.training.optimize import Stepper, to_device
from risam_cli.training.stage import TrainingBuilder

ONCE, EACH, CACHED = "once an image", "once an expression", "from the cache"


def measure(options: Options) -> list[Row]:
    """The tiny network and ViT-B, with the image encoder frozen and trained."""
    rows = steps("tiny", 4, 8, "no", options) + steps("tiny", 4, 8, "yes", options)
    if not options.quick:
        rows += steps("vit_b", 1, 4, "no", options)
        if options.device == "cuda":
            rows += steps("vit_b", 4, 8, "adapters", options)
    return rows


def steps(preset: str, images: int, each: int, trained: str, options: Options) -> list[Row]:
    """Steps of ``images`` with ``each`` expressions; ``trained``: of the image encoder."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        settings = run_settings(Path(folder), preset, images, each, trained, options.device)
        builder = TrainingBuilder(settings, Console(quiet=True))
        stage = builder.stage(settings.stages[0])
        task: Any = stage.task
        step = Stepper(
            task,
            stage.groups,
            builder.device,
            builder.dtype,
            builder.processes,
            settings.optimizer,
        )
        task.module.train()
        batch = stage.collate([stage.data[index] for index in range(images)])
        apart = spread(batch)
        features, task.features = task.features, None

        def way(taken: Any, source: Any = None) -> Callable[[], None]:
            def run() -> None:
                task.features = source
                step([to_device(taken, builder.device)], 1.0, 0)

            return run

        ways = {ONCE: way(batch), EACH: way(apart)}
        if features is not None:
            ways[CACHED] = way(batch, features)  # The round that warms up fills it.
        wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
        repeats = 1 if options.quick else options.repeats
        times = in_turns(ways, repeats, synchronize=wait)
        builder.close()
    name = f"{preset}, {'frozen encoder' if trained == 'no' else f'encoder trained: {trained}'}"
    return figures(name, times, images * each, f"{images} images, {each} expressions each", options)


def figures(
    name: str, times: dict[str, Times], expressions: int, note: str, options: Options
) -> list[Row]:
    """Expressions a second of each way, and how many times faster than once an expression."""
    rows = []
    cpu = options.device == "cpu"
    taken = {way: (one.cpu if cpu else one.wall) for way, one in times.items()}
    for way, seconds in taken.items():
        row = times[way].row(f"{name}: {way}", by="cpu" if cpu else "wall", note=note)
        rates = sorted(expressions / second for second in seconds)
        unit = "expressions/s of processor" if cpu else "expressions/s"
        rows.append(Row(row.name, expressions / row.value, unit, (rates[0], rates[-1]), note))
    for way in (ONCE, CACHED):
        if way in taken:
            rows.append(ratio(f"{name}: {way} over {EACH}", taken[EACH], taken[way], ">= 1"))
    if CACHED in taken:
        rows.append(ratio(f"{name}: {CACHED} over {ONCE}", taken[ONCE], taken[CACHED]))
    return rows


def run_settings(
    folder: Path, preset: str, images: int, each: int, trained: str, device: str
) -> TrainSettings:
    """A referring stage of one step on scenes."""
    scenes = {"dataset": "refshapes", "expressions_per_scene": each}
    cache = {"folder": str(folder / "features"), "limit": "2GB"}
    raw = {
        "name": "benchmark",
        "output": str(folder / "run"),
        "device": device,
        "precision": "fp32" if device == "cpu" else "bf16",
        "workers": 0,
        "model": {"preset": preset, "text_encoder": {"vocabulary": "refshapes"}},
        "train": {**scenes, "scenes": images},
        "val": {"held out": {**scenes, "split": "val", "scenes": 1}},
        "feature_cache": cache if trained == "no" else None,
        "stages": [
            {
                "name": "steps",
                "kind": "referring",
                "steps": 1,
                "images_per_step": images,
                "learning_rate": 1e-4,
                "train_encoder": trained,
            }
        ],
    }
    return check(TrainSettings, raw, "a benchmark")


def spread(batch: ReferringBatch) -> ReferringBatch:
    """The same expressions, each with an image of its own."""
    import torch

    index = batch.image_index
    return ReferringBatch(
        images=batch.images[index],
        fitted=batch.fitted[index],
        image_index=torch.arange(len(index)),
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        targets=batch.targets,
        no_target=batch.no_target,
        weights=batch.weights,
    )
