"""Completion on the command line, in the shells themselves where they are here."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from support.paths import REPO

from risam_cli.cli import main, root

SHELLS = ("bash", "zsh", "fish")


def offered(*words: str) -> list[str]:
    """What is offered for the last of ``words``, by click's own protocol."""
    *before, last = words
    completer = ShellComplete(root, {}, "risam", "_RISAM_COMPLETE")
    return [
        f"<{item.type}>" if item.type != "plain" else str(item.value)
        for item in completer.get_completions(before, last)
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ex"], ["explain", "export-masks"]),
        (["models", "i"], ["inspect"]),
        (["predict", "--sa"], ["--save"]),
        (["predict", "--save", ""], ["png", "overlay", "html", "none"]),
        (["predict", "--save", "png,"], ["png,overlay", "png,html"]),
        (["predict", "--save", "png,html,o"], ["png,html,overlay"]),
        (["predict", "--model", "ref"], ["<dir>", "refshapes-tiny"]),
        (["predict", "--model", "runs/"], ["<dir>"]),
        (["predict", "--device", "c"], ["cpu", "cuda", "cuda:0"]),
        (["predict", "--precision", "f"], ["fp32", "fp16"]),
        (["predict", "photos/"], ["<file>"]),
        (["predict", "-o", "o"], ["<dir>"]),
        (["eval", "--dataset", "g"], ["grefcoco"]),
        (["eval", "--dataset", "refcoco"], ["refcoco", "refcoco+", "refcocog"]),
        (["export-masks", "--to", "c"], ["coco", "coco-polygons", "cvat", "cutout"]),
        (["refshapes", "--splits", "val,t"], ["val,train", "val,testA", "val,testB", "val,testC"]),
        (["models", "verify", "ref"], ["<dir>", "refshapes-tiny"]),
        (["train", "configs/"], ["<file>"]),
        (["explain", "photo"], ["<file>"]),
        (["completion", ""], list(SHELLS)),
    ],
)
def test_what_is_offered(words: list[str], expected: list[str]) -> None:
    assert offered(*words) == expected


def test_completing_needs_nothing_heavy() -> None:
    """Every key press starts a process, so it may load neither torch nor NumPy."""
    script = "import sys\nfrom test_completion import offered\n" + "".join(
        f"assert offered(*{words!r})\n"
        for words in (["predict", "--save", "png,"], ["predict", "--model", ""], ["eval", "--s"])
    )
    script += "print(sorted({'torch', 'numpy', 'cv2', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# --- in the shells --------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``risam`` on the path, and something to complete."""
    shim = tmp_path / "bin" / "risam"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m risam_cli "$@"\n')
    shim.chmod(0o755)
    for name in ("alpha.jsonl", "beta.txt"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    return tmp_path


def script_of(shell: str, place: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert main(["completion", shell]) == 0
    path = place / f"risam.{shell}"
    path.write_text(capfd.readouterr().out)
    return path


def typed(shell: list[str], lines: list[str], keys: str, until: str, cwd: Path) -> str:
    """What a shell on a terminal shows once ``keys`` are typed after ``lines``."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.environ.update(TERM="dumb", PS1="> ", HOME=str(cwd))
        os.execvp(shell[0], shell)
    shown, end, sent = "", time.monotonic() + 300, False
    try:
        os.write(terminal, ("\n".join(lines) + "\necho rea''dy\n").encode())
        while time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")
            if not sent and "ready" in shown.replace("rea''dy", ""):
                shown, sent = "", True
                os.write(terminal, keys.encode())
            if sent and until in shown:
                break
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)
    return shown


@pytest.mark.parametrize(
    ("keys", "until"),
    [
        ("risam eval --dataset grefc\t", "grefcoco"),
        ("risam predict --save png,h\t", "png,html"),
        ("risam predict --model refs\t", "refshapes-tiny"),
        ("risam predict al\t", "alpha.jsonl"),
    ],
)
def test_bash_on_a_terminal(
    keys: str, until: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = script_of("bash", place, capfd)
    shell = ["bash", "--norc", "--noprofile", "-i"]
    assert until in typed(shell, [f"source {script}"], keys, until, place)


@pytest.mark.parametrize(
    ("keys", "until"),
    [
        ("risam eval --dataset grefc\t", "grefcoco"),
        ("risam predict --save png,h\t", "png,html"),
        ("risam predict al\t", "alpha.jsonl"),
    ],
)
def test_zsh_on_a_terminal(
    keys: str, until: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = script_of("zsh", place, capfd)
    functions = place / "functions"
    functions.mkdir()
    shutil.copy(script, functions / "_risam")  # as the page tells to install it
    lines = [f"fpath=({functions} $fpath)", "autoload -U compinit", "compinit -u -D"]
    assert until in typed(["zsh", "-f", "-i"], lines, keys, until, place)


def test_fish(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = script_of("fish", place, capfd)
    ask = 'complete -C "risam eval --dataset gref"; complete -C "risam predict --save png,"'
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script}; {ask}"],
        cwd=place,
        env={**os.environ, "HOME": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert sorted(done.stdout.split()) == ["grefcoco", "png,html", "png,overlay"], done.stderr
