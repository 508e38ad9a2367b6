"""What a network of SAM's sizes holds and costs on this machine.

::

    python benchmarks/full_size.py                        # vit_b forward, vit_h built
    python benchmarks/full_size.py --forward vit_b vit_h  # both forward; vit_h needs minutes
    python benchmarks/full_size.py --forward vit_b --precision bf16

Weights are random, since only their number and the work matter: the image encoder as in SAM at
1024x1024 pixels with adapters, a text encoder of BERT-base's size. One image, four expressions.
Every preset is measured in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any

EXPRESSIONS = [
    "red circle",
    "the small blue square left of the green star",
    "leftmost triangle",
    "every yellow shape",
]


def main() -> None:
    """Measures one preset after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build", nargs="*", default=["vit_b", "vit_h"], metavar="PRESET")
    parser.add_argument("--forward", nargs="*", default=["vit_b"], metavar="PRESET")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for preset in dict.fromkeys([*options.build, *options.forward]):
        bf16 = options.precision == "bf16"
        process = context.Process(target=measure, args=(preset, preset in options.forward, bf16))
        process.start()
        process.join()
        if process.exitcode:
            print(f"{preset}: ended with exit code {process.exitcode}; too little memory?")


def measure(preset: str, forward: bool, bf16: bool) -> None:
    """Builds one preset and, where asked, runs it once; prints what that took."""
    import torch

    began = time.perf_counter()
    model, tokenizer = build(preset)
    print(
        f"{preset}: built in {time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads"
    )
    parts = {name: count(part.parameters()) for name, part in model.named_children()}
    for name, number in parts.items():
        print(f"  {name:<22}{number:>15,}")
    adapters = sum(count(b.adapter.parameters()) for b in model.image_encoder.blocks if b.adapter)
    total, text = sum(parts.values()), count(model.text_encoder.backbone.parameters())
    behind = total - parts["image_encoder"] - text
    print(f"  {'all':<22}{total:>15,}")
    print(f"  {'trainable':<22}{behind + adapters:>15,}  of these adapters {adapters:,}")
    print(f"  {'with the text encoder':<22}{behind + adapters + text:>15,}")
    print(f"  peak memory after building  {peak():6.2f} GB")
    if not forward:
        return
    seconds: dict[str, tuple[float, float]] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        start, busy = time.perf_counter(), time.process_time()
        result = step()
        seconds[name] = time.perf_counter() - start, time.process_time() - busy
        return result

    tokens = tokenizer.encode(EXPRESSIONS)
    size = model.image_encoder.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    index = torch.zeros(len(EXPRESSIONS), dtype=torch.long)
    from risam_cli.model.fast.prepare import prepare_for_inference

    precision = torch.bfloat16 if bf16 else torch.float32
    prepare_for_inference(model, torch.device("cpu"), precision)  # as predict does
    with torch.inference_mode():
        image = timed("encode_image, 1 image", lambda: model.encode_image(pixels))
        text_features = timed(
            f"encode_text, {len(EXPRESSIONS)} expressions",
            lambda: model.encode_text(tokens.input_ids, tokens.attention_mask),
        )
        decoded = timed(
            f"decode, {len(EXPRESSIONS)} expressions",
            lambda: model.decode(image, text_features, index),
        )
    for name, (passed, worked) in seconds.items():
        print(
            f"  {name:<28}{passed:7.2f} s, {worked:6.2f} s of CPU  ({'bf16' if bf16 else 'fp32'})"
        )
    shape, finite = tuple(decoded.mask_logits.shape), bool(decoded.mask_logits.isfinite().all())
    print(f"  masks {shape}, finite: {finite}")
    print(f"  peak memory after running   {peak():6.2f} GB")


def build(preset: str) -> tuple[Any, Any]:
    """The network with random weights, in evaluation mode, and a tokenizer for it."""
    from transformers import BertConfig, BertModel

    from risam_cli.settings.load import check
    from risam_cli.settings.model import ModelSettings
    from risam_cli.weights.build import build_model, new_text_parts
    from risam_cli.weights.text import TextParts

    raw = {"preset": preset, "text_encoder": {"vocabulary": "refshapes"}}
    settings = check(ModelSettings, raw, preset)
    tokenizer = new_text_parts(settings.text_encoder).tokenizer
    config = BertConfig()
    backbone = BertModel(config, add_pooling_layer=False)
    return build_model(settings, TextParts(backbone, config, tokenizer)).eval(), tokenizer


def count(parameters: Iterable[Any]) -> int:
    """Number of values in parameters."""
    return sum(p.numel() for p in parameters)


def peak() -> float:
    """Largest resident memory of this process so far, in GB of 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
