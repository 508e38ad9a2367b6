"""Overlays: colours that can be told apart, labels that cover nothing, sizes that fit."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from risam_cli.drawing import overlay
from risam_cli.drawing.overlay import draw_overlay
from risam_cli.drawing.palette import OKABE_ITO, color, indexed_palette, ink
from risam_cli.drawing.text import fit_text, text_mask


def scene(count, size=(480, 640)):
    """A gray image and ``count`` blocks in a grid."""
    rgb = np.full((*size, 3), 128, np.uint8)
    masks = []
    for k in range(count):
        mask = np.zeros(size, np.bool_)
        row, column = divmod(k, 5)
        mask[40 + 100 * row : 90 + 100 * row, 30 + 120 * column : 100 + 120 * column] = True
        masks.append(mask)
    return rgb, masks


def to_linear(rgb):
    share = np.asarray(rgb) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


# Viénot, Brettel and Mollon (1999), on linear RGB; the last is normal sight.
SIGHTS = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    "normal": np.eye(3).tolist(),
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_first_seven_colours_differ_for_colour_blind_readers(sight):
    seen = [np.array(SIGHTS[sight]) @ to_linear(c) for c in OKABE_ITO]
    seen = [np.cbrt(np.clip(s, 0, 1)) for s in seen]
    gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(gaps) > 0.08


def test_56_colours_are_all_different_and_then_repeat():
    colors = [color(k) for k in range(56)]
    assert len(set(colors)) == 56
    assert color(56) == color(0)
    assert indexed_palette().shape == (256, 3)
    assert tuple(indexed_palette()[3]) == color(2)


def test_ink_is_read_on_every_colour():
    for k in range(56):
        dark, light = sorted(
            float(np.dot([0.2126, 0.7152, 0.0722], to_linear(c))) for c in (color(k), ink(color(k)))
        )
        assert (light + 0.05) / (dark + 0.05) > 4.5


def test_outside_of_masks_and_labels_the_image_is_untouched():
    rgb, masks = scene(1)
    before = rgb.copy()
    drawn = draw_overlay(rgb, masks, ["the block"])
    assert np.array_equal(rgb, before)
    assert drawn.shape == rgb.shape
    assert drawn.dtype == np.uint8
    changed = (drawn != rgb).any(axis=2)
    assert changed[masks[0]].all()
    # Label and outline stay within a margin around the mask.
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 10
    assert rows.max() <= 95
    assert columns.max() <= 160


def test_fill_lets_the_image_through_and_the_outline_is_the_pure_colour():
    rgb, masks = scene(1)
    drawn = draw_overlay(rgb, masks, ["x"])
    expected = np.round(0.58 * 128 + 0.42 * np.array(color(0)))
    assert np.allclose(drawn[70, 65], expected, atol=1)
    assert tuple(drawn[89, 65]) == color(0)
    assert tuple(drawn[70, 30]) == color(0)


@pytest.fixture
def plates(monkeypatch):
    """Where labels are drawn, filled as they are: x0, y0, x1, y1 of each."""
    drawn = []
    draw = overlay._draw_tag

    def spy(canvas, tag, x, y, tint, size):
        drawn.append((x, y, x + tag.shape[1], y + tag.shape[0]))
        draw(canvas, tag, x, y, tint, size)

    monkeypatch.setattr(overlay, "_draw_tag", spy)
    return drawn


def test_few_masks_carry_their_phrases_and_none_covers_another(plates):
    rgb, masks = scene(5)
    drawn = draw_overlay(rgb, masks, [f"block number {k}" for k in range(5)])
    assert drawn.shape == rgb.shape
    assert len(plates) == 5
    for a, b in itertools.combinations(plates, 2):
        assert overlay._overlap(a, b) == 0


@pytest.mark.parametrize("count", [7, 20])
def test_many_masks_get_numbers_and_a_legend(count, plates):
    rgb, masks = scene(count)
    drawn = draw_overlay(rgb, masks, [f"the block in place {k}" for k in range(count)])
    assert drawn.shape[0] > rgb.shape[0]
    assert drawn.shape[1] == rgb.shape[1]
    assert len(plates) == count
    for a, b in itertools.combinations(plates, 2):
        assert overlay._overlap(a, b) == 0
    legend = drawn[rgb.shape[0] :]
    for k in range(count):
        assert (legend == color(k)).all(axis=2).sum() > 50


def test_phrases_that_find_no_room_become_numbers():
    rgb, masks = scene(3)
    long = "a phrase that goes on and on until it is as wide as the whole of this image"
    same = [masks[0]] * 6
    assert draw_overlay(rgb, same, [long] * 6).shape[0] > rgb.shape[0]


def test_what_found_nothing_stands_in_the_legend():
    rgb, masks = scene(1)
    drawn = draw_overlay(rgb, [masks[0], np.zeros_like(masks[0])], ["here", "nowhere"])
    assert drawn.shape[0] > rgb.shape[0]


def test_small_images_are_enlarged_by_a_whole_factor():
    rgb, masks = scene(1)
    small, mask = rgb[:100, :130], masks[0][:100, :130]
    assert draw_overlay(small, [mask], ["x"]).shape == (400, 520, 3)


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3)])
def test_odd_sizes_are_drawn(size):
    mask = np.ones(size, np.bool_)
    drawn = draw_overlay(np.zeros((*size, 3), np.uint8), [mask], ["a phrase"])
    assert drawn.shape[2] == 3


def test_no_mask_leaves_the_image_as_it_is():
    rgb, _ = scene(0)
    assert np.array_equal(draw_overlay(rgb, [], []), rgb)


@pytest.mark.parametrize(
    ("masks", "labels", "scores"),
    [
        ([np.zeros((5, 5), np.bool_)], ["a"], None),
        ([np.zeros((480, 640), np.bool_)], [], None),
        ([np.zeros((480, 640), np.bool_)], ["a"], [0.5, 0.5]),
    ],
)
def test_what_does_not_fit_is_refused(masks, labels, scores):
    with pytest.raises(ValueError, match="mask"):
        draw_overlay(scene(0)[0], masks, labels, scores=scores)


def test_text_is_cut_in_the_middle():
    whole = text_mask("the leftmost of the many people", 20)
    cut = fit_text("the leftmost of the many people", 20, 120)
    assert whole.shape[1] > 120 >= cut.shape[1] > 60
    assert cut.shape[0] == whole.shape[0]


@pytest.mark.parametrize(
    "text", ["größte Straße", "левый круг", "", "\x1b[31mred\n", "😀", "\ud800"]
)
def test_any_text_is_drawn(text):
    drawn = text_mask(text, 24)
    assert drawn.shape[0] == round(1.3 * 24)
    assert drawn.any() == bool(text)


def test_threads_that_draw_at_once_draw_what_one_draws():
    asked = [(words, size) for words in ("the rightmost pink circle", "a") for size in (12, 24)]
    alone = [text_mask(*one) for one in asked]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda one: text_mask(*one), asked * 300))
    for place, one in enumerate(drawn):
        assert np.array_equal(one, alone[place % len(asked)])


def test_control_characters_are_drawn_as_escapes():
    assert np.array_equal(text_mask("a\nb", 20), text_mask("a\\nb", 20))
