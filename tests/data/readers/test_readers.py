"""Every reader on files of the benchmark's true shape, masks held against another raster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.eval_files import (
    GREFS,
    PHRASECUT_SIZE,
    TASKS,
    TRUTH,
    H,
    Mask,
    W,
    box,
    box_mask,
    coco_content,
    compressed,
    instances,
    phrasecut_mask,
    ref,
    refer_mask,
    runs,
    write_grefcoco,
    write_phrasecut,
    write_refer,
)

from risam_cli.data.readers.catalog import count_differences, open_dataset
from risam_cli.data.readers.coco import open_coco
from risam_cli.data.readers.instances import segmentation_to_rle
from risam_cli.data.readers.phrasecut import open_phrasecut
from risam_cli.data.readers.refer import open_refer
from risam_cli.errors import DataError, UsageError
from risam_cli.masks import rle as masks
from risam_cli.types import Expression, Failure, Sample


def by_id(samples: Iterable[Sample]) -> dict[str, Expression]:
    return {e.id: e for sample in samples for e in sample.expressions}


def drawn(expression: Expression) -> Mask:
    assert expression.target is not None
    return masks.decode(expression.target)


def assert_mask(expression: Expression, expected: Mask) -> None:
    np.testing.assert_array_equal(drawn(expression), expected)


# --- REFER ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_refer_reads_every_sentence_of_every_ref(tmp_path: Path, protocol: int) -> None:
    write_refer(tmp_path, protocol=protocol)
    samples = list(open_refer(tmp_path, "refcoco", "val"))
    assert [s.image for s in samples] == [
        "COCO_train2014_000000000011.jpg",
        "COCO_train2014_000000000012.jpg",
    ]
    assert all(s.path.is_file() and s.size == (H, W) for s in samples)
    assert [e.id for e in samples[0].expressions] == ["10", "11", "12", "20", "30"]
    found = by_id(samples)
    assert found["11"].text == "the cat on the left"
    assert found["11"].attributes["raw"] == "THE CAT ON THE LEFT"
    for name in ("10", "11", "12", "30"):
        assert_mask(found[name], TRUTH[101])
    assert_mask(found["20"], TRUTH[102])
    assert_mask(found["60"], TRUTH[105])
    assert found["10"].no_target is False


def test_overlapping_polygons_are_a_union(tmp_path: Path) -> None:
    write_refer(tmp_path)
    mask = drawn(by_id(open_refer(tmp_path, "refcoco", "val"))["20"])
    both = 15 * 10 + 20 * 20
    assert mask.sum() == both - 5 * 5


def test_a_triangle_is_drawn_as_the_benchmarks_own_tool_draws_it(tmp_path: Path) -> None:
    write_refer(tmp_path)
    assert_mask(by_id(open_refer(tmp_path, "refcoco", "train"))["50"], TRUTH[103])


def test_uncompressed_and_listed_rle(tmp_path: Path) -> None:
    write_refer(tmp_path)
    assert_mask(by_id(open_refer(tmp_path, "refcoco", "testA"))["40"], TRUTH[104])


def test_a_root_may_be_the_data_sets_own_folder(tmp_path: Path) -> None:
    folder = write_refer(tmp_path)
    source = open_refer(folder, "refcoco", "val")
    assert source.counts["refs"] == 4
    assert source.counts["expressions"] == 6
    assert all(s.path.is_file() for s in source)


def test_refcocog_by_umd_and_google(tmp_path: Path) -> None:
    folder = write_refer(tmp_path, "refcocog", "umd")
    assert len(open_refer(tmp_path, "refcocog", "val")) == 2
    with pytest.raises(DataError, match=r"refs\(google\)\.p"):
        open_refer(tmp_path, "refcocog", "val", split_by="google")
    (folder / "refs(google).p").write_bytes((folder / "refs(umd).p").read_bytes())
    assert len(open_refer(tmp_path, "refcocog", "val", split_by="google")) == 2
    with pytest.raises(DataError, match="umd or google"):
        open_refer(tmp_path, "refcocog", "val", split_by="unc")


def test_category_and_rivals_are_known(tmp_path: Path) -> None:
    write_refer(tmp_path)
    found = by_id(open_refer(tmp_path, "refcoco", "val"))
    assert found["10"].attributes["category"] == "cat"
    assert found["10"].attributes["distractors"] == 1  # 102; the kite is of another category
    assert found["60"].attributes["distractors"] == 1  # 104; 106 is a crowd
    kite = by_id(open_refer(tmp_path, "refcoco", "train"))["50"]
    assert kite.attributes["distractors"] == 0


def test_a_split_that_does_not_exist_names_those_that_do(tmp_path: Path) -> None:
    write_refer(tmp_path)
    with pytest.raises(DataError, match=r"testB.*testA \(1\), train \(1\), val \(4\)"):
        open_refer(tmp_path, "refcoco", "testB")


def test_missing_files_are_listed_with_every_place(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        open_refer(tmp_path, "refcoco+", "val")
    for place in (tmp_path, tmp_path / "refcoco+"):
        assert str(place / "refs(unc).p") in str(raised.value)
    folder = write_refer(tmp_path)
    (folder / "instances.json").unlink()
    with pytest.raises(DataError, match=r"refcoco/instances\.json"):
        open_refer(tmp_path, "refcoco", "val")
    with pytest.raises(DataError, match="does not exist"):
        open_refer(tmp_path / "nowhere", "refcoco", "val")


def _edit_instances(folder: Path, **changes: Any) -> None:
    content = instances()
    content.update(changes)
    (folder / "instances.json").write_text(json.dumps(content))


def test_an_annotation_that_does_not_exist_fails_its_expressions_only(tmp_path: Path) -> None:
    folder = write_refer(tmp_path)
    kept = [a for a in instances()["annotations"] if a["id"] != 102]
    _edit_instances(folder, annotations=kept)
    failures: list[Failure] = []
    found = by_id(open_refer(tmp_path, "refcoco", "val").iterate(failures.append))
    assert sorted(found) == ["10", "11", "12", "30", "60"]
    assert [f.id for f in failures] == ["20"]
    assert "annotation 102 does not exist" in failures[0].message
    with pytest.raises(DataError, match="annotation 102 does not exist"):
        list(open_refer(tmp_path, "refcoco", "val"))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = write_refer(tmp_path)
    strange = [{**a, "id": a["id"] + 5000} for a in instances()["annotations"]]
    _edit_instances(folder, annotations=strange)
    with pytest.raises(DataError, match="do not belong together"):
        open_refer(tmp_path, "refcoco", "val")
    _edit_instances(folder, images=[])
    with pytest.raises(DataError, match="image 11 is not among"):
        open_refer(tmp_path, "refcoco", "val")


def test_a_mask_of_another_size_than_the_image_fails(tmp_path: Path) -> None:
    folder = write_refer(tmp_path)
    content = instances()
    content["annotations"][3]["segmentation"] = compressed(np.ones((H + 1, W), bool))
    (folder / "instances.json").write_text(json.dumps(content))
    failures: list[Failure] = []
    assert not list(open_refer(tmp_path, "refcoco", "testA").iterate(failures.append))
    assert "41x60" in failures[0].message
    assert "40x60" in failures[0].message


# --- gRefCOCO -------------------------------------------------------------------------------------


def test_grefcoco_scalars_lists_none_and_crowds(tmp_path: Path) -> None:
    write_grefcoco(tmp_path)
    source = open_refer(tmp_path, "grefcoco", "val")
    found = by_id(source)
    assert sorted(found) == ["10", "11", "20", "30", "40", "50"]
    assert_mask(found["10"], TRUTH[101] | TRUTH[102])
    assert_mask(found["40"], TRUTH[104])
    assert_mask(found["50"], TRUTH[105])  # the crowd is left out
    for name in ("20", "30"):
        assert found[name].no_target is True
        assert not drawn(found[name]).any()
    assert source.counts["no_target"] == 2
    assert source.counts["multi_target"] == 2
    assert source.counts["single_target"] == 2
    assert source.notes == ("1 refs without a sentence were left out",)
    assert by_id(open_refer(tmp_path, "grefcoco", "testA"))["70"].attributes["referents"] == 2


def test_grefcoco_refuses_none_beside_something(tmp_path: Path) -> None:
    folder = write_grefcoco(tmp_path)
    mixed = [*GREFS, ref(9, 11, [-1, 101], "val", ["odd"])]
    (folder / "grefs(unc).json").write_text(json.dumps(mixed))
    with pytest.raises(DataError, match=r"ref 7 mixes 'no target'"):
        open_refer(tmp_path, "grefcoco", "val")


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({"split": "val"}, "has no ref_id"),
        ({"ref_id": 1}, "has no split"),
        (7, "has no split"),
        (ref(1, 11, ["x"], "val", ["a"]), "malformed"),
        ({**ref(1, 11, 101, "val", ["a"]), "sentences": [{"sent": "a"}]}, "lacks sent_id"),
        ({**ref(1, 11, 101, "val", ["a"]), "sentences": "a"}, "malformed"),
    ],
)
def test_malformed_refs_are_named(tmp_path: Path, broken: Any, complaint: str) -> None:
    folder = write_grefcoco(tmp_path)
    (folder / "grefs(unc).json").write_text(json.dumps([GREFS[0], broken]))
    with pytest.raises(DataError, match=rf"ref 1 .*{complaint}|ref 1.*{complaint}"):
        open_refer(tmp_path, "grefcoco", "val")


# --- PhraseCut ------------------------------------------------------------------------------------


def test_phrasecut_polygons_are_drawn_as_its_own_tool_draws_them(tmp_path: Path) -> None:
    write_phrasecut(tmp_path)
    samples = list(open_phrasecut(tmp_path, "val"))
    assert [s.image for s in samples] == ["7.jpg"]
    assert samples[0].path.is_file()
    found = by_id(samples)
    assert sorted(found) == ["7__1", "7__2"]
    for task in TASKS[:2]:
        expected = phrasecut_mask(task["Polygons"], PHRASECUT_SIZE)
        assert_mask(found[task["task_id"]], expected)
    one = drawn(found["7__1"])
    assert not one[40, 5]  # the polygon of one point
    assert one[5, 50]  # the polygon of two points is a line
    assert found["7__1"].attributes["category"] == "cup"
    assert found["7__1"].attributes["referents"] == 2


def test_phrasecut_val_leaves_miniv_out(tmp_path: Path) -> None:
    folder = write_phrasecut(tmp_path)
    source = open_phrasecut(folder, "val")
    assert source.counts["expressions"] == 2
    assert source.notes == ("1 phrases of miniv images were left out",)
    assert sorted(by_id(open_phrasecut(folder, "miniv"))) == ["9__1"]


@pytest.mark.parametrize("odd", [7, ["7", 1], {"task": 7}], ids=str)
def test_a_phrasecut_id_of_any_kind_is_its_text(tmp_path: Path, odd: Any) -> None:
    folder = write_phrasecut(tmp_path)
    tasks = json.loads((folder / "refer_val.json").read_text())
    for task in tasks:
        if task["task_id"] == "7__1":
            task["task_id"] = odd
    (folder / "refer_val.json").write_text(json.dumps(tasks))
    assert str(odd) in by_id(open_phrasecut(folder, "val"))


def test_phrasecut_phrases_with_one_id_keep_their_own_masks(tmp_path: Path) -> None:
    folder = write_phrasecut(tmp_path)
    tasks = json.loads((folder / "refer_val.json").read_text())
    twice = [{**task, "task_id": "7__1"} for task in tasks if task["image_id"] == 7]
    (folder / "refer_val.json").write_text(json.dumps(twice))
    found = by_id(open_phrasecut(folder, "val"))
    for name, task in zip(("7__1", "7__1#1"), twice, strict=True):
        assert_mask(found[name], phrasecut_mask(task["Polygons"], PHRASECUT_SIZE))


def test_phrasecut_with_the_other_name_of_its_image_list(tmp_path: Path) -> None:
    folder = write_phrasecut(tmp_path)
    (folder / "image_data_split3000.json").rename(folder / "image_data_split.json")
    assert len(open_phrasecut(folder, "val")) == 1
    (folder / "image_data_split.json").unlink()
    with pytest.raises(DataError, match=r"image_data_split3000\.json.*image_data_split\.json"):
        open_phrasecut(folder, "val")


def test_phrasecut_wrong_split_and_missing_file(tmp_path: Path) -> None:
    write_phrasecut(tmp_path)
    with pytest.raises(DataError, match="its splits: val, miniv"):
        open_phrasecut(tmp_path, "testA")
    with pytest.raises(DataError, match=r"refer_test\.json"):
        open_phrasecut(tmp_path, "test")


@pytest.mark.parametrize(
    ("polygons", "complaint"),
    [
        ([[["a", "b"]]], "not a list of points"),
        ([[[[1e30, 2], [3, 4]]]], "out of range"),
        ([[[[float("inf"), 2], [3, 4]]]], "not a list of points"),
        ([5], "not a list of points"),
    ],
)
def test_phrasecut_nonsense_polygons_fail_their_phrase(
    tmp_path: Path, polygons: Any, complaint: str
) -> None:
    folder = write_phrasecut(tmp_path)
    tasks = [{**TASKS[0], "Polygons": polygons}, TASKS[1]]
    (folder / "refer_val.json").write_text(json.dumps(tasks))
    failures: list[Failure] = []
    found = by_id(open_phrasecut(folder, "val").iterate(failures.append))
    assert sorted(found) == ["7__2"]
    assert complaint in failures[0].message


# --- COCO style -----------------------------------------------------------------------------------


def test_coco_expressions_and_captions(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_content()))
    found = by_id(open_coco(path))
    expected = {
        "900": TRUTH[101] | TRUTH[102],
        "901": np.zeros((H, W), bool),
        "902": TRUTH[104],
        "101": TRUTH[101],
        "102": TRUTH[102],
        "103#0": TRUTH[103],
        "103#1": TRUTH[103],
    }
    for name, mask in expected.items():
        assert_mask(found[name], mask)
    assert found["901"].no_target is True
    assert found["903"].target is None
    assert found["903"].no_target is None
    assert found["101"].text == "captioned"
    assert found["103#1"].text == "second"


def test_coco_as_a_manifest_needs_no_sizes_and_no_masks(tmp_path: Path) -> None:
    content = {
        "images": [{"id": "a", "file_name": "x/1.png"}, {"id": "b", "file_name": "2.png"}],
        "annotations": [{"id": 1, "image_id": "a", "caption": "a cat"}],
    }
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content))
    samples = list(open_coco(path, tmp_path / "pictures"))
    assert [(s.image, s.path, s.size) for s in samples] == [
        ("x/1.png", tmp_path / "pictures/x/1.png", None)
    ]
    assert samples[0].expressions[0].target is None
    bare = list(open_coco(path, bare_images=True))
    assert [len(s.expressions) for s in bare] == [1, 0]


def test_coco_ids_are_one_as_number_and_as_text(tmp_path: Path) -> None:
    plain = coco_content()
    kinds: list[type] = [str, float, int]

    def other(content: Any, number: int) -> Any:  # every id as another type than the one before
        if isinstance(content, list):
            return [other(one, number + k) for k, one in enumerate(content)]
        if not isinstance(content, dict):
            return content
        kind = kinds[number % 3]
        given = {key: kind(content[key]) for key in content if key in ("id", "image_id")}
        parts = {"ann_ids": [kind(one) for one in content.get("ann_ids", ())]}
        return content | given | (parts if "ann_ids" in content else {})

    mixed = {key: other(value, k) for k, (key, value) in enumerate(plain.items())}
    mixed["expressions"].append({"image_id": "12", "ann_ids": "-1", "text": "nothing"})
    plain["expressions"].append({"image_id": 12, "ann_ids": [-1], "text": "nothing"})
    read = []
    for content in (plain, mixed):
        (tmp_path / "instances.json").write_text(json.dumps(content))
        read.append(by_id(open_coco(tmp_path / "instances.json")))
    assert read[0] == read[1]


def test_refer_ids_are_one_as_number_and_as_text(tmp_path: Path) -> None:
    folder = write_grefcoco(tmp_path)
    expected = by_id(open_refer(tmp_path, "grefcoco", "val"))

    def text(value: Any) -> Any:
        return [*map(str, value)] if isinstance(value, list) else str(value)

    changed = [
        one | {"image_id": str(one["image_id"]), "ann_id": text(one["ann_id"])} for one in GREFS
    ]
    (folder / "grefs(unc).json").write_text(json.dumps(changed))
    assert by_id(open_refer(tmp_path, "grefcoco", "val")) == expected


def test_coco_images_are_found_in_any_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["in\\a.png", "in/\u00e9.png", "in/b.png"]  # of Windows, of Linux, of both
    content = {"images": [{"id": k, "file_name": name} for k, name in enumerate(names)]}
    (tmp_path / "any.json").write_text(json.dumps(content))
    files = [tmp_path / "images/in" / name for name in ("a.png", "e\u0301.png", "b.png")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.touch()
    groups = open_coco(tmp_path / "any.json", bare_images=True).groups
    assert [group.image for group in groups] == names
    assert [group.path for group in groups] == files
    monkeypatch.setattr(os.path, "lexists", lambda path: pytest.fail("plain names are looked up"))
    content["images"] = content["images"][2:]
    (tmp_path / "any.json").write_text(json.dumps(content))
    source = open_coco(tmp_path / "any.json", tmp_path / "images", bare_images=True)
    assert source.groups[0].path == files[2]


def test_coco_splits_by_field_and_by_file(tmp_path: Path) -> None:
    content = coco_content()
    for image, split in zip(content["images"], ("val", "test"), strict=True):
        image["split"] = split
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert len(open_dataset("coco", tmp_path, "val")) == 1
    assert len(open_dataset("coco", tmp_path, "all")) == 2
    with pytest.raises(DataError, match=r"its splits: test \(3\), val \(5\)"):
        open_dataset("coco", tmp_path, "train")
    (tmp_path / "train.json").write_text(json.dumps(coco_content()))
    assert len(open_dataset("coco", tmp_path, "train")) == 2


def test_an_object_that_is_named_twice_is_one(tmp_path: Path) -> None:
    content = coco_content()
    path = tmp_path / "instances.json"
    found = []
    for times in (1, 2):
        for one in content["expressions"]:
            one["ann_ids"] = one.get("ann_ids", []) * times
        path.write_text(json.dumps(content))
        source = open_coco(path)
        found.append((source.counts, [p.attributes for g in source.groups for p in g.phrases]))
    assert found[0] == found[1]


def test_doubled_ids_are_told_apart(tmp_path: Path) -> None:
    content = coco_content()
    content["expressions"][2]["id"] = 900
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    source = open_coco(path)
    assert {"900", "900#1"} <= by_id(source).keys()
    assert source.notes == ("1 expressions shared an id with an earlier one (now id#k)",)


@pytest.mark.parametrize(
    ("given", "own", "told"),
    [
        (("7", "7", "7#1", "7"), ["7", "7#1", "7#1#1", "7#2"], 3),
        (("7", "7#1", "7", "7"), ["7", "7#1", "7#2", "7#3"], 2),
    ],
)
def test_a_new_id_of_a_doubled_one_is_not_anothers_own(
    tmp_path: Path, given: tuple[str, ...], own: list[str], told: int
) -> None:
    content = coco_content()
    spoken = [{**content["expressions"][0], "id": name} for name in given]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({**content, "expressions": spoken}))
    source = open_coco(path)
    assert [phrase.id for phrase in source.groups[0].phrases][:4] == own
    assert f"{told} expressions shared an id" in source.notes[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"images": []}, "lists no images"),
        ({"images": [{"file_name": "x"}]}, "has no id"),
        ({"expressions": [3]}, r"expressions\[0\] is not an object"),
        ({"expressions": [{"image_id": 11, "ann_ids": []}]}, "has no text"),
        ({"expressions": [{"image_id": 99, "text": "a"}]}, "image 99 is not among"),
        ({"expressions": [{"image_id": 11, "text": "a", "ann_ids": "1,2"}]}, "1,2"),
        ({"expressions": [{"image_id": 11, "text": "a", "ann_ids": [{}]}]}, "a list of ids"),
    ],
)
def test_malformed_coco_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({**instances(), **change}))
    with pytest.raises(DataError, match=complaint):
        list(open_coco(path))


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        (None, "no segmentation"),
        ([], "no segmentation"),
        ([[1, 2, 3, 4]], "no polygon has three points"),
        ("abc", "no segmentation"),
        ({"size": [H, W], "counts": [5]}, "sum to 5"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite"),
        ([["a"] * 6], "numbers"),
    ],
)
def test_malformed_segmentations_are_named(segmentation: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        segmentation_to_rle(segmentation, (H, W), "here")


def test_polygons_of_fewer_than_three_points_are_left_out_beside_others() -> None:
    rle = segmentation_to_rle([[1, 2, 3, 4], box(2, 2, 9, 9)], (H, W), "here")
    np.testing.assert_array_equal(masks.decode(rle), box_mask((2, 2, 9, 9)))
    flat = segmentation_to_rle(box(2, 2, 9, 9), (H, W), "here")
    assert flat == rle
    triangle = segmentation_to_rle([[5.3, 4.7, 50.2, 9.9, 20.6, 35.1]], (H, W), "here")
    expected = refer_mask([[5.3, 4.7, 50.2, 9.9, 20.6, 35.1]])
    np.testing.assert_array_equal(masks.decode(triangle), expected)
    listed = segmentation_to_rle({"size": [H, W], "counts": runs(expected)}, (H, W), "here")
    assert listed == triangle


# --- what they share ------------------------------------------------------------------------------


def test_limit_and_shuffle(tmp_path: Path) -> None:
    write_refer(tmp_path)
    source = open_refer(tmp_path, "refcoco", "val")
    first = [e.id for s in source.limited(4) for e in s.expressions]
    assert first == ["10", "11", "12", "20"]
    assert source.limited(4).planned == 4
    assert source.limited(99).planned == 6
    orders = {tuple(s.image for s in source.limited(None, seed)) for seed in range(8)}
    assert len(orders) == 2  # both orders of two images come up
    for seed in range(3):
        once, again = (list(by_id(source.limited(None, seed))) for _ in range(2))
        assert once == again
        assert sorted(once) == ["10", "11", "12", "20", "30", "60"]


def test_counts_are_held_against_the_published_ones(tmp_path: Path) -> None:
    write_refer(tmp_path)
    lines = count_differences(open_refer(tmp_path, "refcoco", "val"))
    assert "refcoco val holds 6 expressions, the published number is 10834" in lines
    assert any("4 refs" in line and "3811" in line for line in lines)
    write_grefcoco(tmp_path)
    lines = count_differences(open_refer(tmp_path, "grefcoco", "val"))
    assert any("2 expressions with no target" in line and "8905" in line for line in lines)


def test_split_by_is_for_refer_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="split_by"):
        open_dataset("phrasecut", tmp_path, "val", split_by="unc")
