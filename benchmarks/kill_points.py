"""Kills every command at every change of its output folder in turn, and compares the ends.

    python benchmarks/kill_points.py [--only predict merge] [--every 1] [--keep FOLDER]

Where ``benchmarks/kills.py`` kills at random moments, this one kills at the first, the second, the
third … ``os.replace``, ``fsync``, ``write`` and so on (see ``benchmarks/killer/sitecustomize.py``)
until the command ends unbroken, each time from the same folder. After each kill the command is run
again as a user would, and the folder must hold what an unbroken run leaves: nothing lost, nothing
twice, nothing left over. Everything heavy is imported once; each run is a fork.

Prints a table, and one line for each kill point that did not hold; exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from killer.sitecustomize import Switch
from kills import differences, make_inputs, snapshot
from PIL import Image

from risam_cli.cli import main
from risam_cli.weights.load import load_model

_SHOWN = 12
_OUTPUT = ["-o", "{}"]
_TINY = "2000"  # --max-pixels by which the larger images fail


@dataclass(slots=True)
class Case:
    """A command from one state of its folder.

    Attributes:
        before: what brings the folder, and the inputs, into that state; None begins with nothing.
        cut, again: arguments of the run that is killed and of those that follow; ``{}`` in the
            last stands for the output folder.
        wanted: arguments of an unbroken run in an empty folder that must give the same; None: those
            that are killed.
        codes: exit codes of a run that ends.
    """

    name: str
    cut: list[str]
    again: list[str]
    codes: tuple[int, ...] = (0,)
    before: Callable[[Path], None] | None = None
    wanted: list[str] | None = None
    points: int = 0
    wrong: list[str] = field(default_factory=list)


def run(arguments: Sequence[str], out: Path, log: Path, number: int | None = None) -> int:
    """A fork of the command, killed at its n-th change; its exit code, -9 where it was killed."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            torch.set_num_threads(1)
            if number is not None:
                Switch(os.fspath(out), number).install()
            code = main([*arguments[:-1], arguments[-1].format(out)])
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def try_all(case: Case, folder: Path, every: int) -> None:
    """Kills at every point, goes on, and compares."""
    out, log, start = folder / "out", folder / "log", folder / "start"
    for path in (out, start):
        shutil.rmtree(path, ignore_errors=True)
    if case.before is not None:
        case.before(start)
    whole = folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    code = run(case.wanted or case.cut, whole, log)
    if code not in case.codes:
        raise SystemExit(f"{case.name}: the unbroken run ended with {code}: {log.read_text()}")
    wanted = snapshot(whole)
    number = 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        if start.exists():
            shutil.copytree(start, out, symlinks=True)
        code = run(case.cut, out, log, number)
        if code in case.codes:
            break  # it has no more points
        said = f"point {number}: "
        if code != -9:
            case.wrong.append(f"{said}ended with {code}: {log.read_text()[-200:]}")
        case.points += 1
        code = run(case.again, out, log)
        if code not in case.codes:
            case.wrong.append(f"{said}the next ended with {code}: {log.read_text()[-200:]}")
        case.wrong += [f"{said}{one}" for one in differences(snapshot(out), wanted)]
        number += every


# --- the cases ------------------------------------------------------------------------------------


def _change(images: Path) -> None:
    """Another picture in place of the first image, and no picture in place of the second."""
    names = sorted(images.rglob("*.png"))
    Image.fromarray(np.full((50, 64, 3), 90, np.uint8)).save(names[0])
    names[1].write_text("no image any more")


def _lists(folder: Path, images: Path) -> list[str]:
    """Two lists of the same images: in the second one is new, one is gone, and others moved."""
    names = [os.fspath(path.relative_to(folder)) for path in sorted(images.rglob("*.png"))]
    orders = names[1:], [names[-1], *names[:2], *names[3:-1]]
    paths = [folder / f"list{k}.jsonl" for k in range(2)]
    for path, order in zip(paths, orders, strict=True):
        path.write_text("".join(json.dumps({"image": name}) + "\n" for name in order))
    return [str(path) for path in paths]


def cases(folder: Path) -> list[Case]:
    """All commands from all states."""
    images = folder / "images"
    asked = ["-e", "the red circle", "-e", "the small blue square on the left"]
    predict = ["-q", "predict", str(images), *asked, "--device", "cpu", "--save", "png,overlay"]
    o, resume, over = _OUTPUT, ["--resume", *_OUTPUT], ["--overwrite", *_OUTPUT]

    def begun(arguments: list[str], change: Callable[[], None] = lambda: None) -> Any:
        def before(out: Path) -> None:
            if run(arguments, out, folder / "log") not in {0, 3}:
                raise SystemExit(f"a run to begin with failed: {(folder / 'log').read_text()}")
            change()

        return before

    def cut(arguments: list[str], number: int) -> Any:
        return lambda out: run(arguments, out, folder / "log", number)

    parts = [folder / f"part{k}" for k in range(2)]
    for k, part in enumerate(parts):
        begun([*predict, "--shard", f"{k}/2", "-o", "{}"])(part)
    records = folder / "records"
    begun([*predict, *o])(records)
    merge = ["-q", "merge", *map(str, parts)]
    data = ["-q", "eval", "--dataset", "coco", "--root", str(folder), "--images", str(images)]
    model = [*data, "--device", "cpu"]
    scored = [*data, "--predictions", str(records)]
    png = ["-q", "export-masks", str(records), "--to", "png"]
    train, at = ["-q", "train", str(folder / "train.json")], ["--set", "output={}"]
    return [
        *_resumed(predict, folder, begun, cut),
        Case("predict --overwrite", predict + over, predict + over, (3,), begun([*predict, *o])),
        Case("merge", merge + o, merge + over),
        Case("merge --overwrite", merge + over, merge + over, (0,), begun([*merge, *o])),
        Case("eval of a model", model + o, model + resume),
        Case("eval of predictions", scored + o, scored + over),
        Case("export-masks", png + o, png + over),
        Case("train", [*train, *at], [*train, "--resume", *at]),
        Case(
            "train --resume", [*train, "--resume", *at], [*train, "--resume", *at], (0,),
            cut([*train, *at], 60), [*train, *at],
        ),
        # The last of predict: it changes the images.
        Case(
            "predict --resume, changed images", predict + resume, predict + resume, (3,),
            begun([*predict, *o], partial(_change, images)), predict + o,
        ),
    ]  # fmt: skip


def _resumed(predict: list[str], folder: Path, begun: Any, cut: Any) -> list[Case]:
    """Runs of predict that go on, and the one that they are compared with."""
    o, resume, tiny = _OUTPUT, ["--resume", *_OUTPUT], ["--max-pixels", _TINY]
    lists = [["-q", "predict", path, *predict[3:]] for path in _lists(folder, folder / "images")]
    return [
        Case("predict", predict + o, predict + resume, (3,)),
        Case(
            "predict --resume", predict + resume, predict + resume, (3,),
            cut([*predict, *o], 60), predict + o,
        ),
        Case(
            "predict --resume, other limits", predict + resume, predict + resume, (3,),
            begun([*predict, *tiny, *o]), predict + o,
        ),
        Case(
            "predict --retry-failed", [*predict, "--retry-failed", *o], predict + resume, (3,),
            begun([*predict, *tiny, *o]), predict + o,
        ),
        Case(
            "predict --resume, other inputs", lists[1] + resume, lists[1] + resume, (0,),
            begun([*lists[0], *o]), lists[1] + o,
        ),
    ]  # fmt: skip


def main_loop() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names begin so")
    parser.add_argument("--every", type=int, default=1, help="take only every n-th point")
    parser.add_argument("--keep", type=Path, help="work here, and leave it")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="risam-kill-points-"))
    (folder / "images").mkdir(parents=True)
    make_inputs(folder, images=5, steps=(2, 4))
    load_model(None, device=torch.device("cpu"))  # imports what a load imports
    wrong = 0
    print(f"{'command':34} {'points':>6} {'wrong':>5} {'seconds':>8}")
    for case in cases(folder):
        if options.only and not any(case.name.startswith(name) for name in options.only):
            continue
        begun = time.monotonic()
        try_all(case, folder, options.every)
        bad = len({one.partition(":")[0] for one in case.wrong})
        wrong += bad
        took = time.monotonic() - begun
        print(f"{case.name:34} {case.points:6} {bad:5} {took:8.0f}", flush=True)
        for one in case.wrong[:_SHOWN]:
            print(f"    {one}", flush=True)
    if options.keep is None:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main_loop())
