"""Decoding the expressions of an image together gives what the plain equations give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import (
    SWITCHES,
    WITH_STEM,
    features,
    in_double,
    prepared,
    relative_error,
    small_model,
)
from torch import Tensor

from risam_cli.model.fast import decoding
from risam_cli.model.fast.decoding import FastRisam, HostRisam
from risam_cli.model.fast.prepare import prepare_for_inference, take_plain_forms
from risam_cli.model.mask_decoder import Decoded
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.text_encoder import TextFeatures

SAM: dict[str, Any] = {"kind": "sam"}
OWNERS = torch.tensor([0, 0])


def both(
    model: Risam, image: ImageFeatures, text: TextFeatures, owner: list[int]
) -> tuple[Decoded, Decoded]:
    """The fast form, and the plain one."""
    index = torch.tensor(owner)
    take_plain_forms(model)
    batched = model.decode(image, text, index)
    prepared(model)
    assert isinstance(model, FastRisam)
    with torch.inference_mode():
        return model.decode(image, text, index), batched


def assert_equal(found: Decoded, expected: Decoded) -> None:
    for name in ("mask_logits", "iou", "no_target_logits"):
        a, b = getattr(found, name), getattr(expected, name).detach()
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-10, name


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch(switch: str) -> None:
    model, _ = small_model(**SWITCHES[switch])
    in_double(model)
    image, text = features(model, (4, 4), 2, [3, 5, 1, 2])
    assert_equal(*both(model, image, text, [1, 0, 1, 1]))


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    owners=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    rows=st.integers(1, 50),
    together=st.integers(1, 200),
    stem=st.booleans(),
)
def test_any_grid_any_lengths_any_parts(
    grid: tuple[int, int],
    lengths: list[int],
    owners: list[int],
    rows: int,
    together: int,
    stem: bool,
) -> None:
    model, _ = small_model(**(WITH_STEM if stem else {}))
    in_double(model)
    image, text = features(model, grid, 3, lengths)
    before = decoding.ROWS, decoding.GROUP_ROWS
    decoding.ROWS, decoding.GROUP_ROWS = rows, together
    try:
        assert_equal(*both(model, image, text, owners[: len(lengths)]))
    finally:
        decoding.ROWS, decoding.GROUP_ROWS = before


def test_on_large_grids_an_expression_does_not_depend_on_those_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, whatever stands before it and however long the longest is."""
    monkeypatch.setattr(decoding, "GROUP_ROWS", 31)  # of 16 regions each: one by one
    model = prepared(small_model()[0])
    image, text = features(model, (4, 4), 1, [3, 6, 2])
    image = ImageFeatures(image.visual.float(), None)
    with torch.inference_mode():
        whole = model.decode(image, _cut(text, slice(0, 3), 6), torch.tensor([0, 0, 0]))
        alone = model.decode(image, _cut(text, slice(2, 3), 2), torch.tensor([0]))
    assert torch.equal(whole.mask_logits[2], alone.mask_logits[0])
    assert torch.equal(whole.no_target_logits[2], alone.no_target_logits[0])


def _cut(text: TextFeatures, rows: slice, length: int) -> TextFeatures:
    words: Tensor = text.words[rows, :length].float()
    return TextFeatures(words, text.valid[rows, :length], text.sentence[rows].float())


def test_prepared_again_it_has_the_weights_of_then() -> None:
    model = prepared(in_double(small_model(**WITH_STEM)[0]))
    image, text = features(model, (4, 4), 1, [3, 2])
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1  # other memory, as an optimizer or a cast has it
    assert_equal(*both(model, image, text, [0, 0]))


def test_prepared_under_autocast_it_has_its_weights_in_their_own_format() -> None:
    image, text = features(small_model()[0], (4, 4), 1, [3, 2])
    whole, found = _cut(text, slice(0, 2), 3), []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower), torch.inference_mode():
            model = prepared(small_model()[0])
            decoded = model.decode(ImageFeatures(image.visual.float(), None), whole, OWNERS)
        found.append(decoded.mask_logits)
    assert torch.equal(*found)


def test_one_grid_after_another() -> None:
    model = prepared(in_double(small_model()[0]))
    for grid in ((4, 4), (3, 5), (4, 4)):
        image, text = features(model, grid, 1, [2])
        with torch.inference_mode():
            found = model.decode(image, text, torch.tensor([0]))
        fresh, _ = both(in_double(small_model()[0]), image, text, [0])
        assert torch.equal(found.mask_logits, fresh.mask_logits)


def test_features_of_the_image_are_left_as_they_are() -> None:
    model = in_double(prepared(small_model(**WITH_STEM)[0]))
    image, text = features(model, (4, 4), 1, [3, 3])
    assert image.fine is not None
    visual, fine = image.visual.clone(), image.fine.clone()
    with torch.inference_mode():
        model.decode(image, text, torch.tensor([0, 0]))
    assert torch.equal(image.visual, visual)
    assert torch.equal(image.fine, fine)


def test_no_expression_at_all() -> None:
    model = prepared(in_double(small_model()[0]))
    image, text = features(model, (4, 4), 1, [1])
    none = TextFeatures(text.words[:0], text.valid[:0], text.sentence[:0])
    with torch.inference_mode():
        found = model.decode(image, none, torch.tensor([], dtype=torch.long))
    assert found.mask_logits.shape == (0, 16, 16)
    assert found.iou.shape == found.no_target_logits.shape == (0,)


@pytest.mark.parametrize(
    ("limit", "numbers", "expected"),
    [
        (8, [3, 4, 5], [slice(3, 6)]),
        (2, [0, 1, 2, 3, 4], [slice(0, 1), slice(1, 3), slice(3, 5)]),
        (1, [1, 3], [slice(1, 2), slice(3, 4)]),
        (4, [0, 2, 5], [[0, 2, 5]]),
    ],
)
def test_groups_are_few_and_even(limit: int, numbers: list[int], expected: list[Any]) -> None:
    assert list(decoding._groups(numbers, limit)) == expected


def test_gpus_and_other_decoders_decode_as_the_plain_form() -> None:
    for model, device, form in (
        (small_model()[0], "cuda", Risam),
        (small_model(**SAM)[0], "cpu", HostRisam),
    ):
        prepare_for_inference(model, torch.device(device))
        assert type(model) is form
        assert form.decode is Risam.decode
