"""The walks of docs/architecture.md pass the files that they name."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPO

DOCUMENT = REPO / "docs/architecture.md"
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
)

# Which files of the package run a function of theirs, in any thread of one process.
TRACED = """
import json, sys, threading
seen = set()
def note(frame, event, argument):
    if event == "call" and frame.f_code.co_name != "<module>":
        seen.add(frame.f_code.co_filename)
from risam_cli.cli import main
threading.setprofile(note)
sys.setprofile(note)
code = main(sys.argv[1:])
sys.setprofile(None)
print(json.dumps([code, sorted(seen)]))
"""


def walk(start: str) -> list[str]:
    """The files in the table of the section whose title begins so."""
    (section,) = (text for title, text in SECTIONS.items() if title.startswith(start))
    return re.findall(r"^\| `(risam_cli/[^`]+)` \|", section, re.M)


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`(risam_cli/[^`]*)`", DOCUMENT.read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [name for name in named if not (REPO / name).exists()] == []


@pytest.mark.parametrize(
    ("start", "arguments"),
    [
        (
            "An image and an expression",
            ["predict", "sample_data/images/scene_1.png", "-e", "the red circle"],
        ),
        ("A REFER sample", ["eval", "--dataset", "refcoco", "--root", "sample_data"]),
    ],
)
def test_a_walk_passes_each_file(start: str, arguments: list[str], tmp_path: Path) -> None:
    more = ["--split", "val"] if arguments[0] == "eval" else []
    more += ["--device", "cpu", "--workers", "0", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", TRACED, *arguments, *more],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    code, seen = json.loads(done.stdout)
    assert code == 0, done.stderr
    files = walk(start)
    assert len(files) >= 15
    assert [name for name in files if str(REPO / name) not in seen] == []
    assert list((tmp_path / "out").rglob("*.png" if arguments[0] == "predict" else "report.json"))


def test_a_setting_keeps_its_name_to_the_optimizer() -> None:
    files = walk("A YAML key")
    assert files[-1].endswith("optimize.py")
    assert "settings.weight_decay" in (REPO / files[-1]).read_text(encoding="utf-8")


def test_the_map_lists_the_layers_in_their_order() -> None:
    page = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(r"^\| `risam_cli/` \|.*?\n\n", page, re.M | re.S)
    assert table is not None
    rows = [
        re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1])
        for row in table[0].split("\n")
        if "|" in row
    ]
    contracts = configparser.ConfigParser()
    contracts.read(REPO / "setup.cfg")
    layers = contracts["importlinter:contract:layers"]["layers"].split("\n")
    assert [row for row in rows[2:] if row] == [
        layer.strip().split(" : ") for layer in layers if layer.strip() and "#" not in layer
    ]
