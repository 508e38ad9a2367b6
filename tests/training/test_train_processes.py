"""Several processes train what one would: real processes, gloo, one voice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.paths import REPO
from support.train_cases import STAGES, everything, fork_runs, write_config
from support.training_runs import last_weights, rows

from risam_cli.training.data.collate import DealtBatches, PlannedBatches, deal

RATE = 1e-4
STEPS = 10
# A softmax does not see what is added to all its logits, so a key's bias has a gradient of
# rounding errors alone, which Adam makes steps of: these go their own ways, and change no answer.
IDLE = "key.bias"


def config(folder: Path, name: str, **changes: Any) -> str:
    """Two stages of five steps; every expression and image counts alike, whoever has it."""
    stages = [{**stage, "steps": STEPS // 2, "learning_rate": RATE} for stage in STAGES]
    values = everything(
        folder / "data", folder / name, stages=stages, early_stopping=None, **changes
    )
    return write_config(folder / f"{name}.yaml", values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    log = str(folder / "bereft" / "metrics.jsonl")
    jobs: list[dict[str, Any]] = [
        {"args": ["train", config(folder, "one")]},
        {"args": ["train", config(folder, "two")], "world": 2},
        {
            "args": ["train", config(folder, "bereft")],
            "world": 2,
            "kill": {"signal": "SIGKILL", "rank": 1, "file": log, "lines": 4},
        },
        {"args": ["train", config(folder, "misspelt", keep_lats=2)], "world": 2},
    ]
    return fork_runs(jobs, folder)


def assert_close_runs(one: Path, other: Path) -> None:
    expected, found = last_weights(one), last_weights(other)
    assert found.keys() == expected.keys()
    for name in expected:
        far = (found[name] - expected[name]).abs()
        if name.endswith("qkv.bias"):  # The keys' is the middle third.
            query, key, value = far.chunk(3)
            assert key.max() <= STEPS * RATE
            far = torch.cat([query, value])
        assert far.max() <= (STEPS * RATE if name.endswith(IDLE) else 1e-6), name
    log, other_log = rows(one), rows(other)
    assert len(log) == len(other_log)
    for row, other_row in zip(log, other_log, strict=True):
        for key, value in row.items():
            fitting = pytest.approx(value, abs=2e-6) if isinstance(value, float) else value
            assert other_row[key] == fitting, (key, row["kind"], row["step"])


def test_two_processes_learn_what_one_does_with_the_same_batches(
    folder: Path, told: list[dict[str, Any]]
) -> None:
    assert [one["codes"] for one in told[:2]] == [[0], [0, 0]]
    trained = [r["loss"] for r in rows(folder / "two") if r["kind"] == "train"]
    assert len(trained) == STEPS
    assert_close_runs(folder / "one", folder / "two")
    first, second = told[1]["stderr"]
    assert "in 2 processes" in first
    assert "Warning" not in first
    assert second == ""


def test_a_process_that_dies_ends_the_others_with_one_line(
    folder: Path, told: list[dict[str, Any]]
) -> None:
    bereft = told[2]
    assert bereft["codes"] == [1, -9]
    last = bereft["stderr"][0].splitlines()[-1]
    assert last.startswith("error: one of the 2 processes of this run has ended")
    assert last.endswith("then continue with --resume")
    assert "Traceback" not in bereft["stderr"][0]


def test_an_error_that_all_meet_is_told_once(told: list[dict[str, Any]]) -> None:
    misspelt = told[3]
    assert misspelt["codes"] == [1, 1]
    lines = "".join(misspelt["stderr"]).splitlines()
    assert len(lines) == 1
    assert "keep_lats" in lines[0]
    assert "did you mean 'keep_last'" in lines[0]


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(
    folder: Path, told: list[dict[str, Any]]
) -> None:
    log = str(folder / "fewer" / "metrics.jsonl")
    path = config(folder, "fewer")
    stopped, resumed = fork_runs(
        [
            {
                "args": ["train", path],
                "world": 2,
                # Whichever gets the signal, both stop after the same step.
                "kill": {"signal": "SIGTERM", "rank": 1, "file": log, "lines": 9},
            },
            {"args": ["train", path, "--resume"]},
        ],
        folder,
    )
    assert stopped["codes"] == [130, 130]
    assert "interrupted after step" in "".join(stopped["stderr"])
    assert resumed["codes"] == [0]
    assert_close_runs(folder / "one", folder / "fewer")


@pytest.mark.slow
def test_torchrun_starts_it(folder: Path, told: list[dict[str, Any]]) -> None:
    path = config(folder, "torchrun")
    program = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [str(program), "--nproc-per-node", "2", "-m", "risam_cli", "train", path],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert_close_runs(folder / "two", folder / "torchrun")
    resolved = yaml.safe_load((folder / "torchrun" / "config.resolved.yaml").read_text())
    assert resolved["name"] == "everything"


# --- how a batch is dealt -------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 20), max_size=24),
    hands=st.integers(1, 6),
    parts=st.integers(1, 4),
)
def test_dealing_gives_every_image_once_and_evenly(
    sizes: list[int], hands: int, parts: int
) -> None:
    dealt = deal(range(len(sizes)), hands, sizes.__getitem__)
    assert sorted(item for hand in dealt for item in hand) == list(range(len(sizes)))
    lengths = [len(hand) for hand in dealt]
    assert max(lengths) - min(lengths) <= 1
    loads = [sum(sizes[item] for item in hand) for hand in dealt]
    if len(sizes) % hands == 0:  # Greedy, so no hand is ahead by more than the largest image.
        assert max(loads) - min(loads) <= max(sizes, default=0)
    plan = PlannedBatches(max(1, len(sizes)), max(1, len(sizes)), 0, 1, seed=1)
    for rank in range(hands):
        mine = DealtBatches(plan, rank, hands, parts)
        assert len(mine.of(range(plan.batch))) == mine.per_step(plan.batch)
        assert len(list(mine)) == len(mine)


def test_all_processes_together_have_the_planned_batch() -> None:
    plan = PlannedBatches(10, 7, 3, 6, seed=2)
    shares = [list(DealtBatches(plan, rank, 3, 2)) for rank in range(3)]
    for step, chosen in enumerate(plan):
        parts = [DealtBatches(plan, rank, 3, 2).of(chosen) for rank in range(3)]
        assert sorted(i for hand in parts for part in hand for i in part) == sorted(chosen)
        for rank, hand in enumerate(parts):
            each = DealtBatches(plan, rank, 3, 2).per_step(7)
            assert shares[rank][step * each : (step + 1) * each] == hand
