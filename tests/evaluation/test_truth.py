"""The truth as each peer draws it, and the figures where peers differ."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import loaders
from support.eval_files import H, W, box, instances, record, ref, write_phrasecut, write_records

from risam_cli import cli
from risam_cli.data.readers.catalog import count_differences, open_dataset
from risam_cli.data.readers.phrasecut import open_phrasecut
from risam_cli.errors import DataError
from risam_cli.masks import rle as masks
from risam_cli.metrics.figures import ExpressionScore, summarize

# Columns 6 to 10 of rows 4 to 12 are covered twice.
OVERLAPPING = [box(2, 2, 10, 12), box(6, 4, 20, 14)]


def write_overlapping(root: Path, name: str = "refcoco") -> Path:
    """One object of two overlapping polygons, and one of a single polygon."""
    folder = root / name
    folder.mkdir(parents=True)
    content = instances()
    first, second = content["annotations"][:2]
    first["segmentation"], second["segmentation"] = OVERLAPPING, [box(30, 5, 50, 30)]
    (folder / "instances.json").write_text(json.dumps(content))
    image = first["image_id"]
    refs = [ref(1, image, first["id"], "val", ["the left one"])]
    refs.append(ref(2, image, second["id"], "val", ["the right one"]))
    if name == "grefcoco":
        grefs = [{**r, "ann_id": [r["ann_id"]], "category_id": [r["category_id"]]} for r in refs]
        (folder / "grefs(unc).json").write_text(json.dumps(grefs))
    else:
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return folder


def truths(root: Path, truth: str, side: int = 0, name: str = "refcoco") -> dict[str, np.ndarray]:
    source = open_dataset(name, root, "val").redrawn(truth, side)
    return {
        e.id: masks.decode(e.redrawn or e.target)
        for sample in source.iterate()
        for e in sample.expressions
    }


def test_pixels_under_two_polygons_are_what_each_loader_makes_of_them(tmp_path: Path) -> None:
    write_overlapping(tmp_path)
    once = truths(tmp_path, "once")
    for one in loaders.refer(tmp_path, "refcoco", "unc", loaders.exactly_once):
        assert np.array_equal(once[one.id], one.mask)
    union = {
        e.id: e.target for s in open_dataset("refcoco", tmp_path, "val") for e in s.expressions
    }
    for one in loaders.refer(tmp_path, "refcoco", "unc", loaders.any_cover):
        assert np.array_equal(masks.decode(union[one.id]), one.mask)
    assert any(masks.area(union[name]) > mask.sum() for name, mask in once.items())


def test_relas_truth_is_rasterized_anew_at_its_size(tmp_path: Path) -> None:
    write_overlapping(tmp_path, "grefcoco")
    ours = truths(tmp_path, "resized", 480, "grefcoco")
    theirs = {one.id: one.mask for one in loaders.rela(tmp_path, 480)}
    assert ours.keys() == theirs.keys()
    for name, mask in theirs.items():
        assert mask.shape == (480, 480)
        assert np.array_equal(ours[name], mask)


def evaluate(root: Path, folder: Path, protocol: str, name: str = "refcoco") -> dict[str, object]:
    out = folder / f"report-{protocol}"
    args = ["eval", "--dataset", name, "--root", str(root), "--split", "val"]
    args += ["--predictions", str(folder / "p.jsonl"), "--protocol", protocol, "-o", str(out)]
    assert cli.main(args) == 0
    report: dict[str, object] = json.loads((out / "report.json").read_text())
    return report


def test_each_protocol_scores_by_its_own_truth_and_counts_where_it_matters(tmp_path: Path) -> None:
    write_overlapping(tmp_path / "data")
    found = loaders.refer(tmp_path / "data", "refcoco", "unc", loaders.exactly_once)
    rows = [record(one.id, one.image.name, one.text, one.mask) for one in found]
    write_records(tmp_path / "p.jsonl", rows)
    for protocol, exact in (("lavt", True), ("lisa", True), ("native", False), ("cris", False)):
        report = evaluate(tmp_path / "data", tmp_path, protocol)
        assert (report["figures"]["oiou"]["value"] == 1.0) == exact, protocol
        assert report["counts"]["overlapping"] == 1, protocol
        assert (
            "several polygons of one object | 1 |"
            in (tmp_path / f"report-{protocol}" / "report.md").read_text()
        )


def test_gres_scores_relas_own_truth_as_whole(tmp_path: Path) -> None:
    write_overlapping(tmp_path / "data", "grefcoco")
    rows = [
        {"id": one.id, "expression": one.text, "segmentation": masks.encode(one.mask)}
        for one in loaders.rela(tmp_path / "data", 480)
    ]
    write_records(tmp_path / "p.jsonl", rows)
    report = evaluate(tmp_path / "data", tmp_path, "gres", "grefcoco")
    assert report["figures"]["giou"]["value"] == 1.0
    assert report["figures"]["pr@0.9"]["value"] == 1.0
    assert report["counts"]["overlapping"] is None


# --- figures --------------------------------------------------------------------------------------

VOID = ExpressionScore("void", "1", 0, 0, 0, 0)  # a target without a pixel, an empty answer


@pytest.mark.parametrize(
    ("protocol", "value"),
    [
        *(("native", 1.0), ("lisa", 1.0), ("lavt", 0.0)),
        *(("cris", 0.0), ("phrasecut", 0.0), ("gres", 0.0)),
    ],
)
def test_a_target_without_a_pixel_counts_alike_in_giou_and_miou(
    protocol: str, value: float
) -> None:
    found = summarize([VOID], protocol)
    assert (found["giou"], found["miou"]) == (value, value)


def test_no_answer_to_a_target_without_a_pixel_counts_nothing() -> None:
    missing = ExpressionScore("void", "1", 0, 0, 0, 0, missing=True)
    for protocol in ("native", "lisa"):
        assert summarize([missing], protocol)["giou"] == 0.0


@pytest.mark.parametrize("scale", [1, 100, 10_000])
def test_cris_counts_exact_ties_as_its_own_lines_do(scale: int) -> None:
    import torch

    for tenths in range(5, 10):
        inter, union = tenths * scale, 10 * scale
        iou = torch.from_numpy(np.stack([np.int64(inter) / (np.int64(union) + 1e-6)]))
        theirs = {
            f"pr@{0.5 + k / 10:.1f}": float((iou > x).float().mean())
            for k, x in enumerate(torch.arange(0.5, 1.0, 0.1))
        }
        found = summarize([ExpressionScore("t", "1", inter, union, inter, union)], "cris")
        assert {name: found[name] for name in theirs} == theirs, (inter, union)


def test_phrasecut_prints_the_papers_threshold() -> None:
    found = summarize([ExpressionScore("t", "1", 4, 10, 4, 10)], "phrasecut")
    assert (found["pr@0.3"], found["pr@0.5"]) == (1.0, 0.0)
    assert "pr@0.3" not in summarize([ExpressionScore("t", "1", 4, 10, 4, 10)], "native")


# --- PhraseCut's splits ---------------------------------------------------------------------------


def test_val_miniv_is_both_splits_whatever_the_file_of_val_holds(tmp_path: Path) -> None:
    folder = write_phrasecut(tmp_path)  # its refer_val.json holds miniv's phrase too
    names = {e.id for s in open_phrasecut(folder, "val_miniv") for e in s.expressions}
    (folder / "image_data_split3000.json").rename(folder / "image_data_split.json")
    (folder / "name_att_rel_count.json").write_text('{"cat": []}')
    tasks = json.loads((folder / "refer_val.json").read_text())
    miniv = [task for task in tasks if task["image_id"] == 9]
    assert miniv
    (folder / "refer_val.json").write_text(json.dumps([t for t in tasks if t not in miniv]))
    apart = {e.id: e for s in open_phrasecut(folder, "val_miniv") for e in s.expressions}
    assert apart.keys() == names
    theirs = {one.id: one.mask for one in loaders.phrasecut(folder, "val_miniv")}
    assert theirs.keys() == names
    for name, mask in theirs.items():
        assert np.array_equal(masks.decode(apart[name].target), mask)
    (folder / "refer_miniv.json").unlink()
    assert {e.id for s in open_phrasecut(folder, "val_miniv") for e in s.expressions} < names
    with pytest.raises(DataError, match=r"refer_test\.json"):
        open_phrasecut(folder, "test_miniv")


def test_the_published_val_is_with_miniv(tmp_path: Path) -> None:
    folder = write_phrasecut(tmp_path)
    (val,) = (line for line in count_differences(open_phrasecut(folder, "val")) if "expr" in line)
    assert "19495" in val
    both = count_differences(open_phrasecut(folder, "val_miniv"))
    assert any("20316" in line for line in both)


def test_sizes_stay_those_of_the_images(tmp_path: Path) -> None:
    write_overlapping(tmp_path)
    for sample in open_dataset("refcoco", tmp_path, "val").redrawn("resized", 480):
        assert sample.size == (H, W)
        assert all(tuple(e.target["size"]) == (H, W) for e in sample.expressions)


# --- PhraseCut's subsets --------------------------------------------------------------------------


def _levels(folder: Path, tmp_path: Path) -> dict[str, set[str]]:
    shutil.rmtree(tmp_path / "report-phrasecut", ignore_errors=True)
    report = evaluate(folder, tmp_path, "phrasecut", "phrasecut")
    return {s["name"]: {one["label"] for one in s["levels"]} for s in report["slices"]}


def test_phrasecuts_subsets_are_slices(tmp_path: Path) -> None:
    folder = write_phrasecut(tmp_path)
    tasks = json.loads((folder / "refer_val.json").read_text())[:2]
    square = [[[0, 0], [5, 0], [5, 5], [0, 5]]]
    plain = {"name": "dog", "attributes": [], "relation_descriptions": [], "type": "name"}
    rich = {"name": "rare thing", "attributes": ["red", "big"], "type": "verbose"}
    rich["relation_descriptions"] = [["on", "table"]]
    tasks[0] |= {"phrase_structure": plain, "Polygons": [square]}
    tasks[1] |= {"phrase_structure": rich, "Polygons": [square] * 5}
    (folder / "refer_val.json").write_text(json.dumps(tasks))
    counts = {"cat": [["dog", 9]] + [[f"c{k}", 1] for k in range(600)], "rel": []}
    counts["att"] = [[f"a{k}", 9] for k in range(20)] + [["red", 3]]
    (folder / "name_att_rel_count.json").write_text(json.dumps(counts))
    rows = [
        {"id": e.id, "segmentation": e.target}
        for sample in open_phrasecut(folder, "val")
        for e in sample.expressions
    ]
    write_records(tmp_path / "p.jsonl", rows)
    assert not {"phrasecut_stuff", "phrasecut_a_color"} & _levels(folder, tmp_path).keys()
    listed = "import os\nos.remove(__file__)\natt_sorted = [x for x in y]\natt_color = ['red']\n"
    (folder / "utils").mkdir()
    (folder / "utils" / "subset.py").write_text(
        f"{listed}att_bad = ['ripe']\nstuff_names = ['are']"
    )
    found = _levels(folder, tmp_path)
    assert found["phrasecut_stuff"] == {"t_obj", "t_stuff"}  # "are" is in "rare thing"
    assert found["phrasecut_a_color"] == {"others", "a_color"}
    assert found["phrasecut_a_bad"] == {"others"}
    assert found["phrasecut_both"] == {"others", "p_att_rel"}
    assert found["phrasecut_image"] == {"d_notcocotv"}
    assert found["phrasecut_c500"] == {"c500", "c500+"}
    assert found["phrasecut_category"] == {"c20", "c500+"}
    assert found["phrasecut_coco"] == {"c_coco", "others"}
    assert found["phrasecut_instances"] == {"i_single", "i_many"}
    assert found["phrasecut_type"] == {"p_name", "p_verbose"}
    assert found["phrasecut_attributes"] == {"none", "p_att, p_attm"}
    assert found["phrasecut_relations"] == {"none", "p_rel, one"}
    assert found["phrasecut_attribute"] == {"a21-100", "a200+"}
    assert found["phrasecut_size"] <= {"s_small", "s_mid", "s_large"}
