"""Mutual-Aware Attention against the formula, one expression at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.networks import noise, randomize, relative_error, streams
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.mutual_aware_attention import (
    AttentionMaps,
    MutualAwareAttention,
    expression_slots,
    ragged_gather,
    ragged_product,
)

DIM, HEADS, REGIONS, WORDS = 16, 4, 12, 5
# The traps: as many expressions as images, all on one image or in another order.
OWNERS = {
    "one each": [0, 1, 2],
    "another order": [2, 0, 1],
    "all on one, as many as images": [1, 1, 1],
    "ragged": [0, 2, 2, 0, 2],
    "one expression": [1],
    "many on one": [0] * 7,
}


def _block(**switches: Any) -> MutualAwareAttention:
    return randomize(MutualAwareAttention(DIM, HEADS, 24, **switches), 3).eval()


def _run(
    block: MutualAwareAttention,
    inputs: dict[str, Tensor],
    owner: Tensor | None,
    text: Tensor | None = None,
) -> tuple[Tensor, Tensor, AttentionMaps]:
    """Visual features, words and maps; without an owner each row is its expression's own."""
    visual, language = streams(**inputs, owner=owner, text=text)
    seen, said = block(visual, language)
    return seen.features, said.words, block.maps(visual, language)


def _inputs(expressions: int, images: int = 3) -> dict[str, Tensor]:
    lengths = torch.tensor([WORDS, 2, 4, 3, 1, WORDS, 2])[:expressions]
    return {
        "visual": noise(images, REGIONS, DIM, seed=1),
        "visual_position": noise(REGIONS, DIM, seed=2),
        "words": noise(expressions, WORDS, DIM, seed=3),
        "word_position": noise(WORDS, DIM, seed=4),
        "valid": torch.arange(WORDS) < lengths[:, None],
    }


def _by_formula(
    block: Any, visual: Tensor, visual_position: Tensor, words: Tensor, word_position: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One expression of unpadded words, head by head: A, its two softmaxes, residual and FFN."""
    width = DIM // HEADS
    placed = visual + visual_position
    regions = block.affinity_vision(placed)
    keys = block.affinity_language(words + word_position)
    word_values = block.vision_guided.value(words)
    region_values = block.language_guided.value(placed)
    to_words, to_regions, seen, read = [], [], [], []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        affinity = regions[:, part] @ keys[:, part].T / width**0.5  # (N, L)
        to_words.append(affinity.softmax(dim=1))
        to_regions.append(affinity.T.softmax(dim=1))
        seen.append(to_words[-1] @ word_values[:, part])
        read.append(to_regions[-1] @ region_values[:, part])

    def stream(branch: Any, x: Tensor, change: Tensor) -> Tensor:
        x = branch.norm1(x + branch.output(change))
        out: Tensor = branch.norm2(x + branch.ffn(x))
        return out

    return (
        stream(block.vision_guided, visual, torch.cat(seen, dim=1)),
        stream(block.language_guided, words, torch.cat(read, dim=1)),
        torch.stack(to_words),
        torch.stack(to_regions),
    )


@pytest.mark.parametrize("case", OWNERS)
@torch.no_grad()
def test_a_ragged_batch_is_the_formula_for_each_expression(case: str) -> None:
    block, owner = _block(), torch.tensor(OWNERS[case])
    inputs = _inputs(len(owner))
    visual, words, maps = _run(block, inputs, owner=owner)
    assert visual.shape == (len(owner), REGIONS, DIM)
    for row, image in enumerate(owner):
        length = int(inputs["valid"][row].sum())
        expected = _by_formula(
            block,
            inputs["visual"][image],
            inputs["visual_position"],
            inputs["words"][row, :length],
            inputs["word_position"][:length],
        )
        found = (
            visual[row],
            words[row, :length],
            maps.words_of_region[row, :, :, :length],
            maps.regions_of_word[row, :, :length],
        )
        for name, a, b in zip(
            ("visual", "words", "to words", "to regions"), found, expected, strict=True
        ):
            assert relative_error(a, b) < 1e-5, name


@torch.no_grad()
def test_the_visual_stream_of_each_expression_is_its_own_from_the_second_block_on() -> None:
    """With no owner, row e is expression e's own; it must not be taken for an image's."""
    block = _block()
    inputs = _inputs(3)
    own = _run(block, inputs, owner=None)
    owned = _run(block, inputs, owner=torch.arange(3))
    assert torch.allclose(own[0], owned[0], atol=1e-5)
    assert torch.allclose(own[1], owned[1], atol=1e-5)
    moved = _run(block, inputs, owner=torch.tensor([1, 1, 1]))
    assert relative_error(moved[0], own[0]) > 0.05


@torch.no_grad()
def test_both_maps_come_from_one_affinity() -> None:
    """log P(word | region) - log P(region | word) is a sum of a row's and a column's term."""
    block, owner = _block(), torch.tensor([0, 2, 2, 0])
    inputs = _inputs(4)
    inputs["valid"][:] = True
    calls = []
    for part in (block.affinity_vision, block.affinity_language):
        part.register_forward_hook(lambda module, _i, _o: calls.append(module))
    block(*streams(**inputs, owner=owner))
    assert len(calls) == 2, "the affinity is projected once for both branches"
    maps = block.maps(*streams(**inputs, owner=owner))
    difference = maps.words_of_region.log() - maps.regions_of_word.transpose(-1, -2).log()
    centred = (
        difference
        - difference.mean(dim=-1, keepdim=True)
        - difference.mean(dim=-2, keepdim=True)
        + difference.mean(dim=(-2, -1), keepdim=True)
    )
    assert difference.std() > 0.1
    assert centred.abs().max() < 1e-4


@torch.no_grad()
def test_maps_sum_to_one_and_padding_has_no_part_in_either() -> None:
    block, owner = _block(), torch.tensor([0, 2, 2, 0, 1])
    inputs = _inputs(5)
    visual, words, maps = _run(block, inputs, owner=owner)
    assert torch.allclose(maps.words_of_region.sum(dim=-1), torch.ones(5, HEADS, REGIONS))
    assert torch.allclose(maps.regions_of_word.sum(dim=-1), torch.ones(5, HEADS, WORDS))
    padding = ~inputs["valid"]
    assert maps.words_of_region.transpose(1, 3)[padding].abs().max() == 0

    noisy = {**inputs, "words": inputs["words"].clone()}
    noisy["words"][padding] = 1e4
    other_visual, other_words, _ = _run(block, noisy, owner=owner)
    assert torch.equal(visual, other_visual)
    assert torch.equal(words[inputs["valid"]], other_words[inputs["valid"]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_padding_is_masked_in_half_precision_too(dtype: torch.dtype) -> None:
    block, owner = _block().to(dtype), torch.tensor([0, 1, 1])
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _inputs(3).items()}
    visual, words, maps = _run(block, inputs, owner=owner)
    assert torch.isfinite(visual).all()
    assert torch.isfinite(words).all()
    assert maps.words_of_region.transpose(1, 3)[~inputs["valid"]].abs().max() == 0


@pytest.mark.parametrize(
    ("switch", "part", "kept"),
    [
        ("vision_guided", "regions_of_word", "visual"),
        ("language_guided", "words_of_region", "words"),
    ],
)
@torch.no_grad()
def test_a_branch_switched_off_leaves_its_stream_and_the_other_branch_alone(
    switch: str, part: str, kept: str
) -> None:
    full, ablated = _block(), _block(**{switch: False})
    assert getattr(ablated, switch) is None
    assert not any(name.startswith(switch) for name in ablated.state_dict())
    ablated.load_state_dict({k: full.state_dict()[k] for k in ablated.state_dict()})
    inputs, owner = _inputs(4), torch.tensor([0, 2, 2, 0])
    visual, words, maps = _run(full, inputs, owner=owner)
    found: tuple[Tensor, Tensor, AttentionMaps] = _run(ablated, inputs, owner=owner)
    assert (found[0] if kept == "visual" else found[1]) is inputs[kept]
    assert torch.equal(found[1], words) if kept == "visual" else torch.equal(found[0], visual)
    assert torch.equal(getattr(found[2], part), getattr(maps, part))
    assert {found[2].words_of_region is None, found[2].regions_of_word is None} == {True, False}


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "visual_kept", "words_kept"),
    [("none", False, False), ("language", False, True), ("both", True, True)],
)
@torch.no_grad()
def test_a_branch_that_starts_as_an_identity_gives_its_normalized_stream(
    start: Any, visual_kept: bool, words_kept: bool
) -> None:
    torch.manual_seed(0)
    block, inputs = MutualAwareAttention(DIM, HEADS, 24, identity_start=start), _inputs(4)
    owner = torch.tensor([0, 2, 2, 0])
    visual, words, _ = _run(block, inputs, owner=owner)
    for found, stream, kept in (
        (visual, inputs["visual"][owner], visual_kept),
        (words, inputs["words"], words_kept),
    ):
        same = torch.allclose(found, F.layer_norm(stream, (DIM,)), atol=1e-4)
        assert same == kept


@torch.no_grad()
def test_regions_that_read_the_text_do_not_see_what_words_have_seen() -> None:
    owner = torch.tensor([0, 2, 2, 0])
    inputs, text = _inputs(4), noise(4, WORDS, DIM, seed=9)
    seen = {**inputs, "words": noise(4, WORDS, DIM, seed=8)}
    reading = {reads: _block(reads=reads) for reads in ("words", "text", "both")}
    changed = {}
    for reads, block in reading.items():
        first = _run(block, inputs, owner=owner, text=text)
        other = _run(block, seen, owner=owner, text=text)
        assert relative_error(other[1], first[1]) > 0.05, "the words keep their own stream"
        changed[reads] = relative_error(other[0], first[0])
    assert changed["text"] == 0
    assert min(changed["words"], changed["both"]) > 0.01
    # The text's form is the words' form on the text.
    same = _run(reading["words"], {**inputs, "words": text}, owner=owner)[0]
    assert torch.equal(_run(reading["text"], inputs, owner=owner, text=text)[0], same)


@torch.no_grad()
def test_what_words_have_seen_is_added_to_the_text_from_zero_on() -> None:
    block = MutualAwareAttention(DIM, HEADS, 24, reads="both")
    inputs, text, owner = _inputs(4), noise(4, WORDS, DIM, seed=9), torch.tensor([0, 2, 2, 0])
    seen = {**inputs, "words": noise(4, WORDS, DIM, seed=8)}
    first = _run(block, inputs, owner=owner, text=text)[0]
    assert torch.equal(first, _run(block, seen, owner=owner, text=text)[0])


@torch.no_grad()
def test_a_temperature_sharpens_the_regions_of_words_alone() -> None:
    block, inputs, owner = _block(own_temperature=True), _inputs(4), torch.tensor([0, 2, 2, 0])
    block.log_temperature.zero_()
    plain = _run(block, inputs, owner=owner)[2]
    block.log_temperature.fill_(1.0)
    sharp = _run(block, inputs, owner=owner)[2]
    assert torch.equal(plain.words_of_region, sharp.words_of_region)
    assert torch.isfinite(sharp.regions_of_word).all(), "of padding too"
    expected = F.softmax(plain.regions_of_word.log() * torch.tensor(1.0).exp(), dim=-1)
    assert relative_error(sharp.regions_of_word, expected) < 1e-4


# --- no copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OWNERS)
def test_ragged_products_are_those_of_gathered_copies(case: str) -> None:
    owner = torch.tensor(OWNERS[case])
    count = len(owner)
    queries, keys = noise(3, HEADS, REGIONS, 4), noise(count, HEADS, WORDS, 4, seed=1)
    expected = queries[owner] @ keys.transpose(-1, -2)
    assert relative_error(ragged_product(queries, keys, owner), expected) < 1e-6
    weights = F.softmax(noise(count, HEADS, WORDS, REGIONS, seed=2), dim=-1)
    expected = weights @ queries[owner]
    assert relative_error(ragged_gather(weights, queries, owner), expected) < 1e-6


@pytest.mark.parametrize("case", ["ragged", "many on one"])
def test_gradients_of_ragged_products_are_those_of_gathered_copies(case: str) -> None:
    owner = torch.tensor(OWNERS[case])
    results = []
    for ragged in (True, False):
        queries = noise(3, HEADS, REGIONS, 4).requires_grad_()
        keys = noise(len(owner), HEADS, WORDS, 4, seed=1).requires_grad_()
        if ragged:
            product = ragged_product(queries, keys, owner)
            back = ragged_gather(product.transpose(-1, -2), queries, owner)
        else:
            product = queries[owner] @ keys.transpose(-1, -2)
            back = product.transpose(-1, -2) @ queries[owner]
        back.square().sum().backward()
        results.append((queries.grad, keys.grad))
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("owner", [[0] * 9 + list(range(1, 8)), [5] * 9, [3]])
def test_uneven_batches_cost_no_more_than_twice_their_expressions(owner: list[int]) -> None:
    """One image with many expressions among others with one, or with none at all."""
    from torch.utils.flop_counter import FlopCounterMode

    queries = noise(8, HEADS, REGIONS, 4)
    keys = noise(len(owner), HEADS, WORDS, 4, seed=1)
    weights = noise(len(owner), HEADS, WORDS, REGIONS, seed=2)
    with FlopCounterMode(display=False) as spent:
        ragged_product(queries, keys, torch.tensor(owner))
        ragged_gather(weights, queries, torch.tensor(owner))
    assert 0 < spent.get_total_flops() <= 2 * 2 * (2 * len(owner) * HEADS * REGIONS * WORDS * 4)


@torch.no_grad()
def test_image_features_are_projected_once_per_image_not_per_expression() -> None:
    block = _block()
    assert block.language_guided is not None
    sizes: list[int] = []
    for part in (block.affinity_vision, block.language_guided.value):
        part.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    block(*streams(**_inputs(7), owner=torch.tensor([0, 2, 2, 0, 0, 0, 0])))
    assert sizes == [3, 3]


@pytest.mark.parametrize("case", OWNERS)
def test_slots_number_the_expressions_of_each_image(case: str) -> None:
    owner = torch.tensor(OWNERS[case])
    slot, slots = expression_slots(owner, 3)
    for image in range(3):
        mine = slot[owner == image].tolist()
        assert mine == list(range(len(mine)))
    assert slots == max(OWNERS[case].count(image) for image in range(3))
