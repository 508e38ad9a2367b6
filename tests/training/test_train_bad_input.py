"""Whatever is wrong with a training's settings, data and weights ends it in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.made_parts import TEXT_MAKERS, frozen_run, sam_file
from support.training_runs import RAW, settings, write_coco

from risam_cli.cli import main
from risam_cli.settings.load import merge


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sam.pth, bert/ and mine/pairs.json; read-only."""
    folder = tmp_path_factory.mktemp("made")
    sam_file(folder / "sam.pth")
    TEXT_MAKERS["bert"](folder / "bert")
    write_coco(folder / "mine")
    return folder


def _raw(made: Path, output: Path) -> dict[str, Any]:
    coco = {
        "dataset": "coco",
        "annotations": str(made / "mine/pairs.json"),
        "images": str(made / "mine/images"),
    }
    raw = merge(RAW, frozen_run(made / "sam.pth", made / "bert"))
    return {**raw, "output": str(output), "train": coco, "val": {"mine": coco}}


def _train(raw: dict[str, Any], tmp_path: Path, *more: str) -> int:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(raw))
    return main(["train", str(path), *more])


def _one_line(text: str) -> str:
    """The error, which is the last thing told, in one line with its place and what to do."""
    lines = [line for line in text.splitlines() if line.startswith(("error: ", "Error: "))]
    assert len(lines) == 1, text
    assert text.rstrip().endswith(lines[0]), text
    assert "Traceback" not in text
    return lines[0]


Change = Callable[[dict[str, Any], Path], Any]
WRONG: dict[str, tuple[Change, str]] = {
    "a misspelt key": (
        lambda raw, made: raw.update(augmnet={"flip": 0.5}),
        r"train\.yaml: unknown key 'augmnet'; did you mean 'augment'\?",
    ),
    "a wrong type": (
        lambda raw, made: raw["stages"][0].update(steps="many"),
        r"train\.yaml: stages\.0\.steps = 'many': .*integer",
    ),
    "a value out of range": (
        lambda raw, made: raw["stages"][0].update(learning_rate=-1.0),
        r"train\.yaml: stages\.0\.learning_rate = -1\.0: .*greater than 0",
    ),
    "a missing annotation file": (
        lambda raw, made: raw["train"].update(annotations=str(made / "mine/pears.json")),
        r"annotations = '.*pears\.json': no such file or folder; did you mean '.*pairs\.json'\?",
    ),
    "a folder for the annotation file": (
        lambda raw, made: raw["train"].update(annotations=str(made / "mine")),
        r"train: the annotations were not found; looked for: .*mine/instances\.json, .*; name the "
        r"JSON file itself with train\.annotations, such as .*mine/pairs\.json",
    ),
    "a missing SAM file": (
        lambda raw, made: raw["model"]["image_encoder"].update(checkpoint=str(made / "sem.pth")),
        r"model\.image_encoder\.checkpoint = '.*sem\.pth': no such file or folder; did you mean",
    ),
    "a missing text encoder": (
        lambda raw, made: raw["model"]["text_encoder"].update(source=str(made / "brt")),
        r"cannot load text encoder '.*brt'",
    ),
    "a split that is not there": (
        lambda raw, made: raw["val"]["mine"].update(split="val"),
        r"val\.mine: .*pairs\.json has no split 'val'; its splits: none but 'all'",
    ),
    "a split that is empty": (
        lambda raw, made: raw.update(train=_empty(raw["train"], made)),
        r"train: .*empty\.json holds no expressions",
    ),
    "a SAM file of another size": (
        lambda raw, made: raw["model"]["image_encoder"].update(
            checkpoint=str(sam_file(made / "wide.pth", dim=48))
        ),
        r"wide\.pth is a ViT of width 48, 3 blocks, the model's image encoder is a ViT of width 32",
    ),
    "a preset that the SAM file does not fit": (
        lambda raw, made: raw.update(model=_preset(raw["model"], "vit_h")),
        r"sam\.pth is a ViT of width 32, 3 blocks, the model's image encoder is a ViT-H",
    ),
    "a model folder that is none": (
        lambda raw, made: (
            raw["model"]["image_encoder"].update(checkpoint=None),
            raw.update(init_from=str(made / "mine")),
        ),
        r"model folder .*mine lacks config\.json",
    ),
    "a model folder of another network": (
        lambda raw, made: (
            raw["model"]["image_encoder"].update(checkpoint=None),
            raw.update(init_from="refshapes-tiny"),
        ),
        r"init_from|config\.json",
    ),
}


def _empty(data: dict[str, Any], made: Path) -> dict[str, Any]:
    content = json.loads(Path(data["annotations"]).read_text())
    path = made / "mine/empty.json"
    path.write_text(json.dumps({**content, "expressions": []}))
    return {**data, "annotations": str(path)}


def _preset(model: dict[str, Any], name: str) -> dict[str, Any]:
    """A preset's own encoder, but for what would make it slow to build."""
    return {
        **model,
        "preset": name,
        "image_encoder": {
            "checkpoint": model["image_encoder"]["checkpoint"],
            "image_size": 64,
            "mlp_ratio": 0.01,
        },
    }


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_ends_training_in_one_line(
    made: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[case]
    raw = json.loads(json.dumps(_raw(made, tmp_path / "run")))
    change(raw, made)
    assert _train(raw, tmp_path) == 1
    assert re.search(message, _one_line(capsys.readouterr().err))
    assert not (tmp_path / "run/best").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line_whoever_reads_it(
    made: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = write_coco(tmp_path / "mine")
    broken = tmp_path / "mine/images/2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    raw = {**_raw(made, tmp_path / "run"), "train": coco, "workers": workers}
    assert _train(raw, tmp_path) == 1
    assert str(broken) in _one_line(capsys.readouterr().err)


def test_a_picture_of_another_size_than_its_masks_is_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = write_coco(tmp_path / "mine")
    (tmp_path / "mine/images/2.png").write_bytes((tmp_path / "mine/images/1.png").read_bytes())
    assert _train({**_raw(made, tmp_path / "run"), "train": coco}, tmp_path) == 1
    assert re.search(r"2\.png is \(90, 120\) \(H, W\), its masks are", capsys.readouterr().err)


def test_a_checkpoint_of_other_settings_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = _raw(made, tmp_path / "run")
    assert _train(raw, tmp_path) == 0
    capsys.readouterr()
    before = (tmp_path / "run/checkpoints/last.pt").read_bytes()
    raw["augment"] = {"flip": 0.5}
    assert _train(raw, tmp_path, "--resume") == 1
    assert "other settings: augment.flip was 0.0 and is 0.5; resume" in _one_line(
        capsys.readouterr().err
    )
    assert (tmp_path / "run/checkpoints/last.pt").read_bytes() == before


def test_the_weights_that_training_needs_are_looked_at_before_the_output_is_made(
    made: Path, tmp_path: Path
) -> None:
    raw = _raw(made, tmp_path / "run")
    raw["model"]["image_encoder"]["checkpoint"] = str(made / "bert/vocab.txt")
    assert _train(raw, tmp_path) == 1
    assert not (tmp_path / "run").exists()


def test_an_augmented_run_that_is_cut_goes_on_to_the_same_bits(made: Path, tmp_path: Path) -> None:
    """Flips, cuts and colours follow from the step's number as everything else does."""
    changes = {
        **frozen_run(made / "sam.pth", made / "bert", lora={"rank": 2, "dropout": 0.2}),
        "augment": {"flip": 0.5, "crop": 0.5, "shrink": 0.7, "jitter": 0.5},
        "train": {
            "dataset": "mixed",
            "members": {
                "scenes": {"dataset": "refshapes", "scenes": 5, "expressions_per_scene": 2},
                "mine": {"dataset": "coco", "annotations": str(made / "mine/pairs.json"),
                         "images": str(made / "mine/images")},
            },
            "weights": {"mine": 1.5},
        },
    }  # fmt: skip
    changes["stages"][0] |= {"steps": 6, "name": "all"}
    changes |= {"checkpoint_every": 3, "validate_every": 6}
    from risam_cli.training.loop import train

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(whole, **changes), resume=False)

    from risam_cli.training import loop as engine

    saved = engine.TrainingRun._save

    class Cut(Exception):
        pass

    def save_and_stop(self: Any, *rest: Any, **named: Any) -> None:
        saved(self, *rest, **named)
        raise Cut

    patch = pytest.MonkeyPatch()
    patch.setattr(engine.TrainingRun, "_save", save_and_stop)
    with pytest.raises(Cut):
        train(settings(cut, **changes), resume=False)
    patch.undo()
    train(settings(cut, **changes), resume=True)
    states = [
        torch.load(folder / "checkpoints/last.pt", weights_only=True)["model"]
        for folder in (whole, cut)
    ]
    assert states[0].keys() == states[1].keys()
    assert any("lora" in name for name in states[0])
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_a_loader_at_work_does_not_keep_the_process_from_ending() -> None:
    """Its workers ignore SIGTERM, which multiprocessing sends at exit, to wait for their end."""
    script = """
import torch
from risam_cli.training.data.collate import begin_worker
loader = iter(torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=begin_worker))
print(next(loader))
held = [loader]
held.append(held)  # as a traceback holds what its frames hold
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=600, capture_output=True)
    assert done.returncode == 0, done.stderr
