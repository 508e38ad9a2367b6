"""What the Python code of the documents says that it prints is what it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

PAGES = ("docs/python.md", "docs/explain.md")


def test_what_is_said_to_be_printed_is_printed(repo: Path, tmp_path: Path) -> None:
    code = "\n".join(
        block
        for page in PAGES
        for block in re.findall(
            r"```python\n(.*?)```", (repo / page).read_text(encoding="utf-8"), re.S
        )
    )
    shutil.copytree(repo / "sample_data", tmp_path / "sample_data")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(repo)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    said = re.findall(r"^\s*print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(said) >= 5
    for comment in said:  # what is printed, and maybe a remark
        assert any(comment.startswith(line) for line in lines), comment
