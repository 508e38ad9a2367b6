"""Images a second of ``risam predict`` against the bare model on tensors in memory.

Both are given the same number of torch's threads (``OMP_NUM_THREADS``), in turns: first one, which
leaves the other cores to what surrounds the network, then all. The bare model is torch as it comes,
all threads on one image after another; where there are several, also as many bare models side by
side as predict runs, which is what nothing that reads and writes as well can reach. The start-up of
a process is left out of all, for it does not grow with the images; what is written, RLE, PNG and
the records synced to the disk, is in.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Options, Row, ratio, run_child
from models import checked, draw, model_folder, parts_of, risam

_BARE = """
import json, sys, threading, time
import torch
from pathlib import Path
from risam_cli.data.images.frames import sam_frame
from risam_cli.weights.load import load_model
from risam_cli.data.images.images import read_for_encoder
from risam_cli.inference.device import share_cores
device, count, batch = torch.device(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
bf16 = device.type == "cuda"
precision = torch.bfloat16 if bf16 else torch.float32
source = None if sys.argv[1] == "-" else sys.argv[1]
loaded = load_model(source, device=device, precision=precision)
paths = sorted(Path(sys.argv[5]).iterdir())[:32]
frame = sam_frame(loaded.image_size)
rgb = [read_for_encoder(path, [frame]).rgb for path in paths]
ready = [frame.batch(rgb[k : k + batch], device).values for k in range(0, 32, batch)]
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
lanes = 1
if sys.argv[7] == "beside":
    shared = share_cores(device.type, loaded.image_size)
    lanes = shared.lanes
    torch.set_num_threads(shared.threads)
def work(first):
    torch.get_num_threads()  # a new thread takes the number when it is first asked for it
    with torch.inference_mode():
        for number in range(first, count // batch, lanes):
            step(ready[number % len(ready)])
with torch.inference_mode():
    for pixels in ready[:2]:
        step(pixels)
wait()
wall, cpu = time.perf_counter(), time.process_time()
others = [threading.Thread(target=work, args=(first,)) for first in range(1, lanes)]
for one in others:
    one.start()
work(0)
for one in others:
    one.join()
wait()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
done = count // batch * batch
print(json.dumps({"wall": wall / done, "cpu": cpu / done, "lanes": lanes}))
"""


def measure(options: Options) -> list[Row]:
    """Rates and their ratio, with the bundled model on a CPU and ViT-B on a GPU."""
    count = 64 if options.quick else 512
    gpu = options.device == "cuda"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        folder = draw(Path(made, "pictures"), count, 480, 640)
        model = model_folder(Path(made, "model"), "vit_b") if gpu else None
        for cores in (1,) if gpu else sorted({1, os.cpu_count() or 1}):
            rows += compare(Path(made), folder, model, count, cores, options)
    return rows


def compare(
    made: Path, folder: Path, model: Path | None, count: int, cores: int, options: Options
) -> list[Row]:
    """One number of cores."""
    asked = "the red circle"
    batch = 8 if options.device == "cuda" else 1
    bare: list[dict[str, float]] = []
    beside: list[dict[str, float]] = []
    whole: list[dict[str, Any]] = []
    for turn in range(1 if options.quick else options.repeats):
        command = [sys.executable, "-c", _BARE, str(model or "-"), options.device]
        command += [str(count), str(batch), str(folder), asked]
        env = {"OMP_NUM_THREADS": str(cores)}
        bare.append(run_child([*command, "alone"], env=env).last_json())
        if cores > 1:
            beside.append(run_child([*command, "beside"], env=env).last_json())
        output = made / f"o{cores}-{turn}"
        words = ["predict", folder, "-e", asked, "-o", output, "--device", options.device]
        words += ["--batch-size", batch, *(["--model", model] if model else [])]
        child = checked(risam(*words, threads=cores))
        wall, seconds = parts_of(output)
        whole.append({"wall": wall / count, "cpu": child.cpu / count, "parts": seconds})
    name = f"{count} images, {cores} thread{'s' * (cores > 1)}"
    rates = [[1 / one["wall"] for one in way] for way in (bare, whole, beside)]
    rows = [
        _rate(f"{name}: bare model", rates[0]),
        _rate(f"{name}: risam predict", rates[1]),
        ratio(f"{name}: predict / bare", rates[1], rates[0], ">= 0.9"),
    ]
    if beside:
        lanes = int(beside[0]["lanes"])
        rows.append(_rate(f"{name}: {lanes} bare models side by side", rates[2]))
        rows.append(ratio(f"{name}: predict / side by side", rates[1], rates[2]))
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
