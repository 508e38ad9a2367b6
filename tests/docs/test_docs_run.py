"""Every code block of the documents: run as it stands, or said why not and checked all the same.

``pytest -m slow tests/docs/test_docs_run.py`` runs the blocks that are tagged as slow.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.docs_blocks import READ, RUN, SHOWN, TAGS, Block, blocks, calls, documents, wrong_usage
from support.docs_server import CLIENT
from support.paths import REPO

from risam_cli.cli import root

PAGES = documents(REPO)
BLOCKS = [block for page in PAGES for block in blocks(REPO, page)]


def _name(block: Block) -> str:
    return block.name


def _page(path: Path) -> str:
    return str(path.relative_to(REPO))


# --- without running ------------------------------------------------------------------------------


def test_every_block_says_what_it_is() -> None:
    """So none is skipped: a known language, known tags, a reason where there must be one."""
    wrong = [
        f"{block.name}: {why}"
        for block in BLOCKS
        for why in [
            *([f"language {block.language!r}"] if block.language not in RUN | READ | SHOWN else []),
            *(f"tag {tag!r}" for tag in block.tags.keys() - TAGS),
            *(
                f"{tag!r} says nothing"
                for tag in ("not run", "slow", "needs")
                if block.tags.get(tag) == ""
            ),
        ]
    ]
    assert wrong == []
    assert len([block for block in BLOCKS if block.language in RUN]) > 30


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=_name)
def test_every_call_has_options_that_there_are(block: Block) -> None:
    wrong = {" ".join(call): wrong_usage(root, call) for call in calls(block.text)}
    assert {call: why for call, why in wrong.items() if why} == {}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in READ], ids=_name)
def test_every_file_that_is_shown_can_be_read(block: Block) -> None:
    if block.language == "yaml":
        assert yaml.safe_load(block.text)
        return
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=_name)
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.text, block.name, "exec")


def test_the_checks_find_what_is_wrong() -> None:
    assert wrong_usage(root, ["predict", "a", "--bogus"]) is not None
    assert wrong_usage(root, ["predict"]) is not None
    assert wrong_usage(root, ["export-masks", "out", "--to", "bogus", "-o", "x"]) is not None
    assert wrong_usage(root, ["bogus"]) is not None
    assert wrong_usage(root, ["predict", "a", "-e", "the dog", "--save", "png"]) is None
    script = "for x in 1; do risam predict a -e 'b|c' # d\ndone | xargs risam merge -o b && ls\n"
    assert list(calls(script)) == [["predict", "a", "-e", "b|c"], ["merge", "-o", "b"]]
    script = "cat > job.sh <<'END'\n#!/bin/sh\nrisam doctor --json\nEND\nrisam doctor\n"
    assert list(calls(script)) == [["doctor", "--json"], ["doctor"]]


# --- run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH, whose ``risam`` is served by one process that has imported torch."""
    folder = tmp_path_factory.mktemp("bin")
    address = folder / "server"
    log = folder / "server.log"
    for name in ("risam", "risam-python"):
        client = folder / name
        client.write_text(CLIENT.format(python=sys.executable, socket=str(address)))
        client.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(REPO / "tests/support/docs_server.py"), str(address)],
        env=env,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    end = time.monotonic() + 600
    while not address.exists() and server.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert address.exists(), log.read_text()
    yield folder
    server.kill()
    server.wait()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What a reader of the pages has: the checkout's data, and some pictures in ``photos``."""
    shutil.copytree(REPO / "sample_data", tmp_path / "sample_data")
    shutil.copytree(REPO / "configs", tmp_path / "configs")
    shutil.copytree(REPO / "sample_data/images", tmp_path / "photos")
    return tmp_path


def run(block: Block, place: Path, commands: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "HOME": str(place),
        "OMP_NUM_THREADS": "1",
        **dict(pair.split("=", 1) for pair in block.tags.get("with", "").split()),
    }
    script = place / ".block"
    script.write_text(block.text, encoding="utf-8")
    shell = ["bash", "-euo", "pipefail"]
    done = subprocess.run(
        [*(shell if block.language == "sh" else [str(commands / "risam-python")]), str(script)],
        cwd=place,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    expected = int(block.tags.get("exits", "0"))
    assert done.returncode == expected, f"{block.name}\n{block.text}\n{done.stdout}{done.stderr}"


def pieces(page: Path, *, slow: bool) -> list[Block]:
    """What of a page is run: shell blocks one by one, Python blocks as the one session they are."""
    wanted = [
        block
        for block in BLOCKS
        if block.document == _page(page)
        and block.language in RUN
        and not {"not run", "test-command"} & block.tags.keys()
        and ("slow" in block.tags) == slow
    ]
    python = [block for block in wanted if block.language == "python"]
    session = [
        Block(one.document, one.line, "python", "\n".join(b.text for b in python), one.tags)
        for one in python[:1]
    ]
    return [block for block in wanted if block.language == "sh"] + session


def run_page(page: Path, place: Path, commands: Path, *, slow: bool) -> None:
    left_out = []
    for block in pieces(page, slow=slow):
        missing = [tool for tool in block.tags.get("needs", "").split() if not shutil.which(tool)]
        if missing:
            left_out.append(f"{block.name} needs {', '.join(missing)}")
        else:
            run(block, place, commands)
    if left_out:
        pytest.skip("; ".join(left_out))  # what could run has run


@pytest.mark.parametrize("page", [p for p in PAGES if pieces(p, slow=False)], ids=_page)
def test_the_blocks_of_a_page_run(page: Path, place: Path, commands: Path) -> None:
    run_page(page, place, commands, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if pieces(p, slow=True)], ids=_page)
def test_the_slow_blocks_of_a_page_run(page: Path, place: Path, commands: Path) -> None:
    run_page(page, place, commands, slow=True)
