"""The Mutual-Aware Mask Decoder: ragged batches, padding, ablations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.networks import noise, randomize, relative_error, streams
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.mask_decoder import CrossAttention, Decoded, MutualAwareMaskDecoder

DIM, GRID = 16, (3, 5)
REGIONS, WORDS, EXPRESSIONS = 15, 4, 3
LENGTHS = torch.tensor([4, 2, 3])
OWNER = torch.tensor([1, 0, 1])


def _decoder(**changes: Any) -> MutualAwareMaskDecoder:
    values: dict[str, Any] = {"heads": 2, "layers": 2, "ffn_dim": 24, "mask_dim": 8, **changes}
    return randomize(MutualAwareMaskDecoder(DIM, **values), 11).eval()


def _inputs(decoder: MutualAwareMaskDecoder) -> dict[str, Any]:
    fine = noise(2, 6, 4 * GRID[0], 4 * GRID[1], seed=5)
    return {
        "visual": noise(EXPRESSIONS, REGIONS, DIM, seed=1),
        "visual_position": noise(REGIONS, DIM, seed=2),
        "words": noise(EXPRESSIONS, WORDS, DIM, seed=3),
        "valid": torch.arange(WORDS) < LENGTHS[:, None],
        "sentence": noise(EXPRESSIONS, DIM, seed=4),
        "fine": decoder.project_fine(fine),
        "owner": OWNER,
        "grid": GRID,
    }


def _decode(decoder: MutualAwareMaskDecoder, inputs: dict[str, Any]) -> Decoded:
    decoded: Decoded = decoder(*streams(**inputs, per_expression=True))
    return decoded


def _differs(a: Decoded, b: Decoded) -> list[float]:
    return [
        relative_error(getattr(a, name), getattr(b, name))
        for name in ("mask_logits", "iou", "no_target_logits")
    ]


@pytest.mark.parametrize("fine_dim", [0, 6])
@pytest.mark.parametrize("query_token", [True, False])
@torch.no_grad()
def test_each_expression_is_decoded_as_if_alone_and_unpadded(
    fine_dim: int, query_token: bool
) -> None:
    decoder = _decoder(fine_dim=fine_dim, query_token=query_token)
    inputs = _inputs(decoder)
    together = _decode(decoder, inputs)
    assert together.mask_logits.shape == (EXPRESSIONS, 4 * GRID[0], 4 * GRID[1])
    assert together.iou.shape == together.no_target_logits.shape == (EXPRESSIONS,)
    assert ((together.iou > 0) & (together.iou < 1)).all()
    for row in range(EXPRESSIONS):
        one = slice(row, row + 1)
        length = int(LENGTHS[row])
        fine = inputs["fine"]
        alone = _decode(
            decoder,
            {
                **inputs,
                "visual": inputs["visual"][one],
                "words": inputs["words"][one, :length],
                "valid": inputs["valid"][one, :length],
                "sentence": inputs["sentence"][one],
                "fine": None if fine is None else fine[OWNER[one]],
                "owner": torch.tensor([0]),
            },
        )
        assert relative_error(together.mask_logits[one], alone.mask_logits) < 1e-5
        assert torch.allclose(together.iou[one], alone.iou, atol=1e-6)
        assert torch.allclose(together.no_target_logits[one], alone.no_target_logits, atol=1e-5)


@torch.no_grad()
def test_padded_words_are_not_read() -> None:
    decoder = _decoder()
    inputs = _inputs(decoder)
    noisy = inputs["words"].clone()
    noisy[~inputs["valid"]] = 1e4
    assert (
        max(_differs(_decode(decoder, {**inputs, "words": noisy}), _decode(decoder, inputs))) == 0
    )


@torch.no_grad()
def test_words_guide_the_decoder_and_without_the_query_token_they_do_not() -> None:
    other = noise(EXPRESSIONS, WORDS, DIM, seed=9)
    for query_token in (True, False):
        decoder = _decoder(query_token=query_token)
        inputs = _inputs(decoder)
        moved = _differs(_decode(decoder, {**inputs, "words": other}), _decode(decoder, inputs))
        assert (min(moved) > 1e-3) == query_token
        assert (max(moved) == 0) == (not query_token)
        sentence = inputs["sentence"] + 1
        assert (
            min(
                _differs(
                    _decode(decoder, {**inputs, "sentence": sentence}), _decode(decoder, inputs)
                )
            )
            > 1e-3
        )
    assert "query_token" not in _decoder(query_token=False).state_dict()


@torch.no_grad()
def test_fine_features_sharpen_the_mask_of_their_own_image_only() -> None:
    decoder = _decoder(fine_dim=6)
    inputs = _inputs(decoder)
    before = _decode(decoder, inputs)
    fine = inputs["fine"].clone()
    fine[0] += 1
    after = _decode(decoder, {**inputs, "fine": fine})
    moved = (after.mask_logits - before.mask_logits).abs().amax(dim=(1, 2)) > 1e-3
    assert moved.tolist() == [False, True, False]
    assert torch.equal(after.iou, before.iou)
    assert _decoder().project_fine(noise(1, 6, 12, 20)) is None


@torch.no_grad()
def test_the_mask_is_the_product_of_query_and_pixels() -> None:
    """Moving the mask head's bias along one channel adds that channel of the pixels."""
    decoder = _decoder()
    inputs = _inputs(decoder)
    pixels: list[Tensor] = []
    decoder.up2.register_forward_hook(lambda _m, _i, out: pixels.append(F.gelu(out)))
    before = _decode(decoder, inputs).mask_logits
    decoder.mask_head.layers[-1].bias[3] += 2
    after = _decode(decoder, inputs).mask_logits
    assert torch.allclose(after - before, 2 * pixels[0][:, 3], atol=1e-5)


@torch.no_grad()
def test_cross_attention_is_softmax_attention_head_by_head() -> None:
    ours = randomize(CrossAttention(DIM, 2))
    query, key, value = noise(2, 3, DIM), noise(2, 5, DIM, seed=1), noise(2, 5, DIM, seed=2)
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]])
    q, k, v = ours.query(query), ours.key(key), ours.value(value)
    assert q.shape[-1] == DIM // 2
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        logits = q[..., part] @ k[..., part].transpose(1, 2) / 2.0
        logits = logits.masked_fill(~valid[:, None], -torch.inf)
        heads.append(logits.softmax(dim=-1) @ v[..., part])
    expected = ours.output(torch.cat(heads, dim=-1))
    assert relative_error(ours(query, key, value, valid[:, None, None]), expected) < 1e-5


def test_gradients_reach_every_weight_and_every_input() -> None:
    decoder = _decoder(fine_dim=6)
    inputs = {
        k: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in _inputs(decoder).items()
    }
    # project_fine is part of the way from the stem to the mask.
    inputs["fine"] = decoder.project_fine(noise(2, 6, 12, 20))
    found = _decode(decoder, inputs)
    (found.mask_logits.square().mean() + found.iou.sum() + found.no_target_logits.sum()).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None] == []
    for name in ("visual", "visual_position", "words", "sentence"):
        assert inputs[name].grad.abs().max() > 0, name
