"""Every fuzzing target runs, finds nothing, and would find what is there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPO

BENCHMARKS = REPO / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from fuzz import attempt, fuzz, mutate  # noqa: E402
from fuzz_targets import TARGETS, Target  # noqa: E402


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases_of_every_target(name: str, tmp_path: Path) -> None:
    cases = 10 if name == "settings" else 100
    ends = fuzz(name, TARGETS[name], cases, seed=11, keep=tmp_path / "found")
    assert ends["read"] + ends["refused"] == cases, ends
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("name", TARGETS)
def test_what_mutations_start_from_is_sound(name: str, tmp_path: Path) -> None:
    for seed in TARGETS[name].seeds:
        path = tmp_path / ("input.yaml" if name == "category-map" else "input")
        path.write_bytes(seed)
        assert attempt(TARGETS[name].run, path) == "read"


def test_an_error_of_another_kind_is_kept_and_counted(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        if b"\xff" in path.read_bytes():
            raise KeyError("x")

    ends = fuzz("made up", Target([b"\xff" * 8], fails), 50, seed=0, keep=tmp_path / "found")
    assert ends["KeyError"] == len(list((tmp_path / "found").iterdir())) > 10


def test_mutations_are_a_function_of_the_seed_and_reach_values() -> None:
    data = json.dumps({"a": [1, {"b": 2}], "c": "x"}).encode()

    def some(seed: int) -> list[bytes]:
        dice = random.Random(seed)
        return [mutate(data, data, dice, as_json=True) for _ in range(300)]

    assert some(1) == some(1) != some(2)
    parsed = []
    for one in some(1):
        try:
            parsed.append(json.loads(one))
        except ValueError:
            continue
    assert 100 < len(parsed) < 300
    assert len({json.dumps(value) for value in parsed}) > 60


@pytest.mark.slow
def test_the_command_runs_thousands_of_cases(tmp_path: Path) -> None:
    """As benchmarks/fuzz.py says; figures of longer runs are in docs/reliability.md."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "fuzz.py"), "--cases", "2000", "--seed", "5"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(BENCHMARKS.parent), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
