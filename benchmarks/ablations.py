"""RISAM, every part of it switched off in turn, and SAM directly: the table of docs/ablations.md.

    risam train configs/ablations/encoder.yaml
    python benchmarks/ablations.py -o runs/ablations [--seeds 3] [--all-seeds] [--jobs 2]

Trains each settings file of ``configs/ablations`` under the same budget, data and seeds from one
image encoder, evaluates each on scenes that training never drew, and prints the table. What is
there already is taken as it is, so that a cut run goes on; ``--table`` only prints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.refshapes.dataset import FAMILIES
from risam_cli.metrics.figures import Terms
from risam_cli.metrics.intervals import Change, compare, intervals

REPO = Path(__file__).parent.parent
CONFIGS = REPO / "configs" / "ablations"
NAMES = {
    "risam": "RISAM",
    "no_vision_guided": "without Vision-Guided Attention",
    "no_language_guided": "without Language-Guided Attention",
    "no_query_token": "without the multi-modal query token",
    "no_feature_enhancement": "without Feature Enhancement",
    "no_adapters": "without adapters",
    "sam": "SAM directly",
}
REPEATED = ("risam", "sam")


@dataclass(frozen=True)
class Expressions:
    """What a run answered to the expressions of every family, in one order.

    Attributes:
        iou: (N,) by native rules; clusters: (N,) image numbers; family: (N,) numbers.
        empty: (N,) no referent; said_empty: (N,) answered "nothing".
    """

    iou: NDArray[np.float64]
    clusters: NDArray[np.int64]
    family: NDArray[np.int64]
    empty: NDArray[np.bool_]
    said_empty: NDArray[np.bool_]


def main() -> None:
    """Trains and evaluates what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--encoder", type=Path, help="the dense stage's checkpoints/last.pt")
    parser.add_argument("--seeds", type=int, default=3, help="of RISAM and of SAM directly")
    parser.add_argument("--all-seeds", action="store_true", help="as many of every ablation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--limit", type=int, default=240, help="expressions of a family")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    encoder = options.encoder or options.output / "encoder" / "checkpoints" / "last.pt"
    runs = planned(options.seeds, options.all_seeds)
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda r: run(r[0], r[1], options.output, encoder, options.limit), runs))
    print(table(options.output))


def planned(seeds: int, all_seeds: bool) -> list[tuple[str, int]]:
    """Variants and seeds, what the table needs most first."""
    first = [(name, 0) for name in NAMES]
    more = [(name, seed) for seed in range(1, seeds) for name in REPEATED]
    others = [(n, s) for s in range(1, seeds) for n in NAMES if n not in REPEATED]
    return first + more + (others if all_seeds else [])


def run(name: str, seed: int, output: Path, encoder: Path, limit: int) -> None:
    """Trains one variant with one seed and evaluates it on every family."""
    folder = output / f"{name}-{seed}"
    changes = {
        "seed": seed,
        "output": folder,
        "init_encoder_from": encoder,
        "threads": 1,
        "workers": 0,
    }
    train = ["train", str(CONFIGS / f"{name}.yaml"), "--resume"]
    for key, value in changes.items():
        train += ["--set", f"{key}={value}"]
    if not (folder / "eval-grefshapes" / "report.json").is_file():
        call(train, folder)
    for family in FAMILIES:
        report = folder / f"eval-{family}"
        if not (report / "report.json").is_file():
            evaluate = ["eval", "--dataset", "refshapes", "--family", family, "--split", "val"]
            evaluate += ["--limit", str(limit), "--model", str(folder / "best")]
            call([*evaluate, "--workers", "0", "-o", str(report), "--overwrite"], folder)


def call(arguments: Sequence[str], folder: Path) -> None:
    """Runs one command of risam, its messages in ``FOLDER.log``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, "-m", "risam_cli", *arguments], stderr=log, stdout=log, check=True
        )


def read(folder: Path) -> Expressions:
    """The answers of one run."""
    rows, families = [], []
    for number, family in enumerate(FAMILIES):
        text = (folder / f"eval-{family}" / "per_expression.jsonl").read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines()]
        rows += found
        families += [number] * len(found)
    images = [f"{family}/{row['image']}" for family, row in zip(families, rows, strict=True)]
    clusters = np.unique(images, return_inverse=True)[1].astype(np.int64)
    return Expressions(
        np.array([row["iou"] for row in rows], np.float64),
        clusters,
        np.array(families, np.int64),
        np.array([row["gt_no_target"] for row in rows], bool),
        np.array([row["pred_no_target"] for row in rows], bool),
    )


def figures(found: Expressions) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Numerators and denominators of the table's figures."""
    every = np.ones_like(found.iou)
    terms = {"mIoU": (found.iou, every)}
    for number, family in enumerate(FAMILIES):
        inside = (found.family == number).astype(np.float64)
        terms[f"{family} mIoU"] = (found.iou * inside, inside)
    empty = found.empty.astype(np.float64)
    terms["N-acc"] = (empty * found.said_empty, empty)
    terms["T-acc"] = ((1 - empty) * ~found.said_empty, 1 - empty)
    return terms


def mean_terms(runs: Sequence[Expressions]) -> Terms:
    """The figures' terms, each expression's averaged over the seeds."""
    each = [figures(found) for found in runs]
    return {
        name: (np.mean([terms[name][0] for terms in each], axis=0), each[0][name][1])
        for name in each[0]
    }


def table(output: Path) -> str:
    """Markdown: each variant's figures, and its difference to RISAM with the same seeds."""
    found = {
        name: {
            int(folder.name.rpartition("-")[2]): read(folder)
            for folder in sorted(output.glob(f"{name}-[0-9]*"))
            if (folder / f"eval-{FAMILIES[-1]}" / "report.json").is_file()
        }
        for name in NAMES
    }
    columns = ["mIoU", *(f"{family} mIoU" for family in FAMILIES), "N-acc", "T-acc"]
    lines = [
        "| | seeds | " + " | ".join(columns) + " | mIoU against RISAM, same seeds |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, seeds in found.items():
        if not seeds:
            continue
        runs = list(seeds.values())
        terms = mean_terms(runs)
        bounds = intervals(terms.values(), runs[0].clusters)
        cells = [
            f"{above.sum() / below.sum():.3f} ± {(high - low) / 2:.3f}"
            for (above, below), (low, high) in zip(terms.values(), bounds, strict=True)
        ]
        cells[0] += spread(runs)
        base = [found["risam"][seed] for seed in seeds if seed in found["risam"]]
        change = "" if name == "risam" or len(base) != len(runs) else against(base, runs)
        lines.append(f"| {NAMES[name]} | {len(runs)} | " + " | ".join([*cells, change]) + " |")
    return "\n".join(lines)


def spread(runs: Sequence[Expressions]) -> str:
    """The figures of single seeds, where there are several."""
    means = [float(found.iou.mean()) for found in runs]
    return f" (seeds {min(means):.3f} to {max(means):.3f})" if len(means) > 1 else ""


def against(base: Sequence[Expressions], runs: Sequence[Expressions]) -> str:
    """The paired difference in mIoU with its interval."""
    found: Change = compare(mean_terms(base), mean_terms(runs), base[0].clusters)["mIoU"]
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


if __name__ == "__main__":
    main()
