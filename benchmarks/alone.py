"""One image through ``risam predict``: with one thread, with all, and beside a busy process.

ViT-B with random weights at 1024x1024, one expression, fp32 and bf16. The seconds are those of the
command by the clock, without start-up, the import of torch and the loading of the model. The busy
process has the same priority, one thread that never waits, and is of the same session: a Linux that
shares out cores by sessions would give it one for itself. Nobody watches the memory meanwhile,
which costs a seventh of the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import Options, Row, Times, ratio
from models import checked, draw, model_folder, parts_of, risam


def measure(options: Options) -> list[Row]:
    """Seconds of one image each way, in turns, and what threads and company make of them."""
    cores = os.cpu_count() or 1
    rows = []
    with tempfile.TemporaryDirectory() as made:
        picture = next(draw(Path(made, "in"), 1, 768, 1024).iterdir())
        model = model_folder(Path(made, "model"), "tiny" if options.quick else "vit_b")
        for precision in ("fp32", "bf16"):
            times = {way: Times() for way in ("1 thread", f"{cores} threads", "in company")}
            for turn in range(options.repeats):
                for way, taken in times.items():
                    output = Path(made, f"{precision}-{turn}-{way}")
                    words = ["predict", picture, "-e", "the red circle", "-o", output]
                    words += ["--model", model, "--device", "cpu", "--precision", precision]
                    threads = 1 if way == "1 thread" else cores
                    with neighbour(way == "in company"):
                        checked(risam(*words, threads=threads, every=3600))
                    taken.wall.append(parts_of(output)[0])
            one, all_of_them, company = times.values()
            rows += [t.row(f"{precision}, {way}", by="wall") for way, t in times.items()]
            name = f"{precision}: {cores} threads against 1"
            rows.append(ratio(name, one.wall, all_of_them.wall, ">= 1.8" if cores == 2 else ""))
            name = f"{precision}: in company against alone"
            rows.append(ratio(name, company.wall, all_of_them.wall, "<= 1.5"))
    return rows


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """Another process that keeps one core busy for as long as this lasts."""
    if not wanted:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()
