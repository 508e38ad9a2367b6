"""Has a fault befall every command at every change of its output folder, and compares the ends.

    python benchmarks/kill_points.py [--fault kill full once dead] [--twice] [--only merge* train]
                                     [--every 1] [--keep FOLDER]

Where ``benchmarks/kills.py`` kills at random moments, this one kills at the first, the second, the
third … change of the folder (each ``os.replace``, ``fsync``, ``write`` and so on, see
``benchmarks/killer/sitecustomize.py``) until the command ends unbroken, each time from the same
folder. After each the command is run again as a user would, and the folder must hold what an
unbroken run leaves: nothing lost, nothing twice, nothing left over. With ``--twice`` the run that
follows is killed as well, at a change drawn by chance, and the one after that is compared. With
another fault the change fails instead, as on a full or broken disk: the command must end with one
line and exit code 1, or with a folder that lacks nothing.

Everything heavy is imported once; each run is a fork. Quick where files are: ``TMPDIR=/dev/shm``.
Prints a table, and one line for each point that did not hold; exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from killer.sitecustomize import FAULTS, Switch
from kills import differences, make_inputs, snapshot
from PIL import Image
from soak import small_model

import risam_cli.runs.writer
import risam_cli.training.validate
from risam_cli.cli import main

_SHOWN = 12
_OUTPUT = ["-o", "{}"]
_TINY = ["--max-pixels", "2000"]  # by which the larger images fail
_KILLED = -9
# What stays where the removal itself fails; the next run clears it.
_CLEARED = tuple(
    f"left over: .risam{name}" for name in ("", "/staging", "/scratch", "/lock", "/made_by")
)
_COUNTED = mmap.mmap(-1, 8)  # the changes of the last run, told by its fork

Begin = Callable[[Path], None]


@dataclass(slots=True)
class Case:
    """A command from one state of its folder.

    Attributes:
        name: what stands in the table; cut, again: arguments of the run that meets the fault and
            of those that follow; ``{}`` stands for the output folder.
        codes: exit codes of a run that ends.
        before: what brings the folder, and the inputs, into that state; None begins with nothing.
        wanted: arguments of an unbroken run in an empty folder that must give the same; None: those
            that meet the fault.
        optional: names that a run may do without where it cannot write them.
    """

    name: str
    cut: list[str]
    again: list[str]
    codes: tuple[int, ...] = (0,)
    before: Begin | None = None
    wanted: list[str] | None = None
    optional: tuple[str, ...] = ()


@dataclass(slots=True)
class Found:
    """What came of a case: how many points there were, and what did not hold."""

    points: int
    wrong: list[str]

    @property
    def bad(self) -> int:
        """How many points did not hold."""
        return len({one.partition(":")[0] for one in self.wrong})


# --- runs -----------------------------------------------------------------------------------------


def run(
    arguments: Sequence[str], out: Path, log: Path, number: int = 0, fault: str = "kill"
) -> int:
    """A fork of the command with a fault at its n-th change; its exit code, -9 for a kill."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            torch.set_num_threads(1)
            switch = Switch(os.fspath(out), number, fault).install()
            code = main([one.replace("{}", os.fspath(out)) for one in arguments])
            _COUNTED[:] = switch.count.to_bytes(8, "little")
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changes() -> int:
    """How many changes the last run that was not killed made."""
    return int.from_bytes(_COUNTED[:], "little")


def warm_up(arguments: Sequence[str], out: Path, log: Path) -> None:
    """Run a command here, unbroken, so that no fork has to import and prepare what it needs."""
    held = os.dup(2)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
        main([one.replace("{}", os.fspath(out)) for one in arguments])
        os.dup2(held, 2)
    os.close(held)
    shutil.rmtree(out, ignore_errors=True)
    gc.collect()
    gc.freeze()


class Trial:
    """A case in a folder of its own.

    Args:
        twice: whether the run that follows is killed too.
        chance: at which change that is.
    """

    def __init__(self, case: Case, folder: Path, fault: str, twice: bool, seed: int) -> None:
        self.case = case
        self.out, self.log, self.start = folder / "out", folder / "log", folder / "start"
        self.fault, self.twice = fault, twice
        self.chance = random.Random(seed)
        self.wrong: list[str] = []

    def try_all(self, every: int) -> Found:
        """The fault at every point, and what follows."""
        case, out = self.case, self.out
        for path in (out, self.start):
            shutil.rmtree(path, ignore_errors=True)
        if case.before is not None:
            case.before(out)
            out.rename(self.start)
        warm_up(case.wanted or case.cut, out, self.log)
        code = run(case.wanted or case.cut, out, self.log)
        if code not in case.codes:
            raise SystemExit(f"{case.name}: ended unbroken with {code}: {self.log.read_text()}")
        wanted = snapshot(out)
        points, number = 0, 1
        while True:
            shutil.rmtree(out, ignore_errors=True)
            if self.start.exists():
                shutil.copytree(self.start, out, symlinks=True)
            code = run(case.cut, out, self.log, number, self.fault)
            if code != _KILLED and changes() < number:
                return Found(points, self.wrong)  # there are no more
            points += 1
            self._follow(f"point {number}: ", code, wanted)
            number += every

    def _follow(self, said: str, code: int, wanted: dict[str, str]) -> None:
        case, out, log = self.case, self.out, self.log
        if self.fault == "kill":
            if code != _KILLED:
                self.wrong.append(f"{said}ended with {code}: {_end(log)}")
        elif code in case.codes:
            for one in differences(snapshot(out), wanted):
                if one not in _CLEARED and one.partition(": ")[2] not in case.optional:
                    self.wrong.append(f"{said}{one}, with exit code {code}")
            self.wrong += [f"{said}{problem}" for problem in _told_badly(log)]
            return
        else:
            if code != 1:
                self.wrong.append(f"{said}ended with {code}: {_end(log)}")
            self.wrong += [f"{said}{problem}" for problem in _told_badly(log, out)]
        if self.twice:
            second = self.chance.randint(1, max(1, changes()))
            said = f"{said[:-2]} and {second}: "
            run(case.again, out, log, second)
        code = run(case.again, out, log)
        if code not in case.codes:
            self.wrong.append(f"{said}the next ended with {code}: {_end(log)}")
        self.wrong += [f"{said}{one}" for one in differences(snapshot(out), wanted)]
        self.wrong += [f"{said}then {problem}" for problem in _told_badly(log)]


def _end(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-300:]


def _told_badly(log: Path, out: Path | None = None) -> list[str]:
    """What is wrong with what a command said: one line of its error, if it has one, with its place.

    Args:
        out: where the error is to be; None where there is none.
    """
    text = log.read_text(errors="replace")
    if "Traceback" in text or "internal error" in text:
        return [f"said {text[-600:]}"]
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if len(errors) != int(out is not None):
        return [f"said {len(errors)} errors: {text[-300:]}"]
    return [f"names no place: {one}" for one in errors if os.fspath(out) not in one]


# --- the cases ------------------------------------------------------------------------------------


def _change(images: Path) -> None:
    """Another picture in place of the first image, and no picture in place of the second."""
    names = sorted(images.rglob("*.png"))
    Image.fromarray(np.full((50, 64, 3), 90, np.uint8)).save(names[0])
    names[1].write_text("no image any more")


def _lists(folder: Path, images: Path) -> list[str]:
    """Two lists of the same images: in the second one is new, one is gone, and others moved."""
    names = [os.fspath(path.relative_to(folder)) for path in sorted(images.rglob("*.png"))]
    orders = names[1:], [names[-1], names[0], *names[2:-1]]
    paths = [folder / f"list{k}.jsonl" for k in range(2)]
    for path, order in zip(paths, orders, strict=True):
        path.write_text("".join(json.dumps({"image": name}) + "\n" for name in order))
    return [str(path) for path in paths]


def _lighten_training(path: Path) -> None:
    """Every kind of file that a training writes, in as few steps as that takes."""
    settings = json.loads(path.read_text())
    settings |= {"keep_last": 2, "averaging": {"count": 2, "of": "last"}, "pictures": 1}
    settings["train"]["scenes"] = 4
    for stage in settings["stages"]:
        stage["images_per_step"] = 1
    path.write_text(json.dumps(settings))


def _commands(folder: Path) -> SimpleNamespace:
    """The commands by name, and what begins a run of one; what they need lies in the folder."""
    images, log = folder / "images", folder / "log"
    asked = ["-e", "the red circle", "-e", "the small blue square on the left"]
    small = ["--model", str(small_model(folder / "model")), "--device", "cpu"]
    predict = ["-q", "predict", str(images), *asked, *small, "--save"]
    page, predict = [*predict, "html"], [*predict, "png,overlay"]
    lists = [["-q", "predict", path, *predict[3:]] for path in _lists(folder, images)]
    o, resume, over = _OUTPUT, ["--resume", *_OUTPUT], ["--overwrite", *_OUTPUT]

    def begun(
        arguments: list[str], number: int = 0, change: Callable[[], None] = lambda: None
    ) -> Begin:
        def before(out: Path) -> None:
            if run(arguments, out, log, number) not in {0, 3, _KILLED}:
                raise SystemExit(f"a run to begin with failed: {_end(log)}")
            change()

        return before

    parts, records, report = [folder / f"part{k}" for k in range(2)], folder / "p", folder / "r"
    for k, part in enumerate(parts):
        begun([*predict, "--shard", f"{k}/2", *o])(part)
    begun([*predict, *o])(records)
    merge = ["-q", "merge", *map(str, parts)]
    data = ["-q", "eval", "--dataset", "coco", "--root", str(folder), "--images", str(images)]
    model = [*data, *small]
    scored = [*data, "--predictions", str(records)]
    begun([*scored, *o])(report)
    export = ["-q", "export-masks", str(records), "--to"]
    png, yolo, coco = [*export, "png"], [*export, "yolo", "--copy-images"], [*export, "coco"]
    train, at = ["-q", "train", str(folder / "train.json")], ["--set", "output={}"]
    again = [*train, "--resume", *at]
    pages = ("training.html",)  # without room for it, training goes on
    one = str(images / "0.png")
    explain = ["-q", "explain", one, *asked[:2], *small, "--json"]
    side = ["-q", "compare-models", one, *asked[:2], *small[:2], *small]
    return SimpleNamespace(
        predict=predict, page=page, lists=lists, o=o, resume=resume, over=over, begun=begun,
        merge=merge, model=model, scored=scored, png=png, yolo=yolo, coco=coco,
        train=train, at=at, again=again, pages=pages, explain=explain, side=side, images=images,
    )  # fmt: skip


def cases(folder: Path) -> list[Case]:
    """All commands from all states; what they need lies in the folder."""
    c = _commands(folder)
    return [
        *_predict_cases(c),
        Case("merge", c.merge + c.o, c.merge + c.over, (3,)),
        Case(
            "merge --overwrite", c.merge + c.over, c.merge + c.over,
            (3,), c.begun([*c.merge, *c.o]),
        ),
        Case("eval of a model", c.model + c.o, c.model + c.resume),
        Case(
            "eval --resume", c.model + c.resume, c.model + c.resume, (0,),
            c.begun([*c.model, *c.o], 40), c.model + c.o,
        ),
        Case(
            "eval --overwrite", c.model + c.over, c.model + c.over,
            (0,), c.begun([*c.model, *c.o]),
        ),
        Case("eval of predictions", c.scored + c.o, c.scored + c.over),
        Case("export-masks --to png", c.png + c.o, c.png + c.over),
        Case("export-masks --to coco", c.coco + c.o, c.coco + c.over),
        Case(
            "export-masks --overwrite", c.yolo + c.over, c.yolo + c.over,
            (0,), c.begun(c.yolo + c.o),
        ),
        Case("explain", c.explain + c.o, c.explain + c.over),
        Case("compare-models", c.side + c.o, c.side + c.over),
        Case("train", [*c.train, *c.at], c.again, optional=c.pages),
        Case(
            "train --resume", c.again, c.again,
            (0,), c.begun([*c.train, *c.at], 90), [*c.train, *c.at], c.pages,
        ),
        # The last of predict: it changes the images.
        Case(
            "predict --resume, changed images", c.predict + c.resume, c.predict + c.resume, (3,),
            c.begun([*c.predict, *c.o], 0, partial(_change, c.images)), c.predict + c.o,
        ),
    ]  # fmt: skip


def _predict_cases(c: SimpleNamespace) -> list[Case]:
    return [
        Case("predict", c.predict + c.o, c.predict + c.resume, (3,)),
        Case("predict, with a gallery", c.page + c.o, c.page + c.resume, (3,)),
        Case(
            "predict --resume", c.predict + c.resume, c.predict + c.resume, (3,),
            c.begun([*c.predict, *c.o], 60), c.predict + c.o,
        ),
        Case(
            "predict --resume, other limits", c.predict + c.resume, c.predict + c.resume, (3,),
            c.begun([*c.predict, *_TINY, *c.o]), c.predict + c.o,
        ),
        Case(
            "predict --retry-failed", [*c.predict, "--retry-failed", *c.o],
            c.predict + c.resume, (3,),
            c.begun([*c.predict, *_TINY, *c.o]), c.predict + c.o,
        ),
        Case(
            "predict --resume, other inputs", c.lists[1] + c.resume, c.lists[1] + c.resume, (0,),
            c.begun([*c.lists[0], *c.o]), c.lists[1] + c.o,
        ),
        Case(
            "predict --overwrite", c.predict + c.over, c.predict + c.over,
            (3,), c.begun([*c.predict, *c.o]),
        ),
    ]  # fmt: skip


def main_loop() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of names in the table")
    parser.add_argument("--fault", nargs="*", default=["kill"], choices=FAULTS, help="see there")
    parser.add_argument("--twice", action="store_true", help="kill the run that follows, too")
    parser.add_argument("--every", type=int, default=1, help="take only every n-th point")
    parser.add_argument("--seed", type=int, default=0, help="of the second kill")
    parser.add_argument("--keep", type=Path, help="work here, and leave it")
    options = parser.parse_args()
    torch.set_num_threads(1)  # else a fork waits for threads that worked before it, for ever
    # A commit of its own for every image, so that runs have the same changes.
    risam_cli.runs.writer._AT_ONCE = 1
    risam_cli.training.validate.DENSE_VALIDATION_SCENES = 8
    points = wrong = 0
    print(f"{'command':34} {'fault':5} {'points':>6} {'wrong':>5} {'seconds':>8}", flush=True)
    for fault in options.fault:
        folder = options.keep or Path(tempfile.mkdtemp(prefix="risam-kill-points-"))
        (folder / "images").mkdir(parents=True)
        make_inputs(folder, images=4, steps=(1, 2))
        _lighten_training(folder / "train.json")
        for case in cases(folder):
            if not any(fnmatch(case.name, pattern) for pattern in options.only):
                continue
            begun = time.monotonic()
            trial = Trial(case, folder, fault, options.twice, options.seed)
            found = trial.try_all(options.every)
            points, wrong = points + found.points, wrong + found.bad
            took = time.monotonic() - begun
            row = f"{case.name:34} {fault:5} {found.points:6} {found.bad:5} {took:8.0f}"
            print(row, flush=True)
            for one in found.wrong[:_SHOWN]:
                print(f"    {one}", flush=True)
        if options.keep is None:
            shutil.rmtree(folder)
    print(f"{points} points, {wrong} of them wrong", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main_loop())
