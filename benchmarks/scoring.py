"""How fast masks are scored from their runs, against dense arrays, and in how much memory.

    python benchmarks/scoring.py [--pairs 2000] [--expressions 1000 50000]

Speed: the same pairs of 480x640 masks through three ways, one after the other in turns, medians of
the turns: from RLE as ``risam eval`` does it; dense numpy on arrays that are in memory already; and
dense numpy from RLE, which is what a dense scorer of RLE files has to do. Figures must be equal.

Memory, as Linux counts a process's peak: scoring alone, answers and truths passing by, which is the
table and nothing else; and ``risam eval --predictions`` as a whole, which also holds the records of
the annotation file, beside the sizes of the files it read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.masks import rle as masks
from risam_cli.metrics.figures import Tally, score_masks, summarize
from risam_cli.types import Rle

HEIGHT, WIDTH = 480, 640
PER_IMAGE = 5
Pair = tuple[Rle, Rle]


def blob(rng: np.random.Generator) -> NDArray[np.bool_]:
    """Some overlapping ellipses with a rough edge: about as many runs as a COCO object."""
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    centre = rng.integers((80, 60), (WIDTH - 80, HEIGHT - 60))
    for _ in range(4):
        x, y = centre + rng.integers(-50, 50, 2)
        axes = tuple(int(a) for a in rng.integers(10, 90, 2))
        angle = float(rng.integers(0, 180))
        cv2.ellipse(canvas, (int(x), int(y)), axes, angle, 0, 360, 1, -1)
    edge = canvas ^ cv2.erode(canvas, np.ones((3, 3), np.uint8))
    canvas[(edge > 0) & (rng.random(canvas.shape) < 0.3)] = 0
    return canvas.astype(bool)


def make_pairs(number: int) -> list[Pair]:
    """Answers and truths; the answer is the truth moved a little."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(number):
        truth = blob(rng)
        shift = tuple(int(s) for s in rng.integers(-12, 12, 2))
        pairs.append((masks.encode(np.roll(truth, shift, (0, 1))), masks.encode(truth)))
    return pairs


def from_runs(pairs: list[Pair]) -> float:
    """The mIoU of pairs, as ``risam eval`` computes it."""
    tally = Tally()
    for number, (answer, truth) in enumerate(pairs):
        tally.add(score_masks(str(number), str(number // PER_IMAGE), answer, truth))
    return summarize(tally)["miou"]


def dense(arrays: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> float:
    """The mIoU of dense pairs, as most repositories compute it."""
    ious = []
    for answer, truth in arrays:
        intersection = np.logical_and(answer, truth).sum()
        union = np.logical_or(answer, truth).sum()
        ious.append(intersection / union if union else 1.0)
    return float(np.mean(ious))


def dense_from_runs(pairs: list[Pair]) -> float:
    """The same where masks come as RLE: each is unpacked first."""
    ious = []
    for answer, truth in pairs:
        a, b = masks.decode(answer), masks.decode(truth)
        union = np.logical_or(a, b).sum()
        ious.append(np.logical_and(a, b).sum() / union if union else 1.0)
    return float(np.mean(ious))


def measure_speed(number: int, turns: int = 5) -> None:
    """Print expressions a second of each way, medians of turns."""
    pairs = make_pairs(number)
    arrays = [(masks.decode(a), masks.decode(b)) for a, b in pairs]
    runs = statistics.mean(len(rle["counts"]) for pair in pairs for rle in pair)
    ways: dict[str, Callable[[], float]] = {
        "from RLE (risam)": lambda: from_runs(pairs),
        "dense numpy, arrays in memory": lambda: dense(arrays),
        "dense numpy, from RLE": lambda: dense_from_runs(pairs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, float] = {}
    for _ in range(turns):
        for name, way in ways.items():
            started = time.process_time()
            values[name] = way()
            seconds[name].append(time.process_time() - started)
    print(f"{number} pairs of {HEIGHT}x{WIDTH}, {runs:.0f} characters of RLE on average")
    for name, taken in seconds.items():
        rate = number / statistics.median(taken)
        print(f"  {name:<30} {rate:>9.0f} expressions/s of CPU time   mIoU {values[name]:.12f}")


def write_data(folder: Path, number: int) -> None:
    """A COCO-style data set of ``number`` expressions and its predictions."""
    pairs = make_pairs(200)
    images, annotations, expressions = [], [], []
    with (folder / "predictions.jsonl").open("w") as stream:
        for k in range(number):
            image = k // PER_IMAGE
            answer, truth = pairs[k % len(pairs)]
            if k % PER_IMAGE == 0:
                size = {"height": HEIGHT, "width": WIDTH}
                images.append({"id": image, "file_name": f"{image}.jpg", **size})
            annotations.append({"id": k, "image_id": image, "segmentation": truth})
            expressions.append({"id": k, "image_id": image, "ann_ids": [k], "text": f"thing {k}"})
            record = {"id": str(k), "image": f"{image}.jpg", "expression": f"thing {k}"}
            stream.write(json.dumps({**record, "segmentation": answer, "score": 0.5}) + "\n")
    content = {"images": images, "annotations": annotations, "expressions": expressions}
    (folder / "instances.json").write_text(json.dumps(content))


def measure_memory(numbers: list[int]) -> None:
    """Print the peak memory of scoring data sets of these sizes, each in its own process."""
    print("memory of scoring alone")
    for number in numbers:
        print(f"  {number:>6} expressions: {_child('--score', str(number))}")
    print("memory of `risam eval --predictions`")
    for number in numbers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder, number)
            said = _child("--evaluate", name)
            sizes = [
                (folder / f).stat().st_size / 1e6 for f in ("instances.json", "predictions.jsonl")
            ]
        print(
            f"  {number:>6} expressions: {said}"
            f" (annotations {sizes[0]:.1f} MB, predictions {sizes[1]:.1f} MB)"
        )


def _child(*args: str) -> str:
    command = [sys.executable, __file__, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def evaluate(folder: Path) -> None:
    """In the child: evaluate and print peak memory and time."""
    from risam_cli.cli import main

    started = time.process_time()
    args = ["--dataset", "coco", "--root", folder, "--predictions", folder, "-o", folder / "out"]
    code = main(["eval", "-q", *map(str, args)])
    if code:
        sys.exit(code)
    print(f"{_peak()}, {time.process_time() - started:.1f} s of CPU time, whole report")


def score_stream(number: int) -> None:
    """In the child: score this many expressions that come and go, and print peak memory."""
    from risam_cli.data.readers.predictions import Answer
    from risam_cli.evaluation.scoring import Answered, Scorer
    from risam_cli.metrics.protocols import get_protocol
    from risam_cli.types import Expression, Sample

    pairs = make_pairs(20)
    scorer = Scorer(get_protocol("native"), lambda line: None)
    started = time.process_time()
    for k in range(number):
        answer, truth = pairs[k % len(pairs)]
        image = f"{k // PER_IMAGE}.jpg"
        asked = Expression(str(k), f"thing {k}", {**truth}, False, {"referents": 1})
        sample = Sample(image, Path(image), (asked,), (HEIGHT, WIDTH))
        scorer.add(Answered(sample, (Answer({**answer}, False, 0.5, 0.5),)))
    scorer.finish()
    rate = number / (time.process_time() - started)
    print(f"{_peak()}, {rate:.0f} expressions/s with slices, rows and cases")


def _peak() -> str:
    """Peak memory of this process. Not ru_maxrss: that of a child begins at its parent's."""
    status = Path("/proc/self/status").read_text()
    return f"peak {int(status.partition('VmHWM:')[2].split()[0]) / 1024:.0f} MiB"


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--expressions", type=int, nargs="*", default=[1, 1000, 50000])
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--score", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.evaluate:
        evaluate(options.evaluate)
        return
    if options.score:
        score_stream(options.score)
        return
    measure_speed(options.pairs)
    measure_memory(options.expressions)


if __name__ == "__main__":
    main()
