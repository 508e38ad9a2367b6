"""What every benchmark shares: rows of figures, clocks, peak memory, and how figures are written.

A benchmark is a module beside this one with ``measure(options: Options) -> list[Row]``, which
``run.py`` calls. It compares ways of doing one thing in turns within one run (:func:`in_turns`), so
that what else the machine does falls on all of them, and gives what memory is asked of to a process
of its own (:func:`run_child`), so that a peak is its own.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPO = HERE.parent
PHOTOS = REPO.parent / "shared" / "photos" / "images"
"""Real photos, where the checkout has them beside it."""

_LIBRARIES = (
    "torch",
    "transformers",
    "segment-anything",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "pycocotools",
)


@dataclass(frozen=True, slots=True)
class Options:
    """What a benchmark may be asked.

    Attributes:
        device: ``cpu`` or ``cuda``.
        quick: fewer repeats and smaller inputs, to see that all of it runs.
        repeats: how often each way is timed.
    """

    device: str = "cpu"
    quick: bool = False
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured, such as ``ViT-B, fp32: risam``.
        value, unit: the median, or the one measured value.
        spread: the smallest and the largest of the repeats, or None for a single value.
        note: how it came about, where the name does not say it.
        wanted: a bound to hold it against, such as ``>= 1.6`` or ``<= 0.05``; or empty.
    """

    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    note: str = ""
    wanted: str = ""

    def meets(self) -> bool | None:
        """Whether the value is within its bound; None without one."""
        if not self.wanted:
            return None
        sign, bound = self.wanted.split()
        limit = float(bound)
        return self.value >= limit if sign == ">=" else self.value <= limit


# --- clocks and memory ----------------------------------------------------------------------------


@dataclass(slots=True)
class Times:
    """Seconds of one way's repeats: by the clock, and of all threads on processors."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def row(self, name: str, *, by: str = "cpu", unit: str = "s", note: str = "") -> Row:
        """The median with its spread; ``by`` is ``wall`` or ``cpu``."""
        seconds = self.cpu if by == "cpu" else self.wall
        return Row(name, statistics.median(seconds), unit, (min(seconds), max(seconds)), note)


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Times several ways of doing one thing, one after another, round by round.

    Args:
        warm_up: rounds that are not counted.
        synchronize: called before each look at the clock, such as ``torch.cuda.synchronize``.
    """
    times = {name: Times() for name in ways}
    for number in range(warm_up + repeats):
        for name, way in ways.items():
            gc.collect()
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            synchronize()
            if number >= warm_up:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def ratio(name: str, slow: Sequence[float], fast: Sequence[float], wanted: str = "") -> Row:
    """How many times faster: the median over rounds of slow/fast, each round its own ratio."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return Row(name, statistics.median(ratios), "times", (min(ratios), max(ratios)), wanted=wanted)


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    On Linux it is read from ``/proc``, since ``getrusage`` counts the process that started this one
    as well.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class Child:
    """What a process of its own took.

    Attributes:
        code: its exit code; output, errors: what it wrote.
        wall, cpu: seconds by the clock, and on processors with its own children's.
        peak: largest sum of the proportional memory of it and its children, in bytes, as sampled;
            pages that several of them share count once. 0 where there is no ``/proc``.
    """

    code: int
    output: str
    errors: str
    wall: float
    cpu: float
    peak: int

    def last_json(self) -> Any:
        """What its last line of output says."""
        if self.code:
            raise RuntimeError(f"exit code {self.code}: {self.errors.strip()[-2000:]}")
        return json.loads(self.output.strip().splitlines()[-1])


def run_child(
    command: Sequence[str],
    *,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    every: float = 0.05,
) -> Child:
    """Runs a command and watches the memory of it and its children, every so many seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(every):
            peak = max(peak, sum(map(_proportional_bytes, _tree(process.pid))))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, errors = process.communicate(stdin)
    wall = time.perf_counter() - started
    done.set()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Child(process.returncode, output, errors, wall, cpu, peak)


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text(encoding="ascii").split())
        except (OSError, ValueError):  # it has ended
            continue
    return found


def _proportional_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (OSError, ValueError):
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


# --- what the machine is --------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, str]:
    """What the figures were measured on: machine, load, versions."""
    import torch

    facts = {
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{platform.system()}, {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": _load(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "python": platform.python_version(),
        "risam": _revision(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    for name in _LIBRARIES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def _processor() -> str:
    """The processor's name, and what it has that matters here."""
    from risam_cli.inference.calibration import processor

    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return processor()
    flags = set(re.search(r"^flags\s*:\s*(.+)$|\Z", text, re.MULTILINE)[0].split())  # type: ignore[index]
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join([processor(), *has])


def _load() -> str:
    """Processes that want a core besides this one, over the last one, five, fifteen minutes."""
    return ", ".join(f"{number:.1f}" for number in os.getloadavg())


def _revision() -> str:
    from risam_cli.version import __version__

    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    commit = done.stdout.strip()
    return f"{__version__}, commit {commit}" if commit else __version__


# --- how figures are written ----------------------------------------------------------------------


def table(rows: Iterable[Row]) -> str:
    """The rows as an aligned text table."""
    cells = [("", "median", "unit", "smallest to largest", "wanted", "note")]
    for row in rows:
        low_high = f"{short(row.spread[0])} to {short(row.spread[1])}" if row.spread else ""
        met = {True: "  met", False: "  MISSED", None: ""}[row.meets()]
        cells.append((row.name, short(row.value), row.unit, low_high, row.wanted + met, row.note))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place == 1 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def short(value: float) -> str:
    """Three digits that count, five just below 1, and no powers of ten from 0.001 to a million."""
    if 0.99 <= value < 1:
        return f"{value:.5f}"
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    text = f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"
    return text if abs(value) >= 0.1 else f"{value:.3g}"


def to_csv(parts: Mapping[str, Iterable[Row]]) -> str:
    """All rows, each with the benchmark that it is from."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["benchmark", "name", "value", "unit", "low", "high", "wanted", "met", "note"])
    for part, rows in parts.items():
        for row in rows:
            low, high = row.spread or ("", "")
            met = {True: "yes", False: "no", None: ""}[row.meets()]
            writer.writerow(
                [part, row.name, row.value, row.unit, low, high, row.wanted, met, row.note]
            )
    return file.getvalue()


def from_csv(text: str) -> dict[str, list[Row]]:
    """What :func:`to_csv` wrote."""
    parts: dict[str, list[Row]] = {}
    for line in csv.DictReader(io.StringIO(text)):
        spread = (float(line["low"]), float(line["high"])) if line["low"] else None
        parts.setdefault(line["benchmark"], []).append(
            Row(
                line["name"],
                float(line["value"]),
                line["unit"],
                spread,
                line["note"],
                line["wanted"],
            )
        )
    return parts
