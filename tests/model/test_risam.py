"""The whole network: encode once, decode raggedly; every switch; every weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.networks import (
    BLOCK_FORMS,
    TEXTS,
    WITH_STEM,
    in_double,
    noise,
    prepared,
    relative_error,
    small_model,
)
from torch import Tensor

from risam_cli.model.mask_decoder import Decoded
from risam_cli.model.risam import Risam
from risam_cli.weights.tokenizer import TextTokenizer

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "stem": WITH_STEM,
    "no adapters": {"image_encoder": {"adapter_dim": 0}},
    "no Vision-Guided Attention": {"fusion": {"vision_guided": False}},
    "no Language-Guided Attention": {"fusion": {"language_guided": False}},
    "neither": {"fusion": {"vision_guided": False, "language_guided": False}},
    "no query token": {"decoder": {"query_token": False}},
    "deep features only": {"fusion": {"feature_enhancement": False}},
    "one block": {"fusion": {"blocks": 1}},
    "sam": {"kind": "sam"},
    "cris": {"kind": "cris"},
    "rela": {"kind": "rela"},
    **BLOCK_FORMS,
}
# Weights that a variant does not use, by the start of their names.
UNUSED: dict[str, tuple[str, ...]] = {
    # Without the token the decoder reads no words, so nobody needs the last block's.
    "no query token": ("attention.1.language_guided.",),
    "decoder reads text": ("attention.1.language_guided.",),
    "sam": ("project_position.", "text_encoder.project_words."),
    "rela": ("text_encoder.project_sentence.",),
}
# With the sentence as the only token, attention over tokens has nothing to choose.
OF_ONE_TOKEN = [
    f"{attention}.{part}."
    for attention in ("self_attention", "pixels_to_tokens")
    for part in ("query", "key")
]
OWNER = [1, 0, 1, 1]


@pytest.fixture(autouse=True, params=["plain", "for inference"])
def _both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is built, and as a CPU runs it."""
    if request.param == "plain" or "gradients" in request.node.name:
        return
    plain = small_model

    def small_and_prepared(**changes: Any) -> tuple[Risam, TextTokenizer]:
        model, tokenizer = plain(**changes)
        return prepared(model), tokenizer

    monkeypatch.setitem(globals(), "small_model", small_and_prepared)


def _tokens(tokenizer: TextTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    batch = tokenizer.encode(texts)
    return batch.input_ids, batch.attention_mask


def _same(a: Decoded, row: int, b: Decoded, other: int) -> None:
    assert relative_error(a.mask_logits[row], b.mask_logits[other]) < 1e-5
    assert torch.allclose(a.iou[row], b.iou[other], atol=1e-5)
    assert torch.allclose(a.no_target_logits[row], b.no_target_logits[other], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_ragged_batch_is_its_pairs_one_by_one(variant: str) -> None:
    model, tokenizer = small_model(**VARIANTS[variant])
    in_double(model)
    pixels = noise(2, 3, 64, 64).double()
    together = model(pixels, *_tokens(tokenizer, TEXTS), torch.tensor(OWNER))
    for row, image in enumerate(OWNER):
        alone = model(
            pixels[image : image + 1], *_tokens(tokenizer, [TEXTS[row]]), torch.tensor([0])
        )
        _same(together, row, alone, 0)


@pytest.mark.parametrize(
    "owner", [[0, 0, 0, 0], [3, 1, 0, 2], [2, 2, 2, 2]], ids=["one image", "permuted", "another"]
)
@torch.no_grad()
def test_as_many_expressions_as_images_are_not_taken_for_pairs(owner: list[int]) -> None:
    model, tokenizer = small_model()
    pixels = noise(4, 3, 64, 64)
    image = model.encode_image(pixels)
    text = model.encode_text(*_tokens(tokenizer, TEXTS))
    found = model.decode(image, text, torch.tensor(owner))
    for row, number in enumerate(owner):
        alone = model.decode(
            model.encode_image(pixels[number : number + 1]),
            model.encode_text(*_tokens(tokenizer, [TEXTS[row]])),
            torch.tensor([0]),
        )
        _same(found, row, alone, 0)


@pytest.mark.parametrize("variant", ["full", "stem"])
@torch.no_grad()
def test_selected_features_are_those_of_the_selected_images(variant: str) -> None:
    model, tokenizer = small_model(**VARIANTS[variant])
    image = model.encode_image(noise(3, 3, 64, 64))
    assert (image.fine is None) == (variant == "full")
    text = model.encode_text(*_tokens(tokenizer, TEXTS[:2]))
    whole = model.decode(image, text, torch.tensor([2, 1]))
    for index in (torch.tensor([2, 1]), slice(1, 3)):
        part = image.select(index)
        assert len(part.visual) == 2
        order = [0, 1] if isinstance(index, Tensor) else [1, 0]
        _same(whole, 0, model.decode(part, text, torch.tensor(order)), 0)


@torch.no_grad()
def test_what_is_said_and_what_is_seen_both_move_the_mask() -> None:
    model, tokenizer = small_model()
    pixels = noise(2, 3, 64, 64)
    found = model(
        pixels,
        *_tokens(tokenizer, [TEXTS[0], TEXTS[1], TEXTS[0], "circle red"]),
        torch.tensor([0, 0, 1, 0]),
    ).mask_logits
    for row in (1, 2, 3):
        assert relative_error(found[row], found[0]) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_weight_that_is_used(variant: str) -> None:
    model, tokenizer = small_model(**VARIANTS[variant])
    model.train()
    found = model(noise(2, 3, 64, 64), *_tokens(tokenizer, TEXTS), torch.tensor(OWNER))
    target = noise(*found.mask_logits.shape, seed=8)
    loss = (found.mask_logits * target).mean() + found.iou.sum() + found.no_target_logits.sum()
    loss.backward()
    unused = UNUSED.get(variant, ())
    for name, parameter in model.named_parameters():
        if name.startswith(unused) and unused:
            assert parameter.grad is None, f"{name} is used after all"
            continue
        assert parameter.grad is not None, name
        flat = variant == "no query token" and any(part in name for part in OF_ONE_TOKEN)
        # A key's bias moves all logits of a query alike, which softmax does not see.
        if not name.endswith("key.bias") and not flat:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("variant", "to_words", "to_regions", "blocks"),
    [
        ("full", True, True, 2),
        ("no Vision-Guided Attention", False, True, 2),
        ("no Language-Guided Attention", True, False, 2),
        ("neither", False, False, 0),
        ("sam", False, False, 0),
    ],
)
@torch.no_grad()
def test_attention_maps_of_every_block_are_there_to_look_at(
    variant: str, to_words: bool, to_regions: bool, blocks: int
) -> None:
    model, tokenizer = small_model(**VARIANTS[variant])
    ids, mask = _tokens(tokenizer, TEXTS)
    image, text = model.encode_image(noise(2, 3, 64, 64)), model.encode_text(ids, mask)
    maps = model.attention_maps(image, text, torch.tensor(OWNER))
    assert len(maps) == blocks
    for each in maps:
        assert (each.words_of_region is not None) == to_words
        assert (each.regions_of_word is not None) == to_regions
        if each.words_of_region is not None:
            assert each.words_of_region.shape == (4, 2, 16, ids.shape[1])
            assert torch.allclose(each.words_of_region.sum(dim=-1), torch.ones(4, 2, 16))
        if each.regions_of_word is not None:
            assert each.regions_of_word.shape == (4, 2, ids.shape[1], 16)
            assert torch.allclose(each.regions_of_word.sum(-1), torch.ones(4, 2, ids.shape[1]))


@torch.no_grad()
def test_looking_at_the_maps_changes_no_mask() -> None:
    model, tokenizer = small_model()
    image, text = (
        model.encode_image(noise(1, 3, 64, 64)),
        model.encode_text(*_tokens(tokenizer, TEXTS)),
    )
    owner = torch.zeros(4, dtype=torch.long)
    before = model.decode(image, text, owner).mask_logits
    model.attention_maps(image, text, owner)
    assert torch.equal(model.decode(image, text, owner).mask_logits, before)


@torch.no_grad()
def test_an_image_is_encoded_once_however_many_expressions_follow() -> None:
    model, tokenizer = small_model()
    sizes: list[int] = []
    for part in (model.image_encoder, model.feature_enhancement.norm):
        part.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    model(noise(2, 3, 64, 64), *_tokens(tokenizer, TEXTS), torch.tensor(OWNER))
    assert sizes == [2, 2]


@torch.no_grad()
def test_rectangles_and_other_sizes_go_through() -> None:
    model, tokenizer = small_model(**WITH_STEM)
    found = model(noise(1, 3, 96, 48), *_tokens(tokenizer, TEXTS[:1]), torch.tensor([0]))
    assert found.mask_logits.shape == (1, 24, 12)
    assert torch.isfinite(found.mask_logits).all()


def test_bfloat16_autocast_stays_near_float32() -> None:
    model, tokenizer = small_model()
    inputs = (noise(2, 3, 64, 64), *_tokens(tokenizer, TEXTS), torch.tensor(OWNER))
    with torch.no_grad():
        exact = model(*inputs).mask_logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(*inputs).mask_logits.float()
    assert relative_error(rough, exact) < 0.1


def test_the_parts_are_the_papers_boxes() -> None:
    model, _ = small_model()
    assert isinstance(model, Risam)
    assert [name for name, _ in model.named_children()] == [
        "image_encoder",
        "text_encoder",
        "feature_enhancement",
        "attention",
        "mask_decoder",
        "project_position",
    ]
