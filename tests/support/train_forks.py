"""Runs ``risam train`` in children of its own and does to them what befalls a training run.

    python train_forks.py JOBS.json

Everything heavy is imported once; each run is a fork. A job has ``args`` of the command line and
may have

    world        number of processes (torchrun's environment, gloo)
    kill         SIGNAL and what to wait for: {"signal": "SIGKILL", "rank": 0, "file": PATH,
                 "lines": N, "wait": SECONDS}: that the file has N lines
    in_checkpoint, in_model
                 the process kills itself by SIGKILL while it writes its Nth checkpoint (half of
                 the file is on the disk), or while it exchanges its Nth model folder
    file_limit   largest file in bytes that the process can write: then its disk is full
    spoil        data index whose image makes the loss NaN

Prints, for each job, the exit codes of its processes (a signal's number negative) and stderr.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.parallel
import torch.utils.tensorboard  # noqa: F401 - as the next, for all forks

import risam_cli.training.loop  # noqa: F401
from risam_cli.cli import main
from risam_cli.training import checkpoint, losses
from risam_cli.weights import folder as model_folders

PATIENCE = 900.0


def run(job: dict[str, Any]) -> dict[str, Any]:
    world = job.get("world", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [tempfile.TemporaryFile() for _ in range(world)]  # noqa: SIM115
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(told[rank].fileno(), 2)
                if world > 1:
                    os.environ.update(
                        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    )  # fmt: skip
                prepare(job)
                code = main(job["args"])
            finally:
                os._exit(code)
        children.append(child)
    if "kill" in job:
        kill(children, job["kill"])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for file in told:
        file.seek(0)
    return {"codes": codes, "stderr": [file.read().decode() for file in told]}


def kill(children: list[int], how: dict[str, Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    path = Path(how["file"])
    while not (path.is_file() and len(path.read_bytes().splitlines()) >= how["lines"]):
        assert time.monotonic() < deadline
        ended, status = os.waitpid(children[0], os.WNOHANG)
        assert not ended, f"ended before it could be killed: {status}"
        time.sleep(0.001)
    time.sleep(how.get("wait", 0.0))
    os.kill(children[how.get("rank", 0)], signal.Signals[how["signal"]])


def prepare(job: dict[str, Any]) -> None:
    if "in_checkpoint" in job:
        checkpoint._write = nth(job["in_checkpoint"], checkpoint._write, tear)
    if "in_model" in job:
        model_folders._replace_folder = nth(job["in_model"], model_folders._replace_folder, strand)
    if "file_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if "spoil" in job:
        spoil(job["spoil"])


def nth(number: int, usual: Callable[..., None], last: Callable[..., None]) -> Callable[..., None]:
    """``usual``, but at the Nth call ``last`` and then SIGKILL."""
    calls = 0

    def call(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < number:
            usual(*arguments)
            return
        last(usual, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    return call


def tear(write: Callable[..., None], state: dict[str, Any], path: Path) -> None:
    write(state, path)
    os.truncate(path, path.stat().st_size // 2)


def strand(replace: Callable[..., None], temporary: Path, folder: Path) -> None:
    """As far as the moment when neither the old nor the new folder is in its place."""
    os.replace(folder, folder.with_name(f".{folder.name}-old"))


def spoil(step: int) -> None:
    """The loss of one part of the Nth step is NaN, in the process that has that part."""
    usual = losses.ReferringTask.loss
    calls = 0

    def loss(self: Any, batch: Any, counts: Any = None) -> Any:
        nonlocal calls
        calls += 1
        total, figures = usual(self, batch, counts)
        return (total * float("nan"), figures) if calls == step else (total, figures)

    losses.ReferringTask.loss = loss  # type: ignore[method-assign]


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([run(job) for job in jobs]))
