"""The parts of the training loop: one step in parts and precisions, what is kept, what is shown."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import TEXTS, WITH_STEM, small_model
from torch import nn

from risam_cli.console.console import Console
from risam_cli.errors import ConfigError, RisamError
from risam_cli.inference.device import training_precision
from risam_cli.model.fast.prepare import prepare_for_training
from risam_cli.settings.load import check
from risam_cli.settings.train import OptimizerSettings, TrainSettings
from risam_cli.training.checkpoint import Checkpoints, KeptWeights, Place, Untrained, weights_in
from risam_cli.training.data.collate import DenseBatch, ReferringBatch
from risam_cli.training.distributed import Processes
from risam_cli.training.log import Example, TrainingLog, read_rows
from risam_cli.training.losses import DenseHead, DenseTask, ReferringLoss, ReferringTask
from risam_cli.training.optimize import NotFinite, Stepper, parameter_groups
from risam_cli.training.page import to_html

CPU = torch.device("cpu")


def referring_task(**changes: Any) -> ReferringTask:
    model, _ = small_model(**changes)
    return ReferringTask(model, ReferringLoss(2, 1, 0.2, 0.2, 0.0), encoder_frozen=False)


def batch(images: list[int]) -> ReferringBatch:
    """Some of four images: of different shapes, with 1 to 4 expressions, some without target."""
    _, tokenizer = small_model()
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 256, (10, 16, 16), dtype=torch.uint8, generator=generator)
    owner = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    none = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 0, 1.0])
    targets[none > 0] = 0
    texts = [TEXTS[row % 4] for row in range(10)]
    rows = torch.isin(owner, torch.tensor(images)).nonzero()[:, 0]
    tokens = tokenizer.encode([texts[row] for row in rows])
    return ReferringBatch(
        images=pixels[images],
        fitted=torch.tensor([[64, 64], [40, 64], [64, 30], [64, 64]])[images],
        image_index=torch.tensor([images.index(int(owner[row])) for row in rows]),
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        targets=targets[rows],
        no_target=none[rows],
        weights=torch.ones(len(rows)),
    )


def stepper(task: Any, dtype: torch.dtype = torch.float32, clip: float = 1e9) -> Stepper:
    groups = parameter_groups([(task.module, 1e-3)], OptimizerSettings())
    return Stepper(task, groups, CPU, dtype, Processes(), OptimizerSettings(clip_norm=clip))


def gradients(task: Any, parts: list[Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    figures = stepper(task)(parts, 1.0, 7)
    found = {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}
    return {name: float(value) for name, value in figures.items()}, found


def assert_same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, expected in one.items():
        # Of the largest gradient: some are zero but for rounding.
        assert float((other[name] - expected).abs().max()) < 2e-6, name


# --- one step -------------------------------------------------------------------------------------


def test_a_batch_in_parts_is_the_whole_batch() -> None:
    """Ragged parts: one image with four expressions, three images with six, unlike shares of none.

    Means of the parts' means would differ: the parts have 4 and 6 expressions, 3 and 4 targets.
    """
    whole, expected = gradients(referring_task(), [batch([0, 1, 2, 3])])
    parts, found = gradients(referring_task(), [batch([3]), batch([0, 1, 2])])
    assert whole.keys() == parts.keys() == {
        "loss", "mask", "dice", "no_target", "iou", "expressions",
    }  # fmt: skip
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["expressions"] == 10
    assert_same_gradients(expected, found)


def test_a_dense_batch_in_parts_is_the_whole_batch() -> None:
    def task() -> DenseTask:
        model, _ = small_model(**WITH_STEM)
        torch.manual_seed(3)
        return DenseTask(model.image_encoder, DenseHead(24, 16, 8, (6, 8, 3)), 0.08)

    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels[0, :, 4:] = 0  # Mostly background, so that the parts' weights differ.
    centres = torch.rand(3, 2, 16, 16, generator=generator)

    def some(rows: slice) -> DenseBatch:
        fitted = torch.tensor([[64, 64], [48, 64], [64, 40]])
        return DenseBatch(images[rows], fitted[rows], labels[rows], centres[rows])

    whole, expected = gradients(task(), [some(slice(0, 3))])
    parts, found = gradients(task(), [some(slice(0, 1)), some(slice(1, 3))])
    assert parts == pytest.approx(whole, rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert_same_gradients(
        {n: g / scale for n, g in expected.items()}, {n: g / scale for n, g in found.items()}
    )


def test_checkpointed_blocks_give_the_same_gradients_to_the_bit() -> None:
    plain = referring_task()
    saving = referring_task()
    prepare_for_training(plain.model, CPU)
    prepare_for_training(saving.model, CPU, recompute_blocks=True)
    _, expected = gradients(plain, [batch([0, 1])])
    _, found = gradients(saving, [batch([0, 1])])
    assert any("image_encoder.blocks.0" in name for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_clipping_bounds_the_norm_of_the_whole_step() -> None:
    task = referring_task()
    stepper(task, clip=0.01)([batch([3]), batch([0])], 1.0, 7)
    norm = torch.stack([p.grad.norm() for p in task.module.parameters() if p.grad is not None])
    assert float(norm.norm()) == pytest.approx(0.01, rel=1e-3)


def test_an_optimizer_of_an_earlier_checkpoint_is_taken_up() -> None:
    """One that takes parameter after parameter: the same steps, and the same state."""
    tasks = [referring_task(), referring_task()]
    earlier, now = (stepper(task) for task in tasks)
    groups = [
        {key: group[key] for key in ("params", "lr", "base_lr", "weight_decay")}
        for group in earlier.optimizer.param_groups
    ]
    earlier.optimizer = torch.optim.AdamW(
        groups, betas=(0.9, OptimizerSettings().beta2), foreach=False, fused=False
    )
    for step in (earlier, now):
        step([batch([0, 1])], 1.0, 3)
    for a, b in zip(tasks[0].module.parameters(), tasks[1].module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    later = referring_task()
    taken = stepper(later)
    later.module.load_state_dict(tasks[0].module.state_dict())
    taken.optimizer.load_state_dict(copy.deepcopy(earlier.optimizer.state_dict()))
    for step in (earlier, taken):
        step([batch([2, 3])], 1.0, 4)
    for a, b in zip(tasks[0].module.parameters(), later.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_descends(dtype: torch.dtype) -> None:
    task = referring_task()
    step = stepper(task, dtype)
    if dtype == torch.float16:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = [float(step([batch([0, 1])], 1.0, n)["loss"]) for n in range(4)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in task.module.parameters())


def test_an_overflow_in_half_precision_leaves_the_step_out_and_lowers_the_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = referring_task()
    step = stepper(task, torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {n: p.detach().clone() for n, p in task.module.named_parameters()}
    step([batch([0])], 1.0, 0)
    assert step.scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[n], p) for n, p in task.module.named_parameters())
    # One that no scale helps is an error.
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    step.overflows = 30
    with pytest.raises(NotFinite, match="gradient is inf"):
        step([batch([0])], 1.0, 1)


@pytest.mark.gpu
def test_float16_trains_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    assert training_precision("fp16", device) == torch.float16
    task = referring_task()
    task.module.to(device)
    groups = parameter_groups([(task.module, 1e-3)], OptimizerSettings())
    step = Stepper(task, groups, device, torch.float16, Processes(), OptimizerSettings())
    losses = [float(step([batch([0, 1])], 1.0, n)["loss"]) for n in range(20)]
    assert losses[-1] < losses[0]


def test_a_device_that_cannot_train_in_fp16_is_told_by_the_setting() -> None:
    with pytest.raises(ConfigError, match="precision = 'fp16': cpu cannot train in it"):
        training_precision("fp16", CPU)


def test_decay_is_for_matrices_alone() -> None:
    model, _ = small_model(**WITH_STEM)
    groups = parameter_groups(
        [(model.image_encoder, 1e-5), (model.text_encoder.backbone, 1e-4), (model, 1e-3)],
        OptimizerSettings(weight_decay=0.3),
    )
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    free = {names[id(p)] for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed | free == set(names.values())
    assert decayed & free == set()
    tables = re.compile(r"pos_embed|rel_pos_[hw]|embeddings\.\w+\.weight|query_token|bias$|norm")
    assert {n for n in names.values() if tables.search(n)} <= free
    assert {"image_encoder.pos_embed", "mask_decoder.query_token"} <= free
    assert all(n.endswith("weight") for n in decayed)
    assert any("blocks.0.attn.qkv.weight" in n for n in decayed)
    rates = {names[id(p)]: g["base_lr"] for g in groups for p in g["params"]}
    assert rates["image_encoder.pos_embed"] == 1e-5
    assert rates["text_encoder.project_words.0.weight"] == 1e-3
    assert {r for n, r in rates.items() if n.startswith("text_encoder.backbone")} == {1e-4}


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "steps"), [("best", [2, 6]), ("last", [6, 8])])
def test_kept_weights_are_the_best_or_the_last_and_their_mean_is_theirs(
    tmp_path: Path, of: str, steps: list[int]
) -> None:
    layer = nn.Linear(1, 1, bias=False)
    kept, place = KeptWeights(tmp_path / "kept", 2, of), Place()
    for step, figure in [(2, 0.7), (4, 0.5), (6, 0.7), (8, 0.7)]:
        nn.init.constant_(layer.weight, float(step))
        place.step = step
        kept.add(place, figure, layer, write=True)
    # Nothing goes before a checkpoint says so: an older one may still need it.
    assert len(list((tmp_path / "kept").iterdir())) == (3 if of == "best" else 4)
    kept.prune(place)
    assert [step for step, _ in place.kept] == steps
    assert len(list((tmp_path / "kept").iterdir())) == 2
    with weights_in(layer, kept.mean(place)):
        assert layer.weight.item() == sum(steps) / 2
    assert layer.weight.item() == 8.0


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path: Path) -> None:
    model, _ = small_model()
    checkpoints, untrained = Checkpoints(tmp_path), Untrained(model)
    untrained.stage_begins()
    checkpoints.save(Place(step=1), "hash", model, untrained)
    good = checkpoints.last.read_bytes()
    with torch.no_grad():
        model.project_position.weight[0, 0] = torch.inf
    with pytest.raises(RisamError, match="1 weights hold NaN or infinity") as raised:
        checkpoints.save(Place(step=2), "hash", model, untrained)
    assert "last good checkpoint" in raised.value.fix
    assert checkpoints.last.read_bytes() == good


def test_what_no_stage_trains_stays_out_of_checkpoints_and_is_held_to_its_digest() -> None:
    model, _ = small_model()
    model.image_encoder.requires_grad_(False)
    untrained = Untrained(model)
    untrained.stage_begins()
    weights, note = untrained.trained(), untrained.save()
    assert not any(name.startswith("image_encoder") for name in weights)
    again = Untrained(model)
    again.load(weights, note)
    with torch.no_grad():
        model.image_encoder.pos_embed[0, 0, 0, 0] += 1
    with pytest.raises(RisamError, match="not those the run was started with"):
        again.load(weights, note)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_by": "mIoU"}, "did you mean 'miou'"),
        ({"best_by": "held out.mio"}, "did you mean 'held out.miou'"),
        ({"early_stopping": {"patience": 2, "figure": "loss"}}, "not a figure of the validation"),
        ({"early_stopping": {"patience": 0}}, "patience"),
        ({"averaging": {"count": 1}}, "count"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_wrong_settings_of_the_loop_are_told(changes: dict[str, Any], message: str) -> None:
    from support.training_runs import RAW

    with pytest.raises(ConfigError, match=re.escape(message)):
        check(TrainSettings, {**RAW, "output": "x", **changes}, "a test")


def test_more_parts_than_images_are_told() -> None:
    from support.training_runs import RAW

    stages = [{**RAW["stages"][1], "accumulate": 3}]
    with pytest.raises(ConfigError, match="accumulate 3 is more than its images_per_step 2"):
        check(TrainSettings, {**RAW, "output": "x", "stages": stages}, "a test")


# --- what is shown --------------------------------------------------------------------------------


def test_the_page_is_whole_and_obeys_no_text_in_it(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    settings = {
        "name": hostile,
        "best_by": "miou",
        "stages": [
            {"name": "s", "kind": "referring", "steps": 40, "images_per_step": 2,
             "learning_rate": 0.1, "train_encoder": "no", "accumulate": 2}
        ],
    }  # fmt: skip
    (tmp_path / "config.resolved.yaml").write_text(json.dumps(settings))
    log = TrainingLog(tmp_path, Console(quiet=True))
    place, picture = Place(), torch.zeros(8, 12, 3, dtype=torch.uint8).numpy()
    for step in range(1, 21):
        place.step, place.seconds, place.expressions = step, step * 2.0, step * 10
        log.row(place, "s", {"loss": 1 / step, "mask": 0.5, "lr": 0.1}, "train")
        if step % 2 == 0:
            figures = {f"{hostile}.miou": step / 40, "best": 0.9 if step == 6 else step / 40}
            log.row(place, "s", figures, "val")
            example = Example("example00", hostile, "a.png", hostile, picture, picture)
            log.pictures(place, "s", [example])
    log.row(place, "s", {"watched": 0.5}, "stop")
    page = to_html(tmp_path, ["risam", "train", "x.yaml"], "Finished.")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "prefers-color-scheme: dark" in page
    assert "ended early, after step 20" in page
    assert "best 0.9000" in page
    # Of ten validations five are shown: the first, the last, and the best among them.
    shown = re.findall(r"<figcaption>stage 1, step (\d+)</figcaption>", page)
    assert len(shown) == 5
    assert (shown[0], shown[-1]) == ("2", "20")
    assert "6" in shown


@pytest.mark.parametrize(("giou", "shown"), [(0.5, False), (0.25, True)])
def test_the_page_of_one_validation_shows_points_and_no_figure_twice(
    tmp_path: Path, giou: float, shown: bool
) -> None:
    stage = {"name": "s", "kind": "referring", "steps": 2, "images_per_step": 2}
    settings = {"name": "x", "stages": [{**stage, "learning_rate": 0.1, "train_encoder": "no"}]}
    (tmp_path / "config.resolved.yaml").write_text(json.dumps(settings))
    log = TrainingLog(tmp_path, Console(quiet=True))
    place = Place(step=2, seconds=2.0, expressions=8)
    log.row(place, "s", {"loss": 0.5, "lr": 0.1}, "train")
    log.row(place, "s", {"a.miou": 0.5, "a.oiou": 0.5, "a.giou": giou, "best": 0.5}, "val")
    page = to_html(tmp_path, ["risam"], "Finished.")
    assert ('<th class="n">gIoU</th>' in page) is shown
    assert ("<figcaption>gIoU</figcaption>" in page) is shown
    assert ("gIoU counts a right “nothing” as 1" in page) is shown
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 5 + shown  # loss, rate, best, mIoU, oIoU
    for chart in charts:
        assert "polyline" not in chart
        assert re.search(r'<circle [^>]*class="curve line0 (?:faint )?alone"', chart)
    assert "svg .line0.alone { fill:" in page


def test_a_log_that_a_cut_run_wrote_ahead_is_cut_back(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, Console(quiet=True))
    for stage, step, kind in [
        (0, 2, "train"), (0, 2, "val"), (1, 1, "train"), (1, 2, "train"), (1, 2, "val"),
        (1, 3, "train"), (1, 2, "average"),
    ]:  # fmt: skip
        log.row(Place(stage, step), "s", {"best": 0.5}, kind)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')

    def left(place: Place) -> list[tuple[int, int, str]]:
        log.drop_rows_after(place)
        return [(r["stage"], r["step"], r["kind"]) for _, r in read_rows(log.path)]

    first = [(0, 2, "train"), (0, 2, "val"), (1, 1, "train"), (1, 2, "train")]
    assert left(Place(1, 2, validated=2)) == [*first, (1, 2, "val")]
    # Stopped before its validation was done.
    assert left(Place(1, 2)) == first


def test_a_log_without_room_is_an_error_and_tensorboard_alone_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingLog(tmp_path, Console()) as log:
        log._board.close()
        log._board = _Full()
        log.row(Place(0, 1), "s", {"loss": 1.0}, "train")
        log.row(Place(0, 2), "s", {"loss": 1.0}, "train")
    assert capsys.readouterr().err.count("TensorBoard's log ends here: No space left") == 1
    assert len(list(read_rows(log.path))) == 2
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(RisamError, match=r"cannot write .*: No space left on device"):
        log.row(Place(0, 3), "s", {"loss": 1.0}, "train")


class _Full:
    def add_scalar(self, *_: Any) -> None:
        raise OSError(28, "No space left on device")
