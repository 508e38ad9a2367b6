"""The command line on a machine that runs out of something; a program of its own.

``python -m support.short_machine KIND ARGUMENTS FOLDER``: runs the command of ``ARGUMENTS`` (JSON)
into new folders in ``FOLDER``, each time with less of it, and each time goes on with ``--resume``
and all of it. A line of JSON for each: what there was, both exit codes, and what was said.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from risam_cli.cli import main


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def files(number: int) -> Iterator[None]:
    """So many more than are open now."""
    with limited(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + number):
        yield


@contextlib.contextmanager
def file_size(number: int) -> Iterator[None]:
    with limited(resource.RLIMIT_FSIZE, 64 << number):
        yield


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """So many can be started; root has no limit of the system's."""
    start, left = threading.Thread.start, [number]

    def refused(self: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(self)

    threading.Thread.start = refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


KINDS = {
    "files": (files, (1, 4)),
    "file size": (file_size, (2, 5)),
    "threads": (threads, (0, 3, 7)),
}


def run(arguments: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    return code, said.getvalue()


def each(kind: str, arguments: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    short, numbers = KINDS[kind]
    whole = [*arguments, "-o", str(folder / "whole")]
    yield {"number": None, "code": run(whole)[0], "said": ""}
    for number in numbers:
        out = [*arguments, "-o", str(folder / str(number))]
        with short(number):
            code, said = run(out)
        again, more = run([*out, "--resume"])
        yield {"number": number, "code": code, "said": said, "again": again, "more": more}


if __name__ == "__main__":
    for line in each(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])):
        print(json.dumps(line), flush=True)
