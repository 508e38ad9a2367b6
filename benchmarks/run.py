"""Measures everything that is said of speed and memory, beside the peers, by one command.

    python benchmarks/run.py                          # all parts on the CPU, about an hour
    python benchmarks/run.py encoder parity           # some parts; the others' results stay
    python benchmarks/run.py --device cuda            # on a GPU
    python benchmarks/run.py --quick -o /tmp/figures  # does all of it run? minutes; no real figures

Every part prints its table as it ends and is written at once, into files that bear the machine's
name: ``MACHINE.csv`` (all rows), ``MACHINE.md`` (the same to read), ``MACHINE.json`` (machine, load
and versions of each part) and ``MACHINE.svg`` (the times, ratios and sizes as bars), by default
into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import HERE, Options, Row, from_csv, machine, table, to_csv
from plot import bars

PARTS = {
    "encoder": "ViT-B's image encoder against segment_anything's and transformers'",
    "alone": "one image through `risam predict`, by threads, and beside a busy process",
    "attention": "the ways of attention with relative positions, one against the other",
    "footprint": "peak memory of a process with ViT-B's encoder, against the peers'",
    "parity": "the fast path's masks against the plain float32 path's, on real photos",
    "output": "masks to RLE and PNG against pycocotools and Pillow",
    "pipeline": "images a second of `risam predict` against the bare model",
    "memory": "peak memory over 100, 1,000 and 5,000 images",
    "scale": "a million names listed, dealt to 1,000 shards, kept in a ledger, merged",
    "expressions": "1, 4, 16 and 64 expressions an image",
    "startup": "`risam --help`, and the way from command to first mask",
    "training": "expressions a second in training, by how often an image is encoded",
    "cache": "a second `risam eval` from the feature cache",
}


def main() -> int:
    """Measures the parts asked for; 1 where a figure misses what is wanted of it."""
    options, parts, folder = parse()
    folder.mkdir(parents=True, exist_ok=True)
    missed = 0
    for part in parts:
        print(f"\n{part}: {PARTS[part]}", flush=True)
        facts, started = machine(options.device), time.perf_counter()
        name = name_of(facts)
        rows: list[Row] = importlib.import_module(part).measure(options)
        facts["minutes"] = f"{(time.perf_counter() - started) / 60:.1f}"
        facts["command"] = " ".join(["python", "benchmarks/run.py", *sys.argv[1:]])
        results, machines = load(folder, name)  # another run may have written since
        results[part], machines[part] = rows, facts
        missed += sum(row.meets() is False for row in rows)
        print(table(rows), flush=True)
        save(folder, name, results, machines)
    print(
        f"\nwritten: {folder}/{name_of(machine(options.device))}.csv, .md, .json, .svg; "
        f"{missed} figures missed"
    )
    return 1 if missed else 0


def parse() -> tuple[Options, list[str], Path]:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="parts: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()),
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="of each way, in turns")
    parser.add_argument("--quick", action="store_true", help="small and few; no real figures")
    parser.add_argument("-o", "--output", type=Path, default=None)
    asked = parser.parse_args()
    unknown = sorted(set(asked.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if asked.quick and asked.output is None:
        parser.error("--quick gives no real figures; name a folder for them by -o")
    options = Options(asked.device, asked.quick, asked.repeats)
    return options, asked.parts or list(PARTS), asked.output or HERE / "results"


def name_of(facts: Mapping[str, str]) -> str:
    """Of a machine's files, such as ``amd-epyc-avx2-avx512f-2-cores``."""
    kind = facts.get("gpu", facts["processor"])
    return re.sub(r"[^a-z0-9]+", "-", f"{kind} {facts['cores']} cores".lower()).strip("-")


def load(folder: Path, name: str) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """What earlier runs left."""
    figures, facts = folder / f"{name}.csv", folder / f"{name}.json"
    if not figures.is_file() or not facts.is_file():
        return {}, {}
    return from_csv(figures.read_text(encoding="utf-8")), json.loads(
        facts.read_text(encoding="utf-8")
    )


def save(
    folder: Path,
    name: str,
    results: Mapping[str, Sequence[Row]],
    machines: Mapping[str, Mapping[str, str]],
) -> None:
    """Writes all four files anew."""
    order = [*(part for part in PARTS if part in results), *(results.keys() - PARTS.keys())]
    results = {part: results[part] for part in order}
    texts = {
        "csv": to_csv(results),
        "json": json.dumps(machines, indent=1, ensure_ascii=False) + "\n",
        "md": report(results, machines),
        "svg": bars(results),
    }
    for kind, text in texts.items():
        (folder / f"{name}.{kind}").write_text(text, encoding="utf-8")


def report(results: Mapping[str, Sequence[Row]], machines: Mapping[str, Mapping[str, str]]) -> str:
    """The tables with what they were measured on, as Markdown."""
    lines = ["# Figures", "", "Written by `benchmarks/run.py`; see docs/benchmarks.md.", ""]
    for part, rows in results.items():
        facts = machines[part]
        about = f"{PARTS.get(part, part)}."
        lines += [f"## {part}", "", about, "", "```text", table(rows), "```", ""]
        lines += [", ".join(f"{name}: {value}" for name, value in facts.items()) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
