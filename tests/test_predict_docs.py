"""The commands of docs/predict.md, run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = """#!/bin/sh
# risam with a small model, so that the page's commands take seconds
if [ "$1" = predict ]; then shift; set -- predict --model "$SMALL_MODEL" --device cpu "$@"; fi
exec "$PYTHON" -m risam_cli "$@"
"""


@pytest.mark.slow
def test_every_command_of_the_page_runs(repo: Path, model_folder: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (repo / "docs/predict.md").read_text(), re.S)
    assert len(blocks) >= 6
    shutil.copytree(repo / "sample_data", tmp_path / "sample_data")
    shim = tmp_path / "bin" / "risam"
    shim.parent.mkdir()
    shim.write_text(SHIM)
    shim.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{shim.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(repo),
            "PYTHON": sys.executable,
            "SMALL_MODEL": str(model_folder),
        },
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert whole == (tmp_path / "piped" / "predictions.jsonl").read_bytes()
