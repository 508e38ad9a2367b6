"""Small training runs for the tests: settings, and a run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from risam_cli.settings.load import check, merge
from risam_cli.settings.train import TrainSettings
from risam_cli.training.loop import train
from support.networks import SMALL

MODEL = merge(
    SMALL,
    {
        "image_encoder": {
            "image_size": 128, "dim": 32, "adapter_dim": 0, "stem": [4, 8, 12], "window": 4,
        },
        "decoder": {"fine": True},
    },
)  # fmt: skip
SCENES = {"dataset": "refshapes", "family": "grefshapes", "expressions_per_scene": 3}
RAW: dict[str, Any] = {
    "name": "small", "seed": 3, "device": "cpu", "precision": "fp32", "workers": 0, "threads": 1,
    "model": MODEL,
    "train": {**SCENES, "scenes": 12, "unknown_word_rate": 0.1},
    "val": {"held out": {**SCENES, "split": "val", "scenes": 2}},
    "stages": [
        {"name": "encoder", "kind": "dense", "steps": 6, "images_per_step": 2,
         "learning_rate": 2.0e-3, "warmup": 2},
        {"name": "fusion", "kind": "referring", "steps": 14, "images_per_step": 2,
         "learning_rate": 2.0e-3, "warmup": 2},
    ],
    "loss": {"target_size": 32},
    "optimizer": {"ema_decay": 0.9},
    "validate_every": 7, "checkpoint_every": 4, "log_every": 1,
}  # fmt: skip


def settings(output: Path, **changes: Any) -> TrainSettings:
    """``RAW`` with changes: data and stages as a whole, all else key by key."""
    whole = {key: changes[key] for key in ("train", "val") if key in changes}
    return check(TrainSettings, {**merge(RAW, changes), **whole, "output": str(output)}, "a test")


def run(output: Path, *, resume: bool = False, **changes: Any) -> Path:
    return train(settings(output, **changes), resume=resume)


def last_weights(output: Path) -> dict[str, Tensor]:
    state = torch.load(output / "checkpoints" / "last.pt", weights_only=True)
    weights: dict[str, Tensor] = state["model"]
    return weights


def rows(output: Path) -> list[dict[str, Any]]:
    """The log, without what a clock says."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def write_coco(folder: Path) -> dict[str, str]:
    """Two photos of a rectangle each, of different shapes, with expressions on both."""
    (folder / "images").mkdir(parents=True)
    images, annotations, expressions = [], [], []
    for number, (height, width) in enumerate([(90, 120), (64, 40)], start=1):
        picture = np.full((height, width, 3), 90, np.uint8)
        picture[10:40, 5:30] = (40, 60, 220)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), picture)
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        polygon = [5, 10, 30, 10, 30, 40, 5, 40]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "segmentation": [polygon],
             "bbox": [5, 10, 25, 30], "area": 750, "iscrowd": 0}
        )  # fmt: skip
        for k, (text, ids) in enumerate([("red square", [number]), ("green star", [])]):
            expressions.append(
                {"id": 10 * number + k, "image_id": number, "ann_ids": ids, "text": text}
            )
    content = {
        "images": images, "annotations": annotations, "expressions": expressions,
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(content))
    return {
        "dataset": "coco",
        "annotations": str(folder / "pairs.json"),
        "images": str(folder / "images"),
    }
