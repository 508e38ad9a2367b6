"""How a training starts: what it reads first, what it leaves, and the words that it learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.text_folders import make_bert
from support.training_runs import RAW, last_weights, rows, run, settings, write_coco

from risam_cli.cli import main
from risam_cli.console.console import Console
from risam_cli.errors import ConfigError, DataError, ModelError, OutputError
from risam_cli.training import loop, outcome, text_source
from risam_cli.training.losses import ReferringTask
from risam_cli.training.stage import TrainingBuilder
from risam_cli.weights.load import load_model
from risam_cli.weights.trained_on import KEY

REFERRING = [{**RAW["stages"][1], "steps": 3}]
QUICK: dict[str, Any] = {"stages": REFERRING, "validate_every": 2, "checkpoint_every": 2}


def _mine(folder: Path, **expressions: Any) -> dict[str, Any]:
    """Data of ``write_coco`` for train and val, its texts replaced where some are given."""
    data = write_coco(folder)
    if expressions:
        path = Path(data["annotations"])
        content = json.loads(path.read_text())
        for one in content["expressions"]:
            one["text"] = expressions.get(one["text"].replace(" ", "_"), one["text"])
        path.write_text(json.dumps(content))
    return {"train": data, "val": {"mine": data}}


def _config(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "train.yaml"
    chosen = settings(tmp_path / "run", **changes)
    path.write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    return path


# --- a start that fails ---------------------------------------------------------------------------


def _no_expressions(data: dict[str, Any]) -> None:
    path = Path(data["annotations"])
    path.write_text(json.dumps({**json.loads(path.read_text()), "expressions": []}))


def _no_images(data: dict[str, Any]) -> None:
    for image in Path(data["images"]).iterdir():
        image.unlink()


def _damaged_image(data: dict[str, Any]) -> None:
    for image in Path(data["images"]).iterdir():
        image.write_bytes(image.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "message", "fix"),
    [
        (_no_expressions, "holds no expressions", "'expressions'"),
        (_no_images, r"train: 2 of 2 images are missing", "as train.images"),
        (_damaged_image, r"\.png", ""),
    ],
)
def test_a_start_that_fails_leaves_nothing_and_the_corrected_one_runs(
    tmp_path: Path, spoil: Any, message: str, fix: str
) -> None:
    data = _mine(tmp_path / "mine")
    spoil(data["train"])
    with pytest.raises((ConfigError, DataError), match=message) as raised:
        run(tmp_path / "run", **QUICK, **data)
    assert fix in raised.value.fix
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", **QUICK, **_mine(tmp_path / "again")).is_dir()


def test_a_start_that_fails_keeps_what_lay_there_before(tmp_path: Path) -> None:
    data = _mine(tmp_path / "mine")
    _damaged_image(data["train"])
    for name, error in (("notes", DataError), ("pictures", OutputError)):
        held = tmp_path / name / name / "mine.jpg"
        held.parent.mkdir(parents=True)
        held.write_text("mine")
        with pytest.raises(error):
            run(tmp_path / name, **QUICK, **data)
        assert [p for p in (tmp_path / name).rglob("*") if p.is_file()] == [held]


def test_a_run_cut_before_its_first_checkpoint_makes_way(tmp_path: Path) -> None:
    """Nothing of it can be gone on from."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.resolved.yaml").write_text("name: cut\n")
    (tmp_path / "run/metrics.jsonl").write_text('{"kind": "train", "stage": 0, "step": 1}\n')
    run(tmp_path / "run", **QUICK)
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows if '"train"' in row] == [1, 2, 3]


def test_averaging_asked_of_a_finished_run_says_that_nothing_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", **QUICK)
    run(tmp_path / "run", resume=True, **QUICK, averaging={"count": 2})
    assert "warning: averaging: the last stage has kept no weights" in capsys.readouterr().err
    assert not (tmp_path / "run/averaged").exists()


def test_figures_of_another_validation_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stage is judged by what nothing fits to, which is easy."""
    data = _mine(tmp_path / "mine")
    stage = {**REFERRING[0], "steps": 2}
    chosen: dict[str, Any] = {"validate_every": 2, "checkpoint_every": 2, **data}
    easy = {"val": {"mine": {**data["train"], "limit": 1}}}
    out = tmp_path / "run"
    run(out, **{**chosen, **easy}, stages=[stage])
    started = json.loads((out / "best/card.json").read_text())
    more = [stage, {**stage, "name": "more"}]
    run(out, resume=True, **chosen, stages=more, best_by="t_acc")
    assert "its figures are no longer compared" in capsys.readouterr().err
    card = json.loads((out / "best/card.json").read_text())
    assert card != started
    run(out, resume=True, **chosen, stages=more, best_by="t_acc")
    told = capsys.readouterr().err
    assert "no longer compared" not in told
    assert f"done: best t_acc {rows(out)[-1]['mine.t_acc']:.4f}" in told


def test_figures_of_another_validation_file_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, out = write_coco(tmp_path / "mine"), tmp_path / "run"
    moved, other = (_mine(tmp_path / name)["train"] for name in ("moved", "other"))
    content = json.loads(Path(other["annotations"]).read_text())
    content["expressions"] = content["expressions"][1:]
    Path(other["annotations"]).write_text(json.dumps(content))
    for data, told in ((train, False), (moved, False), (other, True)):
        run(out, resume=True, **QUICK, train=train, val={"mine": data})
        assert ("its figures are no longer compared" in capsys.readouterr().err) == told


@pytest.mark.parametrize(("kept", "figure"), [("green star", "oiou"), ("red square", "n_acc")])
def test_a_figure_without_a_value_is_told_before_the_first_step(
    tmp_path: Path, kept: str, figure: str
) -> None:
    data = _mine(tmp_path / "mine")["train"]
    path = Path(data["annotations"])
    content = json.loads(path.read_text())
    content["expressions"] = [one for one in content["expressions"] if one["text"] == kept]
    path.write_text(json.dumps(content))
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=f"best_by is '{figure}', but no validation set has"):
        run(out, **QUICK, val={"mine": data}, best_by=figure)
    assert not out.exists()


def test_training_data_that_changed_are_told_and_both_are_on_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = _mine(tmp_path / "mine"), tmp_path / "run"
    stage = {**REFERRING[0], "steps": 2}
    run(out, **{**QUICK, **data, "stages": [stage]})
    path = Path(data["train"]["annotations"])
    path.write_text(json.dumps({**json.loads(path.read_text()), "info": {}}))
    capsys.readouterr()
    more = [stage, {**stage, "name": "more"}]
    for _ in range(2):
        run(out, resume=True, **{**QUICK, **data, "stages": more})
        assert "the training data have changed since the run began" in capsys.readouterr().err
    files = [one["files"][0] for one in json.loads((out / "best/card.json").read_text())[KEY]]
    assert [one["name"] for one in files] == [path.name] * 2
    assert len({one["sha256"] for one in files}) == 2


def test_a_new_run_does_not_replace_the_model_it_starts_from(tmp_path: Path) -> None:
    out = tmp_path / "run"
    best = run(out, **QUICK)
    before = (best / "model.safetensors").read_bytes()
    for key, source in (("init_from", best), ("init_encoder_from", out / "checkpoints/last.pt")):
        with pytest.raises(ConfigError, match=f"{key} = .* is in the output folder"):
            loop.train(settings(out, **QUICK, **{key: str(source)}), overwrite=True)
    assert (best / "model.safetensors").read_bytes() == before


def test_a_lost_best_model_is_told_of_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.rmtree(run(out, **QUICK, best_by="t_acc"))
    with pytest.raises(ModelError, match="best is missing, and the run is finished"):
        run(out, resume=True, **QUICK, best_by="t_acc")
    more = [*REFERRING, {**REFERRING[0], "name": "more"}]
    capsys.readouterr()
    assert run(out, resume=True, **{**QUICK, "stages": more}, best_by="t_acc").is_dir()
    assert "best is missing: the next validation's weights become best/" in capsys.readouterr().err


# --- what already exists ------------------------------------------------------------------------


def test_what_was_trained_is_kept_resumed_or_overwritten(tmp_path: Path) -> None:
    run(tmp_path / "run", **QUICK)
    (tmp_path / "run/notes.txt").write_text("mine")
    first = last_weights(tmp_path / "run")
    with pytest.raises(OutputError, match="holds a training run") as raised:
        run(tmp_path / "run", **QUICK, seed=4)
    assert "overwrite" in raised.value.settings
    chosen = settings(tmp_path / "run", **QUICK, seed=4)
    loop.train(chosen, overwrite=True)
    second = last_weights(tmp_path / "run")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


def test_where_nothing_is_to_resume_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", resume=True, **QUICK)
    assert f"nothing to resume in {tmp_path / 'run'}: starting" in capsys.readouterr().err
    run(tmp_path / "run", resume=True, **QUICK)
    assert "nothing to resume" not in capsys.readouterr().err


def test_settings_that_fail_overwrite_nothing(tmp_path: Path) -> None:
    run(tmp_path / "run", **QUICK)
    before = (tmp_path / "run/checkpoints/last.pt").read_bytes()
    data = _mine(tmp_path / "mine")
    _no_expressions(data["train"])
    with pytest.raises(ConfigError):
        loop.train(settings(tmp_path / "run", **QUICK, **data), overwrite=True)
    assert (tmp_path / "run/checkpoints/last.pt").read_bytes() == before


def test_a_run_is_resumed_by_its_folder_wherever_that_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    run(whole, **QUICK)

    class Cut(Exception):
        pass

    saved = loop.TrainingRun._save

    def save_and_stop(self: Any, *rest: Any) -> None:
        saved(self, *rest)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "_save", save_and_stop)
        with pytest.raises(Cut):
            run(tmp_path / "cut", **QUICK)
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert main(["train", "--resume", str(tmp_path / "moved")]) == 0
    told = capsys.readouterr().err
    assert "resuming at stage 1, step 2" in told
    assert not (tmp_path / "cut").exists()
    expected, found = last_weights(whole), last_weights(tmp_path / "moved")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    # The last lines say where things are and what to do with them.
    best = tmp_path / "moved/best"
    lines = told.splitlines()[-4:]
    shown = json.loads((best / "card.json").read_text())["figures"]
    names = {"miou": "mIoU", "oiou": "oIoU", "n_acc": "N-acc", "t_acc": "T-acc"}
    figures = ", ".join(f"{told} {shown[f'held out.{name}']:.3f}" for name, told in names.items())
    assert lines[0] == f"done: best miou {shown['best']:.4f} ({figures}); the model is in {best}"
    assert str(tmp_path / "moved/training.html") in lines[1]
    assert f"--model {best}" in lines[2]
    assert lines[3] == (
        "score it: risam eval --dataset refshapes --family grefshapes --split val "
        f"--model {best} -o {tmp_path / 'moved'}-eval"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "is a folder; give a YAML file, or --resume"),
        (["--resume", "{empty}"], "holds no training run"),
        (["--resume", "{empty}/nope"], "no such file or folder; give the output folder of a run"),
        (["--resume", "--overwrite", "{run}"], "contradict each other"),
    ],
)
def test_a_folder_is_only_resumed(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/config.resolved.yaml").write_text("")
    places = {"run": tmp_path / "run", "empty": tmp_path / "empty"}
    assert main(["train", *(one.format(**places) for one in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_short_run_is_asked_for_in_one_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path)
    assert main(["train", str(config), "--steps", "1", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert [stage["steps"] for stage in printed["stages"]] == [1, 1]


# --- what is shown and warned about ---------------------------------------------------------------


def test_the_page_is_there_from_the_first_validation_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    watch = loop.TrainingRun._watch

    def look(self: Any, *rest: Any) -> None:
        seen.append((tmp_path / "run/training.html").read_text())
        watch(self, *rest)

    monkeypatch.setattr(loop.TrainingRun, "_watch", look)
    run(tmp_path / "run", **QUICK)
    assert len(seen) == 2
    assert all("Still training." in page for page in seen)
    assert "Finished." in (tmp_path / "run/training.html").read_text()


@pytest.mark.parametrize(("logit", "figure"), [(50.0, "T-acc 0"), (-50.0, "N-acc 0")])
def test_a_best_model_that_answers_all_alike_is_warned_about(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logit: float,
    figure: str,
) -> None:
    decode = ReferringTask.decode

    def one_answer(self: Any, batch: Any) -> Any:
        from dataclasses import replace

        decoded = decode(self, batch)
        none, masks = decoded.no_target_logits, decoded.mask_logits
        return decoded if torch.is_grad_enabled() else replace(
            decoded, no_target_logits=torch.full_like(none, logit), mask_logits=masks.abs() + 9
        )  # fmt: skip

    monkeypatch.setattr(ReferringTask, "decode", one_answer)
    run(tmp_path / "run", **QUICK, **_mine(tmp_path / "mine"))
    told = [line for line in capsys.readouterr().err.splitlines() if "best model" in line]
    assert len(told) == 1
    assert "by miou" in told[0]
    assert figure in told[0]


@pytest.mark.parametrize(
    ("figures", "best_by", "told"),
    [
        ({"a.t_acc": 0.5, "a.n_acc": 0.02}, "miou", []),
        # No expression without a target, or with one: the figure is not there.
        ({"a.t_acc": 0.9}, "miou", []),
        (
            {"a.t_acc": 0.31, "a.n_acc": 1.0, "b.t_acc": 0.9}, "miou",
            ["the best model by miou answers 'nothing' to most expressions that have a target in a "
             "(T-acc 0.310); mIoU counts a correct 'nothing' as 1: train longer, or set best_by to "
             "oiou"],
        ),
        (
            {"a.t_acc": 0.0, "b.t_acc": 0.01}, "a.oiou",
            ["the best model by a.oiou answers 'nothing' to nearly all expressions that have a "
             "target in a (T-acc 0.000), b (T-acc 0.010): train longer"],
        ),
        (
            {"a.t_acc": 1.0, "a.n_acc": 0.0}, "oiou",
            ["the best model by oiou answers hardly any expression that has no target with "
             "'nothing' in a (N-acc 0.000): train longer, or set best_by to n_acc"],
        ),
    ],
)  # fmt: skip
def test_a_best_model_that_says_nothing_to_most_targets_is_warned_about(
    figures: dict[str, float], best_by: str, told: list[str]
) -> None:
    chosen = settings(Path("run"), val={"a": RAW["train"], "b": RAW["train"]}, best_by=best_by)
    assert list(outcome.warnings_of(chosen, figures)) == told


def test_the_last_line_shows_the_foremost_figures_as_means_over_the_sets() -> None:
    figures = {"a.miou": 0.5, "b.miou": 0.7, "a.oiou": 0.25, "b.oiou": 0.75, "a.t_acc": 0.125}
    both = settings(Path("run"), val={"a": RAW["train"], "b": RAW["train"]})
    told = " (mIoU 0.600, oIoU 0.500, T-acc 0.125, means of 2 sets)"
    assert outcome.shown(both, figures) == told
    one = settings(Path("run"), val={"a": RAW["train"]})
    assert outcome.shown(one, figures) == " (mIoU 0.500, oIoU 0.250, T-acc 0.125)"
    assert outcome.shown(one, {}) == ""


# --- words ----------------------------------------------------------------------------------------

STRANGE = {"red_square": "the shiny boat", "green_star": "the dog"}


def test_data_of_unknown_words_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        run(tmp_path / "run", **QUICK, **_mine(tmp_path / "mine", **STRANGE))
    assert raised.value.message == (
        "train: 3 of 4 words, in 4 of 4 expressions, are unknown to the text encoder: "
        "shiny, boat, dog"
    )
    assert "learn_words" in raised.value.fix
    assert not (tmp_path / "run").exists()


def test_a_few_unknown_words_and_long_expressions_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_coco(tmp_path / "mine")
    path = Path(data["annotations"])
    content = json.loads(path.read_text())
    content["expressions"][0]["text"] = "red boat"
    content["expressions"][1]["text"] = "red " * 50
    path.write_text(json.dumps(content))
    run(tmp_path / "run", **QUICK, train=data, val={"mine": data})
    told = capsys.readouterr().err
    assert "train: 1 of 4 expressions are cut: they have more tokens than model.text_enc" in told
    assert (
        "train: 1 of 5 words, in 1 of 4 expressions, are unknown to the text encoder: boat" in told
    )


@pytest.mark.parametrize("start", ["bundled", "data"])
def test_words_of_ones_own_are_learned_beside_the_old(tmp_path: Path, start: str) -> None:
    """From a model that knows other words, and from nothing."""
    data = _mine(tmp_path / "mine", **STRANGE)
    changes: dict[str, Any] = {**QUICK, **data}
    if start == "data":
        changes["model"] = {"text_encoder": {"vocabulary": "data"}}
    else:
        first = run(tmp_path / "first", **QUICK)
        changes |= {"init_from": str(first), "model": {"text_encoder": {"learn_words": True}}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    best = load_model(run(whole, **changes), device=torch.device("cpu"))
    assert best.tokenizer.unknown_words("the shiny boat, a dog") == ()
    words = best.model.text_encoder.backbone.embeddings.word_embeddings.weight
    boat = best.tokenizer.tokenizer.token_to_id("boat")
    assert words.shape[0] == best.tokenizer.tokenizer.get_vocab_size() > boat
    # Trained, and another for each word.
    one, other = (best.tokenizer.encode([text]) for text in ("the boat", "the dog"))
    with torch.no_grad():
        encoded = [best.model.encode_text(t.input_ids, t.attention_mask) for t in (one, other)]
    assert not torch.allclose(encoded[0].sentence, encoded[1].sentence, atol=1e-4)
    # The same again, to the bit.
    run(cut, **changes)
    a, b = last_weights(whole), last_weights(cut)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_other_texts_are_other_settings_where_words_are_learned(tmp_path: Path) -> None:
    changes = {**QUICK, "model": {"text_encoder": {"vocabulary": "data"}}}
    run(tmp_path / "run", **changes, **_mine(tmp_path / "mine", **STRANGE))
    data = _mine(tmp_path / "mine2", green_star="a cat")
    Path(tmp_path / "mine/pairs.json").write_text((tmp_path / "mine2/pairs.json").read_text())
    told = "belongs to other settings: the words of the training expressions have changed; resume"
    with pytest.raises(ModelError, match=told):
        run(tmp_path / "run", resume=True, **changes, **_same(data, tmp_path))


def _same(data: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The first file's path, which holds the second one's texts."""
    old = {**data["train"], "annotations": str(tmp_path / "mine/pairs.json"),
           "images": str(tmp_path / "mine/images")}  # fmt: skip
    return {"train": old, "val": {"mine": old}}


# --- labels that a model made ---------------------------------------------------------------------


def _pseudo(folder: Path) -> dict[str, Any]:
    """Data whose first expression of each image is a model's answer."""
    data = write_coco(folder)
    path = Path(data["annotations"])
    content = json.loads(path.read_text())
    for one in content["expressions"][::2]:
        one["pseudo"] = True
    path.write_text(json.dumps(content))
    return data


def test_pseudo_labels_are_counted_and_weigh_as_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**_pseudo(tmp_path / "mine"), "pseudo_weight": 0.25}
    augment = {"flip": 0.5, "crop": 0.5, "jitter": 0.5}
    chosen = settings(tmp_path / "run", **QUICK, train=data, val={"mine": data}, augment=augment)
    builder = TrainingBuilder(chosen, Console())
    assert "2 images, 4 expressions, 2 of them pseudo-labels" in capsys.readouterr().err
    examples = builder.data.train()
    for index in range(8):  # four epochs
        one = examples[index]
        told = dict(zip(one.texts, one.weights.tolist(), strict=True))
        assert told == {"red square": 0.25, "green star": 1.0}
    stage = builder.stage(chosen.stages[0])
    batch = stage.collate([examples[0], examples[1]])
    assert batch.weights.tolist() == [0.25, 1.0, 0.25, 1.0]
    assert stage.task.counts(batch).tolist() == [2.5, 0.5]


def test_what_predict_answers_is_marked_in_its_export(tmp_path: Path) -> None:
    """From masks of a model to training on them."""
    data = write_coco(tmp_path / "mine")
    images, out, coco = data["images"], tmp_path / "out", tmp_path / "coco"
    phrases = ["-e", "the blue square", "-e", "the red circle"]
    assert main(["predict", images, *phrases, "-o", str(out), "-q"]) == 0
    export = ["export-masks", str(out), "--to", "coco", "--copy-images", "-o", str(coco), "-q"]
    assert main(export) == 0
    said = json.loads((coco / "instances.json").read_text())["expressions"]
    assert len(said) == 4
    assert all(one["pseudo"] is True for one in said)
    shutil.rmtree(images)  # The export is whole.
    own = {"dataset": "coco", "annotations": str(coco / "instances.json")}
    data = write_coco(tmp_path / "held out")
    best = run(tmp_path / "run", **QUICK, train={**own, "pseudo_weight": 0.5}, val={"mine": data})
    assert best.is_dir()


def test_a_pretrained_text_encoder_loads_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_bert(tmp_path / "bert")
    text = {"source": str(tmp_path / "bert"), "vocabulary": None, "max_tokens": 12}
    config = _config(tmp_path, **QUICK, model={"text_encoder": text})
    capfd.readouterr()
    assert main(["train", str(config), "-q"]) == 0
    told = capfd.readouterr()
    assert told.out == ""
    assert [line for line in told.err.splitlines() if "best model by miou" not in line] == []


# --- a text encoder that the settings leave open --------------------------------------------------

OPEN = {"text_encoder": {"source": "auto", "vocabulary": None, "lora": {"rank": 4}, "layers": 1}}


def _resolved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    chosen: dict[str, Any] = found["model"]["text_encoder"]
    return chosen


def test_without_a_pretrained_encoder_words_are_learned_and_a_line_says_so(
    offline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = _mine(tmp_path / "mine", **STRANGE)
    changes: dict[str, Any] = {**QUICK, **data, "model": OPEN}
    best = load_model(run(tmp_path / "run", **changes), device=torch.device("cpu"))
    [told] = [line for line in capsys.readouterr().err.splitlines() if "bert-base-uncased" in line]
    assert "HF_HUB_OFFLINE is set" in told
    assert "learns the words of the training expressions" in told
    assert best.tokenizer.unknown_words("the shiny boat, a dog") == ()
    chosen = _resolved(tmp_path / "run")
    assert (chosen["source"], chosen["vocabulary"], chosen["lora"]) == (None, "data", None)
    # What goes on keeps its encoder, though another could be had by now.
    monkeypatch.setattr(text_source, "fetch", lambda name: pytest.fail("asked again"))
    more = [{**REFERRING[0], "steps": 5}]
    with pytest.raises(ModelError, match="belongs to other settings"):
        run(tmp_path / "run", resume=True, **{**changes, "stages": more})
    run(tmp_path / "run", resume=True, **changes)
    assert _resolved(tmp_path / "run") == chosen


def test_a_pretrained_encoder_is_taken_where_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_bert(tmp_path / "bert"))
    asked: list[str] = []
    monkeypatch.setattr(text_source, "PRETRAINED_TEXT", source)
    monkeypatch.setattr(text_source, "fetch", asked.append)
    run(tmp_path / "run", **QUICK, **_mine(tmp_path / "mine"), model=OPEN)
    assert asked == [source]
    chosen = _resolved(tmp_path / "run")
    assert (chosen["source"], chosen["vocabulary"]) == (source, None)
    assert chosen["lora"]["rank"] == 4
    assert "warning: text encoder" not in capsys.readouterr().err


def test_a_named_encoder_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_source, "fetch", lambda name: pytest.fail("asked for another"))
    named = {"text_encoder": {"source": str(tmp_path / "nothing"), "vocabulary": None}}
    with pytest.raises(ModelError, match="cannot load text encoder"):
        run(tmp_path / "run", **QUICK, **_mine(tmp_path / "mine"), model=named)
    assert not (tmp_path / "run").exists()
