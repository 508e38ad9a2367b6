"""The paper's Figure 2 on RefShapes: models side by side, cases chosen by rule.

    python benchmarks/figure2.py -o figure.png RISAM=runs/risam-0/best SAM=runs/sam-0/best …

Asks every model about the first scenes of ``testA`` of every family. The rows are the expressions
where the first model's IoU is furthest ahead of the best of the others (``--each`` of them), those
where it is furthest behind, and those in the middle of that order; one row for an image, no row
where there is no target. Prints each model's mean IoU over all of the expressions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from risam_cli.api.model import load
from risam_cli.data.refshapes.dataset import FAMILIES, RefShapes
from risam_cli.drawing.comparison import ComparisonRow, Panel, draw_comparison
from risam_cli.drawing.png import encode_rgb
from risam_cli.files.write import write_file


@dataclass(frozen=True)
class Case:
    """One expression with its truth and each model's mask and IoU, in the models' order."""

    scene: str
    rgb: NDArray[np.uint8]
    text: str
    truth: NDArray[np.bool_]
    masks: tuple[NDArray[np.bool_], ...]
    iou: tuple[float, ...]

    @property
    def lead(self) -> float:
        """Of the first model over the best of the others, -1..1."""
        return self.iou[0] - max(self.iou[1:])


def main() -> None:
    """Predicts, chooses and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=25, help="of each family")
    parser.add_argument("--each", type=int, default=2, help="best, middle and worst cases")
    options = parser.parse_args()
    if len(options.models) < 2 or any("=" not in model for model in options.models):
        parser.error("give two models or more as NAME=MODEL")
    names, sources = zip(*(model.split("=", 1) for model in options.models), strict=True)
    cases = answered(sources, options.scenes)
    for number, name in enumerate(names):
        print(f"{name}: mean IoU {np.mean([case.iou[number] for case in cases]):.3f}")
    rows = [row(case, names) for case in chosen(cases, options.each)]
    write_file(options.output, encode_rgb(draw_comparison(rows)))


def answered(sources: Sequence[str], scenes: int) -> list[Case]:
    """Every expression of the first scenes with every model's answer."""
    models = [load(source) for source in sources]
    cases = []
    for family in FAMILIES:
        for number in range(scenes):
            item = RefShapes(family, "testA", scenes=scenes)[number]
            texts = [referring.text for referring in item.expressions]
            answers = [model.predict(item.image, texts) for model in models]
            for k, referring in enumerate(item.expressions):
                truth = item.mask(referring)
                masks = tuple(results[k].mask for results in answers)
                ious = tuple(_iou(mask, truth) for mask in masks)
                scene = f"{family}/{number}"
                cases.append(Case(scene, item.image, referring.text, truth, masks, ious))
    return cases


def chosen(cases: Sequence[Case], each: int) -> list[Case]:
    """The furthest ahead, the middle and the furthest behind, one of a scene."""
    order = sorted((case for case in cases if case.truth.any()), key=lambda case: -case.lead)
    taken: set[str] = set()
    rows = []
    for part in (order, order[::-1], order[len(order) // 2 :]):
        picked = []
        for case in part:
            if len(picked) < each and case.scene not in taken:
                taken.add(case.scene)
                picked.append(case)
        rows.append(picked)
    best, worst, middle = rows
    return [*best, *middle, *worst[::-1]]


def row(case: Case, names: Sequence[str]) -> ComparisonRow:
    """A case as the picture shows it."""
    panels = [Panel("image"), Panel("truth", case.truth)]
    for name, mask, iou in zip(names, case.masks, case.iou, strict=True):
        note = f"IoU {iou:.2f}" if mask.any() else f"IoU {iou:.2f}, nothing found"
        panels.append(Panel(name, mask, note))
    return ComparisonRow(case.rgb, f"{case.scene}: {case.text}", tuple(panels))


def _iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


if __name__ == "__main__":
    main()
