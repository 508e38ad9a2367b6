"""How fast masks are exported, and in how much memory, for every format.

    python benchmarks/export.py [--masks 10000] [--formats coco yolo ...]

The masks are 480x640 (height x width), some overlapping ellipses with a rough edge and at times a
hole, five an image. Every format is a process of its own, run on a tenth of the records and on all
of them: masks a second by the clock and by the processor's time (the fairer one on a machine that
has other work), and the peak resident memory of both, as the kernel counts it.

PNG: the same masks are encoded by the project's writer and by Pillow with its defaults, in turns.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.commands.export_masks import FORMATS
from risam_cli.drawing.png import encode_mask
from risam_cli.masks import rle as masks

HEIGHT, WIDTH = 480, 640
PER_IMAGE = 5
CHILD = """
import resource, sys, time
from risam_cli.cli import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
scale = 1 if sys.platform == "darwin" else 1024
print(used.ru_utime + used.ru_stime, used.ru_maxrss * scale)
sys.exit(code)
"""


def blob(rng: np.random.Generator) -> NDArray[np.bool_]:
    """Overlapping ellipses with a rough edge; one in four has a hole."""
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    center = rng.integers([80, 60], [WIDTH - 80, HEIGHT - 60])
    for _ in range(4):
        place = (center + rng.integers(-40, 41, 2)).tolist()
        axes = rng.integers(10, 70, 2).tolist()
        cv2.ellipse(canvas, place, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
    if rng.random() < 0.25:
        cv2.circle(canvas, center.tolist(), 12, 0, -1)
    rough = cv2.GaussianBlur(rng.random((HEIGHT // 4, WIDTH // 4)).astype(np.float32), (0, 0), 1)
    rough = cv2.resize(rough, (WIDTH, HEIGHT)) - 0.5
    soft = cv2.GaussianBlur(canvas, (0, 0), 3).astype(np.float32) / 255
    return np.asarray(soft + rough > 0.5)


def write_records(folder: Path, count: int) -> tuple[Path, Path]:
    """All records, and the first tenth of them."""
    rng = np.random.default_rng(0)
    pool = [masks.encode(blob(rng)) for _ in range(min(count, 500))]
    lines = []
    for k in range(count):
        row = {
            "id": str(k),
            "image": f"{k // PER_IMAGE}.jpg",
            "expression": f"thing {k % 40}",
            "height": HEIGHT,
            "width": WIDTH,
            "segmentation": pool[k % len(pool)],
            "score": 0.5,
        }
        lines.append(json.dumps(row) + "\n")
    whole, tenth = folder / "whole.jsonl", folder / "tenth.jsonl"
    whole.write_text("".join(lines))
    tenth.write_text("".join(lines[: count // 10]))
    picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    first = folder / "0.jpg"
    Image.fromarray(cv2.GaussianBlur(picture, (0, 0), 3)).save(first)
    for k in range(1, -(-count // PER_IMAGE)):
        (folder / f"{k}.jpg").hardlink_to(first)
    return whole, tenth


def run(source: Path, output: Path, options: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of the processor, peak memory in MB, start-up included."""
    command = [sys.executable, "-c", CHILD, "export-masks", str(source), "-o", str(output), "-q"]
    started = time.perf_counter()
    done = subprocess.run([*command, *options], capture_output=True, encoding="utf-8", check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    busy, peak = (float(value) for value in done.stdout.split()[-2:])
    return wall, busy, peak / 1e6


def measure_formats(folder: Path, count: int, wanted: list[str]) -> None:
    """One row a format."""
    whole, tenth = write_records(folder, count)
    size = whole.stat().st_size / 1e6
    print(f"{count} masks of {WIDTH}x{HEIGHT}, {PER_IMAGE} an image, {size:.1f} MB of records")
    print(f"{'format':22s} {'masks/s':>8s} {'masks/CPU s':>12s} {'MB, tenth':>10s} {'MB, all':>8s}")
    variants = {kind: ["--to", kind] for kind in FORMATS}
    variants["labelme --shapes mask"] = ["--to", "labelme", "--shapes", "mask"]
    variants["cvat --shapes mask"] = ["--to", "cvat", "--shapes", "mask"]
    variants["png --style indexed"] = ["--to", "png", "--style", "indexed"]
    for name, options in variants.items():
        if wanted and name.split()[0] not in wanted:
            continue
        options = [*options, "--image-root", str(folder)]
        small = run(tenth, folder / f"small {name}", options)
        large = run(whole, folder / f"large {name}", options)
        # The difference leaves the start of Python and the imports out.
        extra = count - count // 10
        wall, busy = (large[k] - small[k] for k in (0, 1))
        print(
            f"{name:22s} {extra / wall:8.0f} {extra / busy:12.0f} {small[2]:10.0f} {large[2]:8.0f}",
            flush=True,
        )


def measure_png(count: int) -> None:
    """The project's PNG encoder and Pillow's, in turns over the same masks."""
    rng = np.random.default_rng(1)
    pool = [blob(rng) for _ in range(50)]

    def by_pillow(mask: NDArray[np.bool_]) -> bytes:
        file = io.BytesIO()
        Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(file, "PNG")
        return file.getvalue()

    ways: dict[str, Callable[[NDArray[np.bool_]], bytes]] = {
        "risam": encode_mask,
        "Pillow, defaults": by_pillow,
    }
    spent = dict.fromkeys(ways, 0.0)
    sizes = dict.fromkeys(ways, 0)
    for k in range(count):
        for name, encode in ways.items():
            started = time.process_time()
            sizes[name] += len(encode(pool[k % len(pool)]))
            spent[name] += time.process_time() - started
    print(f"\nPNG, {count} masks in turns")
    for name in ways:
        rate, size = count / spent[name], sizes[name] / count
        print(f"{name:22s} {rate:8.0f} masks/CPU s, {size:6.0f} bytes each")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--masks", type=int, default=10_000)
    parser.add_argument("--formats", nargs="*", default=[], choices=FORMATS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure_formats(Path(folder), options.masks, options.formats)
    measure_png(min(options.masks, 2000))


if __name__ == "__main__":
    main()
