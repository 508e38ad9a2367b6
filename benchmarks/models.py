"""Model folders, pictures and manifests that several benchmarks run on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common import PHOTOS, Child, run_child

EXPRESSIONS = (
    *("red circle", "the small blue square left of the green star", "leftmost triangle"),
    *("every yellow shape", "the large purple cross", "the thing above the red circle"),
)


def texts(count: int) -> list[str]:
    """So many different expressions."""
    return [
        f"{EXPRESSIONS[k % len(EXPRESSIONS)]} {'the ' * (k // 6)}".strip() for k in range(count)
    ]


def model_folder(folder: Path, preset: str) -> Path:
    """A model folder with random weights of SAM's sizes, and a small BERT: work, not answers."""
    import torch

    from risam_cli.settings.load import check
    from risam_cli.settings.model import ModelSettings
    from risam_cli.weights.build import build_model, new_text_parts
    from risam_cli.weights.folder import write_model_folder

    torch.manual_seed(0)
    raw = {
        "preset": preset,
        "image_encoder": {"adapter_dim": 0},
        "text_encoder": {"vocabulary": "refshapes", "source": None},
    }
    settings = check(ModelSettings, raw, preset)
    text = new_text_parts(settings.text_encoder)
    model = build_model(settings, text)
    write_model_folder(
        folder,
        model.state_dict(),
        settings.model_dump(mode="json"),
        json.loads(text.config.to_json_string(use_diff=False)),
        text.tokenizer.to_json(),
        {"name": f"random-{preset}", "figures": {}},
        "Random weights.\n",
    )
    return folder


def photos(count: int) -> list[Path]:
    """Real photos, where there are some; else drawn scenes do not come in their place."""
    found = sorted(PHOTOS.glob("*.jpg"))[:count]
    if not found:
        raise SystemExit(f"no photos in {PHOTOS}")
    return found


def draw(folder: Path, count: int, height: int, width: int) -> Path:
    """JPEG files of noise over a gradient, each another one."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, width, dtype=np.float32)[None, :, None]
    for number in range(count):
        coarse = rng.integers(0, 56, (height // 8, width // 8, 3)).astype(np.float32)
        picture = slope + cv2.resize(coarse, (width, height))
        cv2.imwrite(str(folder / f"{number:05}.jpg"), picture.astype(np.uint8))
    return folder


def risam(*words: object, threads: int | None = None, every: float = 0.05) -> Child:
    """One call of the command, in a process of its own; see :func:`common.run_child`."""
    env = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return run_child([sys.executable, "-m", "risam_cli", *map(str, words)], env=env, every=every)


def parts_of(output: Path) -> tuple[float, dict[str, float]]:
    """What a run of ``predict`` took by the clock without its start, and all of its parts."""
    spent: dict[str, float] = json.loads((output / "run.json").read_text("utf-8"))["seconds"]
    start = sum(spent[part] for part in ("startup", "import_torch", "load_model"))
    return spent["total"] - start, spent


def checked(child: Child) -> Child:
    """The same, if it went well."""
    if child.code:
        raise RuntimeError(f"exit code {child.code}: {child.errors.strip()[-2000:]}")
    return child


def manifest(path: Path, images: Sequence[Path], asked: Sequence[str]) -> Path:
    """A manifest that asks all of every image."""
    rows = (json.dumps({"image": str(one), "expressions": list(asked)}) for one in images)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
