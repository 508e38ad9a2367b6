"""Every protocol against cases worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support.eval_files import Mask, box_mask

from risam_cli.data.images.frames import sam_frame
from risam_cli.data.readers.predictions import Answer
from risam_cli.errors import UsageError
from risam_cli.evaluation.protocol import mask_rule
from risam_cli.evaluation.scoring import (
    Answered,
    Scored,
    Scorer,
    resize_nearest,
    warp_through_letterbox,
)
from risam_cli.masks import rle as masks
from risam_cli.metrics.figures import ExpressionScore, summarize
from risam_cli.metrics.protocols import PROTOCOLS, get_protocol
from risam_cli.segmenters.segmenter import GridMaps
from risam_cli.types import Expression, Sample

#                       I    U    P    G  nothing  head
HIT = ExpressionScore("hit", "1", 80, 100, 90, 90)
HALF = ExpressionScore("half", "2", 50, 100, 70, 80)
NONE_RIGHT = ExpressionScore("none-right", "3", 0, 0, 0, 0, True, True)
NONE_MASK = ExpressionScore("none-mask", "4", 0, 40, 40, 0, True, False)
NONE_BOTH = ExpressionScore("none-both", "5", 0, 30, 30, 0, True, True)  # flag set, mask kept
NONE_SILENT = ExpressionScore("none-silent", "6", 0, 0, 0, 0, True, False)  # empty, no flag
LOST_EMPTY = ExpressionScore("lost-empty", "7", 0, 60, 0, 60, False, True)
LOST_MASK = ExpressionScore("lost-mask", "8", 45, 75, 60, 60, False, True)  # flag on a good mask
MISSING = ExpressionScore("missing", "9", 0, 20, 0, 20, missing=True)
MISSING_NONE = ExpressionScore("missing-none", "9", 0, 0, 0, 0, True, missing=True)


def _check(found: dict[str, float], **expected: float) -> None:
    for name, value in expected.items():
        assert found[name.replace("pr", "pr@0.")] == pytest.approx(value, abs=1e-15), name


def test_every_protocol_has_its_definition() -> None:
    assert list(PROTOCOLS) == ["native", "lavt", "cris", "gres", "lisa", "phrasecut"]
    for protocol in PROTOCOLS.values():
        assert str(protocol.threshold) in protocol.definition or protocol.name == "lisa"
        canvas = f"{protocol.canvas}x{protocol.canvas}"
        assert (canvas in protocol.definition) == (protocol.canvas > 0)
        assert ("IoU > X" in protocol.definition) == protocol.strict
        assert ("IoU >= X" in protocol.definition) != protocol.strict
    with pytest.raises(UsageError, match="native, lavt"):
        get_protocol("official")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_without_empty_masks_all_agree_but_for_the_edge(name: str) -> None:
    found = summarize([HIT, HALF], name)
    _check(found, oiou=130 / 200, ciou=130 / 200, miou=0.65, giou=0.65, t_acc=1.0)
    strict = name in ("cris", "phrasecut")  # 0.5 and 0.8 are reached exactly
    _check(found, pr5=0.5 if strict else 1.0, pr7=0.5, pr8=0.0 if strict else 0.5, pr9=0.0)


def test_native() -> None:
    scores = [HIT, NONE_RIGHT, NONE_MASK, NONE_BOTH, NONE_SILENT, LOST_EMPTY, LOST_MASK]
    _check(
        summarize(scores, "native"),
        # A flag empties the mask: NONE_BOTH adds nothing, LOST_MASK adds its truth.
        oiou=80 / (100 + 0 + 40 + 0 + 0 + 60 + 60),
        miou=(0.8 + 1 + 0 + 1 + 1 + 0 + 0) / 7,
        giou=(0.8 + 1 + 0 + 1 + 1 + 0 + 0) / 7,
        pr8=4 / 7,
        pr9=3 / 7,
        n_acc=3 / 4,
        t_acc=1 / 3,
    )


@pytest.mark.parametrize("name", ["lavt", "cris", "phrasecut"])
def test_empty_against_empty_is_zero_where_the_field_has_it_so(name: str) -> None:
    scores = [HIT, NONE_RIGHT, NONE_MASK, NONE_BOTH, LOST_EMPTY, LOST_MASK]
    _check(
        summarize(scores, name),
        # The head is not asked: masks alone count.
        oiou=(80 + 45) / (100 + 0 + 40 + 30 + 60 + 75),
        miou=(0.8 + 0 + 0 + 0 + 0 + 0.6) / 6,
        giou=(0.8 + 1 + 0 + 0 + 0 + 0.6) / 6,
        n_acc=1 / 3,
        t_acc=2 / 3,
    )


def test_lisa() -> None:
    scores = [HIT, NONE_RIGHT, NONE_MASK, NONE_BOTH, LOST_EMPTY, LOST_MASK]
    _check(
        summarize(scores, "lisa"),
        oiou=(80 + 45) / (100 + 0 + 40 + 30 + 60 + 75),
        miou=(0.8 + 1 + 0 + 0 + 0 + 0.6) / 6,
        giou=(0.8 + 1 + 0 + 0 + 0 + 0.6) / 6,
        n_acc=1 / 3,
        t_acc=2 / 3,
    )


def test_gres() -> None:
    scores = [HIT, HALF, NONE_RIGHT, NONE_MASK, NONE_BOTH, NONE_SILENT, LOST_EMPTY, LOST_MASK]
    _check(
        summarize(scores, "gres"),
        # NONE_BOTH is right by its flag and adds nothing; LOST_MASK keeps the raw union.
        ciou=130 / (100 + 100 + 0 + 40 + 0 + 0 + 60 + 75),
        giou=(0.8 + 0.5 + 1 + 0 + 1 + 0 + 0 + 0) / 8,
        miou=(0.8 + 0.5 + 1 + 0 + 1 + 0 + 0 + 0) / 8,
        pr7=1 / 4,  # of the four with a target
        pr8=1 / 4,
        pr9=0 / 4,
        n_acc=2 / 4,  # by the head alone
        t_acc=2 / 4,
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_missing_answer_is_wrong_whatever_was_right(name: str) -> None:
    found = summarize([HIT, MISSING, MISSING_NONE], name)
    _check(found, oiou=80 / 120, miou=0.8 / 3, giou=0.8 / 3, n_acc=0.0, t_acc=0.5)
    _check(found, pr5=1 / 2 if name == "gres" else 1 / 3)


def test_saying_none_to_everything_is_seen_through() -> None:
    """GIoU is high, N-acc is perfect, and T-acc gives it away."""
    scores = [NONE_RIGHT] * 8905 + [LOST_EMPTY] * 5324
    found = summarize(scores, "gres")
    assert found["giou"] == pytest.approx(0.626, abs=5e-4)  # as published for gRefCOCO val
    assert (found["n_acc"], found["t_acc"], found["ciou"]) == (1.0, 0.0, 0.0)


# --- resolution -----------------------------------------------------------------------------------


def test_nearest_resize_is_pillows() -> None:
    rng = np.random.default_rng(4)
    for height, width in ((7, 11), (480, 640), (613, 401), (1, 3)):
        mask = rng.random((height, width)) < 0.5
        expected = Image.fromarray(mask.astype(np.uint8)).resize(
            (480, 480), Image.Resampling.NEAREST
        )
        found = masks.decode(resize_nearest(masks.encode(mask), 480))
        np.testing.assert_array_equal(found, np.array(expected).astype(bool))


def _score(protocol: str, predicted: Mask, true: Mask, **answer: Any) -> Scored:
    target = Expression("1", "text", masks.encode(true), not true.any())
    sample = Sample("a.jpg", Path("a.jpg"), (target,), true.shape)
    scorer = Scorer(get_protocol(protocol), lambda line: None)
    empty = not predicted.any()
    scorer.add(Answered(sample, (Answer(masks.encode(predicted), empty, **answer),)))
    return scorer.finish()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_masks_are_counted_at_the_protocols_size(protocol: str) -> None:
    true = box_mask((0, 0, 30, 40))  # the left half of 40 x 60
    predicted = box_mask((15, 0, 45, 40))
    table = _score(protocol, predicted, true).table
    pixels = 480 * 480 if protocol in ("lavt", "gres") else 40 * 60
    assert table.gt_area[0] == pixels // 2
    assert table.intersection[0] == pixels // 4
    assert table.union[0] == 3 * pixels // 4


@pytest.mark.parametrize("protocol", ["lavt", "gres"])
def test_masks_that_are_at_the_canvas_already_stay_as_they_are(protocol: str) -> None:
    true = box_mask((0, 0, 30, 40))
    predicted = np.zeros((480, 480), bool)
    predicted[:, :241] = True  # one column too many, finer than the image can say
    table = _score(protocol, predicted, true).table
    assert table.union[0] - table.intersection[0] == 480


def test_the_letterbox_keeps_a_smooth_mask_and_its_place() -> None:
    y, x = np.mgrid[:120, :200]
    soft = (1 / (1 + np.exp((np.hypot(y - 60, x - 110) - 35) / 6))).astype(np.float32)
    back = warp_through_letterbox(soft, 416)
    assert back.shape == soft.shape
    assert np.abs(back - soft)[4:-4, 4:-4].max() < 0.02
    assert not warp_through_letterbox(np.zeros((9, 5), np.float32), 416).any()


def test_the_letterbox_is_cris_own_transform() -> None:
    """Where a pixel of the image lands on the 416 canvas, by CRIS's getTransformMat."""
    probabilities = np.zeros((100, 200), np.float32)
    probabilities[40, 150] = 1.0
    scale = 416 / 200
    top = (416 - 100 * scale) / 2
    seen = {}

    def spy(image: Any, matrix: Any, size: Any, flags: int) -> Any:
        seen[size] = matrix @ np.array([150, 40, 1.0])
        return original(image, matrix, size, flags=flags)

    original = cv2.warpAffine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cv2.warpAffine", spy)
        warp_through_letterbox(probabilities, 416)
    assert seen[416, 416] == pytest.approx([150 * scale, 40 * scale + top], abs=1e-3)


def _maps(probability: float) -> GridMaps:
    value = float(np.log(probability / (1 - probability)))
    return GridMaps(torch.full((2, 16, 16), value), sam_frame(64), (60, 64))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_thresholds_are_applied_to_probabilities(protocol: str) -> None:
    rule = get_protocol(protocol)
    for probability in (0.34, 0.36, 0.49, 0.51):
        made = mask_rule(rule)(_maps(probability), (60, 64), rule.threshold).numpy()
        assert len(made) == 2
        inner = made[0][8:-8, 8:-8]  # bicubic ringing at the canvas's edge is CRIS's own
        assert inner.all() == (probability > rule.threshold)
        assert inner.any() == (probability > rule.threshold)
        expected = (480, 480) if protocol in ("lavt", "gres") else (60, 64)
        assert made[0].shape == expected


def test_logits_go_to_the_canvas_without_the_images_size_between() -> None:
    """A boundary between two pixels of a tiny image still has 480 columns' precision."""
    logits = torch.linspace(3, -3, 16).expand(1, 16, 16)
    maps = GridMaps(logits, sam_frame(64), (4, 4))
    made = mask_rule(get_protocol("lavt"))(maps, (4, 4), 0.5).numpy()
    assert 0.48 < made[0].mean() < 0.52
    assert len(np.unique(made[0].sum(axis=1))) == 1
