"""``risam train``: a run that is cut goes on to the same bits, and says what stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.cli import Cli
from support.paths import REPO
from support.settings_files import load_settings
from support.train_cases import assert_same_run
from support.training_runs import RAW, last_weights, rows, run, settings, write_coco

from risam_cli.console.console import get_console
from risam_cli.errors import ModelError, OutputError, RisamError
from risam_cli.settings.train import OptimizerSettings
from risam_cli.training import optimize
from risam_cli.training.checkpoint import MovingAverage
from risam_cli.training.data.collate import PlannedBatches
from risam_cli.training.optimize import Stepper, rate_factor
from risam_cli.training.stage import TrainingBuilder
from risam_cli.weights.load import load_model


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 dense and 14 referring steps; read-only."""
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    run(output)
    return output


# --- what a run leaves ----------------------------------------------------------------------------


def test_a_run_writes_what_the_contract_says(unbroken: Path) -> None:
    assert {p.name for p in unbroken.iterdir()} == {
        "best", "checkpoints", "config.resolved.yaml", "metrics.jsonl", "pictures", "tensorboard",
        "training.html",
    }  # fmt: skip
    assert load_settings(unbroken / "config.resolved.yaml") == settings(unbroken)
    log = rows(unbroken)
    steps = [(r["stage"], r["step"]) for r in log if r["kind"] == "train"]
    assert steps == [(0, n) for n in range(1, 7)] + [(1, n) for n in range(1, 15)]
    assert {"loss", "mask", "dice", "no_target", "iou", "lr"} <= log[-2].keys()
    assert log[0]["lr"] == 1.0e-3  # the first of two steps of warm-up to 2e-3
    held_out = [r for r in log if r["kind"] == "val" and r["stage"] == 1]
    assert [r["step"] for r in held_out] == [7, 14]
    assert {"held out.miou", "held out.oiou", "held out.n_acc", "best"} <= held_out[0].keys()
    assert log[-1]["expressions"] == 6 * 2 + 14 * 2 * 3
    assert list((unbroken / "tensorboard").iterdir())


def test_the_best_model_answers_and_its_card_has_its_figures(unbroken: Path) -> None:
    loaded = load_model(unbroken / "best", device=torch.device("cpu"))
    card = json.loads((unbroken / "best" / "card.json").read_text())
    best = max(r["best"] for r in rows(unbroken) if r["kind"] == "val")
    assert card["figures"]["best"] == pytest.approx(best, abs=1e-5)
    assert (card["name"], card["stage"]) == ("small", "fusion")
    tokens = loaded.tokenizer.encode(["red circle"])
    with torch.no_grad():
        found = loaded.model(
            torch.zeros(1, 3, 128, 128), tokens.input_ids, tokens.attention_mask, torch.tensor([0])
        )
    assert found.mask_logits.shape == (1, 32, 32)


def test_the_encoder_learns_in_the_first_stage_and_is_frozen_in_the_second(
    unbroken: Path, tmp_path: Path
) -> None:
    run(tmp_path / "first", stages=RAW["stages"][:1])
    first, last = last_weights(tmp_path / "first"), last_weights(unbroken)
    # A checkpoint holds what was trained so far, so the second stage's parts are new in the last.
    assert {n.split(".")[0] for n in first if "image_encoder" not in n} == set()
    assert {n.split(".")[0] for n in last} == {
        "attention", "feature_enhancement", "image_encoder", "mask_decoder", "project_position",
        "text_encoder",
    }  # fmt: skip
    assert [n for n in first if not torch.equal(first[n], last[n])] == []
    fresh = TrainingBuilder(settings(tmp_path / "fresh"), get_console()).model.state_dict()
    assert all(not torch.equal(fresh[n], first[n]) for n in first if n.endswith("lin1.weight"))
    assert all(not torch.equal(fresh[n], last[n]) for n in last if n.endswith("query.weight"))


# --- cut and resumed ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(unbroken: Path, tmp_path: Path) -> None:
    output, config = tmp_path / "run", tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({**RAW, "output": str(output)}))
    process = subprocess.Popen(
        [sys.executable, "-m", "risam_cli", "train", str(config)],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 900
        log = output / "metrics.jsonl"
        while not (log.is_file() and '"stage": 1, "name": "fusion", "step": 5,' in log.read_text()):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    run(output, resume=True)
    assert_same_run(output, unbroken)


def _cut(patch: pytest.MonkeyPatch, here: Callable[[int, int], bool]) -> None:
    """Interrupts a run before the step of a stage that ``here`` says."""
    step = Stepper.__call__

    def cut_here(self: Stepper, parts: Any, rate: float, seed: int) -> Any:
        # A step's seed says which one it is.
        if here(*divmod(seed - RAW["seed"] * 1_000_003, 100_003)):
            raise KeyboardInterrupt
        return step(self, parts, rate, seed)

    patch.setattr(Stepper, "__call__", cut_here)


@pytest.mark.parametrize(
    "cut",
    [(0, 2), (0, 5), (1, 0), (1, 9)],
    ids=["before any checkpoint", "in the first stage", "between the stages", "in the second"],
)
def test_wherever_it_is_cut_it_goes_on_to_the_same_bits(
    unbroken: Path, tmp_path: Path, cut: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _cut(patch, lambda *place: place == cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, unbroken)


def test_a_finished_run_resumed_does_nothing(unbroken: Path, tmp_path: Path) -> None:
    import shutil

    output = shutil.copytree(unbroken, tmp_path / "copy")
    run(output, resume=True)
    assert_same_run(output, unbroken)


def test_two_dense_stages_do_not_depend_on_a_cut_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage's head starts at random, once more."""
    dense = {**RAW["stages"][0], "steps": 2}
    stages = [dense, {**dense, "name": "again"}]
    run(tmp_path / "whole", stages=stages)
    with monkeypatch.context() as patch:
        _cut(patch, lambda stage, step: stage == 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", stages=stages)
    run(tmp_path / "cut", resume=True, stages=stages)
    whole, cut = last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


def test_other_settings_are_refused_and_leave_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _cut(patch, lambda stage, step: (stage, step) == (0, 5))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if "tensorboard" not in p.parts}
    nine = [{**RAW["stages"][0], "steps": 9}, RAW["stages"][1]]
    data = {**RAW["train"], "scenes": 13}
    for changes, told in (
        ({"optimizer": {"weight_decay": 0.5}}, "optimizer.weight_decay was 0.02 and is 0.5"),
        ({"stages": nine}, "stages.0.steps was 6 and is 9"),
        ({"seed": 4, "train": data}, "seed was 3 and is 4, train.scenes was 12 and is 13"),
        (
            {"early_stopping": {"patience": 2}, "validate_every": 3},
            "validate_every was 7 and is 3, early_stopping.patience was not set and is 2",
        ),
    ):
        # What bears on no weight, or on a later stage only, is not what differs.
        others = {"log_every": 3, "loss": {"dice": 3.0}, **changes}
        with pytest.raises(ModelError) as raised:
            run(tmp_path, resume=True, **others)
        assert raised.value.message.endswith(f"belongs to other settings: {told}")
    assert {p: p.read_bytes() for p in files} == files
    # A stage that has not begun may be edited, and so may what bears on no weight.
    later = [RAW["stages"][0], {**RAW["stages"][1], "steps": 1}]
    run(tmp_path, resume=True, stages=later, log_every=2)
    assert rows(tmp_path)[-1]["step"] == 1


def test_a_stage_may_be_added_to_a_finished_run_and_a_begun_one_may_not_change(
    unbroken: Path, tmp_path: Path
) -> None:
    import shutil

    output = shutil.copytree(unbroken, tmp_path / "copy")
    more = {**RAW["stages"][1], "name": "joint", "train_encoder": "yes", "steps": 2}
    changed = {**RAW["stages"][1], "learning_rate": 1e-5}
    told = "other settings: stages.1.learning_rate was 0.002 and is 1e-05; resume"
    with pytest.raises(ModelError, match=told):
        run(output, resume=True, stages=[RAW["stages"][0], changed, more])
    with pytest.raises(
        ModelError, match="other settings: stages were 2 at least and are 1; resume"
    ):
        run(output, resume=True, stages=RAW["stages"][:1])
    run(output, resume=True, stages=[*RAW["stages"], more])
    log = rows(output)
    assert log[: len(rows(unbroken))] == rows(unbroken)
    assert [
        (r["stage"], r["step"]) for r in log if r["name"] == "joint" and r["kind"] == "train"
    ] == [
        (2, 1),
        (2, 2),
    ]


def test_a_folder_with_a_run_is_not_written_over(unbroken: Path) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="holds a training run") as raised:
        run(unbroken)
    assert "resume" in raised.value.settings
    assert (unbroken / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "code", "other"])
def test_a_damaged_checkpoint_is_named(unbroken: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    output = shutil.copytree(unbroken, tmp_path / "copy")
    path = output / "checkpoints" / "last.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    if damage == "code":
        torch.save({"format": 1, "place": _Hostile()}, path)
    if damage == "other":
        torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"last\.pt"):
        run(output, resume=True)
    assert not Path("it ran").exists()


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it ran",)


# --- what stops it --------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "train.yaml"
    stages = [{**RAW["stages"][1], "learning_rate": 1e30, "warmup": 0}]
    config.write_text(yaml.safe_dump({**RAW, "stages": stages, "output": str(tmp_path / "run")}))
    done = cli("train", config)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "is nan at stage 'fusion', step " in done.stderr.replace("is inf", "is nan")
    assert "lower the learning rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gradient_that_is_not_finite_spoils_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss may have such a gradient; the checkpoint after it must stay good."""
    task_loss = optimize.to_device

    def poison(batch: Any, device: torch.device) -> Any:
        poison.calls += 1  # type: ignore[attr-defined]
        return task_loss(batch, device)

    poison.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(optimize, "to_device", poison)
    clip = torch.nn.utils.clip_grad_norm_

    def spoiled(parameters: list[torch.Tensor], limit: float) -> torch.Tensor:
        if poison.calls == 5:  # type: ignore[attr-defined]
            assert parameters[0].grad is not None
            parameters[0].grad[...] = torch.nan
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    with pytest.raises(RisamError, match="gradient is nan at stage 'fusion', step 4") as raised:
        run(tmp_path, stages=RAW["stages"][1:])
    assert "in the batch of images grefshapes train scene " in raised.value.message
    assert "last.pt" in raised.value.fix
    assert all(torch.isfinite(t).all() for t in last_weights(tmp_path).values())


def test_data_without_expressions_is_told_before_the_first_step(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "photos")
    empty = tmp_path / "empty.json"
    content = json.loads(Path(data["annotations"]).read_text())
    empty.write_text(json.dumps({**content, "expressions": []}))
    held_out = {"held out": {**data, "annotations": str(empty)}}
    with pytest.raises(RisamError, match=r"empty\.json"):
        run(tmp_path / "run", train=data, val=held_out, stages=RAW["stages"][1:])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- it learns ------------------------------------------------------------------------------------


def test_it_can_learn_two_scenes_by_heart(tmp_path: Path) -> None:
    stage = {**RAW["stages"][1], "steps": 80, "learning_rate": 4e-3, "train_encoder": "yes"}
    data = {**RAW["train"], "scenes": 2, "family": "refshapes", "unknown_word_rate": 0.0}
    run(
        tmp_path,
        stages=[stage],
        train=data,
        val={"held out": data},
        optimizer={"ema_decay": 0.0},
        validate_every=80,
        checkpoint_every=80,
    )
    losses = [r["loss"] for r in rows(tmp_path) if r["kind"] == "train"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert rows(tmp_path)[-1]["held out.miou"] > 0.3


def test_own_photos_with_adapters_and_a_frozen_text_encoder(tmp_path: Path) -> None:
    """Of both encoders, nothing but the adapters moves; the rest learns."""
    data = write_coco(tmp_path / "photos")
    model = {
        "image_encoder": {"stem": None, "adapter_dim": 4},
        "decoder": {"fine": False},
        "text_encoder": {"trainable": False},
    }
    stage = {**RAW["stages"][1], "steps": 3, "train_encoder": "adapters"}
    shared: dict[str, Any] = {"model": model, "train": data, "val": {"held out": data}}
    run(tmp_path / "none", stages=[{**stage, "steps": 1, "learning_rate": 1e-30}], **shared)
    run(tmp_path / "some", stages=[stage], **shared, optimizer={"ema_decay": 0.0})
    before, after = last_weights(tmp_path / "none"), last_weights(tmp_path / "some")
    moved = {n for n in before if not torch.allclose(before[n], after[n], rtol=0, atol=1e-7)}
    assert any(".adapter.up." in n for n in moved)
    assert not {n for n in moved if n.startswith("image_encoder") and ".adapter." not in n}
    assert not {n for n in moved if n.startswith("text_encoder.backbone")}
    assert any(n.startswith("text_encoder.project_words") for n in moved)
    assert any(n.startswith("mask_decoder") for n in moved)


def test_adapters_are_all_that_starts_at_zero_in_the_encoder(tmp_path: Path) -> None:
    stage = {**RAW["stages"][1], "steps": 3, "train_encoder": "adapters"}
    shared = {"model": {"image_encoder": {"stem_in_deep": True}}}
    run(tmp_path / "none", stages=[{**stage, "steps": 1, "learning_rate": 1e-30}], **shared)
    run(tmp_path / "some", stages=[stage], **shared, optimizer={"ema_decay": 0.0})
    before, after = last_weights(tmp_path / "none"), last_weights(tmp_path / "some")
    moved = {n for n in before if not torch.allclose(before[n], after[n], rtol=0, atol=1e-7)}
    assert "image_encoder.stem_in_deep.proj.weight" in moved
    assert not {n for n in moved if n.startswith("image_encoder") and ".stem_in_deep." not in n}


# --- parts ----------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    rates = [rate_factor(OptimizerSettings(), step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.01 + 0.99 / 2)
    assert 0.01 < rates[99] < 0.012
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rate_factor(OptimizerSettings(), 0, 5, 0) == 1.0
    polynomial = OptimizerSettings(schedule="polynomial", power=2.0, floor=0.1)
    assert rate_factor(polynomial, 5, 100, 10) == pytest.approx(0.6)
    assert rate_factor(polynomial, 55, 100, 10) == pytest.approx(0.1 + 0.9 * 0.25)
    assert rate_factor(polynomial, 100, 100, 10) == pytest.approx(0.1)
    assert rate_factor(OptimizerSettings(schedule="constant"), 99, 100, 10) == 1.0


def test_batches_are_permutations_and_a_function_of_the_step() -> None:
    whole = list(PlannedBatches(7, 3, 0, 14, seed=5))
    flat = [index for batch in whole for index in batch]
    for epoch in range(6):
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7 * epoch, 7 * epoch + 7))
    assert flat[:7] != [index - 7 for index in flat[7:14]]
    assert list(PlannedBatches(7, 3, 9, 14, seed=5)) == whole[9:]
    assert len(PlannedBatches(7, 3, 9, 14, seed=5)) == 5
    assert list(PlannedBatches(7, 3, 0, 14, seed=6)) != whole


def test_the_moving_average_is_one_and_swaps_back() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    average = MovingAverage(layer, 0.5)
    expected, live = torch.zeros(1, 2), torch.zeros(1, 2)
    for update in range(1, 9):
        live = torch.full((1, 2), float(update))
        with torch.no_grad():
            layer.weight.copy_(live)
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * live
    average.swap()
    assert torch.allclose(layer.weight, expected)
    average.swap()
    assert torch.equal(layer.weight, live)
