"""The attention of one expression as a picture, after the paper's Figure 1 (layout ours).

Above, the predicted mask beside the words that inform chosen points most (Vision-Guided
Attention); below, for each word, the regions that it attends to (Language-Guided Attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.drawing.drawing import fitted, with_outline, write_text
from risam_cli.drawing.palette import Color, color, ink
from risam_cli.drawing.text import fit_text, text_mask
from risam_cli.explain.attention import Attention, Word
from risam_cli.explain.explanation import Explained, Explanation, chosen_words, spread
from risam_cli.masks import rle as masks

Rgb = NDArray[np.uint8]

HEAT = np.asarray(cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO))[
    :, 0, ::-1
]
"""(256, 3) RGB from no weight to the most: told apart in gray and by every kind of eye."""

SPECIAL = (150, 155, 160)
"""Gray: a special token is no word."""

_WIDTH, _MARGIN, _GAP = 1200, 28, 14
_INNER = _WIDTH - 2 * _MARGIN
_COLUMNS = 5
_PAPER, _INK, _SOFT, _WARN = (255, 255, 255), (28, 32, 36), (92, 102, 112), (168, 62, 0)
_GROUND = 0.55  # how much of the gray picture shines through where there is no weight


def draw_explanation(explanation: Explanation, explained: Explained) -> Rgb:
    """The picture of one expression, (H, 1200, 3)."""
    attention = explained.attention
    strips = [*_head(explanation, explained), _blank(10), _overview(explanation, explained)]
    if explanation.points and attention.tokens_of_region is not None:
        strips += [_blank(8), *_point_lines(explanation, attention)]
    if attention.regions_of_token is not None:
        strips += [_blank(22), *_word_panels(explanation, attention)]
    return np.concatenate([_blank(20), *strips, _blank(20)])


def blend_heat(gray: Rgb, share: NDArray[np.float32]) -> Rgb:
    """Heat over a gray picture: ``share`` (H, W) in 0..1 chooses colour and opacity."""
    tint = HEAT[np.clip(share * 255 + 0.5, 0, 255).astype(np.uint8)].astype(np.float32)
    cover = (0.9 * np.sqrt(np.clip(share, 0, 1)))[..., None]
    return np.round((1 - cover) * _GROUND * gray + cover * tint).astype(np.uint8)


def enlarge(
    weights: NDArray[np.float32], extent: tuple[float, float], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Weights (rows, columns) at the picture's (H, W), bilinear between the regions' middles.

    Args:
        extent: (height, width) of the picture in regions; the last ones may be cut.
    """
    y = (np.arange(size[0], dtype=np.float32) + 0.5) / size[0] * extent[0] - 0.5
    x = (np.arange(size[1], dtype=np.float32) + 0.5) / size[1] * extent[1] - 0.5
    columns, rows = np.meshgrid(x, y)
    drawn = cv2.remap(weights, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(drawn, np.float32)


def to_gray(rgb: Rgb) -> Rgb:
    """The picture without its colours, (H, W, 3)."""
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), np.uint8)


def word_colors(words: Sequence[Word]) -> list[Color]:
    """A colour for each word; special tokens are gray."""
    real = iter(range(len(words)))
    return [SPECIAL if word.special else color(next(real)) for word in words]


# --- parts of the picture -------------------------------------------------------------------------


def _head(explanation: Explanation, explained: Explained) -> list[Rgb]:
    attention, prediction = explained.attention, explained.prediction
    found = "nothing fits" if prediction.no_target else f"{prediction.area} pixels"
    facts = [explanation.image, explanation.model]
    if attention.blocks:
        facts.append(chosen_words(explanation.block, explanation.head, attention))
    facts.append(f"{found}, score {prediction.score:.3f}")
    lines = [_line(attention.expression, 28, _INK), _line("  ·  ".join(facts), 15, _SOFT)]
    notes = [*prediction.notes, *explanation.missing]
    strange = dict.fromkeys(word.text for word in attention.words if word.unknown)
    if strange:
        quoted = " ".join(f"\u201c{text}\u201d" for text in strange)
        notes.append(f"not in the model's vocabulary, so read as one and the same: {quoted}")
    return [*lines, *(_line(note, 15, _WARN) for note in notes)]


def _overview(explanation: Explanation, explained: Explained) -> Rgb:
    """The mask on the left, the informing words on the right."""
    attention = explained.attention
    room = (_INNER - _GAP) // 2
    picture = fitted(explanation.rgb, room, 620)
    mask = masks.decode(explained.prediction.segmentation)
    left = with_outline(picture, mask)
    caption = "nothing fits" if explained.prediction.no_target else "predicted mask"
    panels = [_panel(left, caption, room)]
    if attention.tokens_of_region is not None:
        right = _informed(explanation, attention, picture)
        where = "at the chosen points" if explanation.points else "at a grid of points"
        title = f"Vision-Guided Attention: the word that informs most, {where}"
        panels.append(_panel(right, title, room))
    return _row(panels)


def _informed(explanation: Explanation, attention: Attention, picture: Rgb) -> Rgb:
    """Each point with its word; special tokens take no part in who is first."""
    weights = attention.words_of_regions(explanation.block, explanation.head)
    assert weights is not None
    drawn = np.round(_GROUND * to_gray(picture) + (1 - _GROUND) * 60).astype(np.uint8)
    tints = word_colors(attention.words)
    real = [number for number, word in enumerate(attention.words) if not word.special]
    points = explanation.shown_points
    scale = picture.shape[1] / explanation.rgb.shape[1]
    across = len({x for x, _ in points}) if not explanation.points else 4
    room = max(30, picture.shape[1] // across - 10)
    size = 14 if room >= 90 else 11
    for number, (x, y) in enumerate(points):
        own = weights[attention.region_at(x, y)]
        if not real:
            continue
        best = max(real, key=lambda k: float(own[k]))
        lead = f"{number + 1}: " if explanation.points else ""
        label = f"{lead}{attention.words[best].text} {own[best]:.0%}"
        _plate(drawn, fit_text(label, size, room), (x * scale, y * scale), tints[best])
    return drawn


def _plate(drawn: Rgb, text: NDArray[np.uint8], middle: tuple[float, float], tint: Color) -> None:
    """Text on a plate of its colour, a dot at the point itself, all inside the picture."""
    height, width = text.shape[0] + 2, text.shape[1] + 8
    x, y = round(middle[0]), round(middle[1])
    cv2.circle(drawn, (x, y), 4, (0, 0, 0), -1, cv2.LINE_AA)
    cv2.circle(drawn, (x, y), 3, tint, -1, cv2.LINE_AA)
    left = int(np.clip(x - width // 2, 0, max(0, drawn.shape[1] - width)))
    top = y + 7 if y + 7 + height <= drawn.shape[0] else max(0, y - 7 - height)
    area = drawn[top : top + height, left : left + width]
    area[:] = tint
    write_text(area[1:, 4:], text, ink(tint))
    cv2.rectangle(drawn, (left, top), (left + width - 1, top + height - 1), (0, 0, 0), 1)


def _point_lines(explanation: Explanation, attention: Attention) -> list[Rgb]:
    """For each chosen point all words, the heaviest first."""
    weights = attention.words_of_regions(explanation.block, explanation.head)
    assert weights is not None
    lines = []
    for number, (x, y) in enumerate(explanation.points):
        own = weights[attention.region_at(x, y)]
        order = np.argsort(-own, kind="stable")
        words = ",  ".join(f"{attention.words[k].text} {own[k]:.0%}" for k in order)
        lines.append(_line(f"{number + 1}  ({x:g}, {y:g}):  {words}", 15, _INK))
    return lines


def _word_panels(explanation: Explanation, attention: Attention) -> list[Rgb]:
    weights = attention.regions_of_words(explanation.block, explanation.head)
    outside = attention.padding_of_words(explanation.block, explanation.head)
    assert weights is not None
    assert outside is not None
    room = (_INNER - (_COLUMNS - 1) * _GAP) // _COLUMNS
    picture = to_gray(fitted(explanation.rgb, room, 280))
    even = 1 / attention.cells
    panels = []
    for word, own, lost in zip(attention.words, weights, outside, strict=True):
        peak = float(own.max())
        share = enlarge(own / peak if peak > 0 else own, attention.extent, picture.shape[:2])
        facts = [f"peak {peak / even:.1f}x even, over {spread(own):.0f} of {own.size}"]
        if outside.max() >= 0.005:
            facts.append(f"{lost:.0%} in the padding")
        mark = " (special)" if word.special else " (unknown)" if word.unknown else ""
        title = word.text + mark
        panels.append(_panel(blend_heat(picture, share), title, room, facts))
    rows = [panels[k : k + _COLUMNS] for k in range(0, len(panels), _COLUMNS)]
    strips = [_line("Language-Guided Attention: the regions that each word attends to", 15, _INK)]
    for row in rows:
        strips += [_blank(8), _row(row)]
    return [*strips, _blank(10), _legend(even)]


def _legend(even: float) -> Rgb:
    """From no weight to the most, and what the figures mean."""
    bar = np.repeat(np.linspace(0, 1, 220, dtype=np.float32)[None], 14, axis=0)
    colours = blend_heat(np.full((*bar.shape, 3), 150, np.uint8), bar)
    strip = _blank(22)
    at = _MARGIN
    for piece in (text_mask("0", 13), colours, text_mask("the map's own peak", 13)):
        top = (strip.shape[0] - piece.shape[0]) // 2
        if piece.ndim == 3:
            strip[top : top + piece.shape[0], at : at + piece.shape[1]] = piece
        else:
            write_text(strip[top:, at:], piece, _SOFT)
        at += piece.shape[1] + 8
    words = (
        f"even: every region the same, {even:.2g}.  over N of M: as spread out as N regions of "
        "the same weight."
    )
    write_text(strip[2:, at + 16 :], fit_text(words, 13, _WIDTH - _MARGIN - at - 16), _SOFT)
    return strip


# --- setting --------------------------------------------------------------------------------------


def _panel(picture: Rgb, title: str, width: int, facts: Sequence[str] = ()) -> Rgb:
    """A picture with its caption above and facts below, a line each."""
    above = _line(title, 16 if facts else 15, _INK, width)
    parts = [above, _blank(4, width), _wide(picture, width)]
    parts += [_line(fact, 12, _SOFT, width) for fact in facts]
    return np.concatenate(parts)


def _row(panels: Sequence[Rgb]) -> Rgb:
    height = max(panel.shape[0] for panel in panels)
    strip = _blank(height)
    at = _MARGIN
    for panel in panels:
        strip[: panel.shape[0], at : at + panel.shape[1]] = panel
        at += panel.shape[1] + _GAP
    return strip


def _line(text: str, size: int, tint: Color, width: int | None = None) -> Rgb:
    """One line of text; over the whole page, with its margins, where no width is given."""
    margin = _MARGIN if width is None else 0
    strip = _blank(round(1.5 * size), width)
    write_text(strip[:, margin:], fit_text(text, size, strip.shape[1] - 2 * margin), tint)
    return strip


def _wide(picture: Rgb, width: int) -> Rgb:
    strip = _blank(picture.shape[0], width)
    strip[:, : picture.shape[1]] = picture
    return strip


def _blank(height: int, width: int | None = None) -> Rgb:
    return np.full((height, width or _WIDTH, 3), _PAPER, np.uint8)
