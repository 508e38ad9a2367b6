"""The ablations of docs/ablations.md: forms of the block, its parts, and RISAM's rivals.

    risam train configs/ablations/encoder.yaml
    python benchmarks/ablations.py -o runs/ablations [--only A,B] [--jobs N] [--until N]

Trains each variant under the same budget, data and seeds from one image encoder, evaluates each on
scenes that training never drew, writes what was found to ``--results``, each expression's IoU to an
``.npz`` of the same name, and prints the tables. What already exists is taken as it is, so that a
cut run goes on; ``--until`` cuts every run at a step, to be gone on with by a later call;
``--table`` only reads the results, which outlive the runs' folders. Runs of another budget have
other folders, and stay in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plot import charts

from risam_cli.data.refshapes.dataset import FAMILIES
from risam_cli.drawing import svg
from risam_cli.files.write import write_file
from risam_cli.metrics.figures import Terms
from risam_cli.metrics.intervals import Change, compare, intervals

REPO = Path(__file__).parent.parent
CONFIGS = REPO / "configs" / "ablations"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        label: what the table calls it; config: its settings file's name in ``configs/ablations``.
        changes: ``--set`` on top of it.
    """

    label: str
    config: str
    changes: tuple[str, ...] = ()


VARIANTS = {
    "risam": Variant("RISAM", "risam"),
    "no_vision_guided": Variant("without Vision-Guided Attention", "no_vision_guided"),
    "no_language_guided": Variant("without Language-Guided Attention", "no_language_guided"),
    "no_query_token": Variant("without the multi-modal query token", "no_query_token"),
    "no_feature_enhancement": Variant("without Feature Enhancement", "no_feature_enhancement"),
    "no_adapters": Variant("without adapters", "no_adapters"),
    "plain": Variant(
        "block in its plain form",
        "risam",
        ("model.fusion.identity_start=none", "model.fusion.vision_guided_reads=words"),
    ),
    "sam": Variant("SAM directly", "sam"),
    "cris": Variant("CRIS", "cris"),
    "rela": Variant("ReLA", "rela"),
    "words": Variant(
        "regions read the words alone", "risam", ("model.fusion.vision_guided_reads=words",)
    ),
    "text": Variant(
        "regions read the text alone", "risam", ("model.fusion.vision_guided_reads=text",)
    ),
    "no_identity": Variant(
        "no branch starts as an identity", "risam", ("model.fusion.identity_start=none",)
    ),
    "decoder_both": Variant(
        "the decoder reads both too", "risam", ("model.fusion.decoder_reads=both",)
    ),
    "temperature": Variant(
        "Language-Guided Attention has its own temperature",
        "risam",
        ("model.fusion.own_temperature=true",),
    ),
    "last": Variant(
        "Language-Guided Attention in the last block alone",
        "risam",
        ("model.fusion.language_blocks=last",),
    ),
}
"""The paper's parts and the rivals first, then forms of the block."""
PARTS = tuple(VARIANTS)[:10]
REPEATED = ("risam", "sam", "cris", "rela")
FORMS = ("words", "text", "no_identity")


@dataclass(frozen=True)
class Budget:
    """How long and on what every run trains.

    Attributes:
        steps: of the schedule; images: of a step, with eight expressions each.
        until: the step at which a run is cut, to go on another time; None runs to its end.
        encoder: the model folder or checkpoint that the image encoder starts from.
        limit: expressions of each family that a finished run is scored on.
        precision: of the training; machine: that does it, in words.
    """

    steps: int
    images: int
    until: int | None
    encoder: str
    limit: int
    precision: str
    machine: str

    @property
    def name(self) -> str:
        """Of the folder of this budget's runs."""
        return f"{self.steps}x{self.images}"


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
    """Trains and evaluates what is not there yet, writes the results and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--encoder", help="model folder or checkpoint of the image encoder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images", type=int, default=16, help="of a step")
    parser.add_argument("--precision", default="bf16", help="of the training: fp32 or bf16")
    parser.add_argument("--until", type=int, help="cut each run at this step")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3, help="of RISAM and its rivals")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--all-seeds", action="store_true", help="as many of every variant")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--limit", type=int, default=240, help="expressions of a family")
    parser.add_argument("--table", action="store_true", help="train nothing")
    here = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    parser.add_argument("--machine", default=here, help="that the runs were made on")
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks/results/ablations.json")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(VARIANTS)):
        parser.error(f"--only {unknown[0]}: use some of {', '.join(VARIANTS)}")
    if options.steps < 8:
        parser.error(f"--steps {options.steps}: a run is validated eight times, so 8 or more")
    encoder = options.encoder or str(options.output / "encoder" / "checkpoints" / "last.pt")
    o = options
    budget = Budget(o.steps, o.images, o.until, encoder, o.limit, o.precision, o.machine)
    runs = options.output / budget.name

    def one(planned: tuple[str, int]) -> None:
        run(*planned, runs, budget)
        keep(options.results, runs, budget)

    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            list(pool.map(one, planned(names, seeds, options.all_seeds)))
    keep(options.results, runs, budget)
    results = json.loads(options.results.read_text("utf-8"))
    picture = options.results.with_name(f"{options.results.stem}_{budget.name}.svg")
    picture.write_text(draw(results, budget), encoding="utf-8")
    print(
        table(answers(options.results), budget.name), curves(results), each_seed(results), sep="\n"
    )


def planned(names: Sequence[str], seeds: range, all_seeds: bool) -> list[tuple[str, int]]:
    """Variants and seeds, what the table needs most first."""
    first = [(name, seeds[0]) for name in names]
    more = [(name, seed) for seed in seeds[1:] for name in names if name in REPEATED]
    others = [(n, s) for s in seeds[1:] for n in names if n not in REPEATED]
    return first + more + (others if all_seeds else [])


def run(name: str, seed: int, output: Path, budget: Budget) -> None:
    """Trains one variant with one seed, and evaluates it on every family when it is done."""
    folder, variant = output / f"{name}-{seed}", VARIANTS[name]
    every = max(1, budget.steps // 8)
    changes = [
        *variant.changes,
        f"seed={seed}",
        f"output={folder}",
        f"init_encoder_from={budget.encoder}",
        f"precision={budget.precision}",
        "threads=1",
        "workers=0",
        "pictures=0",
        f"stages.0.steps={budget.steps}",
        f"stages.0.images_per_step={budget.images}",
        f"stages.0.warmup={budget.steps // 10}",
        f"validate_every={every}",
        f"checkpoint_every={every}",
    ]
    train = ["train", str(CONFIGS / f"{variant.config}.yaml"), "--resume"]
    for change in changes:
        train += ["--set", change]
    until = budget.until or budget.steps
    if validated(folder) < until:
        call(train, folder, until)
    if validated(folder) < budget.steps:
        return
    for family in FAMILIES:
        report = folder / f"eval-{family}"
        if not (report / "report.json").is_file():
            evaluate = ["eval", "--dataset", "refshapes", "--family", family, "--split", "val"]
            evaluate += ["--limit", str(budget.limit), "--model", str(folder / "best")]
            call([*evaluate, "--workers", "0", "-o", str(report), "--overwrite"], folder)


def validated(folder: Path) -> int:
    """The last step with a validation in a run's log, 0 where there is none."""
    return max((row["step"] for row in log(folder)), default=0)


def log(folder: Path) -> list[dict[str, Any]]:
    """A run's validations, in order."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text("utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may be half written
            rows.append(json.loads(line))
    return [row for row in rows if row["kind"] == "val"]


def call(arguments: Sequence[str], folder: Path, until: int | None = None) -> None:
    """Runs one command of risam, its messages in ``FOLDER.log``.

    Args:
        until: interrupt it when its log has a validation at this step or later. It then writes a
            checkpoint and ends with 130.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a", encoding="utf-8") as told:
        child = subprocess.Popen(
            [sys.executable, "-m", "risam_cli", *arguments],
            stderr=told,
            stdout=told,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        cut = False
        try:
            while child.poll() is None:
                time.sleep(2)
                if until is not None and not cut and validated(folder) >= until:
                    child.send_signal(signal.SIGINT)
                    cut = True
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                child.wait()
    if child.returncode not in ((0, 130) if cut else (0,)):
        raise SystemExit(f"{' '.join(arguments)}: exit {child.returncode}; see {told.name}")


# --- results --------------------------------------------------------------------------------------


def keep(results: Path, output: Path, budget: Budget) -> None:
    """Writes what the runs of a budget have come to beside what the file has of others."""
    known: dict[str, Any] = {}
    if results.is_file():
        known = {row["run"]: row for row in json.loads(results.read_text("utf-8"))["runs"]}
    answered = answers(results)
    for folder in sorted(output.glob("*-[0-9]*")):
        name, _, seed = folder.name.rpartition("-")
        if found := log(folder):
            row = summary(name, int(seed), found, budget)
            row["scores"] = None
            if (folder / f"eval-{FAMILIES[-1]}" / "report.json").is_file():
                answered[row["run"]] = read(folder)
                row["scores"] = scores(answered[row["run"]])
            known[row["run"]] = row
    text = json.dumps({"runs": [known[key] for key in sorted(known)]}, indent=1) + "\n"
    write_file(results, text)
    packed = {run: np.stack(astuple(found)).astype(np.float32) for run, found in answered.items()}
    write_file(results.with_suffix(".npz"), partial(save, packed))


def save(arrays: Mapping[str, NDArray[np.float32]], file: Path) -> None:
    """Writes arrays to a file under just that name."""
    with file.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def answers(results: Path) -> dict[str, Expressions]:
    """What the finished runs of the results answered, by ``BUDGET/VARIANT-SEED``."""
    file = results.with_suffix(".npz")
    if not file.is_file():
        return {}
    with np.load(file) as packed:
        return {
            run: Expressions(
                iou.astype(np.float64),
                clusters.astype(np.int64),
                family.astype(np.int64),
                empty.astype(bool),
                said_empty.astype(bool),
            )
            for run, (iou, clusters, family, empty, said_empty) in packed.items()
        }


def summary(
    name: str, seed: int, found: Sequence[Mapping[str, Any]], budget: Budget
) -> dict[str, Any]:
    """A run as the results hold it."""
    last = found[-1]
    return {
        "run": f"{budget.name}/{name}-{seed}",
        "variant": name,
        "label": VARIANTS[name].label if name in VARIANTS else name,
        "seed": seed,
        "steps": budget.steps,
        "images": budget.images,
        "precision": budget.precision,
        "encoder": Path(budget.encoder).name,
        "done": last["step"],
        "expressions": last["expressions"],
        "seconds": last["seconds"],
        "machine": budget.machine,
        "curve": [
            {
                "step": row["step"],
                "miou": round(float(np.mean([row[f"{f}.miou"] for f in FAMILIES])), 4),
                **{f: round(row[f"{f}.miou"], 4) for f in FAMILIES},
                "n_acc": row["grefshapes.n_acc"],
                "t_acc": row["grefshapes.t_acc"],
            }
            for row in found
        ],
    }


def scores(found: Expressions) -> dict[str, float]:
    """A finished run's figures by ``risam eval``, of all families' expressions together."""
    terms = figures(found)
    return {name: round(float(a.sum() / b.sum()), 4) for name, (a, b) in terms.items()}


def curves(results: Mapping[str, Any]) -> str:
    """Markdown: mean mIoU of the families' val (refshapesg's), at ten steps or fewer."""
    lines = []
    budgets = sorted({(row["steps"], row["images"]) for row in results["runs"]})
    for steps, images in budgets:
        rows = [r for r in results["runs"] if (r["steps"], r["images"]) == (steps, images)]
        every = sorted({point["step"] for row in rows for point in row["curve"]})
        at = every[:: -(-len(every) // 10)]
        title = f"{steps} steps of {images} images"
        lines += ["", f"| {title} | seed | " + " | ".join(f"step {s}" for s in at) + " |"]
        lines.append("|---" * (len(at) + 2) + "|")
        order = list(VARIANTS)
        for row in sorted(rows, key=lambda r: (order.index(r["variant"]), r["seed"])):
            by_step = {point["step"]: point for point in row["curve"]}
            cells = [
                f"{by_step[s]['miou']:.3f} ({by_step[s]['refshapesg']:.2f})" if s in by_step else ""
                for s in at
            ]
            lines.append(f"| {row['label']} | {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def each_seed(results: Mapping[str, Any]) -> str:
    """Markdown: each finished run's mIoU; in brackets its gain in the last quarter of the steps."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for row in results["runs"]:
        if not row["scores"]:
            continue
        at = {point["step"]: point["miou"] for point in row["curve"]}
        every = max(1, row["steps"] // 8)
        gain = at[8 * every] - at[6 * every]
        seeds = found.setdefault(f"{row['steps']} steps of {row['images']} images", {})
        cells = seeds.setdefault(row["seed"], {})
        cells[row["variant"]] = f"{row['scores']['mIoU']:.3f} ({gain:+.3f})"
    lines = []
    for title, seeds in found.items():
        lines += ["", f"| {title} | " + " | ".join(f"seed {seed}" for seed in sorted(seeds)) + " |"]
        lines.append("|---" * (len(seeds) + 1) + "|")
        for name, variant in VARIANTS.items():
            cells = [seeds[seed].get(name, "") for seed in sorted(seeds)]
            if any(cells):
                lines.append(f"| {variant.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Mapping[str, Any], budget: Budget) -> str:
    """The learning curves of a budget's runs, one for each seed, as SVG."""
    rows = [r for r in results["runs"] if r["run"].startswith(f"{budget.name}/")]

    def series(names: Sequence[str], figure: str) -> list[svg.Line]:
        return [
            svg.Line(
                VARIANTS[row["variant"]].label,
                [point["step"] for point in row["curve"]],
                [point[figure] for point in row["curve"]],
            )
            for name in names
            for row in rows
            if row["variant"] == name
        ]

    parts = ("risam", *(name for name in PARTS if name.startswith("no_")))
    panels = {
        "RISAM and its rivals, all families": series(REPEATED, "miou"),
        "Relations (refshapesg)": series(REPEATED, "refshapesg"),
        "Without each part, all families": series(parts, "miou"),
        "Forms of the block, refshapesg": series(
            ("risam", "plain", "no_language_guided", *FORMS), "refshapesg"
        ),
    }
    return charts(panels, "step", "mIoU while training")


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
        np.array([row["answered_none"] for row in rows], bool),
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


def table(answered: Mapping[str, Expressions], budget: str) -> str:
    """Markdown: each variant's figures, and its difference to RISAM with the same seeds."""
    found = {
        name: {
            int(run.rpartition("-")[2]): answered[run]
            for run in sorted(answered)
            if run.rpartition("-")[0] == f"{budget}/{name}"
        }
        for name in VARIANTS
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
        lines.append(
            f"| {VARIANTS[name].label} | {len(runs)} | " + " | ".join([*cells, change]) + " |"
        )
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
