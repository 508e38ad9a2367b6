"""Every test that docs/reliability.md and docs/compatibility.md name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.mark.parametrize(("name", "least"), [("reliability.md", 30), ("compatibility.md", 10)])
def test_the_tests_that_the_page_names_are_there(repo: Path, name: str, least: int) -> None:
    page = (repo / "docs" / name).read_text(encoding="utf-8")
    there = {
        name
        for path in (repo / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > least
    assert named - there == set()
    files = set(re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", page))
    assert not [file for file in files if not (repo / file).is_file()]


def test_every_fault_has_a_test_that_injects_it(repo: Path) -> None:
    page = (repo / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.count("|") >= 6 and "---" not in line]
    faults = [line for line in rows if not line.startswith("| fault ")]
    assert len(faults) > 30
    assert not [line for line in faults if not re.search(r"`(test_|tests/|benchmarks/)", line)]
