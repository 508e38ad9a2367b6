"""What the feature cache saves: a second ``risam eval`` with ViT-B, and training.

Weights are random, since only the work matters; photos are real ones with their own expressions.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import PHOTOS, Child, Options, Row, ratio, run_child
from models import checked, model_folder, risam

_ANNOTATIONS = PHOTOS.parent / "instances.json"


def measure(options: Options) -> list[Row]:
    """Evaluation and training, each without a cache, with an empty one and with a full one."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        preset = "tiny" if options.quick else "vit_b"
        model = model_folder(folder / "model", preset)
        count = 4 if options.quick else 6
        data = subset(folder / "data.json", count, each=2)
        rows = evaluation(folder, model, data, preset, options)
        rows += training(folder / "train-tiny", "tiny", 24, 40, options)
        if not options.quick:
            rows += training(folder / "train-vit_b", "vit_b", 2, 3, options)
    return rows


def subset(path: Path, images: int, each: int) -> Path:
    """The first photos with at most so many of their expressions, as COCO-style JSON."""
    whole = json.loads(_ANNOTATIONS.read_text(encoding="utf-8"))
    found: dict[int, list[Any]] = {}
    for one in whole["expressions"]:
        found.setdefault(one["image_id"], []).append(one)
    chosen = dict(list(found.items())[:images])
    whole["images"] = [one for one in whole["images"] if one["id"] in chosen]
    whole["annotations"] = [one for one in whole["annotations"] if one["image_id"] in chosen]
    whole["expressions"] = [one for asked in chosen.values() for one in asked[:each]]
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def evaluation(folder: Path, model: Path, data: Path, preset: str, options: Options) -> list[Row]:
    """Whole runs of ``risam eval``, start-up and reports included."""
    words = ["eval", "--dataset", "coco", "--root", data, "--images", PHOTOS, "--model", model]
    words += ["--device", options.device]
    runs: dict[str, list[Child]] = {"first": [], "second": []}
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    figures = set()
    size = 0
    for turn in range(1 if options.quick else min(2, options.repeats)):
        kept = folder / "cache"
        for way, found in runs.items():
            output = folder / f"{way}{turn}"
            found.append(checked(risam(*words, "--feature-cache", kept, "-o", output, "--json")))
            figures.add(found[-1].output)
            seconds[way].append(json.loads((output / "report.json").read_text())["timing"]["total"])
        size = sum(path.stat().st_size for path in kept.rglob("*.safetensors"))
        shutil.rmtree(kept)
    wanted = "" if options.quick else ">= 5"
    images = len(json.loads(data.read_text())["images"])
    name = f"eval, {preset}, {images} photos, 2 expressions each"
    rows = []
    for way, found in runs.items():
        cpu, wall = [one.cpu for one in found], [one.wall for one in found]
        note = f"by the clock {sorted(wall)[len(wall) // 2]:.1f} s"
        rows.append(
            Row(
                f"{name}: {way} run", sum(cpu) / len(cpu), "s of a core", (min(cpu), max(cpu)), note
            )
        )
    first, second = runs["first"], runs["second"]
    rows += [
        ratio(f"{name}: whole run, processor", [c.cpu for c in first], [c.cpu for c in second]),
        ratio(
            f"{name}: whole run, clock", [c.wall for c in first], [c.wall for c in second], wanted
        ),
        ratio(f"{name}: without start-up, clock", seconds["first"], seconds["second"], wanted),
        Row(f"{name}: cache", size / images / (1 << 20), "MB an image"),
        Row(f"{name}: kinds of figures", len(figures), "of 1", None, "equal to the byte", "<= 1"),
    ]
    return rows


_STEPS = """
import json, sys, time
from pathlib import Path
from risam_cli.settings.train import TrainSettings, check
from risam_cli.training.losses import ReferringTask
from risam_cli.training.loop import train
loss, spent = ReferringTask.loss, []
def timed(self, *args, **kwargs):
    spent.append(time.process_time())
    return loss(self, *args, **kwargs)
ReferringTask.loss = timed
train(check(TrainSettings, json.loads(Path(sys.argv[1]).read_text()), "benchmark"), resume=False)
print(json.dumps(spent))
"""


def training(folder: Path, preset: str, images: int, steps: int, options: Options) -> list[Row]:
    """Expressions a second of the loop's steps, by the run's own log."""
    folder.mkdir()
    each = 2 if preset == "vit_b" else 6
    scenes = {"dataset": "refshapes", "family": "mixed", "expressions_per_scene": each}
    settings: dict[str, Any] = {
        "name": "cache",
        "device": options.device,
        "precision": "fp32",
        "workers": 0,
        "model": {
            "preset": preset,
            "image_encoder": {"adapter_dim": 0},
            "text_encoder": {"vocabulary": "refshapes", "source": None},
        },
        "train": {**scenes, "scenes": images},
        "val": {"val": {**scenes, "split": "val", "scenes": 1}},
        "stages": [
            {
                "name": "fusion",
                "kind": "referring",
                "learning_rate": 1e-4,
                "warmup": 1,
                "steps": steps,
                "images_per_step": min(images, 8),
            }
        ],
        "log_every": 1,
        "validate_every": steps,
        "checkpoint_every": steps,
        "pictures": 0,
    }
    kept = {"feature_cache": {"folder": str(folder / "cache")}}
    rates: dict[str, list[float]] = {}
    repeats = 1 if options.quick or preset == "vit_b" else options.repeats
    for _ in range(repeats):
        for way, more in {"uncached": {}, "empty cache": kept, "cached": kept}.items():
            rates.setdefault(way, []).append(rate(folder, {**settings, **more}, each))
        shutil.rmtree(folder / "cache")
    rows = []
    for way in ("uncached", "cached"):
        found = sorted(rates[way])
        middle = found[len(found) // 2]
        rows.append(
            Row(
                f"training, {preset}: {way}",
                middle,
                "expressions a s of a core",
                (found[0], found[-1]),
            )
        )
    rows.append(ratio(f"training, {preset}: cached / uncached", rates["cached"], rates["uncached"]))
    return rows


def rate(folder: Path, settings: Mapping[str, Any], each: int) -> float:
    """Expressions a second of a processor, from the second step's beginning to the last one's."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    path = folder / "settings.json"
    path.write_text(json.dumps({**settings, "output": str(output)}), encoding="utf-8")
    child = run_child([sys.executable, "-c", _STEPS, str(path)])
    spent = child.last_json()
    images = settings["stages"][0]["images_per_step"]
    return (len(spent) - 2) * images * each / (spent[-1] - spent[1])
