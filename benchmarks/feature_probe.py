"""What an image encoder's features say of an object: its colour, its shape, its size.

    python benchmarks/feature_probe.py refshapes-tiny runs/ablations/encoder/checkpoints/last.pt

Linear probes (multinomial logistic regression) guess from the mean of the features under an
object's mask: from the deep features, from those of the three depths side by side, and from the
stem's. They are fitted on the objects of the first two thirds of ``--scenes`` scenes of val and
scored on the others'. A checkpoint is taken for one of configs/ablations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from word_probe import classify

from risam_cli.data.images.transforms import normalize
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.data.refshapes.vocabulary import COLORS, SHAPES, SIZES
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.settings.train import load_settings
from risam_cli.weights.build import build_image_encoder
from risam_cli.weights.folder import stored_settings
from risam_cli.weights.load import load_model
from risam_cli.weights.start import start_encoder

CONFIG = Path(__file__).parent.parent / "configs" / "ablations" / "risam.yaml"
ASKED = {"color": COLORS, "shape": SHAPES, "size": SIZES}


def main() -> None:
    """Probes each encoder and prints a row for each of its features."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", help="model folders, bundled models, checkpoints")
    parser.add_argument("--scenes", type=int, default=180)
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| encoder | features | " + " | ".join(ASKED) + " |\n" + "|---" * (len(ASKED) + 2) + "|")
    for source in options.sources:
        fitted = range(2 * options.scenes // 3)
        scored = range(len(fitted), options.scenes)
        encoder = open_encoder(source)
        (fit_on, fit_names), (score_on, names) = (read(encoder, s) for s in (fitted, scored))
        for stream in fit_on:
            rights = [
                float((classify(fit_on[stream], fit_names[k], score_on[stream]) == names[k])
                      .float().mean())
                for k in range(len(ASKED))
            ]  # fmt: skip
            print(f"| {source} | {stream} | " + " | ".join(f"{r:.2f}" for r in rights) + " |")


def open_encoder(source: str) -> ImageEncoder:
    """The encoder of a model folder or of a checkpoint, in evaluation mode."""
    if not Path(source).is_file():
        return load_model(source, device=torch.device("cpu")).model.image_encoder
    encoder = build_image_encoder(
        load_settings(CONFIG, [], stored=stored_settings).model.image_encoder
    )
    start_encoder(encoder, source)
    return encoder.eval()


@torch.no_grad()
def read(encoder: ImageEncoder, scenes: Sequence[int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Features of each object (n, C) by their names, and its words' numbers, each (n,)."""
    data = RefShapes("refshapes", "val", scenes=max(scenes) + 1, size=encoder.image_size)
    streams: dict[str, list[Tensor]] = {}
    words: list[list[int]] = [[] for _ in ASKED]
    for number in scenes:
        scene = data[number]
        pixels = torch.from_numpy(scene.image)[None]
        found = encoder(normalize(pixels, [list(scene.image.shape[:2])]))
        depths = torch.cat([found.shallow, found.middle, found.deep], dim=1)
        masks = torch.from_numpy(
            np.stack([scene.instances == k + 1 for k in range(len(scene.objects))])
        )
        for name, features in {
            "deep": found.deep, "all depths": depths, "stem": found.fine,
        }.items():  # fmt: skip
            if features is None:
                continue
            weights = F.interpolate(masks[:, None].float(), features.shape[-2:], mode="area")
            weights = weights.flatten(1) / weights.flatten(1).sum(1, keepdim=True)
            streams.setdefault(name, []).append(weights @ features[0].flatten(1).T)
        for kept, (asked, known) in zip(words, ASKED.items(), strict=True):
            kept += [known.index(getattr(one, asked)) for one in scene.objects]
    return {name: torch.cat(rows) for name, rows in streams.items()}, [
        torch.tensor(kept) for kept in words
    ]


if __name__ == "__main__":
    main()
