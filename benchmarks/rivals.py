"""What RISAM and its rivals cost behind the same encoders: parameters, and time per expression.

    python benchmarks/rivals.py [--repeats 5]

Each network of the ablations is built with random weights, since its work does not depend on them.
Parameters are those behind the two encoders. ``decode`` alone is timed, since all else is the same
for all: six expressions about one image, in turns over the networks, one thread, the median of the
repeats, in milliseconds of CPU. RISAM has a way of its own for inference on a CPU; "in a batch" is
what its rivals do too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from ablations import CONFIGS, VARIANTS

from risam_cli.model.fast.prepare import inference_forms
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.text_encoder import TextFeatures
from risam_cli.settings.load import apply_override, check, read_settings_file
from risam_cli.settings.model import ModelSettings
from risam_cli.weights.build import build_model, new_text_parts

NETWORKS = ("risam", "no_language_guided", "plain", "sam", "cris", "rela")
EXPRESSIONS, WORDS = 6, 9
CPU = torch.device("cpu")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--presets", default="tiny,vit_b", help="sizes to build them in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    grids = {"tiny": ("tiny, 256²", 16), "vit_b": ("vit_b, 1024²", 64)}
    for preset in options.presets.split(","):
        label, side = grids[preset]
        networks = {name: built(name, preset) for name in NETWORKS}
        found = timed(networks, side, options.repeats)
        print(f"\n| {label} | parameters | ms an expression | in a batch |")
        print("|---|---|---|---|")
        for name, network in networks.items():
            whole = sum(p.numel() for p in network.parameters())
            encoders = (network.image_encoder, network.text_encoder)
            behind = whole - sum(p.numel() for part in encoders for p in part.parameters())
            own, batch = (f"{1000 * found[name, way]:.1f}" for way in (False, True))
            print(f"| {VARIANTS[name].label} | {behind:,} | {own} | {batch} |")


def built(name: str, preset: str) -> Risam:
    """The network of a variant in the sizes of a preset."""
    variant = VARIANTS[name]
    raw = read_settings_file(CONFIGS / f"{variant.config}.yaml")
    for change in variant.changes:
        raw = apply_override(raw, change)
    model = {**raw["model"], "preset": preset}
    settings = check(ModelSettings, model, name)
    with torch.device("meta"):
        network = build_model(settings, new_text_parts(settings.text_encoder))
    return network.to_empty(device="cpu").requires_grad_(False).eval()


def timed(networks: dict[str, Risam], side: int, repeats: int) -> dict[tuple[str, bool], float]:
    """Median CPU seconds an expression by network and by whether all went in one batch."""
    found: dict[tuple[str, bool], list[float]] = {}
    for network in networks.values():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for buffer in network.buffers():
            if buffer.is_floating_point():
                torch.nn.init.normal_(buffer)
    for repeat in range(repeats + 1):
        for name, network in networks.items():
            for batched in (False, True):
                with nullcontext() if batched else inference_forms(network, CPU):
                    seconds = once(network, side)
                if repeat:  # the first warms up
                    found.setdefault((name, batched), []).append(seconds)
    return {key: statistics.median(values) for key, values in found.items()}


@torch.no_grad()
def once(network: Risam, side: int) -> float:
    """CPU seconds of ``decode`` an expression."""
    dim, channels = network.dim, network.dim
    if hasattr(network.mask_decoder, "neck"):
        channels = 3 * dim  # CRIS keeps the three depths apart
    image = ImageFeatures(torch.randn(1, channels, side, side), None)
    valid = torch.ones(EXPRESSIONS, WORDS, dtype=torch.bool)
    words = torch.randn(EXPRESSIONS, WORDS, dim)
    text = TextFeatures(words, valid, torch.randn(EXPRESSIONS, dim))
    owner = torch.zeros(EXPRESSIONS, dtype=torch.long)
    start = time.process_time()
    network.decode(image, text, owner)
    return (time.process_time() - start) / EXPRESSIONS


if __name__ == "__main__":
    main()
