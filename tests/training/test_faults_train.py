"""Faults under ``risam train`` that concern its folder; its resume is in test_train*.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import training_runs
from support.power import recorded

from risam_cli.errors import ConfigError, OutputError
from risam_cli.files.locks import FolderLock

SHORT = {
    "stages": [
        {"name": "fusion", "kind": "referring", "steps": 2, "images_per_step": 2,
         "learning_rate": 2.0e-3, "warmup": 1},
    ],
    "checkpoint_every": 1,
    "validate_every": 1,
}  # fmt: skip


def test_two_runs_do_not_share_a_folder_and_a_checkpoint_survives_a_power_cut(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    for resume in (False, True):
        with FolderLock(out), pytest.raises(OutputError, match="another run is writing"):
            training_runs.run(out, resume=resume, **SHORT)
    assert list(out.iterdir()) == []
    with recorded(out) as disk:
        training_runs.run(out, **SHORT)
    assert not (out / ".risam").exists()
    disk.after_power_cut(tmp_path / "found")
    kept = (
        "checkpoints/last.pt",
        "config.resolved.yaml",
        "metrics.jsonl",
        "best/model.safetensors",
    )
    for name in kept:
        assert (tmp_path / "found" / name).read_bytes() == (out / name).read_bytes(), name


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    changes = {"train": {"dataset": "coco", "annotations": str(tmp_path / "gone.json")}}
    with pytest.raises(ConfigError, match=r"gone\.json"):
        training_runs.run(tmp_path / "out", **SHORT, **changes)
    assert not (tmp_path / "out").exists()
