"""Faults under ``risam eval``: what an interrupted run kept is used only where it still holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.eval_files import box, image_file
from support.power import recorded

from risam_cli.cli import main
from risam_cli.data.images.files import file_sha256
from risam_cli.evaluation import flow
from risam_cli.evaluation import scoring as engine
from risam_cli.evaluation.answer_log import AnswerLog
from risam_cli.files.locks import FolderLock
from risam_cli.model.risam import Risam

SIZES = [(40, 60), (64, 64), (50, 90), (33, 70)]
Evaluate = Callable[..., int]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images, two expressions each."""
    root = tmp_path / "set"
    content: dict[str, Any] = {"images": [], "annotations": [], "expressions": []}
    for k, (height, width) in enumerate(SIZES):
        image_file(root / f"{k}.png", (height, width), seed=k)
        content["images"].append(
            {"id": k, "file_name": f"{k}.png", "height": height, "width": width}
        )
        content["annotations"].append({"id": k, "image_id": k, "segmentation": [box(2, 2, 20, 20)]})
        for j, text in enumerate(("red circle", "the small blue square")):
            content["expressions"].append(
                {"id": 10 * k + j, "image_id": k, "ann_ids": [k], "text": text}
            )
    (root / "instances.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def evaluate(tmp_path: Path, data: Path, model_folder: Path) -> Evaluate:
    def run(out: Path, *args: str | Path) -> int:
        base = ["eval", "--dataset", "coco", "--root", str(data), "--device", "cpu"]
        return main([*base, "--model", str(model_folder), *map(str, args), "-o", str(out)])

    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with each image that is encoded."""
    seen: list[int] = []
    encode = Risam.encode_image

    def counted(self: Risam, pixels: Any) -> Any:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Risam, "encode_image", counted)
    return iter([seen])


def cut(evaluate: Evaluate, out: Path, monkeypatch: pytest.MonkeyPatch, images: int = 3) -> None:
    """A run that ends when so many images are scored; one more may have been answered."""
    add, left = engine.Scorer.add, images

    def stop(self: Any, answered: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return add(self, answered)

    with monkeypatch.context() as patched:
        patched.setattr(engine.Scorer, "add", stop)
        assert evaluate(out) == 130
    assert [path.name for path in out.iterdir()] == ["answers.jsonl"]


def rows(out: Path) -> bytes:
    return (out / "per_expression.jsonl").read_bytes()


def figures(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())["figures"]


def test_a_changed_image_is_answered_again(
    evaluate: Evaluate, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(evaluate, tmp_path / "out", monkeypatch)
    before = (data / "1.png").read_bytes()
    image_file(data / "1.png", SIZES[1], seed=99)
    assert before != (data / "1.png").read_bytes()
    assert evaluate(tmp_path / "out", "--resume") == 0
    assert evaluate(tmp_path / "fresh") == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "fresh")
    assert figures(tmp_path / "out") == figures(tmp_path / "fresh")


def test_a_changed_expression_is_answered_again(
    evaluate: Evaluate, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(evaluate, tmp_path / "out", monkeypatch)
    path = data / "instances.json"
    path.write_text(path.read_text().replace("red circle", "blue thing at the top"))
    assert evaluate(tmp_path / "out", "--resume") == 0
    assert evaluate(tmp_path / "fresh") == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "fresh")


def test_what_was_added_or_taken_away_costs_the_others_nothing(
    evaluate: Evaluate,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoded: Iterator[list[int]],
    capfd: Any,
) -> None:
    seen = next(encoded)
    path = data / "instances.json"
    whole = json.loads(path.read_text())
    first, gone = whole["images"][0]["id"], whole["images"][2]["id"]

    def write_without(image: int) -> None:
        left = {
            key: [one for one in rows if one.get("id" if key == "images" else "image_id") != image]
            for key, rows in whole.items()
            if key != "categories"
        }
        path.write_text(json.dumps({**whole, **left}))

    write_without(first)
    cut(evaluate, tmp_path / "out", monkeypatch, 2)
    kept = (tmp_path / "out" / "answers.jsonl").read_text().count('"asked"') - 2
    assert kept in (2, 4)
    write_without(gone)
    seen.clear()
    assert evaluate(tmp_path / "out", "--resume") == 0
    assert sum(seen) == 3 - kept // 2
    said = capfd.readouterr().err
    assert evaluate(tmp_path / "fresh") == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "fresh")
    assert figures(tmp_path / "out") == figures(tmp_path / "fresh")
    assert f"{kept} answered before are kept, 2 are gone, {6 - kept} are to be answered" in said


def test_what_did_not_change_is_kept(
    evaluate: Evaluate,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoded: Iterator[list[int]],
) -> None:
    seen = next(encoded)
    cut(evaluate, tmp_path / "out", monkeypatch)
    image_file(data / "0.png", SIZES[0], seed=98)
    answered = (tmp_path / "out" / "answers.jsonl").read_text().count('"asked"') // 2
    assert 3 <= answered <= 4
    seen.clear()
    assert evaluate(tmp_path / "out", "--resume") == 0
    assert sum(seen) == 1 + (4 - answered)


def test_a_resumed_run_hashes_what_it_answered_once_and_nothing_else(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(evaluate, tmp_path / "out", monkeypatch)
    answered = (tmp_path / "out" / "answers.jsonl").read_text().count('"asked"') // 2
    assert 1 <= answered <= 4
    hashed: list[str] = []

    def counted(path: Path) -> str | None:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("risam_cli.evaluation.answer_log.file_sha256", counted)
    assert evaluate(tmp_path / "out", "--resume") == 0
    assert hashed == [f"{number}.png" for number in range(answered)]


def test_lines_that_a_power_cut_spoilt_are_answered_again(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cut(evaluate, out, monkeypatch)
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    spoilt = json.loads(lines[1])
    spoilt["segmentation"]["counts"] = "0" * 8
    lines[1] = json.dumps(spoilt).encode() + b"\n"
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    (out / "answers.jsonl").write_bytes(b"".join(lines) + b"\0" * 300)
    assert evaluate(out, "--resume") == 0
    assert evaluate(tmp_path / "fresh") == 0
    assert rows(out) == rows(tmp_path / "fresh")


def test_a_kill_before_the_reports_costs_no_answer(
    evaluate: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoded: Iterator[list[int]],
) -> None:
    seen = next(encoded)
    out = tmp_path / "out"

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(flow, "write_reports", killed)
        assert evaluate(out) == 130
    seen.clear()
    assert evaluate(out, "--resume") == 0
    assert seen == []
    assert evaluate(tmp_path / "fresh") == 0
    assert rows(out) == rows(tmp_path / "fresh")
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "fresh").iterdir()}


def test_a_kill_after_the_reports_leaves_nothing_for_ever(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AnswerLog, "finished", killed)
        assert evaluate(out) == 130
    assert (out / "report.json").exists()
    assert (out / "answers.jsonl").exists()
    assert evaluate(out) == 1
    assert evaluate(out, "--resume") == 0
    assert not (out / "answers.jsonl").exists()
    assert evaluate(out, "--resume") == 1  # it is finished: nothing to go on with


def test_a_second_run_into_the_folder_is_refused(
    evaluate: Evaluate, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with FolderLock(tmp_path / "out"):
        assert evaluate(tmp_path / "out") == 1
    assert "another run is writing to this folder" in capfd.readouterr().err
    assert evaluate(tmp_path / "out") == 0


def test_results_of_predict_are_not_written_over(
    evaluate: Evaluate, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "ledger.jsonl").write_text("{}\n")
    (out / "failures.jsonl").write_text("theirs\n")
    assert evaluate(out, "--overwrite") == 1
    assert "holds files of `risam predict`" in capfd.readouterr().err
    assert (out / "failures.jsonl").read_text() == "theirs\n"


def test_drawn_scenes_lie_in_the_output_folder_and_are_tidied_up(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run leaves them where the next one looks, not in the system's folder for ever."""
    out = tmp_path / "out"
    left = out / ".risam" / "scratch" / "of-a-killed-run.png"
    left.parent.mkdir(parents=True)
    left.write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    seen: list[Path] = []
    add = engine.Scorer.add

    def look(self: Any, answered: Any) -> Any:
        seen.append(answered.sample.path)
        assert not left.exists()
        return add(self, answered)

    monkeypatch.setattr(engine.Scorer, "add", look)
    code = main(
        ["eval", "--dataset", "refshapes", "--split", "val", "--limit", "6", "--device", "cpu",
         "--model", str(model_folder), "-o", str(out)]
    )  # fmt: skip
    assert code == 0
    assert seen
    assert all(out in path.parents for path in seen)
    assert not (out / ".risam").exists()
    assert list(elsewhere.iterdir()) == []


def test_the_reports_survive_a_power_cut(evaluate: Evaluate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with recorded(out) as disk:
        assert evaluate(out) == 0
    disk.after_power_cut(tmp_path / "found")
    for name in ("report.json", "report.md", "report.html", "per_expression.jsonl"):
        assert (tmp_path / "found" / name).read_bytes() == (out / name).read_bytes(), name
    shutil.rmtree(tmp_path / "found")
