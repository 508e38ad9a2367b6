"""Images a second of ``risam predict`` against the bare model on tensors in memory.

Both run with the same number of the model's threads, in turns. On a machine of two cores, one
thread leaves a core to what surrounds the network, and two leave none: both are measured. The
start-up of a process is left out of both, for it does not grow with the images; what is written,
RLE, PNG and the records synced to the disk, is in.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Options, Row, ratio, run_child
from models import checked, draw, model_folder, risam

_BARE = """
import json, sys, time
import torch
from pathlib import Path
from risam_cli.build import load_model
from risam_cli.data.images import read_for_encoder
from risam_cli.transforms import to_pixels
device, count, batch = torch.device(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
bf16 = device.type == "cuda"
precision = torch.bfloat16 if bf16 else torch.float32
source = None if sys.argv[1] == "-" else sys.argv[1]
loaded = load_model(source, device=device, precision=precision)
paths = sorted(Path(sys.argv[5]).iterdir())[:32]
rgb = [read_for_encoder(path, loaded.image_size).rgb for path in paths]
ready = [to_pixels(rgb[k : k + batch], loaded.image_size, device) for k in range(0, 32, batch)]
tokens = loaded.tokenizer.encode([sys.argv[6]])
model = loaded.model
ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
def step(pixels):
    rows = torch.arange(len(pixels), device=device)
    text = model.encode_text(ids.expand(len(rows), -1), mask.expand(len(rows), -1))
    return model.decode(model.encode_image(pixels), text, rows).mask_logits
def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()
with torch.inference_mode():
    for pixels in ready[:2]:
        step(pixels)
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    done = 0
    while done < count:
        pixels = ready[done // batch % len(ready)]
        step(pixels)
        done += len(pixels)
    wait()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({"wall": wall / done, "cpu": cpu / done}))
"""


def measure(options: Options) -> list[Row]:
    """Rates and their ratio, with the bundled model on a CPU and ViT-B on a GPU."""
    count = 64 if options.quick else 512
    gpu = options.device == "cuda"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        folder = draw(Path(made, "pictures"), count, 480, 640)
        model = model_folder(Path(made, "model"), "vit_b") if gpu else None
        for threads in (1,) if gpu else (1, 2):
            rows += compare(Path(made), folder, model, count, threads, options)
    return rows


def compare(
    made: Path, folder: Path, model: Path | None, count: int, threads: int, options: Options
) -> list[Row]:
    """One number of threads."""
    batch = 8 if options.device == "cuda" else 1
    asked = "the red circle"
    bare: list[dict[str, float]] = []
    whole: list[dict[str, Any]] = []
    for turn in range(1 if options.quick else options.repeats):
        command = [sys.executable, "-c", _BARE, str(model or "-"), options.device]
        command += [str(count), str(batch), str(folder), asked]
        bare.append(run_child(command, env={"OMP_NUM_THREADS": str(threads)}).last_json())
        output = made / f"o{threads}-{turn}"
        words = ["predict", folder, "-e", asked, "-o", output, "--device", options.device]
        words += ["--batch-size", batch, *(["--model", model] if model else [])]
        child = checked(risam(*words, threads=threads))
        seconds = json.loads((output / "run.json").read_text())["seconds"]
        parts = ("startup", "import_torch", "load_model")
        wall = seconds["total"] - sum(seconds[part] for part in parts)
        whole.append({"wall": wall / count, "cpu": child.cpu / count, "parts": seconds})
    name = f"{count} images, {threads} threads of the model"
    rates = [1 / one["wall"] for one in bare], [1 / one["wall"] for one in whole]
    rows = [
        _rate(f"{name}: bare model", rates[0]),
        _rate(f"{name}: risam predict", rates[1]),
        ratio(f"{name}: predict / bare", rates[1], rates[0], ">= 0.9"),
    ]
    for part in ("load_images", "encode", "decode_masks", "finish_masks", "write"):
        spent = [1000 * one["parts"][part] / count for one in whole]
        rows.append(
            Row(f"  {part}", statistics.median(spent), "ms an image", (min(spent), max(spent)))
        )
    cpu = [1000 * one["cpu"] for one in bare], [1000 * one["cpu"] for one in whole]
    note = "of all threads; predict's with start-up"
    rows += [
        Row(f"{name}: processor, bare", statistics.median(cpu[0]), "ms an image", None, note),
        Row(f"{name}: processor, predict", statistics.median(cpu[1]), "ms an image", None, note),
    ]
    return rows


def _rate(name: str, rates: list[float]) -> Row:
    return Row(name, statistics.median(rates), "images/s", (min(rates), max(rates)))
