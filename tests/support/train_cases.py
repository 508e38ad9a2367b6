"""A small run that uses all of the loop at once, and runs of it in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from support.networks import SMALL
from support.paths import REPO, TESTS
from support.training_runs import last_weights, rows, write_coco

STAGES = [
    {"name": "fusion", "kind": "referring", "steps": 6, "images_per_step": 3, "accumulate": 2,
     "learning_rate": 2.0e-3, "warmup": 2},
    {"name": "joint", "kind": "referring", "steps": 20, "images_per_step": 3, "accumulate": 2,
     "learning_rate": 2.0e-3, "warmup": 2, "train_encoder": "yes"},
]  # fmt: skip


def everything(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Accumulation, a moving average, early stopping, averaging, several checkpoints, two stages.

    The second stage stops early, after its fourth validation, in step 8.
    """
    data = write_coco(folder) if not folder.exists() else coco(folder)
    return {
        "name": "everything", "seed": 3, "device": "cpu", "precision": "fp32", "workers": 0,
        "threads": 1, "output": str(output), "model": SMALL, "train": data,
        "val": {"held out": data}, "stages": STAGES, "loss": {"target_size": 16},
        "optimizer": {"ema_decay": 0.8, "schedule": "polynomial"},
        "early_stopping": {"patience": 3, "min_delta": 0.9},
        "averaging": {"count": 2, "of": "last"}, "keep_last": 2, "pictures": 1,
        "validate_every": 2, "checkpoint_every": 3, "log_every": 1, **changes,
    }  # fmt: skip


def coco(folder: Path) -> dict[str, str]:
    """What ``write_coco`` gave for this folder."""
    return {
        "dataset": "coco",
        "annotations": str(folder / "pairs.json"),
        "images": str(folder / "images"),
    }


def write_config(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fork_runs(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Runs jobs of ``train_forks.py`` one after the other."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(TESTS / "support/train_forks.py"), str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": f"{REPO}{os.pathsep}{TESTS}",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        },
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def assert_same_run(output: Path, unbroken: Path) -> None:
    """All that a run leaves, but for clocks, equal to the bit."""
    expected, found = last_weights(unbroken), last_weights(output)
    assert found.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
    assert rows(output) == rows(unbroken)
    for weights in unbroken.glob("*/model.safetensors"):
        again = output / weights.relative_to(unbroken)
        assert again.read_bytes() == weights.read_bytes()
    for folder in ("checkpoints", "checkpoints/kept", "pictures"):
        names = {p.name for p in (unbroken / folder).glob("*")}
        assert {p.name for p in (output / folder).glob("*")} == names
