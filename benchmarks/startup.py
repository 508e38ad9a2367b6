"""From command to first mask with the bundled model, in parts; and what its BERT saves of it.

Seconds are of processors, since importing is work and not waiting; the clock's stand beside.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from common import Child, Options, Row, ratio, run_child
from models import checked, draw, risam

_PARTS = """
import json, sys, time
def cpu():
    return time.process_time()
marks = [("python", cpu())]
import torch
marks.append(("import torch", cpu()))
import risam_cli.segmenters.resolve, risam_cli.segmenters.risam, risam_cli.runs.run
marks.append(("import risam", cpu()))
if sys.argv[1] == "transformers":
    from transformers import AutoConfig, BertModel
    marks.append(("import transformers", cpu()))
model = risam_cli.segmenters.resolve.load_segmenter(
    None, device=torch.device("cpu"), precision=torch.float32
)
marks.append(("load the model", cpu()))
from risam_cli.data.images.images import read_for_encoder
from risam_cli.inference.compute import Compute, ComputeSettings
from risam_cli.inference.compute import Job
from pathlib import Path
settings = ComputeSettings(torch.device("cpu"), 0.5, 1)
image = read_for_encoder(Path(sys.argv[2]), model.frames)
list(Compute(model, settings).run([Job(image, ["the red circle"])]))
marks.append(("first mask", cpu()))
parts, before = {}, 0.0
for name, now in marks:
    parts[name], before = now - before, now
print(json.dumps(parts))
"""


def measure(options: Options) -> list[Row]:
    """``--help``, a whole ``predict`` of one image, its parts, and the same with transformers."""
    helps: list[Child] = []
    wholes: list[Child] = []
    parts: dict[str, list[dict[str, float]]] = {"own": [], "transformers": []}
    with tempfile.TemporaryDirectory() as made:
        picture = next(draw(Path(made, "in"), 1, 480, 640).iterdir())
        for turn in range(1 if options.quick else options.repeats + 1):
            helps.append(checked(risam("--help", threads=1)))
            words = ["predict", picture, "-e", "the red circle", "-o", Path(made, f"o{turn}")]
            wholes.append(checked(risam(*words, "--device", "cpu", threads=1)))
            for way, found in parts.items():
                command = [sys.executable, "-c", _PARTS, way, str(picture)]
                found.append(run_child(command, env={"OMP_NUM_THREADS": "1"}).last_json())
    if not options.quick:  # the first round fills the system's cache of files
        helps, wholes = helps[1:], wholes[1:]
        parts = {way: found[1:] for way, found in parts.items()}
    rows = [_median("risam --help", [c.cpu for c in helps], [c.wall for c in helps])]
    rows.append(
        _median("risam predict, one image", [c.cpu for c in wholes], [c.wall for c in wholes])
    )
    for name in parts["own"][0]:
        rows.append(_median(f"  {name}", [one[name] for one in parts["own"]]))
    rows.append(
        _median("importing transformers", [p["import transformers"] for p in parts["transformers"]])
    )
    sums = {way: [sum(one.values()) for one in found] for way, found in parts.items()}
    rows.append(
        ratio("to the first mask: with transformers / without", sums["transformers"], sums["own"])
    )
    return rows


def _median(name: str, cpu: list[float], wall: list[float] | None = None) -> Row:
    note = f"by the clock {statistics.median(wall):.2f} s" if wall else ""
    return Row(name, statistics.median(cpu), "s of a core", (min(cpu), max(cpu)), note)
