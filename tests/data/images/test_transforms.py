"""Geometry into the encoder's square and back, against SAM's own and by properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.networks import noise
from torch import Tensor
from torch.nn import functional as F

from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.transforms import (
    PIXEL_MEAN,
    PIXEL_STD,
    fit_size,
    logits_to_size,
    normalize,
    resize_for_encoder,
)
from risam_cli.training.data.dataset import soft_target

SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, st.integers(16, 1024))
def test_fit_size_brings_the_longest_side_to_the_square(height: int, width: int, size: int) -> None:
    fitted = fit_size(height, width, size)
    assert max(fitted) == size
    assert min(fitted) >= 1
    assert (fitted[0] >= fitted[1]) == (height >= width) or fitted[0] == fitted[1]
    assert fit_size(width, height, size) == fitted[::-1]
    # Half a pixel of rounding is all that the shape may change by.
    for side, found in zip((height, width), fitted, strict=True):
        assert abs(side * size / max(height, width) - found) <= 0.5 or found == 1


@pytest.mark.parametrize(
    ("picture", "fitted"),
    [
        ((480, 640), (768, 1024)),
        ((640, 427), (1024, 683)),
        ((1080, 1920), (576, 1024)),
        ((333, 500), (682, 1024)),
        ((1023, 1024), (1023, 1024)),
        ((1, 3000), (1, 1024)),
    ],
)
def test_fit_size_is_that_of_sams_resize_longest_side(
    picture: tuple[int, int], fitted: tuple[int, int]
) -> None:
    """But for the last, where SAM would round to no pixel at all."""
    assert fit_size(*picture, 1024) == fitted


@pytest.mark.parametrize(("height", "width"), [(30, 40), (200, 100), (64, 64), (1, 300), (7, 5)])
def test_resizing_keeps_flat_colours_and_the_longest_side(height: int, width: int) -> None:
    rgb = np.full((height, width, 3), (10, 200, 90), np.uint8)
    out = resize_for_encoder(rgb, 64)
    assert out.shape == (*fit_size(height, width, 64), 3)
    assert (out == (10, 200, 90)).all()


def test_shrinking_averages_so_that_thin_things_do_not_vanish() -> None:
    rgb = np.zeros((256, 256, 3), np.uint8)
    rgb[:, ::4] = 255  # bars of one pixel, which nearest or bilinear sampling would miss or keep
    out = resize_for_encoder(rgb, 64)
    assert np.abs(out.astype(int) - 64).max() <= 1


def test_an_image_of_the_right_size_is_not_touched() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    assert resize_for_encoder(rgb, 64) is rgb


def test_pixels_are_normalized_by_sams_figures_and_padding_is_zero() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, s, dtype=np.uint8) for s in ((16, 10, 3), (8, 16, 3))]
    pixels = sam_frame(16).batch(images).values
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    for row, image in zip(pixels, images, strict=True):
        height, width = image.shape[:2]
        expected = (image - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
        found = row[:, :height, :width].permute(1, 2, 0).numpy()
        assert np.allclose(found, expected, atol=1e-5)
        assert row[:, height:].abs().sum() == 0
        assert row[:, :, width:].abs().sum() == 0


def test_normalize_does_not_write_into_the_batch() -> None:
    batch = torch.full((1, 8, 8, 3), 200, dtype=torch.uint8)
    normalize(batch, [(4, 8)])
    assert (batch == 200).all()


# --- back to the picture --------------------------------------------------------------------------


def _sams_postprocess(
    logits: Tensor, fitted: tuple[int, int], size: int, out: tuple[int, int]
) -> Tensor:
    """segment_anything's ``Sam.postprocess_masks``: to the square, crop, to the picture."""
    masks = F.interpolate(logits[:, None], (size, size), mode="bilinear", align_corners=False)
    masks = masks[..., : fitted[0], : fitted[1]]
    return F.interpolate(masks, out, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize(
    "out", [(480, 640), (640, 427), (1000, 1000), (90, 120), (256, 171), (50, 400)]
)
def test_one_interpolation_gives_sams_masks(out: tuple[int, int]) -> None:
    """On smooth logits, as a network gives them: nearly the same values, and nearly no pixel
    on the other side of the threshold."""
    size = 256
    fitted = fit_size(*out, size)
    coarse = noise(3, 1, 8, 8) * 4
    logits = F.interpolate(coarse, (64, 64), mode="bicubic")[:, 0]
    ours = logits_to_size(logits, fitted, size, out)
    theirs = _sams_postprocess(logits, fitted, size, out)
    assert ours.shape == theirs.shape == (3, *out)
    assert (ours - theirs).abs().max() < 0.05 * logits.abs().max()
    assert ((ours > 0) != (theirs > 0)).float().mean() < 0.002


@pytest.mark.parametrize(
    ("out", "size"), [((40, 64), 64), ((64, 64), 64), ((128, 80), 64), ((30, 90), 64)]
)
def test_a_ramp_over_the_square_stays_the_ramp_of_the_picture(
    out: tuple[int, int], size: int
) -> None:
    """Logits that say where they are: pixel centres must come back as themselves, within the
    square's own edge of half a cell."""
    fitted, cells = fit_size(*out, size), size // 4
    centre = (torch.arange(cells) + 0.5) * 4
    for axis in (0, 1):
        ramp = centre[:, None].expand(cells, cells)[None]
        ramp = ramp if axis == 0 else ramp.transpose(1, 2)
        found = logits_to_size(ramp, fitted, size, out)[0]
        place = (torch.arange(out[axis]) + 0.5) * fitted[axis] / out[axis]
        expected = place.clamp(2, size - 2)
        expected = expected[:, None] if axis == 0 else expected[None]
        assert torch.allclose(found, expected.expand(out), atol=1e-3)


@given(
    grid=st.integers(1, 9),
    out=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    fitted=st.tuples(st.integers(1, 36), st.integers(1, 36)),
)
def test_sampling_is_that_of_grid_sample(
    grid: int, out: tuple[int, int], fitted: tuple[int, int]
) -> None:
    logits = noise(2, grid, grid)
    ways = [
        (torch.arange(pixels) + 0.5) / pixels * (2 * inside / 36) - 1
        for pixels, inside in zip(out, fitted, strict=True)
    ]
    y, x = torch.meshgrid(*ways, indexing="ij")
    places = torch.stack([x, y], dim=-1)[None]
    expected = F.grid_sample(logits[None], places, padding_mode="border", align_corners=False)[0]
    assert torch.allclose(logits_to_size(logits, fitted, 36, out), expected, atol=1e-4)


def test_square_and_padded_pictures_are_sampled_alike() -> None:
    """A square picture goes another way through the code; half a pixel would show."""
    logits = noise(2, 16, 16)
    square = logits_to_size(logits, (64, 64), 64, (100, 100))
    nearly = logits_to_size(logits, (64, 64 - 1e-4), 64, (100, 100))  # type: ignore[arg-type]
    assert torch.allclose(square, nearly, atol=1e-3)


def test_no_expressions_and_half_precision() -> None:
    assert logits_to_size(torch.zeros(0, 8, 8), (32, 16), 32, (10, 5)).shape == (0, 10, 5)
    for fitted in ((32, 16), (32, 32)):
        out = logits_to_size(torch.ones(2, 8, 8, dtype=torch.bfloat16), fitted, 32, (10, 5))
        assert out.dtype == torch.float32
        assert torch.allclose(out, torch.ones(2, 10, 5))


# --- targets --------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_soft_targets_hold_the_masks_area(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.random()
    target = soft_target(mask, 64, 16)
    assert target.shape == (16, 16)
    assert target.dtype == np.uint8
    fitted = fit_size(height, width, 64)
    covered = target.sum() / 255 * 16  # in encoder pixels
    expected = mask.mean() * fitted[0] * fitted[1]
    if max(height, width) >= 64:  # averaged over areas; growing is bilinear, which only nears it
        assert abs(covered - expected) <= 0.02 * 64 * 64 / 4 + 0.01 * expected
    assert (target.sum() == 0) or mask.any()
    edge_row, edge_column = -(-fitted[0] // 4), -(-fitted[1] // 4)
    assert target[edge_row:].sum() == 0
    assert target[:, edge_column:].sum() == 0


def test_a_soft_target_says_how_much_of_each_cell_is_covered() -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[:6, :8] = True  # rows 0-3 fill a cell, rows 4-5 half of the next
    target = soft_target(mask, 64, 16)
    assert target[0, :2].tolist() == [255, 255]
    assert abs(int(target[1, 0]) - 128) <= 1
    assert target[2:].sum() == 0
    assert target[:, 2:].sum() == 0
