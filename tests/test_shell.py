"""What shells do to a command: closed streams, pipes, empty variables, folders that go."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.export_cases import record, shapes, write_jsonl

PYTHON = shlex.quote(sys.executable)


def bash(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in bash, ``risam`` being this checkout's."""
    line = line.replace("risam ", f"{PYTHON} -m risam_cli ")
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "p.jsonl", [record("a.jpg", "x", shapes()["block"])])


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_that_are_not_needed_do_no_harm(
    closing: str, tmp_path: Path, source: Path
) -> None:
    done = bash(f"risam export-masks p.jsonl --to coco -o out {closing}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert json.loads((tmp_path / "out/export.json").read_text())["complete"] is True
    # What was printed did not land in a file that took the stream's number.
    assert len(json.loads((tmp_path / "out/instances.json").read_text())["annotations"]) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("risam export-masks - --to coco -o out <&-", "stdin is closed"),
        ("risam predict - -e x -o out <&-", "stdin is closed"),
        ("risam predict a.png -e x -o out --jsonl - >&-", "stdout is closed"),
        ("risam export-masks p.jsonl --to coco -o out --json >&-", "stdout is closed"),
    ],
)
def test_closed_streams_that_are_needed_are_named(
    line: str, words: str, tmp_path: Path, source: Path
) -> None:
    done = bash(line, tmp_path)
    assert done.returncode in (1, 2)
    assert f"error: {words}" in done.stderr
    assert "internal error" not in done.stderr


def test_results_come_from_pipes_of_every_form(tmp_path: Path, source: Path) -> None:
    for k, text in enumerate((source.read_text(), f"[{source.read_text().strip()}]")):
        (tmp_path / "text").write_text(text)
        line = f"risam export-masks <(cat text) --to coco -o out{k}"
        done = bash(line, tmp_path)
        assert done.returncode == 0, done.stderr
        done = bash(f"cat text | risam export-masks - --to coco -o pipe{k}", tmp_path)
        assert done.returncode == 0, done.stderr
        for folder in (f"out{k}", f"pipe{k}"):
            found = json.loads((tmp_path / folder / "instances.json").read_text())
            assert len(found["annotations"]) == 1


def test_a_category_map_may_come_from_a_pipe(tmp_path: Path, source: Path) -> None:
    line = """risam export-masks p.jsonl --to coco -o out --category-map <(echo '{"x": "thing"}')"""
    done = bash(line, tmp_path)
    assert done.returncode == 0, done.stderr
    names = json.loads((tmp_path / "out/instances.json").read_text())["categories"]
    assert [one["name"] for one in names] == ["thing"]


@pytest.mark.parametrize(
    "command",
    [
        *(
            "export-masks '' --to coco -o out",
            "export-masks p.jsonl --to coco -o out --agree-with ''",
        ),
        "eval --dataset coco --root p.jsonl --predictions '' -o out",
        "eval --dataset coco --root '' --predictions p.jsonl -o out",
        *("compare ''", "compare a=", "train ''", "init ''", "merge '' -o out", "predict '' -e x"),
    ],
)
def test_an_unset_variable_is_not_the_working_folder(
    command: str, tmp_path: Path, source: Path
) -> None:
    done = bash(f"risam {command}", tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) <= 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict a.png -e x", "export-masks p.jsonl --to coco"])
@pytest.mark.parametrize(("name", "words"), [("", "it is empty"), ("-", "- is no folder")])
def test_an_output_that_is_no_name_is_wrong_usage(
    command: str, name: str, words: str, tmp_path: Path, source: Path
) -> None:
    done = bash(f"risam {command} -o '{name}'", tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl"]


def test_a_deleted_working_folder_is_named(tmp_path: Path) -> None:
    line = f"mkdir gone; cd gone; rmdir ../gone; PYTHONPATH={os.getcwd()} risam predict a.png -e x"
    done = bash(line, tmp_path)
    assert done.returncode == 1
    assert "the working folder no longer exists" in done.stderr


def test_an_early_interrupt_prints_no_traceback(tmp_path: Path) -> None:
    for delay in np.linspace(0.05, 0.3, 6):
        process = subprocess.Popen(
            [sys.executable, "-m", "risam_cli", "predict", "a.png", "-e", "x"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(float(delay))
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=600)
        # Python itself answers until the package's own first file has run.
        later = re.findall(r'File "[^"]*/risam_cli/([^"]+)"', told)
        assert not set(later) - {"__init__.py", "version.py", "__main__.py"}, told
        assert process.returncode != 0
