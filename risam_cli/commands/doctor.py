"""``risam doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from risam_cli.commands.options import (
    device_options,
    json_option,
    model_option,
    verbosity_options,
)
from risam_cli.console.console import get_console
from risam_cli.console.text import counted, sanitize
from risam_cli.errors import EXIT_ERROR, EXIT_OK, OutputError, RisamError
from risam_cli.version import __version__

if TYPE_CHECKING:
    import torch

    from risam_cli.inference.device import Advice
    from risam_cli.model.image_encoder import ImageEncoder
    from risam_cli.segmenters.segmenter import Segmenter

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "segment-anything",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pycocotools",
    "pydantic",
    "pyyaml",
    "click",
    "rich",
    "jinja2",
    "markupsafe",
    "tensorboard",
    "tqdm",
    "peft",
    "filelock",
    "fsspec",
    "huggingface_hub",
)
"""The package's dependencies, those that predict needs most first."""

# Pillow's feature -> what it reads, and whether predict is of little use without it.
DECODERS = {
    "jpg": ("JPEG", True),
    "zlib": ("PNG", True),
    "webp": ("WebP", False),
    "libtiff": ("compressed TIFF", False),
    "jpg_2000": ("JPEG 2000", False),
}
SIDE = 256  # pixels of the timed image
EXPRESSIONS = (
    "the red circle",
    "the leftmost square",
    "the large star above the blue ring",
    "all the green triangles",
)
REPEATS = 5
SECONDS = 1.0  # for each thing that is timed to advise on settings

Facts = dict[str, Any]


@click.command("doctor")
@model_option
@device_options
@click.option(
    "--quick",
    is_flag=True,
    help="Versions and image formats only: no model is loaded, nothing is timed.",
)
@json_option
@verbosity_options
def command(model: str | None, device: str, precision: str, quick: bool, as_json: bool) -> int:
    """Show what this machine can do, what is missing, and which settings suit it.

    Prints versions, the device and the precision that would be chosen and why, cores, memory,
    image formats, and the time of a forward pass: one 256x256 image with 4 expressions, the median
    of 5. Then reads and encodes for some seconds, and recommends a precision, batch size and number
    of workers for this machine. On a CPU it also measures which kernel multiplies fastest, and the
    best number of patches at a time and of threads per image, and stores the result for the other
    commands. Exit code 0 if `risam predict` can run, else 1 with a fix for each problem.

    \b
    Examples:
      risam doctor
      risam doctor --model runs/mine/best --device cuda:0 --json
    """
    problems: list[dict[str, str]] = []

    def problem(what: str, fix: str) -> None:
        problems.append({"problem": what, "fix": fix})

    facts: Facts = {
        "risam": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
        "libraries": _libraries(problem),
        "image_formats": _image_formats(problem),
    }
    try:
        if not quick:
            facts.update(_network(model, device, precision))
    except RisamError as error:
        problem(error.message, error.fix)
    except ImportError as error:
        problem(f"cannot import {error.name or 'a library'}: {error}", "reinstall risam")
    facts["problems"] = problems
    facts["ok"] = not problems
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _report(facts))
    return EXIT_ERROR if problems else EXIT_OK


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    """Memory that this process may use: the machine's, or the container's limit if that is less."""
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return round(min(limits) / 2**30, 1)


def _libraries(problem: Callable[[str, str], None]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            problem(f"{name} is not installed", f"pip install {name}")
    return versions


def _image_formats(problem: Callable[[str, str], None]) -> dict[str, bool]:
    try:
        from PIL import features
    except ImportError:  # told with the libraries
        return {}
    has = {}
    for feature, (kind, needed) in DECODERS.items():
        has[kind] = bool(features.check(feature))
        if needed and not has[kind]:
            problem(f"Pillow was built without {kind}", "pip install --force-reinstall pillow")
    return has


def _network(source: str | None, device_name: str, precision: str) -> Facts:
    """Device, precision, model, a timed forward pass, and the settings that suit."""
    import torch

    from risam_cli.inference.device import (
        advise,
        choose_device,
        choose_precision,
        describe_device,
        measure,
        share_cores,
    )
    from risam_cli.inference.pipeline import side_of
    from risam_cli.segmenters.resolve import load_segmenter, require_risam
    from risam_cli.segmenters.risam import RisamSegmenter

    device = choose_device(device_name)
    dtype = choose_precision(precision, device)
    segmenter = load_segmenter(source, device=device, precision=dtype)
    with torch.inference_mode():
        seconds = _timed_forward(segmenter, device)
    facts: Facts = {
        "device": {
            "chosen": str(device),
            "name": describe_device(device),
            "why": _why_device(device_name, device),
        },
        "precision": {
            "chosen": str(dtype).removeprefix("torch."),
            "why": _why_precision(precision, device),
        },
        "torch_threads": torch.get_num_threads(),
        "side_by_side": asdict(share_cores(device.type, side_of(segmenter))),
        "model": {
            "kind": segmenter.kind,
            "name": segmenter.name,
            "hash": segmenter.hash,
            "parameters": segmenter.parameters,
            "image_size": side_of(segmenter),
        },
        "forward": {
            "image": [SIDE, SIDE],
            "expressions": len(EXPRESSIONS),
            "repeats": REPEATS,
            "seconds": {part: round(value, 5) for part, value in seconds.items()},
        },
    }
    if not isinstance(segmenter, RisamSegmenter):  # which settings suit is known of SAM's encoder
        return facts
    if dtype != torch.float32:
        found = load_segmenter(source, device=device, precision=torch.float32)
        segmenter = require_risam(found, "a measurement")
    measured = measure(segmenter.loaded.model.image_encoder, device, _cores(), SECONDS)
    facts["measured"] = {
        "read_seconds": round(measured.read, 5),
        "encode_seconds": {kind: round(value, 5) for kind, value in measured.encode.items()},
        "images_per_second": {str(k): round(rate, 2) for k, rate in measured.rates.items()},
    }
    facts["settings"] = [_as_option(one) for one in advise(measured)]
    if device.type == "cpu":
        facts["calibration"] = _calibrated(segmenter.loaded.model.image_encoder)
    return facts


def _calibrated(encoder: ImageEncoder) -> Facts:
    """What the processor does best with; kept for the commands that compute.

    Args:
        encoder: in float32, prepared for the CPU.
    """
    import copy

    import torch

    from risam_cli.inference.calibration import calibrate, keep, path_of_calibration
    from risam_cli.model.fast.encoder import HostImageEncoder
    from risam_cli.model.fast.prepare import prepare_for_inference

    lower = copy.deepcopy(encoder)
    prepare_for_inference(lower, torch.device("cpu"), torch.bfloat16)
    found = calibrate([cast(HostImageEncoder, one) for one in (encoder, lower)], _cores())
    try:
        keep(encoder.image_size, found)
    except OutputError as error:
        get_console().warn(f"the measurements could not be saved: {error}")
    return {**found.model_dump(), "file": str(path_of_calibration())}


def _as_option(one: Advice) -> dict[str, str]:
    return {"option": f"--{one.setting.replace('_', '-')}", "value": one.value, "why": one.why}


def _timed_forward(segmenter: Segmenter, device: torch.device) -> dict[str, float]:
    """Median seconds of each part, after one pass that is not counted."""
    import numpy as np

    from risam_cli.inference.device import synchronize

    rgb = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    inputs = [frame.batch([frame.resize(rgb)], device) for frame in segmenter.frames]
    rows = [0] * len(EXPRESSIONS)

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    rounds: list[tuple[float, float, float]] = []
    for _ in range(REPEATS + 1):
        start = now()
        image = segmenter.encode_images(inputs)
        encoded = now()
        text = segmenter.encode_texts(EXPRESSIONS)
        read = now()
        segmenter.decode(image, text, rows, [(SIDE, SIDE)])
        rounds.append((encoded - start, read - encoded, now() - read))
    rounds = rounds[1:]
    medians = {
        part: statistics.median(times)
        for part, times in zip(("image", "text", "decode"), zip(*rounds, strict=True), strict=True)
    }
    return {"total": statistics.median(map(sum, rounds)), **medians}


def _why_device(asked: str, device: torch.device) -> str:
    import torch

    if asked != "auto":
        return "asked for"
    if device.type == "cuda":
        return "a CUDA GPU is available"
    if device.type == "mps":
        return "no CUDA GPU, but Apple's MPS is available"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch has no GPU support, and there is no MPS"
    return "torch finds no GPU, and there is no MPS"


def _why_precision(asked: str, device: torch.device) -> str:
    if asked != "auto":
        return "asked for"
    if device.type == "cpu":
        return "on a CPU the masks must not depend on the machine"
    return "bfloat16 where the device computes it natively, else float32"


def _shared(cores: Facts) -> str:
    """How a CPU's cores are shared out; nothing on other devices."""
    lanes, threads = cores["lanes"], cores["threads"]
    if not threads:
        return ""
    return f": {counted(lanes, 'image')} at a time, {counted(threads, 'thread')} each"


def _chosen(found: Facts) -> str:
    """What the commands go by from now on."""
    parts = [f"{kind} products by {by}" for kind, by in found["products"].items()]
    parts += [
        f"{found['tile']} patches at a time",
        f"{counted(found['threads'], 'thread')} an image",
    ]
    return f"{', '.join(parts)}; kept in {found['file']}"


def _report(facts: Facts) -> str:
    """The facts as text, one a line."""
    memory = facts["memory_gib"]
    lines = [
        ("risam", f"{facts['risam']} on Python {facts['python']} ({sys.executable})"),
        ("machine", facts["platform"]),
        ("cores", str(facts["cores"])),
        ("memory", "unknown" if memory is None else f"{memory} GiB"),
    ]
    for title in ("device", "precision"):
        if title in facts:
            chosen = facts[title].get("name", facts[title]["chosen"])
            lines.append((title, f"{chosen}: {facts[title]['why']}"))
    if "forward" in facts:
        model, seconds = facts["model"], facts["forward"]["seconds"]
        parts = ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in seconds.items() if k != "total")
        lines += [
            ("torch threads", str(facts["torch_threads"]) + _shared(facts["side_by_side"])),
            ("model", f"{model['name']}, {model['parameters']:,} parameters, {model['hash'][:12]}"),
            (
                "forward pass",
                f"{seconds['total'] * 1e3:.1f} ms for one {SIDE}x{SIDE} image and "
                f"{len(EXPRESSIONS)} expressions ({parts})",
            ),
        ]
    formats = facts["image_formats"]
    lines.append(("image formats", ", ".join(kind for kind, has in formats.items() if has)))
    missing = [kind for kind, has in formats.items() if not has]
    if missing:
        lines.append(("cannot read", ", ".join(missing)))
    lines += [(name, version or "missing") for name, version in facts["libraries"].items()]
    if "calibration" in facts:
        lines.append(("measured to be best", _chosen(facts["calibration"])))
    lines += [
        (f"use {setting['option']}", f"{setting['value']}: {setting['why']}")
        for setting in facts.get("settings", ())
    ]
    text = "\n".join(f"{name:<23} {sanitize(value)}" for name, value in lines)
    for entry in facts["problems"]:
        text += f"\nproblem: {sanitize(entry['problem'])}"
        text += f"\n    fix: {sanitize(entry['fix'])}" if entry["fix"] else ""
    if not facts["ok"]:
        return text + "\npredict cannot run"
    return text + ("\npredict can run" if "forward" in facts else "\nnothing is missing")
