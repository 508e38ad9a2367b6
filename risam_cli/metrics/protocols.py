"""The ways in which this field scores masks, each under a name and with its definition in words.

Published tables mix these, so every figure is printed with the protocol beside it. Where a
published evaluation adds a small constant to the union to avoid a division by zero (CRIS 1e-6,
LISA 1e-5), it is left out here: it changes no printed digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from risam_cli.errors import UsageError

Resolution = Literal["image", "stretch", "letterbox"]
NoTarget = Literal["gate", "mask", "head"]
Truth = Literal["union", "once", "resized"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way of scoring.

    Attributes:
        threshold: a pixel belongs to the mask where its probability is above this.
        resolution: where masks are compared. ``image``: at the image's own size. ``stretch``:
            both at ``canvas`` x ``canvas``, the truth by nearest neighbour. ``letterbox``: at the
            image's size, after the probabilities went through a ``canvas`` square by CRIS's
            letterbox and back by its inverse warp.
        canvas: side of that square in pixels; 0 for ``image``.
        empty_iou: the IoU where neither mask has a pixel.
        strict: Pr@X counts IoU > X; else IoU >= X.
        no_target: what counts as the answer "nothing fits". ``gate``: the no-target head says so or
            the mask is empty, and the mask then counts as empty. ``mask``: the mask is empty; the
            head is not asked. ``head``: the head alone, as ReLA scores it.
        targets_only: Pr@X is over expressions that refer to something.
        truth: how an annotation's polygons become its mask. ``union``: pixels that any covers.
            ``once``: pixels that exactly one covers, as sums kept where they equal 1 have it.
            ``resized``: the union, rasterized anew at ``canvas`` x ``canvas`` (RLE, which cannot
            be, by nearest neighbour).
        epsilon: added to the union of an IoU that Pr@X compares.
        single: Pr@X compares with X in single precision.
        precisions: the X of Pr@X.
        definition: the whole in words, for the report.
    """

    name: str
    empty_iou: float
    no_target: NoTarget
    definition: str
    threshold: float = 0.5
    resolution: Resolution = "image"
    canvas: int = 0
    strict: bool = False
    targets_only: bool = False
    truth: Truth = "union"
    epsilon: float = 0.0
    single: bool = False
    precisions: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)


_PROTOCOLS = (
    Protocol(
        "native",
        empty_iou=1.0,
        no_target="gate",
        definition=(
            "Masks are compared at the original image's size. A pixel belongs to the mask where p "
            "> 0.5. An answer is 'no target' where the no-target head says so or the mask is "
            "empty, and its mask then counts as empty. IoU is 1 where neither mask has a pixel. "
            "Pr@X counts IoU >= X over all expressions. The truth is the union of an annotation's "
            "polygons. (This project's own default.)"
        ),
    ),
    Protocol(
        "lavt",
        resolution="stretch",
        canvas=480,
        empty_iou=0.0,
        no_target="mask",
        definition=(
            "As LAVT's test.py: the ground truth is the pixels that exactly one polygon of the "
            "annotation covers (its masks are sums kept where they equal 1), resized to 480x480 "
            "by nearest neighbour, stretching the image, and the prediction is taken at 480x480 "
            "too (from a model: its logits interpolated to 480x480, then p > 0.5). IoU is 0 where "
            "neither mask has a pixel. Pr@X counts IoU >= X. No no-target head is asked: an "
            "answer is 'no target' where its mask is empty."
        ),
        truth="once",
    ),
    Protocol(
        "cris",
        threshold=0.35,
        resolution="letterbox",
        canvas=416,
        empty_iou=0.0,
        strict=True,
        no_target="mask",
        definition=(
            "As CRIS's engine: probabilities on a 416x416 letterboxed canvas are warped back to "
            "the original image's size (inverse affine warp, bicubic, zero outside); a pixel "
            "belongs to the mask where p > 0.35. IoU is 0 where neither mask has a pixel. Pr@X "
            "counts IoU > X, with I / (U + 1e-6) as IoU and X in single precision, as "
            "torch.arange gives it. The truth is the union of an annotation's polygons. No "
            "no-target head is asked. (CRIS's printed 'IoU' is miou here.)"
        ),
        epsilon=1e-6,
        single=True,
    ),
    Protocol(
        "gres",
        resolution="stretch",
        canvas=480,
        empty_iou=1.0,
        no_target="head",
        targets_only=True,
        definition=(
            "As ReLA's evaluator for gRefCOCO: both masks at 480x480, stretched; the ground "
            "truth's polygons are scaled and rasterized anew there (RLE is resized by nearest "
            "neighbour); p > 0.5. The no-target head alone decides 'no target'. Nothing fits and "
            "the head says so: IoU 1, and nothing is added to the unions. Nothing fits and a mask "
            "is given: IoU 0, its area is added to the union. Something fits but the head says "
            "'no target': I = 0, and the union keeps the raw mask. Pr@X counts IoU >= X over "
            "expressions that refer to something (ReLA prints X = 0.7, 0.8, 0.9)."
        ),
        truth="resized",
    ),
    Protocol(
        "lisa",
        empty_iou=1.0,
        no_target="mask",
        definition=(
            "As LISA's validate(): masks at the original image's size, a pixel belongs to the "
            "mask where its logit > 0. The truth is the pixels that exactly one polygon of the "
            "annotation covers (its masks are sums kept where they equal 1). IoU is 1 where "
            "neither mask has a pixel, in gIoU too. An answer is 'no target' where its mask is "
            "empty. LISA prints gIoU and cIoU only; Pr@X here counts IoU >= X."
        ),
        truth="once",
    ),
    Protocol(
        "phrasecut",
        empty_iou=0.0,
        strict=True,
        no_target="mask",
        definition=(
            "As PhraseCut's evaluator: masks at the original image's size, p > 0.5. IoU is 0 "
            "where neither mask has a pixel. Pr@X counts IoU > X; the paper's X = 0.3 is among "
            "them. No no-target head is asked. (Its mean_mask_iou is miou, its cum_mask_iou is "
            "oiou.)"
        ),
        precisions=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
    ),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _PROTOCOLS}


def get_protocol(name: str | Protocol) -> Protocol:
    """The protocol of a name; a protocol is given back as it is. Raises UsageError."""
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol is named {name!r}", f"choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
