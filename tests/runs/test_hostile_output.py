"""Nothing is written outside of the output folder, whatever was planted in it beforehand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import hostile_images

from risam_cli import cli
from risam_cli.errors import OutputError
from risam_cli.files.confine import require_own, require_under
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.runs.ledger import LedgerLine

RECORD: dict[str, Any] = {
    "id": "1",
    "image": "street/a.png",
    "expression": "x",
    "segmentation": {"size": [24, 32], "counts": [100, 50, 618]},
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside of every output, with a file in it that must stay as it is."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    return folder


def _untouched(victim: Path) -> bool:
    kept = [path.name for path in victim.iterdir()] == ["precious"]
    return kept and (victim / "precious").read_text() == "precious"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "street").mkdir(parents=True)
    (folder / "street/a.png").write_bytes(hostile_images.saved("PNG"))
    return folder


@pytest.mark.parametrize(
    ("name", "leads_to"),
    [
        ("masks", "."),
        ("overlays", "."),
        ("predictions.jsonl", "precious"),
        ("failures.jsonl", "precious"),
        ("ledger.jsonl", "precious"),
        ("run.json", "precious"),
        (".risam", "."),
        (".risam/lock", "precious"),
        (".risam/staging", "."),
        (".risam/redo.jsonl", "precious"),
        ("predictions.jsonl", None),
        (".risam/lock", None),
    ],
)
@pytest.mark.parametrize("choice", ["--overwrite", "--resume"])
def test_predict_refuses_planted_links_and_pipes(
    name: str,
    leads_to: str | None,
    choice: str,
    images: Path,
    victim: Path,
    tmp_path: Path,
    model_folder: Path,
    capsys: Any,
) -> None:
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    if leads_to is None:
        os.mkfifo(place)
    else:
        place.symlink_to(victim / leads_to)
    common = ["-o", str(tmp_path / "out"), "--model", str(model_folder), choice]
    code = cli.main(["predict", str(images), "-e", "x", "--save", "png,overlay", *common])
    err = capsys.readouterr().err
    assert code == 1
    assert f"{place} is " in err
    assert err.count("\n") == 1
    assert _untouched(victim)
    assert os.path.lexists(place)


def test_a_link_among_the_masks_is_refused_before_anything_is_made_through_it(
    images: Path, victim: Path, tmp_path: Path, model_folder: Path, capsys: Any
) -> None:
    masks = tmp_path / "out" / "masks"
    masks.mkdir(parents=True)
    # Masks keep their image's path below the inputs' common folder: one would go to <street>.
    (masks / "street").symlink_to(victim)
    shutil.copy(images / "street/a.png", images / "b.png")
    common = ["-o", str(tmp_path / "out"), "--model", str(model_folder)]
    code = cli.main(["predict", str(images), "-e", "x", *common])
    assert code == 1
    assert "outside of" in capsys.readouterr().err
    assert _untouched(victim)


def test_a_folder_that_is_itself_a_link_is_the_users_wish(
    images: Path, tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    common = ["-o", str(tmp_path / "out"), "--model", str(model_folder)]
    assert cli.main(["predict", str(images), "-e", "x", *common]) == 0
    assert (tmp_path / "disk/predictions.jsonl").is_file()
    assert len(list((tmp_path / "disk/masks").rglob("*.png"))) == 1


def test_a_ledger_deletes_nothing_elsewhere(
    images: Path, victim: Path, tmp_path: Path, model_folder: Path, capsys: Any
) -> None:
    """--overwrite deletes what the ledger names; the ledger is a file's word."""
    out = tmp_path / "out"
    common = ["predict", str(images), "-e", "x", "-o", str(out), "--model", str(model_folder)]
    assert cli.main(common) == 0
    header, line = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (out / "masks/away").symlink_to(victim)
    files = [["masks/away/precious", 8, 0], ["masks/../../victim/precious", 8, 0]]
    for number, file in enumerate(files):
        hostile = {**unseal(line), "files": [file]}
        (out / "ledger.jsonl").write_bytes(header + seal(hostile))
        code = cli.main([*common, "--overwrite"])
        assert code == (1 if number == 0 else 0)
        assert _untouched(victim)


def _line(**change: Any) -> Any:
    whole = {
        "entry": 0,
        "key": "k",
        "items": 1,
        "image": None,
        "stamp": None,
        "predictions": [0, 1, 2],
        "failures": [0, 0, 0],
        "files": [["masks/a.png", 1, 2]],
    }
    return json.loads(json.dumps({**whole, **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"predictions": [-5, 1, 2]},
        {"predictions": [0, 2**63, 2]},
        {"predictions": [0, 1e999, 2]},
        {"predictions": [0, 1.5, 2]},
        {"predictions": [0]},
        {"entry": 1e999},
        {"files": [["masks/a\0.png", 1, 2]]},
        {"files": [["masks/..\\..\\a.png", 1, 2]]},
        {"files": [["/masks/a.png", 1, 2]]},
        {"files": [["masks", 1, 2]]},
        {"files": [["masks//a.png", 1, 2]]},
        {"files": [["masks/a.png", -1, 2]]},
    ],
)
def test_a_ledger_line_that_can_be_none_is_none(change: dict[str, Any]) -> None:
    LedgerLine.from_json(_line())
    with pytest.raises((ValueError, TypeError, KeyError, OverflowError)):
        LedgerLine.from_json(_line(**change))


def test_a_shard_of_countless_shards_is_told_at_once(
    images: Path, tmp_path: Path, model_folder: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    common = ["--model", str(model_folder), "-o", str(out)]
    assert cli.main(["predict", str(images), "-e", "x", *common, "--shard", "0/2"]) == 0
    text = (out / "run.json").read_text()
    huge = text.replace("[\n      0,\n      2\n    ]", f"[0, {10**18}]")
    assert huge != text
    (out / "run.json").write_text(huge)
    first, *others = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    header = unseal(first)
    header["identity"]["shard"] = [0, 10**18]
    (out / "ledger.jsonl").write_bytes(seal(header) + b"".join(others))
    capsys.readouterr()
    assert cli.main(["merge", str(out), "-o", str(tmp_path / "merged")]) == 1
    err = capsys.readouterr().err
    assert f"shards 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 … of {10**18} are missing" in err


@pytest.mark.parametrize("kind", ["yolo", "labelme", "png", "overlay", "cvat", "coco"])
def test_exports_refuse_planted_links(
    kind: str, images: Path, victim: Path, tmp_path: Path, capsys: Any
) -> None:
    """Without its export.json an earlier export is not cleared, so its links would be followed."""
    (tmp_path / "p.jsonl").write_text(json.dumps(RECORD) + "\n")
    common = ["export-masks", str(tmp_path / "p.jsonl"), "--to", kind, "--overwrite"]
    common += ["--image-root", str(images)]
    copy = ["--copy-images"] if kind in ("yolo", "labelme", "cvat") else []
    owned = ["labels", "images", "data.yaml", "labelme", "masks", "overlays", "annotations.xml"]
    owned += ["instances.json", "results.json", "manifest.jsonl", "failures.jsonl"]
    for name in [*owned, "images.risam-export-part", "list.risam-export-part", "export.json"]:
        out = tmp_path / "out" / name.partition(".")[0]
        out.mkdir(parents=True, exist_ok=True)
        target = victim if "." not in name else victim / "precious"
        (out / name).symlink_to(target)
        assert cli.main([*common, *copy, "-o", str(out)]) in (0, 1), name
        assert _untouched(victim), name
    nested = tmp_path / "nested"
    folder = {"yolo": "labels", "labelme": "labelme", "png": "masks", "overlay": "overlays"}
    (nested / folder.get(kind, "images")).mkdir(parents=True)
    (nested / folder.get(kind, "images") / "street").symlink_to(victim)
    assert cli.main([*common, *copy, "-o", str(nested)]) == (0 if kind == "coco" else 1)
    assert _untouched(victim)


@pytest.mark.parametrize(
    "name",
    [
        "report.html",
        "report.json",
        "per_expression.jsonl",
        "failures.jsonl",
        "surplus.jsonl",
        "answers.jsonl",
    ],
)
def test_eval_refuses_planted_links(name: str, victim: Path, tmp_path: Path, capsys: Any) -> None:
    image = {"id": 1, "file_name": "street/a.png", "height": 24, "width": 32}
    expression = {"id": 1, "image_id": 1, "ann_ids": [], "text": "x"}
    coco = {"images": [image], "annotations": [], "expressions": [expression]}
    (tmp_path / "c.json").write_text(json.dumps(coco))
    (tmp_path / "p.jsonl").write_text(json.dumps(RECORD) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(victim / "precious")
    data = ["--dataset", "coco", "--root", str(tmp_path / "c.json"), "--split", "all"]
    files = ["--predictions", str(tmp_path / "p.jsonl"), "-o", str(out), "--overwrite"]
    assert cli.main(["eval", *data, *files]) == 1
    assert "is a link to" in capsys.readouterr().err
    assert _untouched(victim)


def test_links_that_lead_out_of_a_folder_are_found(victim: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "out").symlink_to(victim)
    (root / "in").symlink_to(root / "a")
    for inside in (root, root / "a/b/new", root / "in/new"):
        require_under(root, inside)
    for outside in (root / "out/new", root / "../victim/new"):
        with pytest.raises(OutputError, match="outside of"):
            require_under(root, outside)
    require_own(root, ["a", "missing", "a/b"])
    with pytest.raises(OutputError, match="is a link to"):
        require_own(root, ["a", "in"])
