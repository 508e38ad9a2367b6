"""The Python code of the documents, run as it stands there, each page from its top to its end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = ("docs/python.md", "docs/explain.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_the_page_runs(repo: Path, tmp_path: Path, page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repo / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    shutil.copytree(repo / "sample_data", tmp_path / "sample_data")
    script = f"import sys\nsys.path.insert(0, {str(repo)!r})\n" + "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    said = re.findall(r"^\s*print\(.*\)  # (.*)$", "\n".join(blocks), re.MULTILINE)
    assert said
    for comment in said:  # what is printed, and maybe a remark
        assert any(comment.startswith(line) for line in lines), comment
