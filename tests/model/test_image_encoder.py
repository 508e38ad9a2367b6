"""The image encoder against segment_anything's own, and what was added to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import encoder, noise, randomize, reference_encoder, relative_error, save_pth
from torch import Tensor, nn

from risam_cli.model.fast.prepare import prepare_for_inference, prepare_for_training
from risam_cli.model.image_encoder import (
    ConvStem,
    ImageEncoder,
    relative_attention,
    relative_table,
    resize_pos_embed,
    window_partition,
    window_unpartition,
)
from risam_cli.settings.presets import PRESETS
from risam_cli.weights.sam import load_sam_encoder

WITHIN = 1e-5


@torch.no_grad()
def _outputs(reference: nn.Module, pixels: Tensor, taps: list[int]) -> list[Tensor]:
    """The reference's result and, by hooks, what its tapped blocks gave, as (B, D, h, w)."""
    seen: dict[int, Tensor] = {}
    blocks: Any = reference.blocks
    hooks = [
        blocks[tap].register_forward_hook(
            lambda _m, _i, out, tap=tap: seen.__setitem__(tap, out.permute(0, 3, 1, 2))
        )
        for tap in taps
    ]
    deep = reference(pixels)
    for hook in hooks:
        hook.remove()
    return [*(seen[tap] for tap in taps), deep]


@pytest.mark.parametrize("dim", [32, 256], ids=["narrow heads", "SAM's heads"])
@pytest.mark.parametrize(
    ("grid", "window"), [(10, 4), (8, 4), (5, 7)], ids=["padded", "even", "one window"]
)
def test_it_is_sams_encoder_with_taps(tmp_path: Path, grid: int, window: int, dim: int) -> None:
    """Untrained adapters are on: they must change nothing."""
    reference = reference_encoder(grid=grid, window=window, dim=dim)
    ours = encoder(grid=grid, window=window, dim=dim, adapter_dim=8)
    for block in ours.blocks:
        nn.init.zeros_(block.adapter.up.weight)
        nn.init.zeros_(block.adapter.up.bias)
    load_sam_encoder(ours, save_pth(tmp_path / "sam.pth", reference))
    pixels = noise(2, 3, 16 * grid, 16 * grid)
    with torch.no_grad():
        found = ours(pixels)
    shallow, middle, deep = _outputs(reference, pixels, [0, 2])
    assert relative_error(found.shallow, shallow) < WITHIN
    assert relative_error(found.middle, middle) < WITHIN
    assert relative_error(found.deep, deep) < WITHIN
    assert found.fine is None


@pytest.mark.slow
def test_vit_b_at_1024_is_sams_encoder(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    values = {**PRESETS["vit_b"]["image_encoder"], "taps": (3, 7, 11)}
    ours = ImageEncoder(**values).eval()
    with torch.no_grad():
        reference = reference_encoder(
            grid=64,
            window=14,
            dim=768,
            heads=12,
            depth=12,
            global_blocks=(2, 5, 8, 11),
            out_dim=256,
        )
        load_sam_encoder(ours, save_pth(tmp_path / "sam_vit_b.pth", reference))
        pixels = noise(1, 3, 1024, 1024)
        found = ours(pixels)
    for name, expected in zip(
        ("shallow", "middle", "deep"), _outputs(reference, pixels, [3, 7]), strict=True
    ):
        error = relative_error(getattr(found, name), expected)
        record_property(name, error)
        print(f"relative error of {name}: {error:.2e}")
        assert error < WITHIN


@pytest.mark.parametrize(
    ("height", "width"), [(6, 6), (10, 6), (13, 9), (16, 16)], ids=lambda side: str(side)
)
def test_other_sizes_and_rectangles_are_sams_with_interpolated_tables(
    tmp_path: Path, height: int, width: int
) -> None:
    """The reference interpolates its relative positions itself; its embeddings are given it."""
    reference = reference_encoder(grid=10)
    ours = encoder(grid=10)
    load_sam_encoder(ours, save_pth(tmp_path / "sam.pth", reference))
    with torch.no_grad():
        embedding = torch.nn.functional.interpolate(
            reference.pos_embed.permute(0, 3, 1, 2),  # type: ignore[operator, union-attr]
            size=(height, width),
            mode="bicubic",
        )
    reference.pos_embed = nn.Parameter(embedding.permute(0, 2, 3, 1))
    pixels = noise(1, 3, 16 * height, 16 * width)
    with torch.no_grad():
        found = ours(pixels)
    shallow, middle, deep = _outputs(reference, pixels, [0, 2])
    assert found.deep.shape == (1, 16, height, width)
    assert relative_error(found.shallow, shallow) < WITHIN
    assert relative_error(found.middle, middle) < WITHIN
    assert relative_error(found.deep, deep) < WITHIN


def test_gradient_checkpointing_changes_no_value_and_no_gradient() -> None:
    ours = encoder(adapter_dim=4).train()
    pixels = noise(1, 3, 160, 160)
    results = []
    for recompute in (False, True):
        prepare_for_training(ours, torch.device("cpu"), recompute_blocks=recompute)
        ours.zero_grad()
        found = ours(pixels)
        (found.shallow.mean() + found.middle.square().mean() + found.deep.square().sum()).backward()
        grads = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
        results.append((found.deep.detach(), grads))
    (plain, plain_grads), (saved, saved_grads) = results
    assert len(plain_grads) == len(list(ours.parameters()))
    assert torch.equal(plain, saved)
    for a, b in zip(plain_grads, saved_grads, strict=True):
        assert torch.equal(a, b)


def test_a_trained_adapter_changes_the_blocks_from_its_own_on() -> None:
    ours = encoder(adapter_dim=4, taps=(0, 1, 3))
    pixels = noise(1, 3, 160, 160)
    with torch.no_grad():
        before = ours(pixels)
        ours.blocks[1].adapter.up.weight.add_(0.1)
        after = ours(pixels)
    assert torch.equal(before.shallow, after.shallow)
    assert not torch.allclose(before.middle, after.middle, atol=1e-3)
    assert not torch.allclose(before.deep, after.deep, atol=1e-3)


def test_heads_as_wide_as_sams_never_hold_all_logits() -> None:
    """On a grid of 96 by 96 they are 340 MB a head: the fused kernel must be the one that runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    side, dim = 8, 64
    q, k, v = (noise(1, 2, side * side, dim, seed=s) for s in range(3))
    table = relative_table(noise(2 * side - 1, dim, seed=3), side)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot
        fused = relative_attention(q, k, v, table, table)
    assert fused.shape == q.shape
    with sdpa_kernel(SDPBackend.MATH):
        assert relative_error(fused, relative_attention(q, k, v, table, table)) < WITHIN


def test_images_of_a_batch_do_not_see_each_other() -> None:
    ours = encoder()
    pixels = noise(3, 3, 160, 160)
    with torch.no_grad():
        together, alone = ours(pixels), ours(pixels[1:2])
    assert relative_error(together.deep[1:2], alone.deep) < WITHIN


@pytest.mark.parametrize("dim", [6, 64])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5)])
def test_relative_attention_is_softmax_with_a_bias(height: int, width: int, dim: int) -> None:
    tokens = height * width
    q, k, v = (noise(2, 3, tokens, dim, seed=s) for s in range(3))
    rel_h = relative_table(noise(2 * height - 1, dim, seed=3), height)
    rel_w = relative_table(noise(2 * width - 1, dim, seed=4), width)
    logits = q @ k.transpose(-1, -2) / dim**0.5
    for i in range(tokens):
        for j in range(tokens):
            bias = rel_h[i // width, j // width] + rel_w[i % width, j % width]
            logits[..., i, j] += (q[..., i, :] * bias).sum(-1)
    expected = logits.softmax(dim=-1) @ v
    assert relative_error(relative_attention(q, k, v, rel_h, rel_w), expected) < WITHIN


@pytest.mark.parametrize(("height", "width", "window"), [(8, 8, 4), (5, 9, 4), (3, 3, 7)])
def test_windows_go_back_to_where_they_came_from(height: int, width: int, window: int) -> None:
    x = noise(2, height, width, 3)
    windows = window_partition(x, window)
    assert windows.shape[1:] == (window, window, 3)
    assert torch.equal(
        windows[0, : min(window, height), : min(window, width)], x[0, :window, :window]
    )
    assert torch.equal(window_unpartition(windows, window, height, width), x)


def test_position_embeddings_of_their_own_grid_are_left_as_they_are() -> None:
    embedding = noise(1, 5, 5, 4)
    assert resize_pos_embed(embedding, 5, 5) is embedding
    flat = torch.full((1, 5, 5, 4), 0.75)
    assert torch.allclose(resize_pos_embed(flat, 8, 3), torch.full((1, 8, 3, 4), 0.75))


def _values(**changes: Any) -> dict[str, Any]:
    values = {
        "image_size": 64, "patch_size": 16, "dim": 24, "depth": 3, "heads": 2, "mlp_ratio": 2.0,
        "out_dim": 16, "window": 2, "global_blocks": (2,), "taps": (0, 1, 2), "adapter_dim": 0,
        "stem": None,
    }  # fmt: skip
    return {**values, **changes}


def test_a_stem_gives_stride_4_features_on_the_same_grid() -> None:
    ours = randomize(ImageEncoder(**_values(stem=(4, 8, 12)))).eval()
    assert isinstance(ours.patch_embed, ConvStem)
    with torch.no_grad():
        found = ours(noise(2, 3, 64, 96))
    assert found.fine is not None
    assert found.fine.shape == (2, 8, 16, 24)
    assert found.shallow.shape == found.middle.shape == (2, 24, 4, 6)
    assert found.deep.shape == (2, 16, 4, 6)


def test_the_stem_in_the_deep_features_changes_nothing_until_it_is_trained() -> None:
    plain = randomize(ImageEncoder(**_values(stem=(4, 8, 12)))).eval()
    ours = ImageEncoder(**_values(stem=(4, 8, 12), stem_in_deep=True)).eval()
    new = ours.load_state_dict(plain.state_dict(), strict=False)
    names = ("norm.weight", "norm.bias", "proj.weight")
    assert set(new.missing_keys) == {f"stem_in_deep.{name}" for name in names}
    pixels = noise(2, 3, 64, 96)
    assert torch.equal(ours(pixels).deep, plain(pixels).deep)
    ours(pixels).deep.square().sum().backward()
    assert ours.stem_in_deep is not None
    assert ours.stem_in_deep.proj.weight.grad is not None
    assert (ours.stem_in_deep.proj.weight.grad != 0).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_stem_in_the_deep_features_is_in_the_fast_forms_too(precision: torch.dtype) -> None:
    ours = randomize(ImageEncoder(**_values(stem=(4, 8, 12), stem_in_deep=True))).eval()
    without = ImageEncoder(**_values(stem=(4, 8, 12))).eval()
    without.load_state_dict(ours.state_dict(), strict=False)
    pixels = noise(2, 3, 64, 96)
    with torch.no_grad():
        expected = ours(pixels).deep
        prepare_for_inference(ours, torch.device("cpu"), precision)
        found = ours(pixels).deep
        assert relative_error(without(pixels).deep, expected) > 0.1
    assert relative_error(found, expected) < (WITHIN if precision == torch.float32 else 0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_in_deep": True}, "stem_in_deep needs a stem"),
        ({"image_size": 70}, "image_size 70 is not a multiple of patch_size 16"),
        ({"taps": (0, 1, 1)}, "must rise and end at the last block, 2"),
        ({"taps": (1, 0, 2)}, "must rise"),
        ({"stem": (4, 8, 12), "patch_size": 8}, "patch_size must be 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageEncoder(**_values(**changes))
