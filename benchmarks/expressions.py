"""Time and memory of 1, 4, 16 and 64 expressions about one image, which is encoded once."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Options, Row, Times, ratio, run_child
from models import model_folder, photos

COUNTS = (1, 4, 16, 64)
_ONE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from common import in_turns, peak_bytes
from models import texts
from risam_cli.segmenters.resolve import load_segmenter
from risam_cli.data.images.images import read_for_encoder
from risam_cli.inference.compute import Compute, ComputeSettings
from risam_cli.inference.compute import Job
source, photo, device = sys.argv[2], Path(sys.argv[3]), torch.device(sys.argv[4])
counts, repeats = json.loads(sys.argv[5]), int(sys.argv[6])
gpu = device.type == "cuda"
precision = torch.bfloat16 if gpu else torch.float32
model = load_segmenter(None if source == "-" else source, device=device, precision=precision)
image = read_for_encoder(photo, model.frames)
def ask(count):
    # Another one each time: the text features of known expressions would be kept.
    compute = Compute(model, ComputeSettings(device, 0.5, 1, expressions=32))
    answers = list(compute.run([Job(image, texts(count))]))
    assert len(answers) == count and not any(answer.error for answer in answers)
def at(count):
    return lambda: ask(count)
times = in_turns({str(count): at(count) for count in counts}, repeats, warm_up=repeats > 1)
peak = torch.cuda.max_memory_allocated() if gpu else peak_bytes()
print(json.dumps({"peak": peak, "times": {k: [t.wall, t.cpu] for k, t in times.items()}}))
"""


def measure(options: Options) -> list[Row]:
    """The bundled model and ViT-B with random weights, on a real photo."""
    rows: list[Row] = []
    photo = photos(1)[0]
    with tempfile.TemporaryDirectory() as made:
        rows += scale("bundled", "-", photo, options.repeats, options)
        if not options.quick:
            model = model_folder(Path(made, "model"), "vit_b")
            rows += scale("ViT-B", str(model), photo, options.repeats, options)
    return rows


def scale(name: str, model: str, photo: Path, repeats: int, options: Options) -> list[Row]:
    """Times in turns in one process; peaks each in a process of its own."""
    by = "wall" if options.device == "cuda" else "cpu"
    timed = child(model, photo, COUNTS, repeats, options)
    times = {count: Times(*timed["times"][str(count)]) for count in COUNTS}
    rows = [times[count].row(f"{name}: {count} expressions", by=by) for count in COUNTS]
    spent = {count: getattr(times[count], by) for count in COUNTS}
    for count, wanted in ((4, ""), (16, "<= 1.3" if name == "ViT-B" else ""), (64, "")):
        rows.append(ratio(f"{name}: {count} against 1", spent[count], spent[1], wanted))
    peaks = {count: child(model, photo, (count,), 1, options)["peak"] for count in COUNTS}
    for count in COUNTS:
        rows.append(Row(f"{name}: {count} expressions, peak", peaks[count] / (1 << 20), "MB"))
    return rows


def child(
    model: str, photo: Path, counts: tuple[int, ...], repeats: int, options: Options
) -> dict[str, Any]:
    """One process that asks so many expressions, so many times."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", _ONE, here, model, str(photo), options.device]
    found: dict[str, Any] = run_child([*command, str(list(counts)), str(repeats)]).last_json()
    return found
