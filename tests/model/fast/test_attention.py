"""The ways of attention and of matrix products: all the same, and each taken where it is meant."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.networks import encoder, noise, prepared, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.errors import UsageError
from risam_cli.model import image_encoder
from risam_cli.model.fast import attention, linear, tuning
from risam_cli.model.fast import encoder as fast_encoder
from risam_cli.model.fast.attention import WAYS, choose_way
from risam_cli.model.fast.encoder import FastImageEncoder, TableCache
from risam_cli.model.fast.prepare import (
    inference_forms,
    prepare_for_inference,
    prepare_for_training,
    take_plain_forms,
)
from risam_cli.model.fast.tuning import Tuning
from risam_cli.model.image_encoder import relative_attention, relative_table
from risam_cli.weights.load import load_model

WITHIN = 1e-5


def _case(batch: int, heads: int, height: int, width: int, dim: int) -> tuple[Tensor, ...]:
    """Queries, keys and values as the encoder gives them: views of one tensor."""
    qkv = noise(batch, height * width, 3, heads, dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    rel_h = relative_table(noise(2 * height - 1, dim, seed=1), height)
    rel_w = relative_table(noise(2 * width - 1, dim, seed=2), width)
    return q, k, v, rel_h, rel_w


def _written_out(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    height, width = rel_h.shape[0], rel_w.shape[0]
    grid = q.reshape(*q.shape[:2], height, width, -1)
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).unflatten(-1, (height, width))
    by_row = torch.einsum("bnhwd,hkd->bnhwk", grid, rel_h).flatten(2, 3)
    by_column = torch.einsum("bnhwd,wkd->bnhwk", grid, rel_w).flatten(2, 3)
    logits = logits + by_row[..., :, None] + by_column[..., None, :]
    return logits.flatten(3).softmax(-1) @ v


@pytest.mark.parametrize("way", ["one_hot", "biased", "by_rows"])
@pytest.mark.parametrize(
    ("shape", "limit"),
    [((1, 2, 9, 7, 64), 4 << 20), ((1, 2, 9, 7, 16), 2000), ((5, 3, 4, 4, 8), 3000)],
    ids=["at once", "in parts of rows", "in parts of windows"],
)
def test_every_way_is_softmax_with_a_bias(
    way: str, shape: tuple[int, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "HOST_LOGITS", limit)
    case = _case(*shape)
    with torch.inference_mode():
        found = WAYS[way](*case)
    assert found.shape == case[0].shape
    assert relative_error(found, _written_out(*case)) < WITHIN


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_softmax_with_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the minutes of a compiler; the arithmetic is the same."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    case = _case(1, 2, 9, 7, 16)
    with torch.inference_mode():
        found = WAYS["flex"](*case)
    assert relative_error(found, _written_out(*case)) < WITHIN


@pytest.mark.parametrize("way", ["one_hot", "biased", "by_rows"])
def test_lower_formats_go_in_and_come_out(way: str) -> None:
    case = [tensor.bfloat16() for tensor in _case(2, 2, 6, 6, 64)]
    with torch.inference_mode():
        found = WAYS[way](*case)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), _written_out(*(t.float() for t in case))) < 0.02


def test_a_cpu_takes_rows_where_there_are_many() -> None:
    few, many = torch.zeros(1, 2, 64, 32), torch.zeros(1, 2, 1024, 32)
    with torch.inference_mode():
        assert choose_way(few, 8, 8) == "biased"
        assert choose_way(many, 32, 32) == (
            "by_rows" if linear.has_fast_products(torch.float32) else "biased"
        )


def test_gradients_go_through_attention_to_all_that_takes_part() -> None:
    case = [tensor.detach().clone().requires_grad_() for tensor in _case(1, 2, 5, 4, 16)]
    relative_attention(*case).square().sum().backward()
    found = [tensor.grad for tensor in case]
    for tensor in case:
        tensor.grad = None
    _written_out(*case).square().sum().backward()
    for a, b in zip(found, case, strict=True):
        assert a is not None
        assert b.grad is not None
        assert relative_error(a, b.grad) < 1e-4


def test_autocast_does_not_reach_into_the_ways_of_a_cpu() -> None:
    case = _case(1, 2, 24, 24, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = attention.fast_attention(*case)
    assert relative_error(found, _written_out(*case)) < WITHIN


# --- matrix products ------------------------------------------------------------------------------


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_torchs_product(gelu: bool, bias: bool) -> None:
    x, weight = noise(2, 5, 24), noise(40, 24, seed=1)
    shift = noise(40, seed=2) if bias else None
    expected = F.linear(x, weight, shift)
    expected = F.gelu(expected) if gelu else expected
    with torch.inference_mode():
        assert relative_error(linear.linear(x, weight, shift, gelu=gelu), expected) < WITHIN
        strided = x.transpose(0, 1)
        found = linear.linear(strided, weight, shift, gelu=gelu).transpose(0, 1)
        assert relative_error(found, expected) < WITHIN


def test_products_have_gradients() -> None:
    layer = nn.Linear(6, 4)
    x = noise(3, 6).requires_grad_()
    linear.linear(x, layer.weight, layer.bias).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, layer.weight.sum(0).expand(3, 6)) < WITHIN


def test_without_the_fast_product_all_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = prepared(encoder(grid=24, heads=2, adapter_dim=4))
    pixels = noise(1, 3, 384, 384)
    with torch.inference_mode():
        fast = ours(pixels)
        monkeypatch.setattr(linear, "_onednn", lambda kind: None)
        plain = ours(pixels)
    assert relative_error(fast.deep, plain.deep) < WITHIN
    assert relative_error(fast.middle, plain.middle) < WITHIN


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_operator_that_is_wrong_is_not_taken(kind: torch.dtype) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        return F.linear(x, weight, bias)  # forgets the GELU

    def failing(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        raise RuntimeError("no such operator here")

    assert not linear._is_right(wrong, kind)
    assert not linear._is_right(failing, kind)


# --- the encoder's own ----------------------------------------------------------------------------


def test_the_fast_forms_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do parts of any size, nor, to the bit, going there and back."""
    ours, pixels = encoder(grid=10, window=4, adapter_dim=4), noise(3, 3, 160, 160)
    names, kinds = list(ours.state_dict()), [type(part) for part in ours.modules()]
    with torch.inference_mode():
        plain = ours(pixels)
        prepared(ours)
        assert list(ours.state_dict()) == names
        whole = ours(pixels)
        monkeypatch.setattr(tuning, "_in_use", Tuning(tile=30))
        parts = ours(pixels)
        take_plain_forms(ours)
        back = ours(pixels)
    assert [type(part) for part in ours.modules()] == kinds
    for name in ("shallow", "middle", "deep"):
        assert relative_error(getattr(whole, name), getattr(plain, name)) < WITHIN
        assert relative_error(getattr(parts, name), getattr(whole, name)) < WITHIN
        assert torch.equal(getattr(back, name), getattr(plain, name))


@pytest.mark.parametrize("before", ["plain", "recomputed", "prepared"])
def test_forms_are_lent_for_a_while(before: str) -> None:
    ours = encoder(adapter_dim=4)
    prepare_for_training(ours, torch.device("cpu"), recompute_blocks=before == "recomputed")
    if before == "prepared":
        prepared(ours)
    kinds = [type(part) for part in ours.modules()]
    with inference_forms(ours, torch.device("cpu")):
        assert type(ours) is fast_encoder.HostImageEncoder
    assert [type(part) for part in ours.modules()] == kinds


def test_weights_held_in_bf16_keep_float32_features_near_float32s() -> None:
    ours, pixels = prepared(encoder(grid=10, dim=64, adapter_dim=4)), noise(1, 3, 160, 160)
    assert isinstance(ours, FastImageEncoder)
    names = set(ours.state_dict())
    with torch.inference_mode():
        before = ours(pixels)
        assert ours.precision == torch.float32
        prepared(ours, torch.bfloat16)
        after = ours(pixels)
    assert ours.precision == torch.bfloat16
    assert set(ours.state_dict()) == names
    assert after.deep.dtype == after.shallow.dtype == torch.float32
    for name in ("shallow", "middle", "deep"):
        assert relative_error(getattr(after, name), getattr(before, name)) < 0.05
    held = {k for k, v in ours.state_dict().items() if v.dtype == torch.bfloat16}
    assert {name for name in names if ".qkv." in name or ".lin" in name} <= held
    assert not [name for name in held if "norm" in name or "rel_pos" in name or "embed" in name]


@pytest.mark.parametrize("form", ["plain", "of a GPU"])
def test_a_compiler_can_take_every_block_whole(form: str) -> None:
    """No graph break in either kind of block; with the compiler's front end alone, for time."""
    ours, pixels = encoder(grid=6, window=4, adapter_dim=4), noise(1, 3, 96, 96)
    with torch.inference_mode():
        expected = ours(pixels)
        if form == "of a GPU":
            prepare_for_inference(ours, torch.device("cuda"))
        for block in ours.blocks:
            block.compile(fullgraph=True, backend="eager")
        found = ours(pixels)
    torch.compiler.reset()
    assert relative_error(found.deep, expected.deep) < WITHIN


def test_compile_on_a_cpu_is_refused_with_the_way_out(model_folder: Path) -> None:
    with pytest.raises(UsageError, match="slower there") as caught:
        load_model(model_folder, device=torch.device("cpu"), compiled=True)
    assert str(caught.value).startswith("compile on cpu")


# --- tables ---------------------------------------------------------------------------------------


def test_a_table_is_made_once_for_a_size_and_anew_after_a_change() -> None:
    made: list[tuple[int, ...]] = []

    def make(parameter: Tensor, *sizes: int) -> Tensor:
        made.append(sizes)
        return parameter * sizes[0]

    cache, parameter = TableCache(make), nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        assert cache(parameter, 2) is cache(parameter, 2)
        cache(parameter, 3)
        cache(parameter, 2)
    assert made == [(2,), (3,)]
    with torch.no_grad():
        parameter.mul_(5)
        assert cache(parameter, 2).tolist() == [10, 10, 10]
        parameter.data = torch.full((3,), 7.0)
        assert cache(parameter, 2).tolist() == [14, 14, 14]
    assert cache(parameter, 2).requires_grad, "where gradients are wanted nothing is kept"


def test_many_sizes_do_not_pile_up() -> None:
    cache, parameter = TableCache(relative_table), nn.Parameter(noise(5, 4))
    with torch.inference_mode():
        for side in range(2, 60):
            assert cache(parameter, side).shape == (side, side, 4)
            assert len(cache._known) <= TableCache.KEPT


def test_positions_are_interpolated_once_for_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, calls = prepared(encoder(grid=6)), []
    real = F.interpolate

    def counted(*args: object, **options: object) -> Tensor:
        calls.append(1)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(image_encoder.F, "interpolate", counted)
    with torch.inference_mode():
        seen = []
        for _ in range(3):
            ours(noise(1, 3, 128, 128))
            seen.append(len(calls))
    assert seen[0] > 0
    assert all(a == b for a, b in pairwise(seen))


# --- on a GPU, and on photos ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["one_hot", "biased", "flex"])
def test_every_way_of_a_gpu_is_softmax_with_a_bias(way: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v, rel_h, rel_w = _case(2, 3, 32, 32, 64)
    # Biases as large as the logits: bfloat16 has no digits left for biases in the tens.
    tables = rel_h / 8, rel_w / 8
    case = [tensor.cuda().to(dtype) for tensor in (q, k, v, *tables)]
    expected = _written_out(*(tensor.double() for tensor in case)).float()
    with torch.inference_mode():
        found = WAYS[way](*case)
    within = 1e-3 if dtype == torch.float32 else 0.02
    assert relative_error(found.float(), expected) < within


@pytest.mark.photos
@pytest.mark.parametrize(
    ("precision", "least"), [(torch.float32, 0.999), (torch.bfloat16, 0.99)], ids=["fp32", "bf16"]
)
def test_masks_of_the_fast_path_are_those_of_the_plain_one(
    repo: Path, precision: torch.dtype, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(repo / "benchmarks"), *sys.path])
    import parity

    photos = sorted(parity.PHOTOS.glob("*.jpg"))[:12]
    if not photos:
        pytest.skip("no photos beside the checkout")
    found = parity.overlaps(photos, precision, torch.device("cpu"))
    assert sum(found) / len(found) >= least
