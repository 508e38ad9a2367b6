"""Masks of the fast path against those of the plain float32 path, on real photos.

The plain path is the network with every matrix product by ``torch.nn.functional.linear``, attention
written out as softmax of logits plus bias, and all expressions decoded in one batch. The fast path
is what ``risam predict`` runs, in float32 and in bfloat16; on a CPU, expression by expression, as
with models of full size. Both by the bundled model, since masks of random weights mean nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from common import PHOTOS, Options, Row
from torch import Tensor

from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.images import read_for_encoder
from risam_cli.data.images.transforms import fit_size, logits_to_size
from risam_cli.model import image_encoder
from risam_cli.model.fast.prepare import take_plain_forms
from risam_cli.weights.load import LoadedModel, load_model

EXPRESSIONS = ("the large red circle", "the leftmost blue shape", "the thing on the right")


def measure(options: Options) -> list[Row]:
    """Mean and worst IoU for each precision, over photos and expressions."""
    photos = sorted(PHOTOS.glob("*.jpg"))[: 8 if options.quick else 100]
    if not photos:
        raise SystemExit(f"no photos in {PHOTOS}")
    device = torch.device(options.device)
    rows = []
    for precision, bound in ((torch.float32, ">= 0.999"), (torch.bfloat16, ">= 0.99")):
        name = "fp32" if precision == torch.float32 else "bf16"
        found = overlaps(photos, precision, device)
        note = f"{len(photos)} photos, {len(EXPRESSIONS)} expressions each, the bundled model"
        rows.append(Row(f"{name}: mean IoU", statistics.mean(found), "IoU", None, note, bound))
        rows.append(Row(f"{name}: worst IoU", min(found), "IoU"))
        same = sum(value == 1 for value in found) / len(found)
        rows.append(Row(f"{name}: equal pixel by pixel", same, "share"))
    return rows


def overlaps(photos: Sequence[Path], precision: torch.dtype, device: torch.device) -> list[float]:
    """IoU of the two paths' masks, one for each photo and expression; 1 where both are empty."""
    plain = load_model(None, device=device)
    take_plain_forms(plain.model)
    fast = load_model(None, device=device, precision=precision)
    found = []
    for photo in photos:
        with torch.inference_mode(), written_out_attention():
            expected = masks(plain, photo, device)
        with torch.inference_mode():
            given = masks(fast, photo, device)
        union = (expected | given).flatten(1).sum(1)
        both = (expected & given).flatten(1).sum(1)
        found += [a / b if b else 1.0 for a, b in zip(both.tolist(), union.tolist(), strict=True)]
    return found


def masks(loaded: LoadedModel, photo: Path, device: torch.device) -> Tensor:
    """(E, H, W) bool at the photo's size, before any no-target rule."""
    frame = sam_frame(loaded.image_size)
    image = read_for_encoder(photo, [frame])
    pixels = frame.batch([image.rgb], device).values
    tokens = loaded.tokenizer.encode(list(EXPRESSIONS))
    index = torch.zeros(len(EXPRESSIONS), dtype=torch.long, device=device)
    features = loaded.model.encode_image(pixels)
    text = loaded.model.encode_text(tokens.input_ids.to(device), tokens.attention_mask.to(device))
    logits = loaded.model.decode(features, text, index).mask_logits
    side = loaded.image_size
    return logits_to_size(logits.float(), fit_size(*image.size, side), side, image.size) > 0


@contextmanager
def written_out_attention() -> Iterator[None]:
    """Within it a plain image encoder's attention runs as it is written in the papers."""
    fused = image_encoder.relative_attention
    image_encoder.relative_attention = written_out
    try:
        yield
    finally:
        image_encoder.relative_attention = fused


def written_out(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """SAM's attention, as segment_anything writes it."""
    batch, heads, tokens, dim = q.shape
    height, width = rel_h.shape[0], rel_w.shape[0]
    grid = q.reshape(batch * heads, height, width, dim)
    logits = ((q * dim**-0.5) @ k.transpose(-2, -1)).view(-1, height, width, height, width)
    logits = (
        logits
        + torch.einsum("bhwc,hkc->bhwk", grid, rel_h)[..., :, None]
        + torch.einsum("bhwc,wkc->bhwk", grid, rel_w)[..., None, :]
    )
    return logits.view(batch, heads, tokens, tokens).softmax(dim=-1) @ v
