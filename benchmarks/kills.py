"""Kills every command at random moments, over and over, and compares what comes out in the end.

    python benchmarks/kills.py [--kills 220] [--seed 0] [--only predict eval] [--keep FOLDER]

Each command runs once unbroken. Then come chains: a run is started, killed at a moment drawn evenly
over the time that an unbroken run takes, started again with the same arguments, killed again, up to
eight times, and at last let end. Six kills in ten are SIGKILL, the rest SIGTERM and Ctrl-C to
the whole group. After each chain the output folder must hold the same files as the unbroken run's,
byte for byte but for clocks: nothing lost, nothing twice, nothing left over; and no process of a
killed run may outlive it. Everything heavy is imported once; each run is a fork.

Prints a table, and one line for each chain that did not hold; exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import risam_cli.evaluation.answers
import risam_cli.runs.merge
import risam_cli.runs.run
import risam_cli.training.loop  # noqa: F401 - as those before, for all forks
from risam_cli.cli import main
from risam_cli.weights.load import load_model

_MOST_IN_CHAIN = 8
_SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM,) * 2 + (signal.SIGINT,) * 2
_TEXTS = ("the red circle", "the small blue square on the left")
_CLOCKS = {"seconds", "wall_seconds", "time", "timestamp"}


@dataclass(slots=True)
class Command:
    """A command under test.

    Attributes:
        begin, again: arguments of a first run, and of one that follows a kill; ``{}`` in the last
            stands for the output folder.
        anew: arguments of one that follows a kill so late that there is nothing to go on with.
        codes: exit codes of a run that ends.
        share: of all kills.
    """

    name: str
    begin: list[str]
    again: list[str]
    share: float
    codes: tuple[int, ...] = (0,)
    anew: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    chains: int = 0
    too_late: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


# --- one run --------------------------------------------------------------------------------------


def into(arguments: Sequence[str], out: Path) -> list[str]:
    """The arguments with their output folder."""
    return [*arguments[:-1], arguments[-1].format(out)]


def start(arguments: Sequence[str], log: Path) -> int:
    """A fork that runs ``risam`` in a process group of its own; its number."""
    child = os.fork()
    if child:
        return child
    code = 130
    try:
        os.setsid()
        # What is started in the background is born deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        torch.set_num_threads(2)  # so that images go side by side
        code = main(list(arguments))
    finally:
        os._exit(code)


def kill_after(child: int, seconds: float, kind: signal.Signals) -> int | None:
    """Kills a run when its time has come; its exit code, None where it had ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    send = os.killpg if kind == signal.SIGINT else os.kill  # Ctrl-C goes to all, as a terminal does
    send(child, kind)
    return None


def outlived(group: int, seconds: float = 180.0) -> bool:
    """Whether a process of a run is still there so long after it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


# --- chains ---------------------------------------------------------------------------------------


def chain(command: Command, out: Path, wanted: dict[str, str], chance: random.Random) -> None:
    """Runs and kills until a run ends, and compares."""
    log = out.with_suffix(".log")
    log.write_bytes(b"")
    shutil.rmtree(out, ignore_errors=True)
    said = "begun"
    for number in range(chance.randint(1, _MOST_IN_CHAIN)):
        arguments = after_kill(command, out) if number else command.begin
        kind = chance.choice(_SIGNALS)
        child = start(into(arguments, out), log)
        try:
            code = kill_after(child, chance.uniform(0, command.seconds), kind)
        except ProcessLookupError:
            code = None
        if code is not None:
            command.too_late += 1
            said = f"ended with {code}"
            if code not in command.codes:
                command.wrong.append(f"exit code {code} before the kill: {_last_line(log)}")
            break
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if outlived(child):
            command.wrong.append(f"a process outlived {kind.name}")
            os.killpg(child, signal.SIGKILL)
        if code in command.codes:
            command.too_late += 1  # it was about to end
        elif code in {130, -kind}:
            command.kills[kind.name] += 1
        else:
            command.wrong.append(f"exit code {code} after {kind.name}: {_last_line(log)}")
    if not said.startswith("ended"):
        code = os.waitstatus_to_exitcode(
            os.waitpid(start(into(after_kill(command, out), out), log), 0)[1]
        )
        if code not in command.codes:
            command.wrong.append(f"the last run ended with {code}: {_last_line(log)}")
    command.chains += 1
    command.wrong += differences(snapshot(out), wanted)


def after_kill(command: Command, out: Path) -> list[str]:
    """What a user types to go on."""
    finished = (out / "report.json").exists() and not (out / "answers.jsonl").exists()
    return command.anew if command.anew and finished else command.again


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def differences(found: dict[str, str], wanted: dict[str, str]) -> Iterator[str]:
    """What is lost, left over, or other than it should be."""
    for name in sorted({*found, *wanted}):
        if name not in found:
            yield f"lost: {name}"
        elif name not in wanted:
            yield f"left over: {name}"
        elif found[name] != wanted[name]:
            yield f"different: {name}"


# --- what must be equal ---------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder with a digest of what must not depend on when it was written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("tensorboard/"):  # named by the clock, one file a process
            continue
        content = b"a folder" if path.is_dir() else _content(path)
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def _content(path: Path) -> bytes:
    if path.name in {"report.md", "report.html", "training.html", "card.json", "README.md"}:
        return b"with clocks"
    if path.suffix == ".pt":
        return _tensors(torch.load(path, map_location="cpu", weights_only=True))
    if path.name in {"run.json", "report.json"}:
        return _without_clocks(json.loads(path.read_bytes()))
    if path.name == "metrics.jsonl":
        return b"\n".join(_without_clocks(json.loads(line)) for line in path.open("rb"))
    return path.read_bytes()


def _tensors(value: Any) -> bytes:
    digest = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        digest.update(value.double().flatten().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in _CLOCKS:
                digest.update(str(key).encode() + _tensors(value[key]))
    elif isinstance(value, (list, tuple)):
        for one in value:
            digest.update(_tensors(one))
    else:
        digest.update(repr(value).encode())
    return digest.digest()


def _without_clocks(value: dict[str, Any]) -> bytes:
    drop = {*_CLOCKS, "timing", "command", "environment", "started", "peak_memory_mb", "created"}
    kept = {key: one for key, one in value.items() if key not in drop}
    if isinstance(kept.get("counts"), dict):
        kept["counts"] = {k: v for k, v in kept["counts"].items() if k != "this_time"}
    for part in kept.get("merged_from", []):
        part.clear()
    return json.dumps(kept, sort_keys=True).encode()


# --- the commands ---------------------------------------------------------------------------------


def make_inputs(folder: Path, images: int = 10, steps: tuple[int, int] = (6, 10)) -> None:
    """Small images, one of them broken, the same as a data set, and a training run."""
    rng = np.random.default_rng(1)
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "expressions": []}
    for number in range(images):
        height, width = 40 + 3 * number, 64
        picture = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        name = f"{'sub/' * (number % 2)}{number}.png"
        Image.fromarray(picture).resize((width, height)).save(folder / "images" / name)
        content["images"].append(
            {"id": number, "file_name": name, "height": height, "width": width}
        )
        polygon = [4.0, 4, 30, 4, 30, 30, 4, 30]
        content["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "segmentation": [polygon]}
        )
        for k, text in enumerate(_TEXTS):
            content["expressions"].append(
                {"id": 10 * number + k, "image_id": number, "ann_ids": [number], "text": text}
            )
    (folder / "images" / "broken.jpg").write_text("no image")
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "train.json").write_text(json.dumps(_training(*steps)))  # JSON is YAML


def _training(encoder: int, fusion: int) -> dict[str, Any]:
    """A training run of a few seconds, through both kinds of stages and several checkpoints."""
    scenes = {"dataset": "refshapes", "family": "grefshapes", "expressions_per_scene": 3}
    stage = {"images_per_step": 2, "learning_rate": 2.0e-3, "warmup": 2}
    return {
        "name": "small", "seed": 3, "device": "cpu", "precision": "fp32", "workers": 0,
        "threads": 1,
        "model": {
            "image_encoder": {
                "image_size": 128, "patch_size": 16, "dim": 32, "depth": 3, "heads": 2,
                "mlp_ratio": 2.0, "out_dim": 16, "window": 4, "global_blocks": [2],
                "taps": [0, 1, 2], "adapter_dim": 0, "stem": [4, 8, 12],
            },
            "text_encoder": {"vocabulary": "refshapes", "hidden": 16, "layers": 1, "heads": 2},
            "fusion": {"dim": 16, "heads": 2, "blocks": 1, "ffn_dim": 24},
            "decoder": {"heads": 2, "layers": 1, "ffn_dim": 24, "mask_dim": 8, "fine": True},
        },
        "train": {**scenes, "scenes": 12},
        "val": {"held out": {**scenes, "split": "val", "scenes": 2}},
        "stages": [
            {"name": "encoder", "kind": "dense", "steps": encoder, **stage},
            {"name": "fusion", "kind": "referring", "steps": fusion, **stage},
        ],
        "loss": {"target_size": 32},
        "optimizer": {"ema_decay": 0.9},
        "validate_every": min(5, fusion // 2), "checkpoint_every": min(3, fusion // 2),
        "log_every": 1,
    }  # fmt: skip


def commands(folder: Path) -> list[Command]:
    """All commands with the arguments that they are run by."""
    asked = [one for text in _TEXTS for one in ("-e", text)]
    predict = ["-q", "predict", str(folder / "images"), *asked, "--device", "cpu"]
    overlay = [*predict, "--save", "png,overlay", "--workers", "2"]
    whole, parts = folder / "records", [folder / f"part{k}" for k in range(3)]
    for arguments in (
        [*predict, "-o", str(whole)],
        *([*predict, "--shard", f"{k}/3", "-o", str(part)] for k, part in enumerate(parts)),
    ):
        if main(arguments) not in {0, 3}:
            raise SystemExit("a run to begin with failed")
    data = ["-q", "eval", "--dataset", "coco", "--root", str(folder), "--images"]
    data += [str(folder / "images")]
    model, records = [*data, "--device", "cpu"], [*data, "--predictions", str(whole)]
    train = ["-q", "train", str(folder / "train.json")]
    png = ["-q", "export-masks", str(whole), "--to", "png"]
    coco = ["-q", "export-masks", str(whole), "--to", "coco-polygons"]
    merge = ["-q", "merge", *map(str, parts)]
    at = ["--set", "output={}"]
    o, resume, over = ["-o", "{}"], ["--resume", "-o", "{}"], ["--overwrite", "-o", "{}"]
    return [
        Command("predict", predict + o, predict + resume, 0.34, (3,)),
        Command("predict, 2 workers, overlays", overlay + o, overlay + resume, 0.06, (3,)),
        Command("eval of a model", model + o, model + resume, 0.17, anew=model + over),
        Command("eval of predictions", records + o, records + over, 0.1),
        Command("train", [*train, *at], [*train, "--resume", *at], 0.05),
        Command("export-masks to png", png + o, png + over, 0.1),
        Command("export-masks to coco-polygons", coco + o, coco + over, 0.08),
        Command("merge", merge + o, merge + over, 0.1, (3,)),
    ]


# --- all of it ------------------------------------------------------------------------------------


def unbroken(command: Command, folder: Path) -> dict[str, str]:
    """What one run without a kill leaves; also takes its time."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    log = folder / "out.log"
    log.write_bytes(b"")
    code = os.waitstatus_to_exitcode(os.waitpid(start(into(command.begin, out), log), 0)[1])
    command.seconds = time.monotonic() - began
    if code not in command.codes:
        raise SystemExit(f"{command.name}: exit code {code}: {_last_line(log)}")
    return snapshot(out)


def row(command: Command) -> str:
    """The command's line of the table."""
    kinds = [command.kills[one.name] for one in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)]
    cells = (sum(kinds), *kinds, command.chains, command.too_late, len(command.wrong))
    return f"{command.name:32}" + "".join(f"{cell:>9}" for cell in cells)


def run(folder: Path, kills: int, seed: int, only: Sequence[str]) -> int:
    """Every command in turn; gives the exit code."""
    chance = random.Random(seed)
    torch.set_num_threads(1)  # else a fork waits for threads that worked before it, for ever
    make_inputs(folder)
    load_model(None, device=torch.device("cpu"))  # imports what a load imports
    head = ("kills", "SIGKILL", "SIGTERM", "SIGINT", "chains", "too late", "wrong")
    print(f"{'':32}" + "".join(f"{one:>9}" for one in head), flush=True)
    done = []
    for command in commands(folder):
        if only and not any(command.name.startswith(one) for one in only):
            continue
        own = folder / "runs"
        own.mkdir(exist_ok=True)
        wanted = unbroken(command, own)
        while sum(command.kills.values()) < round(command.share * kills):
            before = len(command.wrong)
            chain(command, own / "out", wanted, chance)
            for wrong in command.wrong[before:]:
                print(f"  {command.name}: {wrong}", flush=True)
            print(row(command), file=sys.stderr, flush=True)  # so far
        print(row(command), flush=True)
        done.append(command)
    total, wrong = sum(sum(c.kills.values()) for c in done), sum(len(c.wrong) for c in done)
    print(f"{total} kills in {sum(c.chains for c in done)} chains, {wrong} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="COMMAND")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here and leave it")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True)
        sys.exit(run(given.keep, given.kills, given.seed, given.only))
    with tempfile.TemporaryDirectory(prefix="risam-kills-") as place:
        sys.exit(run(Path(place), given.kills, given.seed, given.only))
