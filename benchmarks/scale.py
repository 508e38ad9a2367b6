"""A million names: what listing, dealing and the ledger cost, and a model of what follows from it.

    python benchmarks/scale.py measure     # the figures of docs/scale.md, of this machine
    python benchmarks/scale.py simulate    # its table, from PARAMETERS

The simulation plays a run event by event: workers that take their parts' images one after another,
storage that answers so many requests and bytes a second in all, workers that fail and come back,
and a merge at the end. The closed formula beside it says the same without chance; where the two
differ, it is chance that costs.
"""

from __future__ import annotations

import heapq
import json
import random
import resource
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from common import Options, Row

from risam_cli.data.inputs.inputs import Inputs
from risam_cli.files.jsonlines import seal
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.folder import RUN
from risam_cli.runs.ledger import LEDGER, FileMark, LedgerLine, Span, header_line, read_lines
from risam_cli.runs.merge import find_parts, merge_parts
from risam_cli.runs.shard import Dealer, cost_of

SHARDS = 1000


def measure(options: Options) -> list[Row]:
    """CPU seconds and peak memory of each, at a million names (a hundredth of it if quick)."""
    names = 10_000 if options.quick else 1_000_000
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "m.jsonl")
        with open(manifest, "w") as file:
            for k in range(names):
                row = {"image": f"images/{k // 1000:05}/{k:08}.jpg", "expression": "the left dog"}
                file.write(json.dumps(row) + "\n")
        started = time.process_time()
        dealer, run, dealt = Dealer(SHARDS), -1, [0] * SHARDS
        for entry in Inputs([str(manifest)]):
            if entry.run != run:
                run = entry.run
                dealt[dealer.deal(cost_of(entry.size, None))] += 1
        spent = time.process_time() - started
        note = f"{names:,} lines of a manifest, {SHARDS} shards"
        rows.append(Row("list and deal: CPU", spent, "s", None, note, "<= 60"))
        rows.append(Row("list and deal: peak", _peak(), "MB", None, note, "<= 500"))
        rows.append(Row("shards: largest less smallest", max(dealt) - min(dealt), "images"))
        rows += _ledger(Path(folder, "ledger.jsonl"), names)
        rows.append(_merge(Path(folder), names // 50))
        rows.append(Row("after the ledger: peak", _peak(), "MB", None, note, "<= 500"))
    return rows


def _ledger(path: Path, names: int) -> list[Row]:
    """Writing and reading back a ledger of so many entries of one mask each."""
    started = time.process_time()
    with open(path, "wb") as file:
        file.write(header_line({"model": "0" * 64}))
        for k in range(names):
            mark = FileMark(f"masks/images/{k // 1000:05}/{k:08}.jpg__0-the-left-dog.png", 900, k)
            line = LedgerLine(
                k, "0" * 24, 1, "0" * 64, None, Span(400 * k, 400, k), Span(0, 0, 0), (mark,)
            )
            file.write(seal(line._asdict()))
    written = time.process_time() - started
    started = time.process_time()
    count = sum(1 for _ in read_lines(path))
    read = time.process_time() - started
    assert count == names
    return [
        Row("ledger: write", written, "s CPU", None, f"{names:,} entries"),
        Row("ledger: read and check", read, "s CPU", None, f"{names:,} entries"),
        Row("ledger: bytes an entry", path.stat().st_size / names, "bytes"),
    ]


def _merge(folder: Path, names: int) -> Row:
    """Two parts of so many entries in all, of one record and one mask each, put together."""
    mask, record = b"x" * 900, b'{"id": "' + b"x" * 380 + b'"}\n'
    identity = {"model": "0" * 64, "save": ["png"]}
    for index in range(2):
        part = folder / f"part{index}"
        (part / "masks").mkdir(parents=True)
        own = {**identity, "shard": [index, 2]}
        with open(part / LEDGER, "wb") as ledger, open(part / PREDICTIONS, "wb") as records:
            ledger.write(header_line(own))
            for k in range(index, names, 2):
                mark = FileMark(f"masks/{k:08}.png", len(mask), zlib.crc32(mask))
                (part / mark.path).write_bytes(mask)
                span = Span(records.tell(), len(record), zlib.crc32(record))
                records.write(record)
                line = LedgerLine(k, "0" * 24, 1, "0" * 64, None, span, Span(0, 0, 0), (mark,))
                ledger.write(seal(line._asdict()))
        (part / FAILURES).touch()
        run = {"status": "complete", "settings": own, "inputs": {"entries": names, "hash": "0"}}
        (part / RUN).write_text(json.dumps(run))
    started = time.process_time()
    merge_parts(find_parts([folder / "part0", folder / "part1"]), folder / "whole", link=True)
    spent = time.process_time() - started
    note = f"{names:,} entries of one mask in two parts; masks keep their place on the disk"
    return Row("merge", 1e6 * spent / names, "us CPU an entry", None, note)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a run costs.

    Attributes:
        list_s: to list one name, in every worker.
        start_s: to start a worker: imports, weights.
        work_s: of a worker to take one image through, all stages overlapped.
        spread: how much that varies from image to image, as a share of it.
        requests: to storage for each image; read_bytes of it, and written_bytes.
        storage_requests, storage_bytes: that storage answers in a second, in all.
        fails_per_day: of one worker.
        restart_s: until it is back; it lists and starts again, and lost a batch.
        batch: images in flight.
        merge_s: to merge one image's records and masks, in one process.
        merged: whether the parts are put together.
        worker_hour: what an hour of a worker costs.
        thousand_requests: what a thousand requests cost.
    """

    list_s: float
    start_s: float
    work_s: float
    spread: float
    requests: float
    read_bytes: float
    written_bytes: float
    storage_requests: float
    storage_bytes: float
    fails_per_day: float
    restart_s: float
    batch: int
    merge_s: float
    merged: bool
    worker_hour: float
    thousand_requests: float


PARAMETERS = Parameters(
    # Measured; docs/scale.md says where and how.
    list_s=32e-6,
    merge_s=138e-6,
    written_bytes=1.1e3,
    requests=2,
    batch=32,
    # Assumed: change them to your own.
    start_s=8.0,
    work_s=1 / 40,
    spread=0.5,
    read_bytes=120e3,
    storage_requests=5500.0,
    storage_bytes=2e9,
    fails_per_day=0.02,
    restart_s=60.0,
    merged=True,
    worker_hour=2.5,
    thousand_requests=0.0004,
)
"""A worker is one GPU that takes 40 images a second; no GPU was measured for this."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hours by the clock, failures on the way, cost, and what the run was bound by."""

    hours: float
    failures: float
    cost: float
    bound: str


def formula(images: int, workers: int, p: Parameters) -> Outcome:
    """Without chance: the slowest of work and storage, and what is done once before and after."""
    listing = images * p.list_s + p.start_s
    share = images / workers
    bounds = {
        "work": share * p.work_s,
        "requests": images * p.requests / p.storage_requests,
        "bytes": images * (p.read_bytes + p.written_bytes) / p.storage_bytes,
    }
    bound = max(bounds, key=lambda key: bounds[key])
    middle = bounds[bound]
    failures = workers * p.fails_per_day * (listing + middle) / 86400
    lost = failures / workers * (p.restart_s + listing + p.batch * p.work_s)
    merging = images * p.merge_s if p.merged and workers > 1 else 0.0
    seconds = listing + middle + lost + merging
    parts = {"listing": listing, bound: middle, "merge": merging}
    cost = workers * (listing + middle + lost) / 3600 * p.worker_hour
    cost += images * p.requests / 1000 * p.thousand_requests
    return Outcome(seconds / 3600, failures, cost, max(parts, key=lambda key: parts[key]))


def simulate(images: int, workers: int, p: Parameters, seed: int = 0) -> Outcome:
    """Event by event; images go in chunks so that a thousand million take seconds."""
    chance = random.Random(seed)
    chunk = max(1, images // workers // 200)
    listing = images * p.list_s + p.start_s
    left = [images // workers + (k < images % workers) for k in range(workers)]
    ready = [(listing * chance.uniform(1.0, 1.1), k) for k in range(workers)]
    heapq.heapify(ready)
    storage_free, failures, busy = 0.0, 0, 0.0
    end = 0.0
    while ready:
        now, worker = heapq.heappop(ready)
        count = min(chunk, left[worker])
        if not count:
            end = max(end, now)
            busy += now
            continue
        # Storage serves one chunk after another, at most as fast as it can.
        needs = count * max(
            p.requests / p.storage_requests, (p.read_bytes + p.written_bytes) / p.storage_bytes
        )
        storage_free = max(storage_free, now) + needs
        # A chunk's images vary each by itself, so their sum varies by the root of their number.
        worked = p.work_s * (count + p.spread * count**0.5 * chance.gauss(0, 1))
        then = max(now + max(worked, 0.0), storage_free)
        if chance.random() < 1 - (1 - p.fails_per_day / 86400) ** (then - now):
            failures += 1
            done = max(0, int(count * chance.random()) - p.batch)
            left[worker] -= done
            then = now + (then - now) * chance.random() + p.restart_s + listing
        else:
            left[worker] -= count
        heapq.heappush(ready, (then, worker))
    merging = images * p.merge_s if p.merged and workers > 1 else 0.0
    cost = busy / 3600 * p.worker_hour + images * p.requests / 1000 * p.thousand_requests
    bound = formula(images, workers, p).bound
    return Outcome((end + merging) / 3600, failures, cost, bound)


def table(p: Parameters) -> str:
    """Markdown: the formula and the simulation side by side."""
    lines = [
        "| images | GPUs | hours, formula | hours, simulated | failures | cost | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for images in (1_000_000, 1_000_000_000):
        for workers in (1, 10, 100, 1000):
            told, played = formula(images, workers, p), simulate(images, workers, p)
            lines.append(
                f"| {images:,} | {workers:,} | {told.hours:,.2f} | {played.hours:,.2f} | "
                f"{played.failures:,} | {played.cost:,.0f} | {told.bound} |"
            )
    return "\n".join(lines)


def manifests_by_shard(p: Parameters, workers: int) -> Parameters:
    """With a manifest of its own for each worker: it lists its part only, and nothing is merged."""
    return replace(p, list_s=p.list_s / workers, merged=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["simulate"]:
        print(table(PARAMETERS))
        for number in (100, 1000):
            changed = manifests_by_shard(PARAMETERS, number)
            told = formula(10**9, number, changed)
            played = simulate(10**9, number, changed)
            print(
                f"a manifest for each of {number} GPUs, parts kept: {told.hours:.1f} h by the "
                f"formula, {played.hours:.1f} h simulated, cost {played.cost:,.0f}, {told.bound}"
            )
    else:
        for row in measure(Options(quick="--quick" in sys.argv)):
            print(f"{row.name}: {row.value:.4g} {row.unit} {row.note}")
