"""What this tool writes is read by those that it is written for: the benchmarks' own loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import loaders
from support.loaders import Loaded
from support.paths import REPO

from risam_cli.data.readers.catalog import open_dataset
from risam_cli.data.refshapes.dataset import FAMILIES, RefShapes
from risam_cli.data.refshapes.formats import image_id
from risam_cli.data.refshapes.writers import Plan, write_family
from risam_cli.masks import rle as masks

SPLITS = ("val", "testB")
SCENES = 4
SAMPLES = REPO / "sample_data"
Loader = Callable[[Path], Iterator[Loaded]]

REFER = {"refshapes": ("refcoco", "unc"), "refshapes+": ("refcoco+", "unc")} | {
    "refshapesg": ("refcocog", "umd")
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family in its benchmark's own format, in one folder."""
    folder = tmp_path_factory.mktemp("sets")
    for family in FAMILIES:
        write_family(Plan(family, SPLITS, scenes=SCENES), folder)
    write_family(Plan("refshapes", ("val", "train"), "phrasecut", scenes=SCENES), folder)
    return folder


def truth(family: str) -> dict[str, tuple[str, np.ndarray]]:
    """Text and mask of every expression, from the scenes themselves."""
    found = {}
    for split in SPLITS:
        for index, item in enumerate(RefShapes(family, split, SCENES)):
            for k, referring in enumerate(item.expressions):
                name = str(image_id(split, index, family) * 100 + k)
                found[name] = (referring.text, item.mask(referring))
    return found


LOADERS: dict[str, Callable[[Path, str, str], Iterator[Loaded]]] = {
    "REFER, CRIS": partial(loaders.refer, keep=loaders.any_cover),
    "LAVT": partial(loaders.refer, keep=loaders.exactly_once),
    "LISA, EVF-SAM": loaders.lisa,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("family", REFER)
def test_refers_loaders_read_every_mask(written: Path, family: str, loader: str) -> None:
    found = list(LOADERS[loader](written, *REFER[family]))
    wanted = truth(family)
    assert len(found) == len(wanted) == len(SPLITS) * SCENES * 6
    for one in found:
        text, mask = wanted[one.id]
        assert one.text == text
        assert np.array_equal(one.mask, mask)
        with Image.open(one.image) as image:
            assert image.size[::-1] == mask.shape


def test_grefcocos_loader_reads_every_mask(written: Path) -> None:
    found = list(loaders.grefer(written))
    wanted = truth("grefshapes")
    assert len(found) == len(wanted)
    assert any(not one.mask.any() for one in found)
    for one in found:
        assert np.array_equal(one.mask, wanted[one.id][1])
        assert one.image.is_file()


def test_with_polygons_rela_reads_every_mask_and_the_others_do_too(tmp_path: Path) -> None:
    write_family(Plan("grefshapes", SPLITS, scenes=SCENES, polygons=True), tmp_path)
    write_family(Plan("refshapes", SPLITS, scenes=SCENES, polygons=True), tmp_path)
    wanted = truth("grefshapes")
    for found in (list(loaders.rela(tmp_path)), list(loaders.grefer(tmp_path))):
        assert {one.id for one in found} == wanted.keys()
        for one in found:
            assert np.array_equal(one.mask, wanted[one.id][1])
    wanted = truth("refshapes")
    for loader in LOADERS.values():
        for one in loader(tmp_path, "refcoco", "unc"):
            assert np.array_equal(one.mask, wanted[one.id][1])


@pytest.mark.parametrize("split", ["val", "train"])
def test_phrasecuts_loader_reads_every_mask(written: Path, split: str) -> None:
    folder = written / "refshapes" / "phrasecut"
    found = {one.id: one for one in loaders.phrasecut(folder, split)}
    source = open_dataset("phrasecut", folder, split)
    ours = {e.id: e for sample in source.iterate() for e in sample.expressions}
    assert found.keys() == ours.keys()
    assert len(found) == SCENES * 6
    for name, one in found.items():
        assert one.image.is_file()
        assert ours[name].target is not None
        assert np.array_equal(one.mask, masks.decode(ours[name].target))


@pytest.mark.parametrize("dataset", ["refcoco", "grefcoco"])
def test_the_sample_data_are_read_too(dataset: str, tmp_path: Path) -> None:
    # As sample_data/README.md says: a link, because images/ holds the pictures to predict on.
    (tmp_path / dataset).symlink_to(SAMPLES / dataset)
    place = {"refcoco": "images/mscoco/images/train2014", "grefcoco": "images/train2014"}[dataset]
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(SAMPLES / dataset / "images")
    if dataset == "refcoco":
        found = list(loaders.refer(tmp_path, "refcoco", "unc", loaders.exactly_once))
        splits: tuple[str, ...] = ("val", "testB")
    else:
        found, splits = list(loaders.grefer(tmp_path)), ("val",)
    ours = {}
    for split in splits:
        for sample in open_dataset(dataset, SAMPLES, split).iterate():
            ours |= {e.id: e for e in sample.expressions}
    assert {one.id for one in found} == ours.keys()
    for one in found:
        assert np.array_equal(one.mask, masks.decode(ours[one.id].target))
        assert one.image.is_file()


def test_no_two_families_share_an_id(written: Path) -> None:
    names: set[str] = set()
    images: set[str] = set()
    for family, (dataset, by) in REFER.items():
        found = list(loaders.refer(written, dataset, by, loaders.any_cover))
        assert not names & {one.id for one in found}, family
        names |= {one.id for one in found}
        images |= {one.image.name for one in found}
    grefs = list(loaders.grefer(written))
    assert not names & {one.id for one in grefs}
    assert not images & {one.image.name for one in grefs}


def test_a_set_written_anew_takes_its_own_images_along_and_no_others(tmp_path: Path) -> None:
    images = tmp_path / "images/mscoco/images/train2014"
    write_family(Plan("refshapes", ("val",), scenes=3), tmp_path)
    write_family(Plan("refshapes+", ("val",), scenes=2), tmp_path)
    assert len(list(images.iterdir())) == 5
    write_family(Plan("refshapes", ("val",), scenes=1), tmp_path, overwrite=True)
    left = {path.name for path in images.iterdir()}
    assert left == {
        f"COCO_train2014_{image_id('val', index, family):012d}.jpg"
        for family, index in (("refshapes", 0), ("refshapes+", 0), ("refshapes+", 1))
    }
