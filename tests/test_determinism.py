"""On a CPU the same inputs, model and settings give the same bytes, however they are dealt out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.records import contents

from risam_cli.api.model import load
from risam_cli.cli import main
from risam_cli.model.fast.crew import threads_of

SIZES = [(30, 90), (64, 64), (200, 31), (12, 12), (65, 64), (128, 96), (40, 41), (7, 300), (64, 64)]
Predict = Callable[..., Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many shapes, one twice, one broken, and a manifest of several texts each."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(3)
    rows = []
    for number, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        name = f"{number}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray(coarse).resize((width, height)).save(folder / name)
        texts = ["the red circle", "something small on the left", "stars", "all"][: 1 + number % 4]
        rows.append({"image": name, "expressions": texts})
    (folder / "bad.jpg").write_text("no image")
    rows.insert(4, {"image": "bad.jpg", "expression": "stars"})
    rows.append({"image": "0.jpg", "expression": "the star"})  # an image that came before
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def predict(model_folder: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Predict:
    def run(*arguments: str | Path, inputs: Path | None = None) -> Path:
        out = tmp_path_factory.mktemp("out") / "run"
        given = ["predict", inputs or images / "list.jsonl", "-o", out, "--model", model_folder]
        code = main(["-q", *map(str, [*given, "--device", "cpu", *arguments])])
        assert code in {0, 3}
        return out

    return run


@pytest.fixture(scope="module")
def whole(predict: Predict) -> Path:
    return predict("--batch-size", "1", "--workers", "0")


@pytest.mark.parametrize(
    ("batch", "workers"), [(1, 0), (2, 1), (5, 3), (16, 0), (16, 3)], ids=lambda value: str(value)
)
def test_neither_batches_nor_workers_nor_a_rerun_change_a_byte(
    predict: Predict, whole: Path, batch: int, workers: int
) -> None:
    again = predict("--batch-size", str(batch), "--workers", str(workers))
    assert contents(again) == contents(whole)


@pytest.mark.parametrize("cores", [2, 5])
def test_the_number_of_cores_changes_no_byte_of_small_images(
    predict: Predict, whole: Path, cores: int
) -> None:
    with threads_of(cores):
        beside = predict()
    assert contents(beside) == contents(whole)
    threads = [
        json.loads((run / "run.json").read_text())["run_settings"] for run in (whole, beside)
    ]
    assert [one["threads"] for one in threads] == [1, 1]


@pytest.mark.parametrize("count", [2, 5])
def test_shards_of_different_batches_and_workers_merge_to_the_same_bytes(
    predict: Predict, whole: Path, tmp_path: Path, count: int
) -> None:
    parts = [
        predict("--shard", f"{k}/{count}", "--batch-size", str(1 + 3 * k), "--workers", str(k % 2))
        for k in range(count)
    ]
    # One image is no image: 3, as of the whole run.
    assert main(["-q", "merge", *map(str, parts), "-o", str(tmp_path / "merged")]) == 3
    assert contents(tmp_path / "merged") == contents(whole)


def test_an_image_does_not_depend_on_its_neighbours(
    predict: Predict, whole: Path, images: Path, tmp_path: Path
) -> None:
    """Alone, in another order, among others: the same mask, the same score."""

    def records(folder: Path) -> dict[tuple[str, str], object]:
        rows = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
        return {
            (row["image"], row["expression"]): (row["segmentation"], row["score"], row["no_target"])
            for row in rows
        }

    wanted = records(whole)
    lines = (images / "list.jsonl").read_text().splitlines(keepends=True)
    back = images / "back.jsonl"
    back.write_text("".join(reversed(lines)))
    assert records(predict("--batch-size", "5", inputs=back)) == wanted
    for number in (1, 3, 7):
        alone = images / f"alone{number}.jsonl"
        alone.write_text(lines[number])
        found = records(predict(inputs=alone))
        assert found
        assert found.items() <= wanted.items()


def test_an_image_gives_the_same_bits_alone_and_among_others() -> None:
    """Alone it has all cores; the bundled model has every part whose sums might show that."""
    sample = Path(__file__).parent.parent / "sample_data" / "images"
    names = [str(sample / name) for name in ("scene_2.jpg", "scene_3.png")]
    found = []
    for threads in (1, 2, 3):
        with threads_of(threads):
            model = load("refshapes-tiny", "cpu")
            alone = [
                model.predict(names[0], "the star"),
                model.encode(names[0]).predict("the star"),
            ]
            found += [*alone, model.predict(names, "the star")[0]]
    assert len({(one.score, one.no_target) for one in found}) == 1
    assert len({str(one.rle) for one in found}) == 1
