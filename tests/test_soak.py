"""The long runs against faults, made short; ``benchmarks/`` has them at full length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(repo: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, repo / "benchmarks" / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        encoding="utf-8",
        timeout=1800,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_broken_images_in_twenty_ways_are_counted_exactly(repo: Path) -> None:
    done = run(repo, "soak.py", "--images", "800", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert set(report["broken, by way"].values()) == {2}
    assert len(report["broken, by way"]) == 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_of_every_command_leave_what_an_unbroken_run_leaves(repo: Path) -> None:
    done = run(repo, "kills.py", "--kills", "24", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of them wrong" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs fork and /proc")
@pytest.mark.parametrize("fault", ["kill", "full", "once"])
def test_a_fault_at_any_change_of_a_folder_costs_nothing(repo: Path, fault: str) -> None:
    commands = ("predict*", "merge*", "export*", "eval*")
    done = run(repo, "kill_points.py", "--every", "23", "--fault", fault, "--only", *commands)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " points, 0 of them wrong" in done.stdout
