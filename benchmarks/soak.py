"""Many small images through predict, one in twenty of them broken, in twenty ways.

    python benchmarks/soak.py [--images 20000] [--workers 0] [--model small] [--keep FOLDER]

Every broken image must be one row in failures.jsonl and every other one record, counted by the way
in which it is broken. While the run goes on, its resident memory and its open files are looked at
twice a second: memory must not grow from the second quarter of the run to the last by more than
5 %, nor must open files. ``small`` is a network of random weights for 64x64 pixels, so that the run
is one of reading and writing; name a model folder, or a bundled model, for another.

Prints JSON; exit code 1 where something of this does not hold.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EVERY = 20  # of so many images one is broken
GROWTH = 0.05  # of memory, over the later part of the run
_LOOKS = 0.5  # seconds between two looks
_SMALL: dict[str, Any] = {
    "preset": "tiny",
    "image_encoder": {
        "image_size": 64, "dim": 48, "depth": 3, "heads": 3, "out_dim": 32, "window": 2,
        "global_blocks": [2], "taps": [0, 1, 2], "stem": [8, 16, 24],
    },
    "text_encoder": {"vocabulary": "refshapes", "hidden": 32, "layers": 1, "heads": 2},
    "fusion": {"dim": 32, "heads": 2, "blocks": 1, "ffn_dim": 48},
    "decoder": {"heads": 2, "layers": 1, "ffn_dim": 48, "mask_dim": 8},
}  # fmt: skip


# --- images ---------------------------------------------------------------------------------------


def picture(number: int, kind: str = "PNG", side: int = 0) -> bytes:
    """A small image file; its size and content differ from number to number."""
    rng = np.random.default_rng(number)
    height, width = side or 24 + number % 25, side or 32 + number % 17
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def _cut(kind: str) -> Callable[[int], bytes]:
    def make(number: int) -> bytes:
        whole = picture(number, kind, 48)
        return whole[: len(whole) // 2]

    return make


def _spoilt_png(number: int) -> bytes:
    whole = bytearray(picture(number, side=48))
    start = whole.index(b"IDAT") + 4
    whole[start : start + 4] = b"\xff\xff\xff\xff"  # no stream that zlib knows
    return bytes(whole)


def _boastful_png(number: int) -> bytes:
    whole = bytearray(picture(number))
    start = whole.index(b"IHDR")
    whole[start + 4 : start + 12] = (60_000).to_bytes(4, "big") * 2
    checksum = zlib.crc32(whole[start : start + 17])
    whole[start + 17 : start + 21] = checksum.to_bytes(4, "big")
    return bytes(whole)


def _zip(number: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", picture(number))
    return file.getvalue()


def _npy(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((8, 8, 3), np.uint8))
    return file.getvalue()


WAYS: dict[str, Callable[[int], bytes | None]] = {
    "empty": lambda number: b"",
    "zeros": lambda number: bytes(500),
    "noise": lambda number: np.random.default_rng(number).bytes(500),
    "text": lambda number: b"not an image\n" * 9,
    "html": lambda number: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "pdf": lambda number: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(300),
    "svg": lambda number: b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="9"/></svg>',
    "zip": _zip,
    "npy": _npy,
    "heic": lambda number: b"\0\0\0\x18ftypheic" + bytes(400),
    "jpeg cut": _cut("JPEG"),
    "jpeg header only": lambda number: picture(number, "JPEG")[:20],
    "png cut": _cut("PNG"),
    "png spoilt": _spoilt_png,
    "png of 60000x60000": _boastful_png,
    "gif cut": _cut("GIF"),
    "bmp cut": _cut("BMP"),
    "tiff cut": _cut("TIFF"),
    "webp cut": _cut("WEBP"),
    "gone": lambda number: None,
}
"""How an image is broken: what its file holds; None for a link that leads nowhere."""


def write_images(folder: Path, count: int) -> dict[str, int]:
    """Writes images and their manifest; gives how many there are of each way."""
    ways, of_way = list(WAYS), Counter[str]()
    with (folder / "list.jsonl").open("w", encoding="utf-8") as manifest:
        for number in range(count):
            way = ways[number // EVERY % len(ways)] if number % EVERY == EVERY - 1 else "good"
            name = f"{number // 1000:03}/{number:06}.{'jpg' if number % 3 else 'png'}"
            path = folder / name
            if number % 1000 == 0:
                path.parent.mkdir()
            kind = "JPEG" if number % 3 else "PNG"
            data = picture(number, kind) if way == "good" else WAYS[way](number)
            if data is None:
                path.symlink_to("nowhere")
            else:
                path.write_bytes(data)
            of_way[way] += 1
            row = {"image": name, "expression": "the red circle", "id": f"{way}/{number}"}
            manifest.write(json.dumps(row) + "\n")
    return dict(of_way)


def small_model(folder: Path) -> Path:
    """Writes a model folder of random weights."""
    import torch

    from risam_cli.settings.load import check
    from risam_cli.settings.model import ModelSettings
    from risam_cli.weights.build import build_model, new_text_parts
    from risam_cli.weights.folder import write_model_folder

    settings = check(ModelSettings, _SMALL, "soak")
    torch.manual_seed(0)
    text = new_text_parts(settings.text_encoder)
    weights = build_model(settings, text).state_dict()
    plain = settings.model_dump()
    write_model_folder(
        folder,
        weights,
        plain,
        text.config.to_dict(),
        text.tokenizer.to_json(),
        {"name": "small"},
        "",
    )
    return folder


# --- the run --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """What was seen of a process while it ran: seconds, bytes resident, open files, records."""

    looks: list[tuple[float, int, int, int]] = field(default_factory=list)

    def look(self, pid: int, began: float, out: Path) -> None:
        """One look; none where the process has just ended."""
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{pid}/fd"))
            size = (out / "ledger.jsonl").stat().st_size
        except OSError:
            return
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        self.looks.append((time.monotonic() - began, memory, files, size))

    def quarter(self, number: int, column: int) -> float:
        """The median of a column over a quarter of the run, by what was done, from 0."""
        whole = self.looks[-1][3]
        low, high = whole * number / 4, whole * (number + 1) / 4
        return statistics.median(look[column] for look in self.looks if low <= look[3] <= high)


def soak(folder: Path, images: int, workers: int, model: str) -> dict[str, Any]:
    """Writes the images, runs, and gives what was found; ``wrong`` says what does not hold."""
    (folder / "in").mkdir()
    of_way = write_images(folder / "in", images)
    named = str(small_model(folder / "model")) if model == "small" else model
    out = folder / "out"
    command = [
        sys.executable, "-m", "risam_cli", "-q", "predict", str(folder / "in" / "list.jsonl"),
        "-o", str(out), "--model", named, "--device", "cpu", "--workers", str(workers),
    ]  # fmt: skip
    watch, began = Watch(), time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
        while process.poll() is None:
            watch.look(process.pid, began, out)
            time.sleep(_LOOKS)
    seconds = time.monotonic() - began
    if process.returncode != 3:
        said = (folder / "log").read_text(errors="replace").strip()[-500:]
        return {"wrong": [f"exit code {process.returncode}: {said}"]}
    memory = [watch.quarter(number, 1) / 2**20 for number in range(4)]
    files = [watch.quarter(number, 2) for number in range(4)]
    wrong = list(_miscounted(out, of_way))
    if memory[3] > memory[1] * (1 + GROWTH):
        wrong.append(f"memory grew from {memory[1]:.0f} to {memory[3]:.0f} MiB")
    if files[3] > files[1]:
        wrong.append(f"open files grew from {files[1]} to {files[3]}")
    return {
        "images": images,
        "workers": workers,
        "model": model,
        "broken, by way": {way: count for way, count in of_way.items() if way != "good"},
        "resident MiB, median of each quarter": [round(one, 1) for one in memory],
        "open files, median of each quarter": files,
        "open files, most": max(look[2] for look in watch.looks),
        "looks": len(watch.looks),
        "seconds": round(seconds, 1),
        "load": list(os.getloadavg()),
        "wrong": wrong,
    }


def _miscounted(out: Path, of_way: dict[str, int]) -> Sequence[str]:
    """Where records or failures are not what was put in, by way; and what is there twice."""
    found: dict[str, Counter[str]] = {}
    ids = Counter[str]()
    for name in ("predictions.jsonl", "failures.jsonl"):
        with (out / name).open(encoding="utf-8") as lines:
            own = [json.loads(line)["id"] for line in lines]
        ids.update(own)
        found[name] = Counter(one.partition("/")[0] for one in own)
    wrong = [f"{one} is there {number} times" for one, number in ids.items() if number > 1]
    for way, count in of_way.items():
        wanted = {"predictions.jsonl": count, "failures.jsonl": 0}
        if way != "good":
            wanted = {"predictions.jsonl": 0, "failures.jsonl": count}
        for name, number in wanted.items():
            if found[name][way] != number:
                wrong.append(f"{way}: {found[name][way]} in {name}, not {number}")
    masks = sum(1 for path in (out / "masks").rglob("*.png"))
    if masks != of_way["good"]:
        wrong.append(f"{masks} masks, not {of_way['good']}")
    return wrong


def main() -> int:
    """Reads the arguments and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--model", default="small")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here and leave it")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True)
        report = soak(given.keep, given.images, given.workers, given.model)
    else:
        with tempfile.TemporaryDirectory(prefix="risam-soak-") as place:
            report = soak(Path(place), given.images, given.workers, given.model)
    print(json.dumps(report, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
