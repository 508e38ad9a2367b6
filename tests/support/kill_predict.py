"""Runs ``risam predict`` again and again in a child process and kills it; then lets it end.

    python kill_predict.py SEED KILLS MODEL OUTPUT ARGUMENT...

Everything heavy is imported once; each try is a fork, so that many kills take little time. A try
is killed once its records have grown to a size drawn at random, so that however fast the machine
is, kills fall everywhere in the run. Prints the tries' exit codes as JSON, null for a kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import risam_cli.runs.run  # noqa: F401 - as the next, for all forks
from risam_cli.cli import main
from risam_cli.weights.load import load_model


def try_once(
    arguments: list[str], is_time: Callable[[], bool], wait: float, kind: signal.Signals
) -> int | None:
    """One try; its exit code, or None where it was killed ``wait`` seconds after its time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = main(arguments)
        finally:
            os._exit(code)
    while not is_time():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(child, kind)
    _, status = os.waitpid(child, 0)
    return None if kind == signal.SIGKILL else os.waitstatus_to_exitcode(status)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def main_loop(seed: int, kills: int, model: str, output: str, inputs: list[str]) -> None:
    chance = random.Random(seed)
    load_model(model, device=torch.device("cpu"))  # imports what a load imports
    named = ["-q", "predict", *inputs, "--model", model, "--device", "cpu", "-o"]
    whole = f"{output}-whole"
    codes = [try_once([*named, whole], lambda: False, 0, signal.SIGKILL)]
    end, records = size_of(Path(whole) / "predictions.jsonl"), Path(output) / "predictions.jsonl"
    for _ in range(kills):
        kind = signal.SIGKILL if chance.random() < 0.75 else signal.SIGTERM
        before = size_of(records)
        if before == end:
            break
        goal = before + chance.random() * (end - before) / 3
        codes.append(
            try_once(
                [*named, output, "--resume"],
                lambda goal=goal: size_of(records) > goal,
                chance.uniform(0, 0.01),
                kind,
            )
        )
    codes.append(try_once([*named, output, "--resume"], lambda: False, 0, signal.SIGKILL))
    print(json.dumps(codes))


if __name__ == "__main__":
    main_loop(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
