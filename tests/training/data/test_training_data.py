"""Training data: through the readers that eval uses, mixed without what any part holds out."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.settings_files import load_settings
from support.training_runs import RAW, settings, write_coco

from risam_cli.cli import root
from risam_cli.console.console import Console
from risam_cli.data.readers.catalog import open_dataset
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.errors import ConfigError, DataError
from risam_cli.masks import rle as masks
from risam_cli.training.data.build import DataBuilder
from risam_cli.training.data.collate import PlannedBatches, collate_dense
from risam_cli.training.data.dataset import (
    DenseScenes,
    PackedSamples,
    ReferringSamples,
    ReferringScenes,
)
from risam_cli.training.data.mixed import MixedExamples, image_key
from risam_cli.training.stage import check_paths

FAMILIES = ("refcoco", "refcoco+", "refcocog", "grefcoco")
REFERRING = [RAW["stages"][1]]
SCENES = RAW["val"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RefShapes in the benchmarks' own files: 4 scenes of train and of val each; read-only.

    As in life, RefCOCO, RefCOCO+ and G-Ref ask about the same pictures.
    """
    folder = tmp_path_factory.mktemp("data")
    own = ["-o", str(folder), "--splits", "train,val", "--scenes", "4", "--expressions", "3"]
    for more in (["--size", "128"], ["--size", "128", "--family", "refshapes", *PHRASECUT]):
        done = CliRunner().invoke(root, ["refshapes", *own, *more], standalone_mode=False)
        assert done.exception is None, done.exception
    shutil.move(folder / "refshapes/phrasecut", folder / "phrasecut")
    for name, refs in (("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")):
        shutil.rmtree(folder / name)
        shutil.copytree(folder / "refcoco", folder / name)
        (folder / name / "refs(unc).p").rename(folder / name / refs)
    return folder


PHRASECUT = ["--format", "phrasecut"]


def _builder(tmp_path: Path, train: dict[str, Any], **changes: Any) -> DataBuilder:
    chosen = {"val": SCENES, "stages": REFERRING, **changes}
    return DataBuilder(settings(tmp_path / "run", train=train, **chosen), Console())


# --- one data set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [*FAMILIES, "phrasecut"])
def test_a_benchmark_trains_on_the_masks_that_eval_scores(
    data: Path, tmp_path: Path, dataset: str
) -> None:
    builder = _builder(tmp_path, {"dataset": dataset, "root": str(data)})
    found = builder.train()
    assert isinstance(found, ReferringSamples)
    source = open_dataset(dataset, data, "train")
    assert len(found) == len(source) == 4
    for index, sample in enumerate(source):
        packed = found.samples[index]
        assert [e.target for e in packed.expressions] == [e.target for e in sample.expressions]
        assert [e.text for e in packed.expressions] == [e.text for e in sample.expressions]
        example = found[index]
        assert example.texts == tuple(e.text for e in sample.expressions)
        for row, expression in enumerate(sample.expressions):
            assert expression.target is not None
            share = masks.area(expression.target) / 128**2
            assert example.targets[row].mean() / 255 == pytest.approx(share, abs=0.002)
            assert bool(example.no_target[row]) == (share == 0)
        assert found.expressions_of(index) == len(sample.expressions)
        assert found.name_of(index) == str(sample.path)


def test_one_file_trains_and_validates(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "mine")
    builder = _builder(
        tmp_path,
        {**coco, "leave_out_every": 2},
        val={"mine": {**coco, "only_every": 2}},
    )
    train, val = builder.train(), builder.held_out()["mine"]
    assert (train.name_of(0), val.name_of(0)) == tuple(
        str(tmp_path / f"mine/images/{number}.png") for number in (2, 1)
    )
    assert (len(train), len(val)) == (1, 1)


def test_images_that_train_and_val_share_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = write_coco(tmp_path / "mine")
    _builder(tmp_path, coco, val={"mine": {**coco, "limit": 1}}).train()
    assert "1 image is in train and in val" in capsys.readouterr().err


def test_copies_under_other_names_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco, other = write_coco(tmp_path / "mine"), write_coco(tmp_path / "other")
    for picture in (tmp_path / "other/images").iterdir():
        picture.write_bytes(picture.read_bytes() + b"not the same")
    shutil.copy(tmp_path / "mine/images/1.png", tmp_path / "other/images/2.png")
    _builder(tmp_path, coco, val={"other": other}).train()
    told = capsys.readouterr().err
    assert "1 image is in train and in val, " in told
    assert f"{tmp_path}/mine/images/1.png as {tmp_path}/other/images/2.png" in told


def test_data_are_read_once_for_all_stages(data: Path, tmp_path: Path) -> None:
    builder = _builder(tmp_path, {"dataset": "refcoco", "root": str(data)})
    assert builder.train() is builder.train()
    assert builder.held_out() is builder.held_out()


def test_packed_samples_are_small_and_the_same(data: Path) -> None:
    samples = list(open_dataset("grefcoco", data, "train"))
    packed = PackedSamples(samples)
    assert packed.expressions == sum(len(s.expressions) for s in samples)
    for k, sample in enumerate(samples):
        assert packed[k].path == sample.path
        assert [(e.id, e.text, e.target, e.no_target) for e in packed[k].expressions] == [
            (e.id, e.text, e.target, e.no_target) for e in sample.expressions
        ]
    assert packed.nbytes < 3000 * len(samples)
    again = pickle.loads(pickle.dumps(packed))  # as a worker that is spawned has it
    assert again[3].expressions == packed[3].expressions
    with pytest.raises(IndexError):
        packed[4]


def test_a_target_without_a_pixel_is_not_learned_as_nothing_and_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = write_coco(tmp_path / "mine")
    path = Path(coco["annotations"])
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[10, 10, 10, 10, 10, 10]]
    path.write_text(json.dumps(content))
    train = _builder(tmp_path, coco).train()
    assert train[0].texts == ("green star",)
    assert train[1].texts == ("red square", "green star")
    assert "train: 1 expressions are left out: they have a target" in capsys.readouterr().err


# --- epochs ---------------------------------------------------------------------------------------

AUGMENT = {"flip": 0.5, "crop": 0.5, "shrink": 0.6, "jitter": 0.5, "expressions_per_image": 2}


def test_examples_are_a_function_of_epoch_and_item(data: Path, tmp_path: Path) -> None:
    train = {"dataset": "grefcoco", "root": str(data)}
    first, second = (_builder(tmp_path, train, augment=AUGMENT).train() for _ in range(2))
    plain = _builder(tmp_path, train).train()
    seen = set()
    for index in reversed(range(24)):  # 6 epochs of 4 items, asked for in another order
        one, other = first[index], second[index]
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.targets, other.targets)
        assert one.texts == other.texts
        assert len(one.texts) == first.expressions_of(index) == 2
        seen.add((index % 4, one.image.tobytes()))
    assert len(seen) > 12
    np.testing.assert_array_equal(plain[5].image, plain[1].image)


def test_scenes_may_be_augmented_too(tmp_path: Path) -> None:
    found = _builder(tmp_path, RAW["train"], augment={"flip": 1.0}).train()
    plain = _builder(tmp_path, RAW["train"]).train()
    assert isinstance(found, ReferringScenes)
    for index in range(4):
        np.testing.assert_array_equal(found[index].image, plain[index].image[:, ::-1])
        np.testing.assert_array_equal(found[index].targets, plain[index].targets[..., ::-1])


def test_validation_is_never_augmented(data: Path, tmp_path: Path) -> None:
    val = {"val": {"dataset": "refcoco", "root": str(data), "split": "val"}}
    train = {"dataset": "refcoco", "root": str(data)}
    builder = _builder(tmp_path, train, val=val, augment=AUGMENT)
    held_out = builder.held_out()["val"]
    assert len({held_out[4 * epoch].image.tobytes() for epoch in range(6)}) == 1
    assert len({builder.train()[4 * epoch].image.tobytes() for epoch in range(6)}) > 1


def test_batches_of_augmented_data_are_those_of_an_unbroken_run(data: Path, tmp_path: Path) -> None:
    train = {"dataset": "refcoco", "root": str(data)}
    examples = _builder(tmp_path, train, augment=AUGMENT).train()
    whole = list(PlannedBatches(len(examples), 3, 0, 6, 1))
    rest = list(PlannedBatches(len(examples), 3, 4, 6, 1))
    assert whole[4:] == rest
    assert max(max(batch) for batch in whole) >= len(examples)


# --- mixed ----------------------------------------------------------------------------------------


def _mix(data: Path, **more: Any) -> dict[str, Any]:
    members = {name: {"dataset": name, "root": str(data)} for name in ("refcoco", "refcoco+")}
    return {"dataset": "mixed", "members": members, **more}


def _hold_out(data: Path, dataset: str, split: str, count: int) -> set[str]:
    """Moves the refs of the first training images to another split; gives those images' keys."""
    path = next((data / dataset).glob("*refs*"))
    refs = pickle.loads(path.read_bytes())
    images = list(dict.fromkeys(ref["image_id"] for ref in refs if ref["split"] == "train"))
    for ref in refs:
        if ref["image_id"] in images[:count]:
            ref["split"] = split
    path.write_bytes(pickle.dumps(refs, protocol=2))
    return {f"coco/{image}" for image in images[:count]}


@pytest.mark.parametrize("split", ["val", "testA", "test"])
def test_images_that_any_member_holds_out_are_dropped_from_all_and_counted(
    data: Path, tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    held = _hold_out(own, "refcoco+", split, 1)
    examples = _builder(tmp_path, _mix(own)).train()
    names = {image_key(examples.name_of(k)) for k in range(len(examples))}
    assert len(examples) == 3 + 3
    assert not names & held
    told = capsys.readouterr().err.replace("\n", " ")
    assert "train.members.refcoco: 1 of 4 images dropped, with 3 expressions" in told
    assert "train.members.refcoco+: 0 of 3 images dropped" in told
    assert "an epoch is 6 images: refcoco 3, refcoco+ 3" in told


def test_this_runs_own_validation_images_are_dropped_too(data: Path, tmp_path: Path) -> None:
    val = {"mine": {"dataset": "refcocog", "root": str(data), "split": "train", "limit": 2}}
    examples = _builder(tmp_path, _mix(data), val=val).train()
    assert len(examples) == 2 + 2


def test_copies_of_held_out_images_are_dropped_whatever_they_are_called(
    data: Path, tmp_path: Path
) -> None:
    coco = write_coco(tmp_path / "mine")
    held = open_dataset("refcoco", data, "train").groups[0].path
    shutil.copy(held, tmp_path / "mine/images/2.png")
    val = {"mine": {"dataset": "refcoco", "root": str(data), "split": "train", "limit": 1}}
    mix = _mix(data)
    mix["members"]["refcoco+"] = coco
    examples = _builder(tmp_path, mix, val=val).train()
    assert isinstance(examples, MixedExamples)
    assert examples.shares == [3, 1]
    assert examples.name_of(3) == f"{tmp_path}/mine/images/1.png"


def test_visual_genomes_photos_are_known_by_cocos_numbers(data: Path, tmp_path: Path) -> None:
    """RefCOCO's validation photos must not come back through PhraseCut under another name."""
    own = shutil.copytree(data, tmp_path / "data")
    path = own / "phrasecut/image_data_split3000.json"
    images = json.loads(path.read_text())
    used = open_dataset("phrasecut", own, "train").groups
    first = int(used[0].path.stem)
    held = _hold_out(own, "refcoco", "val", 1)
    number = int(next(iter(held)).split("/")[1])
    for image in images:
        image["coco_id"] = number if image["image_id"] == first else None
    path.write_text(json.dumps(images))
    mix = _mix(own)
    mix["members"]["phrasecut"] = {"dataset": "phrasecut", "root": str(own)}
    examples = _builder(tmp_path, mix).train()
    names = [examples.name_of(k) for k in range(len(examples))]
    assert not [name for name in names if Path(name).stem == str(first)]
    assert len(examples) == 3 + 3 + 3


def test_validation_photos_of_visual_genome_are_known_by_cocos_numbers(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    path = own / "phrasecut/image_data_split3000.json"
    images = json.loads(path.read_text())
    number = int(image_key(open_dataset("refcoco", own, "train").groups[0].path).split("/")[1])
    for image in images:
        image["coco_id"] = number if image is images[-1] else None
    path.write_text(json.dumps(images))
    split = images[-1]["split"]
    val = {"mine": {"dataset": "phrasecut", "root": str(own), "split": split}}
    assert len(_builder(tmp_path, _mix(own), val=val).train()) == 3 + 3
    _builder(tmp_path, {"dataset": "refcoco", "root": str(own)}, val=val).train()
    assert "1 image is in train and in val" in capsys.readouterr().err


def test_scenes_and_files_mix_at_their_weights(data: Path, tmp_path: Path) -> None:
    mix = _mix(data, weights={"refcoco": 2.5, "scenes": 0.5})
    mix["members"]["scenes"] = {**RAW["train"], "scenes": 12}
    examples = _builder(tmp_path, mix).train()
    assert isinstance(examples, MixedExamples)
    assert examples.shares == [10, 4, 6]
    assert {examples[k].image.shape for k in range(len(examples))} == {(128, 128, 3)}


class _Counted:
    """A member that says what it was asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return index % self.length

    def expressions_of(self, index: int) -> int:
        return 1

    def name_of(self, index: int) -> str:
        return str(index % self.length)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 4.0), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_every_item_is_drawn_as_often_as_any_other_at_any_weight(
    lengths: list[int], weights: list[float], seed: int
) -> None:
    members = [_Counted(length) for length in lengths]
    mixed = MixedExamples(members, weights[: len(members)], seed)
    drawn = [mixed.place(index) for index in range(7 * len(mixed))]
    assert drawn == [mixed.place(index) for index in range(7 * len(mixed))]
    for number, length in enumerate(lengths):
        counts = Counter(inner % length for member, inner in drawn if member == number)
        assert sum(counts.values()) == 7 * mixed.shares[number]
        often = [counts[item] for item in range(length)]
        assert max(often) - min(often) <= 1


# --- what is wrong --------------------------------------------------------------------------------


def _without_image(data: Path) -> dict[str, Any]:
    open_dataset("refcoco", data, "train").groups[1].path.unlink()
    return {"dataset": "refcoco", "root": str(data)}


def _damaged(data: Path) -> dict[str, Any]:
    path = data / "refcoco/instances.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"size": [128, 128], "counts": "!!"}
    path.write_text(json.dumps(content))
    return {"dataset": "refcoco", "root": str(data)}


def _empty_coco(data: Path) -> dict[str, Any]:
    coco = write_coco(data / "mine")
    path = Path(coco["annotations"])
    path.write_text(json.dumps({**json.loads(path.read_text()), "expressions": []}))
    return coco


def _no_truth(data: Path) -> dict[str, Any]:
    coco = write_coco(data / "mine")
    path = Path(coco["annotations"])
    content = json.loads(path.read_text())
    content["expressions"][0].pop("ann_ids")
    path.write_text(json.dumps(content))
    return coco


WRONG_DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "no such split": (
        lambda d: {"dataset": "refcoco", "root": str(d), "split": "trian"},
        DataError,
        r"train: .*refs\(unc\)\.p has no split 'trian'; its splits: train \(",
    ),
    "no such split in a file": (
        lambda d: {**write_coco(d / "mine"), "split": "train"},
        DataError,
        "train: .*has no split 'train'",
    ),
    "an empty folder": (
        lambda d: {"dataset": "refcoco", "root": str(d / "phrasecut/images")},
        DataError,
        r"train: the annotations were not found; looked for: .*name with train\.root the folder",
    ),
    "an image that is not there": (
        _without_image,
        DataError,
        r"train: 1 of 4 images are missing, first .*; give the folder .* train\.images",
    ),
    "splits by another": (
        lambda d: {"dataset": "refcoco", "root": str(d), "split_by": "umd"},
        DataError,
        r"train: refcoco has no splits by 'umd'; train\.split_by takes unc or google",
    ),
    "a damaged mask": (_damaged, DataError, r"annotation \d+ of .*instances\.json.*damaged"),
    "a file without expressions": (_empty_coco, ConfigError, "holds no expressions"),
    "an expression without truth": (_no_truth, DataError, "has no mask to learn from"),
    "a mix of a validation split": (
        lambda d: {
            "dataset": "mixed",
            "members": {"a": {"dataset": "refcoco", "root": str(d), "split": "val"}},
        },
        ConfigError,
        r"train\.members\.a\.split = 'val' is held out",
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_data_that_cannot_be_trained_on_are_told_in_one_line_before_the_first_step(
    data: Path, tmp_path: Path, case: str
) -> None:
    change, kind, message = WRONG_DATA[case]
    own = shutil.copytree(data, tmp_path / "data")
    train = change(own)
    with pytest.raises(kind, match=message) as raised:
        _builder(tmp_path, train).train()
    assert "\n" not in str(raised.value)
    assert "--root" not in str(raised.value)


def test_a_mix_of_which_nothing_is_left_is_refused(data: Path, tmp_path: Path) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    val = {"mine": {"dataset": "refcoco+", "root": str(own), "split": "train"}}
    with pytest.raises(ConfigError, match=r"members\.refcoco: every image is held out somewhere"):
        _builder(tmp_path, _mix(own), val=val).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"refcocoo": 1}}, "weights has 'refcocoo', members are refcoco, refcoco+"),
        ({"weights": {"refcoco": 1e18}}, r"is 1e\+18, it must be above 0, at most 1000"),
        ({"weights": {"refcoco": 0}}, "the weight of 'refcoco' is 0.0, it must be above 0"),
        ({"members": {}}, "members = {}: .*at least 1"),
        ({"members": {"a": {"dataset": "mixed", "members": {}}}}, "'mixed'"),
        ({"wieghts": {}}, "unknown key 'train.wieghts'"),
    ],
)
def test_a_mix_that_is_none_is_told(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _builder(tmp_path, {**_mix(data), **change})


@pytest.mark.parametrize(
    ("train", "key"),
    [
        ({"dataset": "refcoco", "root": "nowhere"}, "train.root = 'nowhere'"),
        (
            {"dataset": "mixed", "members": {"a": {"dataset": "refcoco", "root": "nowhere"}}},
            "train.members.a.root = 'nowhere'",
        ),
    ],
)
def test_a_missing_folder_is_named_before_anything_is_built(
    tmp_path: Path, train: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_paths(settings(tmp_path, train=train, stages=REFERRING))
    assert raised.value.message.startswith(key)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"flip": 1.5}, r"augment\.flip = 1\.5: .*less than or equal to 1"),
        ({"flip": True}, r"augment\.flip = True: it does not take true or false"),
        ({"flp": 0.5}, r"unknown key 'augment\.flp'"),
        ({"shrink": 0}, r"augment\.shrink = 0: .*greater than 0"),
    ],
)
def test_augmentation_out_of_range_is_told(
    tmp_path: Path, augment: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, augment=augment)


def test_workers_see_what_the_main_process_sees(data: Path, tmp_path: Path) -> None:
    train = {"dataset": "grefcoco", "root": str(data)}
    examples: Any = _builder(tmp_path, train, augment=AUGMENT).train()
    order = [5, 0, 11, 2]
    loader = torch.utils.data.DataLoader(
        examples, batch_sampler=[order[:2], order[2:]], collate_fn=list, num_workers=2
    )
    found = [example for batch in loader for example in batch]
    for index, example in zip(order, found, strict=True):
        np.testing.assert_array_equal(example.image, examples[index].image)
        assert example.texts == examples[index].texts


def test_scenes_come_back_each_epoch() -> None:
    scenes = ReferringScenes(RefShapes("refshapes", "train", 3, 2, 128), 128, 32, 0.0)
    np.testing.assert_array_equal(scenes[4].image, scenes[1].image)
    assert scenes.name_of(4) == "refshapes train scene 1"


def test_dense_scenes_are_padded_to_the_encoders_square() -> None:
    scenes = RefShapes("mixed", "train", 12, size=128, variety="wide")
    data = DenseScenes(scenes, 32)
    batch = collate_dense([data[k] for k in range(len(data))])
    assert batch.images.shape == (12, 128, 128, 3)
    assert {(h, w) for h, w in batch.fitted.tolist()} > {(128, 128)}
    for k, (height, width) in enumerate(batch.fitted.tolist()):
        item = scenes.scene(k)
        assert item.instances.shape == (height, width)
        assert np.array_equal(batch.images[k, :height, :width].numpy(), item.image)
        assert not batch.images[k, height:].any()
        assert not batch.images[k, :, width:].any()
        cells = np.zeros((128, 128), bool)
        cells[:height, :width] = item.instances > 0
        assert np.array_equal(batch.labels[k, 0].numpy() > 0, cells[2::4, 2::4])


def test_photos_are_data_of_ones_own(photos: Path, repo: Path) -> None:
    annotations = photos.parent / "instances.json"
    chosen = load_settings(
        repo / "configs/finetune_own_data.yaml", [f"train.annotations={annotations}"]
    )
    builder = DataBuilder(chosen, Console())
    train, val = builder.train(), builder.held_out()["mine"]
    assert (len(train), len(val)) == (80, 20)
    for index in range(0, 3 * len(train), 24):
        example = train[index]
        assert max(example.image.shape) == 256
        assert len(example.targets) == len(example.texts) == train.expressions_of(index)
        # What nothing fits has no mask, and what something fits keeps one, cut and mirrored.
        assert (example.targets.max(axis=(1, 2)) > 0).tolist() == (~example.no_target).tolist()


def test_one_image_under_two_names_is_held_out_as_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "caf\u00e9.png").touch()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    names = ("a/caf\u00e9.png", "a/../a/caf\u00e9.png", "b/caf\u00e9.png", "a/cafe\u0301.png")
    assert len({image_key(tmp_path / name) for name in names}) == 1
    assert image_key(tmp_path / "a" / "other.png") != image_key(tmp_path / names[0])
    # COCO's own number says it whatever the folder.
    assert image_key("x/COCO_train2014_000000000009.jpg") == image_key("y/000000000009.jpg")
