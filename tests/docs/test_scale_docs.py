"""The recipes of docs/scale.md, as they stand there, give the records of the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.docs_blocks import blocks
from support.paths import REPO

from risam_cli.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "pyspark"])
def test_the_engines_give_the_records_of_the_command(
    engine: str, tiny_images: Path, tmp_path: Path
) -> None:
    pytest.importorskip(engine)
    (recipe,) = [
        block.text
        for block in blocks(REPO, REPO / "docs" / "scale.md")
        if block.language == "python" and engine in block.text
    ]
    lines = [
        {"image": str(path), "expressions": ["the star", "the red circle"]}
        for path in sorted(tiny_images.rglob("*.*"))
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["predict", str(tmp_path / "list.jsonl"), "--save", "none", "--device", "cpu"]
    assert main([*asked, "-o", str(tmp_path / "out")]) == 0
    done = subprocess.run(
        [sys.executable, "-c", recipe],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(REPO),
            "PYSPARK_PYTHON": sys.executable,
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = (tmp_path / "records.jsonl").read_bytes()
    assert found == (tmp_path / "out" / "predictions.jsonl").read_bytes()
