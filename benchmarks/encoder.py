"""The image encoder against its peers: time, memory, and how far the features are apart.

    python benchmarks/run.py encoder footprint [--device cuda]
    python benchmarks/encoder.py --peak risam-fp32        # one way's peak memory, in this process

The peers are ``segment_anything``'s own encoder and ``transformers``' ``SamVisionModel``, as they
come, in float32 and with all weights in bfloat16. All hold the same random weights and take the
same 1024x1024 pixels, in turns; peak memory is that of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from common import Options, Row, Times, in_turns, peak_bytes, ratio, run_child
from torch import Tensor, nn

from risam_cli.model.fast.linear import linear
from risam_cli.model.fast.prepare import prepare_for_inference
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.model.rivals.sam import segment_anything_modeling
from risam_cli.settings.presets import PRESETS
from risam_cli.weights.sam import from_hugging_face

Encode = Callable[[], Any]
LIBRARIES = ("segment_anything", "transformers", "risam")
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {"vit_b": "ViT-B", "vit_l": "ViT-L", "vit_h": "ViT-H"}


def measure(options: Options) -> list[Row]:
    """All figures of the encoder on one device."""
    if options.device == "cuda":
        rows = []
        for preset in ("vit_b",) if options.quick else ("vit_b", "vit_h"):
            for batch in (1, 8):
                rows += speed(preset, options, batch)
        return rows
    rows = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        rows += speed("vit_b", options, 1, size=256 if options.quick else 1024, threads=threads)
    torch.set_num_threads(1)
    return rows


# --- time -----------------------------------------------------------------------------------------


def speed(
    preset: str, options: Options, batch: int, *, size: int = 1024, threads: int = 1
) -> list[Row]:
    """Times of all ways in turns, their ratios, and the features' relative errors.

    Of one thread of a CPU the processor's times are taken, of several and of a GPU the clock's.
    """
    device = torch.device(options.device)
    weights = random_weights(preset)
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    ways: dict[str, Encode] = {}
    found: dict[str, Tensor] = {}

    def kept(name: str, way: Encode) -> None:
        found[name] = way()

    for precision in FORMATS:
        for library in LIBRARIES:
            network = build(library, preset, precision, device, weights, size)
            taken = pixels.to(device, torch.float32 if library == "risam" else FORMATS[precision])
            name = f"{library}-{precision}"
            ways[name] = partial(kept, name, partial(encode, library, network, taken))
    on_gpu = device.type == "cuda"
    with torch.inference_mode():
        times = in_turns(
            ways,
            options.repeats,
            warm_up=1 if on_gpu or options.quick else 0,  # nothing to warm in ten seconds of a CPU
            synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        )
    found = {name: features.float().cpu() for name, features in found.items()}
    title = f"{NAMES[preset]}, {size} px" + (f", batch {batch}" if on_gpu else "")
    title += f", {threads} threads" if threads > 1 else ""
    by = "wall" if on_gpu or threads > 1 else "cpu"
    return [
        *time_rows(title, times, by, batch, on_gpu),
        *ceiling_rows(title, times, by, batch * operations(preset, size), device),
        *error_rows(title, found),
    ]


def time_rows(
    title: str, times: Mapping[str, Times], by: str, batch: int, on_gpu: bool
) -> list[Row]:
    """Seconds of each way, and how many times faster the fast ones are."""
    rows = []
    large_on_gpu = on_gpu and title.startswith("ViT-H")  # of an H100
    for name, taken in times.items():
        rows.append(taken.row(f"{title}: {name}", by=by))
        if by == "cpu":
            rows.append(taken.row(f"{title}: {name}, by the clock", by="wall"))
        if on_gpu:
            rates = sorted(batch / seconds for seconds in taken.wall)
            wanted = ">= 50" if (large_on_gpu and name == "risam-bf16") else ""
            spread = rates[0], rates[-1]
            middle = rates[len(rates) // 2]
            rows.append(Row(f"{title}: {name}", middle, "images/s", spread, wanted=wanted))
    bounds = {
        ("segment_anything-fp32", "risam-fp32"): ">= 2",
        ("transformers-fp32", "risam-fp32"): ">= 1.2",
        ("segment_anything-fp32", "risam-bf16"): ">= 5" if large_on_gpu else ">= 3",
        ("transformers-bf16", "risam-bf16"): ">= 1",
        ("segment_anything-bf16", "risam-bf16"): "" if on_gpu else ">= 4",
    }
    for (slow, fast), wanted in bounds.items():
        a, b = (getattr(times[name], by) for name in (slow, fast))
        rows.append(ratio(f"{title}: {fast} against {slow}", a, b, wanted))
    return rows


def ceiling_rows(
    title: str, times: Mapping[str, Times], by: str, work: float, device: torch.device
) -> list[Row]:
    """The encoder's own arithmetic over its time, as a share of what one large product reaches."""
    rows = []
    for precision, dtype in FORMATS.items():
        rate = product_rate(device, dtype, by)
        share = work / min(getattr(times[f"risam-{precision}"], by)) / rate
        note = f"{work / 1e9:.0f} GFLOP; one large product reaches {rate / 1e9:.0f} GFLOP/s"
        wanted = {"fp32": ">= 0.75", "bf16": ">= 0.5"}[precision]
        name = f"{title}: risam-{precision}, share of the ceiling"
        rows.append(Row(name, share, "", None, note, wanted=wanted))
    return rows


def product_rate(device: torch.device, dtype: torch.dtype, by: str) -> float:
    """Operations a second of one large matrix product, the best of six."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.inference_mode():
        times = in_turns({"": partial(linear, a, b)}, 6, warm_up=1, synchronize=synchronize)
    return 2 * side**3 / min(getattr(times[""], by))


def operations(preset: str, size: int) -> float:
    """Operations that an encoder cannot do without on one image; norms and GELU not counted."""
    sizes = PRESETS[preset]["image_encoder"]
    side = size // sizes["patch_size"]
    tokens, dim, window = side**2, sizes["dim"], sizes["window"]
    total = 2.0 * tokens * (3 * sizes["patch_size"] ** 2) * dim
    for block in range(sizes["depth"]):
        total += 2 * tokens * dim * dim * (4 + 2 * sizes["mlp_ratio"])
        keys = tokens if block in sizes["global_blocks"] else window**2
        total += 2 * tokens * dim * (2 * keys + 2 * (side if keys == tokens else window))
    return total + 2 * tokens * sizes["out_dim"] * (dim + 9 * sizes["out_dim"])


def error_rows(title: str, found: Mapping[str, Tensor]) -> list[Row]:
    """Root-mean-square difference from segment_anything's float32 features, over their size."""
    expected = found["segment_anything-fp32"]
    rows = []
    for name, features in found.items():
        if name == "segment_anything-fp32":
            continue
        error = float(
            (features - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        )
        wanted = {"risam-fp32": "<= 1e-5", "risam-bf16": "<= 0.05"}.get(name, "")
        rows.append(Row(f"{title}: {name}, relative error", error, "", wanted=wanted))
    return rows


# --- memory ---------------------------------------------------------------------------------------


def memory(preset: str, size: int) -> list[Row]:
    """Peak memory of the whole process for each way, and ours as a share of the peers'."""
    peaks: dict[str, float] = {}
    for precision in FORMATS:
        for library in LIBRARIES:
            name = f"{library}-{precision}"
            command = [sys.executable, __file__, "--peak", name, "--preset", preset]
            child = run_child([*command, "--size", str(size)], every=0.5)
            peaks[name] = child.last_json() / 1e9
    title = f"{NAMES[preset]}, {size} px: peak memory"
    rows = [Row(f"{title}, {name}", peak, "GB") for name, peak in peaks.items()]
    for other, wanted in (("segment_anything-fp32", "<= 0.3334"), ("transformers-fp32", "")):
        share = peaks["risam-fp32"] / peaks[other]
        rows.append(Row(f"{title}, risam-fp32 over {other}", share, "", wanted=wanted))
    return rows


def peak(name: str, preset: str, size: int) -> None:
    """Builds one way with random weights, encodes once, and prints the process's peak memory."""
    library, precision = name.rsplit("-", 1)
    with torch.inference_mode():
        network = build(library, preset, precision, torch.device("cpu"), None, size)
        dtype = torch.float32 if library == "risam" else FORMATS[precision]
        encode(library, network, torch.zeros(1, 3, size, size, dtype=dtype))
    print(json.dumps(peak_bytes()))


# --- the ways -------------------------------------------------------------------------------------


def build(
    library: str,
    preset: str,
    precision: str,
    device: torch.device,
    weights: Mapping[str, Tensor] | None,
    size: int,
) -> nn.Module:
    """An encoder of one library, in evaluation mode; ``weights`` go by segment_anything's names."""
    sizes = PRESETS[preset]["image_encoder"]
    network: nn.Module
    if library == "risam":
        network = ImageEncoder(**{**sizes, "adapter_dim": 0, "taps": tuple(sizes["taps"])})
        names = {name: name for name in network.state_dict()}
    elif library == "segment_anything":
        network = segment_anything_modeling().ImageEncoderViT(
            img_size=1024,
            embed_dim=sizes["dim"],
            depth=sizes["depth"],
            num_heads=sizes["heads"],
            out_chans=sizes["out_dim"],
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes["window"],
            global_attn_indexes=tuple(sizes["global_blocks"]),
        )
        names = {name: name for name in network.state_dict()}
    else:
        network = _hugging_face(sizes, size)
        theirs = {f"vision_encoder.{name}": value for name, value in network.state_dict().items()}
        back = {id(value): name for name, value in theirs.items()}
        ours = from_hugging_face(theirs)
        names = {
            back[id(value)].removeprefix("vision_encoder."): name.removeprefix("image_encoder.")
            for name, value in ours.items()
        }
    if weights is not None:
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                source = weights[names[name]]
                if source.shape != tensor.shape:  # positions, which transformers will not resize
                    source = _positions(source, tensor)
                tensor.copy_(source)
    if library == "segment_anything" and size != 1024:
        network.pos_embed = nn.Parameter(_positions(network.pos_embed, size // 16).clone())
    network.to(device).eval().requires_grad_(False)
    if library == "risam":
        prepare_for_inference(network, device, FORMATS[precision])
        return network
    return network.to(FORMATS[precision])


def _hugging_face(sizes: Mapping[str, Any], size: int) -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=sizes["dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        output_channels=sizes["out_dim"],
        image_size=size,
        window_size=sizes["window"],
        global_attn_indexes=sizes["global_blocks"],
    )
    return SamVisionModel._from_config(config, attn_implementation="sdpa").vision_encoder


def encode(library: str, network: nn.Module, pixels: Tensor) -> Tensor:
    """The last features, (B, C, h, w)."""
    if library == "risam":
        deep: Tensor = network(pixels).deep
        return deep
    if library == "transformers":
        last: Tensor = network(pixels).last_hidden_state
        return last
    features: Tensor = network(pixels)
    return features


def _positions(source: Tensor, like: Tensor | int) -> Tensor:
    """Position embeddings or a relative table, interpolated as this project does."""
    from risam_cli.model.image_encoder import resize_pos_embed, resize_rel_pos

    if source.ndim == 4:
        side = like if isinstance(like, int) else like.shape[1]
        return resize_pos_embed(source, side, side)
    assert isinstance(like, Tensor)
    return resize_rel_pos(source, like.shape[0])


def random_weights(preset: str) -> dict[str, Tensor]:
    """Matrices about as large as a trained network's, scales near 1, and position tables too."""
    sizes = PRESETS[preset]["image_encoder"]
    network = ImageEncoder(**{**sizes, "adapter_dim": 0, "taps": tuple(sizes["taps"])})
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            weights[name] = noise * (1.0 / tensor[0].numel()) ** 0.5
        else:
            weights[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    return weights


def main() -> None:
    """Prints one way's peak memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peak", required=True, help="such as risam-fp32")
    parser.add_argument("--preset", default="vit_b", choices=NAMES)
    parser.add_argument("--size", type=int, default=1024, help="side of the image in pixels")
    options = parser.parse_args()
    peak(options.peak, options.preset, options.size)


if __name__ == "__main__":
    main()
