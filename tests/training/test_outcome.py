"""What a training says of its settings before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training_runs import RAW, SCENES, settings

from risam_cli.training.outcome import doubts_about

REFERRING = RAW["stages"][1]


def _stage(**changes: Any) -> dict[str, Any]:
    return {"stages": [{**REFERRING, **changes}]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"loss": {"target_size": 256}}, "loss.target_size 256 is more than model.image_encoder"),
        (_stage(steps=20, warmup=200), "stage 'fusion': its warmup of 200 steps takes all of its "
         "20 steps, so the learning rate only rises, to 10% of what is set"),
        (_stage(steps=1, warmup=1), "its warmup of 1 step takes all of its 1 step, "),
        (_stage(learning_rate=3), "stage 'fusion': learning_rate is 3, and a step may move"),
        (_stage(encoder_learning_rate=1e-4), "encoder_learning_rate has no effect with"),
        (_stage(encoder_learning_rate=1e-4, train_encoder="yes"), ""),
        (_stage(text_learning_rate=1e-4), ""),
        (_stage(text_learning_rate=1e-4) | {"model": {"text_encoder": {"trainable": False}}},
         "text_learning_rate has no effect with model.text_encoder.trainable: false"),
        ({"early_stopping": {"patience": 1}}, ""),
        ({"early_stopping": {"patience": 2}}, "early_stopping ends no stage before its last step: "
         "its patience is 2, and no stage has more than 2 validations (validate_every 7)"),
        ({"val": {"a": {**SCENES, "split": "train", "scenes": 2}}},
         "train draws the scenes that val.a asks about, so its figures are inflated"),
        ({"val": {"a": {**SCENES, "split": "train", "seed": 1}}}, ""),
        ({"train": {"dataset": "mixed", "members": {"one": {**SCENES, "split": "val"}}}},
         "train draws the scenes that val.held out asks about"),
    ],
)  # fmt: skip
def test_what_is_of_no_use_or_can_only_harm_is_told(changes: dict[str, Any], told: str) -> None:
    if "train" in changes:
        changes = {"stages": [REFERRING], **changes}
    found = list(doubts_about(settings(Path("run"), **changes)))
    assert len(found) == bool(told), found
    assert all(told in line for line in found)
