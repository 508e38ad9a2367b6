"""RefShapes on disk: what the benchmarks' readers find in it."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from risam_cli import cli
from risam_cli.commands import refshapes as command
from risam_cli.data.images.images import open_rgb
from risam_cli.data.readers.catalog import open_dataset
from risam_cli.data.refshapes.dataset import FAMILIES, SPLIT_SCENES, RefShapes
from risam_cli.data.refshapes.expressions import Referring
from risam_cli.data.refshapes.formats import annotation_id, image_id, phrase_structure
from risam_cli.data.refshapes.writers import FORMATS, IMAGE_FORMATS, OWN, Plan, write_family
from risam_cli.errors import OutputError, UsageError
from risam_cli.masks import rle as masks
from risam_cli.types import Sample

SPLITS = ("val", "testB")
SCENES = 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family in its own format, and the fourth also as COCO-style and PhraseCut JSON."""
    folder = tmp_path_factory.mktemp("refshapes")
    for family in FAMILIES:
        write_family(Plan(family, SPLITS, scenes=SCENES), folder)
    write_family(Plan("grefshapes", SPLITS, "coco", SCENES, image_format="png"), folder)
    write_family(Plan("grefshapes", SPLITS, "phrasecut", SCENES), folder)
    write_family(Plan("refshapes", SPLITS, "grefcoco", SCENES), folder)
    return folder


def read(root: Path, dataset: str, split: str) -> list[Sample]:
    return list(open_dataset(dataset, root, split).iterate())


CASES = [
    *((family, OWN[family][1], ".") for family in FAMILIES),
    ("grefshapes", "coco", "grefshapes/coco"),
    ("refshapes", "grefcoco", "refshapes"),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("family", "dataset", "where"), CASES)
def test_readers_find_the_scenes_again(
    written: Path, family: str, dataset: str, where: str, split: str
) -> None:
    samples = read(written / where, dataset, split)
    scenes = RefShapes(family, split, SCENES)
    assert len(samples) == SCENES
    for sample, item in zip(samples, scenes, strict=True):
        image = open_rgb(sample.path)
        if sample.path.suffix == ".png":
            assert np.array_equal(image, item.image)
        else:
            assert np.abs(image.astype(int) - item.image).mean() < 4
        found = {e.text: e for e in sample.expressions}
        assert list(found) == [e.text for e in sample.expressions]
        assert set(found) == {referring.text for referring in item.expressions}
        for referring in item.expressions:
            expression = found[referring.text]
            assert expression.target is not None
            assert np.array_equal(masks.decode(expression.target), item.mask(referring))
            assert expression.no_target == (not referring.objects)
            assert expression.attributes["referents"] == len(referring.objects)


def test_phrasecut_says_all_but_holes_and_no_target(written: Path) -> None:
    holes = exact = 0
    for split in SPLITS:
        samples = read(written / "grefshapes", "phrasecut", split)
        scenes = RefShapes("grefshapes", split, SCENES)
        for sample, item in zip(samples, scenes, strict=True):
            wanted = [referring for referring in item.expressions if referring.objects]
            assert [e.text for e in sample.expressions] == [r.text for r in wanted]
            for expression, referring in zip(sample.expressions, wanted, strict=True):
                assert expression.target is not None
                got, true = masks.decode(expression.target), item.mask(referring)
                assert not (true & ~got).any()
                if any(item.objects[k].shape == "ring" for k in referring.objects):
                    holes += 1
                else:
                    exact += (got & ~true).sum() <= 0.02 * true.sum()
                    assert (got & ~true).sum() <= 0.25 * true.sum()
    assert exact > 5
    assert holes > 0


def test_refer_pickle_has_the_published_fields(written: Path) -> None:
    refs = pickle.loads((written / "refcoco" / "refs(unc).p").read_bytes())
    instances = json.loads((written / "refcoco" / "instances.json").read_text())
    by_id = {record["id"]: record for record in instances["annotations"]}
    assert len(by_id) == len(instances["annotations"])
    names = {record["id"]: record["file_name"] for record in instances["images"]}
    assert {ref["split"] for ref in refs} == set(SPLITS)
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    for ref in refs:
        assert set(ref) == {
            *("ref_id", "ann_id", "category_id", "image_id", "file_name"),
            *("sent_ids", "sentences", "split"),
        }
        annotation = by_id[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"]
        assert names[ref["image_id"]] == ref["file_name"]
        assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"]
        for sentence in ref["sentences"]:
            assert sentence["tokens"] == sentence["sent"].split() == sentence["raw"].split()
    sent_ids = list(itertools.chain(*(ref["sent_ids"] for ref in refs)))
    assert len(set(sent_ids)) == len(sent_ids) == len(SPLITS) * SCENES * 6


def test_annotations_describe_their_objects(written: Path) -> None:
    instances = json.loads((written / "grefcoco" / "instances.json").read_text())
    names = {record["id"]: record["name"] for record in instances["categories"]}
    item = RefShapes("grefshapes", "testB", SCENES)[1]
    image = image_id("testB", 1, "grefshapes")
    for number, thing in enumerate(item.objects):
        (found,) = (a for a in instances["annotations"] if a["id"] == annotation_id(image, number))
        seen = item.instances == number + 1
        rows, columns = np.nonzero(seen)
        assert names[found["category_id"]] == thing.shape
        assert found["attributes"] == {"color": thing.color, "size": thing.size}
        assert found["area"] == seen.sum()
        assert found["bbox"] == [
            columns.min(),
            rows.min(),
            np.ptp(columns) + 1,
            np.ptp(rows) + 1,
        ]


def test_no_target_is_minus_one_in_grefcoco(written: Path) -> None:
    refs = json.loads((written / "grefcoco" / "grefs(unc).json").read_text())
    empty = [ref for ref in refs if ref["no_target"]]
    assert empty
    assert all(ref["ann_id"] == [-1] and ref["category_id"] == [-1] for ref in empty)
    assert all(-1 not in ref["ann_id"] for ref in refs if not ref["no_target"])
    assert any(len(ref["ann_id"]) > 1 for ref in refs)


@pytest.mark.parametrize(
    ("text", "name", "attributes", "relations"),
    [
        ("all the small red crosses", "cross", ["small", "red"], []),
        ("thing that is blue", "thing", ["blue"], []),
        ("the ring to the left of the big star", "ring", [], [["to the left of", "the big star"]]),
        ("ring left of the star", "ring", [], [["left of", "the star"]]),
        ("two white objects next to the star", "object", ["white"], [["next to", "the star"]]),
    ],
)
def test_phrase_structure(
    text: str, name: str, attributes: list[str], relations: list[list[str]]
) -> None:
    structure = phrase_structure(Referring(text, (0,), "relation"))
    assert structure["name"] == name
    assert structure["attributes"] == attributes
    assert structure["relation_descriptions"] == relations
    assert structure["relation_ids"] == list(range(len(relations)))


def test_ids_do_not_meet() -> None:
    blocks = sorted(
        tuple(image_id(split, k, family) for k in (0, 999_999))
        for family in FAMILIES
        for split in SPLIT_SCENES
    )
    assert all(before[1] < after[0] for before, after in itertools.pairwise(blocks))
    # A split that came later moved no other's.
    assert image_id("val", 0) == 1_000_001
    assert image_id("testB", 4, "grefshapes") == 15_000_005
    assert annotation_id(7, 8) < annotation_id(8, 0)


def test_the_same_scene_has_the_same_ids_alone_and_in_company(
    written: Path, tmp_path: Path
) -> None:
    write_family(Plan("refshapes", ("testB",), scenes=2), tmp_path)
    alone = read(tmp_path, "refcoco", "testB")
    assert alone == [
        Sample(s.image, tmp_path / s.path.relative_to(written), s.expressions, s.size)
        for s in read(written, "refcoco", "testB")[:2]
    ]


def test_combinations_without_words_are_refused() -> None:
    with pytest.raises(UsageError, match="one object"):
        Plan("grefshapes", SPLITS, "refer")
    with pytest.raises(UsageError, match="testC has phrases of none"):
        Plan("refshapes", ("val", "testC"))
    with pytest.raises(UsageError, match="jpg"):
        Plan("refshapes", SPLITS, "phrasecut", image_format="png")
    with pytest.raises(UsageError, match="polygons of its own"):
        Plan("refshapes", SPLITS, "phrasecut", polygons=True)
    with pytest.raises(UsageError, match="100 is too many"):
        Plan("refshapes", SPLITS, expressions=100)
    with pytest.raises(UsageError, match="test"):
        Plan("refshapes", ("test",))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_family(Plan("refshapes", ("val",), scenes=2), tmp_path, on_scene=stop)
    assert list(tmp_path.iterdir()) == []

    write_family(Plan("refshapes", ("val",), scenes=1), tmp_path)
    before = (tmp_path / "refcoco" / "instances.json").read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        write_family(Plan("refshapes", ("val",), scenes=2), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_family(Plan("refshapes", ("val",), scenes=2), tmp_path, overwrite=True, on_scene=stop)
    assert (tmp_path / "refcoco" / "instances.json").read_bytes() == before
    write_family(Plan("refshapes", ("val",), scenes=2), tmp_path, overwrite=True)
    assert (tmp_path / "refcoco" / "instances.json").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"refcoco", "images"}


def test_an_output_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken"):
        write_family(Plan("refshapes", ("val",), scenes=1), tmp_path / "taken")


# The command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["refshapes", "-o", str(tmp_path), "--family", "grefshapes", "--splits", "testA,val"]
    args += ["--scenes", "2", "--expressions", "3", "--size", "128", "--seed", "5", "--json"]
    assert cli.main(args) == 0
    told = capsys.readouterr()
    (about,) = json.loads(told.out)
    assert about == {
        "folder": str(tmp_path / "grefcoco"),
        **json.loads((tmp_path / "grefcoco" / "refshapes.json").read_text()),
    }
    assert about["splits"] == {"testA": 2, "val": 2}
    assert about["counts"]["images"] == 4
    assert about["counts"]["expressions"] == 12
    assert "4 images, 12 expressions" in told.err
    scenes = RefShapes("grefshapes", "testA", 2, 3, size=128, seed=5)
    samples = read(tmp_path, "grefcoco", "testA")
    assert [s.size for s in samples] == [(128, 128)] * 2
    assert {e.text for e in samples[1].expressions} == {r.text for r in scenes[1].expressions}

    assert cli.main(args) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*args, "--overwrite"]) == 0


def test_command_warns_of_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["refshapes", "-o", str(tmp_path), "--family", "grefshapes", "--format", "phrasecut"]
    assert cli.main([*args, "--splits", "val", "--scenes", "3"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "without a target are not written" in told.err


@pytest.mark.parametrize(
    "options",
    [
        ["--family", "refshapesx"],
        ["--splits", "val,test"],
        ["--scenes", "0"],
        ["--size", "64"],
        ["--format", "refer"],
        ["--format", "phrasecut", "--image-format", "png"],
        ["--scenes", "2000000"],
    ],
)
def test_wrong_usage(options: list[str], tmp_path: Path) -> None:
    assert cli.main(["refshapes", "-o", str(tmp_path / "out"), *options]) == 2
    assert not (tmp_path / "out").exists()


def test_help_names_what_there_is() -> None:
    assert command.FAMILIES == FAMILIES == tuple(OWN)
    assert tuple(SPLIT_SCENES) == command.SPLITS
    assert command.FORMATS == FORMATS
    assert command.IMAGE_FORMATS == IMAGE_FORMATS
