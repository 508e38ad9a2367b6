"""Settings: what is wrong is told with file, key, value and what it could have been."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.networks import SMALL
from support.paths import REPO
from support.settings_files import load_settings

from risam_cli.errors import ConfigError
from risam_cli.settings.load import apply_override, check, dump, merge
from risam_cli.settings.model import ModelSettings
from risam_cli.settings.presets import PRESETS
from risam_cli.settings.train import TrainSettings
from risam_cli.training.stage import check_paths

CONFIGS = sorted((REPO / "configs").glob("**/*.yaml"))


def raw_settings() -> dict[str, Any]:
    return {
        "name": "test",
        "output": "out",
        "model": SMALL,
        "train": {"dataset": "refshapes"},
        "val": {"held out": {"dataset": "refshapes", "split": "val"}},
        "stages": [
            {"name": "encoder", "kind": "dense", "steps": 3, "images_per_step": 2,
             "learning_rate": 0.001},
            {"name": "fusion", "kind": "referring", "steps": 3, "images_per_step": 2,
             "learning_rate": 0.001},
        ],
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(raw_settings()))
    return path


# --- files that come with the project -------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_its_dump_is_the_same_again(
    path: Path, tmp_path: Path
) -> None:
    settings = load_settings(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(settings), encoding="utf-8")
    assert load_settings(again) == settings
    assert "runs/" in settings.output, "outputs of shipped configs go to the ignored folder"


def test_configs_are_shipped() -> None:
    assert "refshapes_tiny.yaml" in {path.name for path in CONFIGS}


def test_configs_in_the_documents_load(tmp_path: Path) -> None:
    """Each YAML block of the documents is good over a shipped file."""
    found = 0
    for document in sorted((REPO / "docs").glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", document.read_text("utf-8"), re.DOTALL):
            refused = [
                said
                for base in ("refcoco_vit_b.yaml", "refshapes_tiny.yaml")
                if (said := _refused(tmp_path / "doc.yaml", REPO / "configs" / base, block))
            ]
            assert len(refused) < 2, f"{document.name}: {refused}\n{block}"
            found += 1
    assert found >= 3


def _refused(path: Path, base: Path, block: str) -> str:
    """What is wrong with a block over a base; empty where it loads."""
    path.write_text(f"extends: {base}\n{block}", encoding="utf-8")
    try:
        load_settings(path)
    except ConfigError as error:
        return str(error)
    return ""


def test_all_presets_are_valid_with_a_text_encoder() -> None:
    for name in PRESETS:
        raw = {"preset": name, "text_encoder": {"source": "some/model"}}
        settings = check(ModelSettings, raw, name)
        assert check(ModelSettings, settings.model_dump(mode="json"), name) == settings


# --- what is wrong --------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]
WRONG: dict[str, tuple[Change, str, str]] = {
    "unknown key": (
        lambda r: r.update(worker=2),
        r"unknown key 'worker'",
        "did you mean 'workers'?",
    ),
    "unknown key in a section": (
        lambda r: r.update(optimizer={"weight_dekay": 0.1}),
        r"unknown key 'optimizer\.weight_dekay'",
        "did you mean 'weight_decay'?",
    ),
    "unknown key two sections down": (
        lambda r: r.update(model=merge(SMALL, {"fusion": {"visionguided": False}})),
        r"unknown key 'model\.fusion\.visionguided'",
        "did you mean 'vision_guided'?",
    ),
    "unknown key like none": (
        lambda r: r.update(loss={"qqq": 1}),
        r"unknown key 'loss\.qqq'",
        "known keys: mask, dice, no_target, iou, focal_gamma, minimap, target_size",
    ),
    "unknown key in a stage": (
        lambda r: r["stages"][1].update(train_encodr="no"),
        r"unknown key 'stages\.1\.train_encodr'; did you mean",
        "did you mean 'train_encoder'?",
    ),
    "key of another kind of stage": (
        lambda r: r["stages"][0].update(train_encoder="no"),
        r"unknown key 'stages\.0\.train_encoder'",
        "known keys: kind, name, steps",
    ),
    "unknown key in validation data": (
        lambda r: r["val"]["held out"].update(famly="mixed"),
        r"unknown key 'val\.held out\.famly'",
        "did you mean 'family'?",
    ),
    "unknown kind of stage": (
        lambda r: r["stages"][0].update(kind="danse"),
        r"stages\.0.* 'danse'.*'dense', 'referring'",
        "",
    ),
    "missing": (lambda r: r.pop("output"), "key 'output' is missing", "add it"),
    "wrong type": (
        lambda r: r.update(workers="many"),
        "workers = 'many': .*valid integer",
        "print_config",
    ),
    "fraction for a count": (
        lambda r: r.update(validate_every=1.5),
        r"validate_every = 1\.5: .*integer",
        "",
    ),
    "out of range": (
        lambda r: r.update(optimizer={"ema_decay": 1.0}),
        r"optimizer\.ema_decay = 1\.0: .*less than 1",
        "",
    ),
    "one of several": (lambda r: r.update(precision="fp8"), "precision = 'fp8': .*'bf16'", ""),
    "a band that is none": (
        lambda r: r.update(train={"dataset": "coco", "annotations": "a.json", "bands": [0, 1, 2]}),
        r"train\.bands\.0 = 0: .*greater than 0",
        "",
    ),
    "unknown split": (
        lambda r: r["train"].update(split="trian"),
        r"train.*split = 'trian': .*'train', 'val', 'testA', 'testB' or 'testC'",
        "",
    ),
    "unknown preset": (
        lambda r: r.update(model={"preset": "vit_x"}),
        "preset 'vit_x' is unknown; use one of vit_b, vit_l, vit_h, tiny",
        "",
    ),
    "two text encoders": (
        lambda r: r.update(model=merge(SMALL, {"text_encoder": {"source": "x"}})),
        "either source .* or vocabulary",
        "",
    ),
    "heads that do not divide": (
        lambda r: r.update(model=merge(SMALL, {"image_encoder": {"heads": 5}})),
        "dim 24 is not divisible by heads 5",
        "",
    ),
    "decoder heads that do not divide": (
        lambda r: r.update(model=merge(SMALL, {"decoder": {"heads": 16}})),
        "fusion.dim 16 is not divisible by twice decoder.heads 16",
        "",
    ),
    "text heads that do not divide": (
        lambda r: r.update(model=merge(SMALL, {"text_encoder": {"heads": 3}})),
        "hidden 16 is not divisible by heads 3",
        "",
    ),
    "taps past the end": (
        lambda r: r.update(model=merge(SMALL, {"image_encoder": {"taps": [0, 1, 3]}})),
        r"taps \(0, 1, 3\) must rise and end at the last block, 2",
        "",
    ),
    "global blocks past the end": (
        lambda r: r.update(model=merge(SMALL, {"image_encoder": {"global_blocks": [5]}})),
        r"global_blocks \(5,\) must be within 0\.\.2",
        "",
    ),
    "a stem that has no groups": (
        lambda r: r.update(model=merge(SMALL, {"image_encoder": {"stem": [4, 6, 8]}})),
        "stem .* divisible by 4",
        "",
    ),
    "adapters that are not there": (
        lambda r: (
            r.update(model=merge(SMALL, {"image_encoder": {"adapter_dim": 0}})),
            r["stages"][1].update(train_encoder="adapters"),
        ),
        "stage 'fusion' trains adapters, but adapter_dim is 0",
        "",
    ),
    "two stages of a name": (
        lambda r: r["stages"][1].update(name="encoder"),
        "stage names must differ",
        "",
    ),
    "dense on photos": (
        lambda r: r.update(train={"dataset": "coco", "annotations": "a.json"}),
        "dense training needs RefShapes",
        "",
    ),
    "no validation": (lambda r: r.update(val={}), "val = {}: .*at least 1", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_one_line(file: Path, case: str) -> None:
    change, message, fix = WRONG[case]
    raw = yaml.safe_load(file.read_text())
    change(raw)
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=message) as raised:
        load_settings(file)
    assert str(file) in raised.value.message
    assert fix in raised.value.fix
    assert "\n" not in str(raised.value)


def test_several_problems_are_counted(file: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    raw.update(workers="many", threads=0, seed=-1)
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"\(and 2 more\)"):
        load_settings(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not YAML"),
        (b"- 1\n- 2\n", "no settings at its top level"),
        (b"", "no settings at its top level"),
        (b"\xff\xfe\x00", "not UTF-16"),
        (b"!!python/object/apply:os.mkdir [marked]", "is not YAML"),
        (b"[" * 2_000, "is not YAML"),
        (b"seed: 0\nname: a\nseed: 1\n", "seed"),
        (b"augment: {flip: 0.5, crop: 0.1, flip: 0.1}\n", "flip"),
        (b"stages: [{name: a, steps: 1, steps: 2}]\n", "steps"),
    ],
    ids=["open", "list", "empty", "bytes", "code", "deep", "twice", "twice below", "in a list"],
)
def test_files_that_are_no_settings(
    file: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_settings(file)
    assert str(file) in raised.value.message
    assert not (file.parent / "marked").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.yaml: No such file"):
        load_settings(tmp_path / "nothing.yaml")


# --- --set ----------------------------------------------------------------------------------------


def test_set_changes_one_value_and_nothing_else(file: Path) -> None:
    before = load_settings(file).model_dump()
    after = load_settings(file, ["optimizer.ema_decay=0", "seed=7"]).model_dump()
    assert after["optimizer"].pop("ema_decay") == 0
    assert before["optimizer"].pop("ema_decay") == 0.999
    assert (after.pop("seed"), before.pop("seed")) == (7, 0)
    assert after == before


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("stages.1.steps=9", ("stages", 1, "steps"), 9),
        ("stages.0.name=first", ("stages", 0, "name"), "first"),
        ("model.image_encoder.taps=[0, 1, 2]", ("model", "image_encoder", "taps"), (0, 1, 2)),
        ("model.image_encoder.checkpoint=null", ("model", "image_encoder", "checkpoint"), None),
        ("model.fusion.vision_guided=false", ("model", "fusion", "vision_guided"), False),
        ("stages.1.train_encoder=no", ("stages", 1, "train_encoder"), "no"),
        ("stages.1.train_encoder=yes", ("stages", 1, "train_encoder"), "yes"),
        ("output=a=b", ("output",), "a=b"),
        ("loss.mask=2e0", ("loss", "mask"), 2.0),
        ("val.more={dataset: refshapes, split: testA}", ("val", "more", "split"), "testA"),
    ],
)
def test_set_reaches_every_kind_of_value(
    file: Path, override: str, path: tuple[Any, ...], value: Any
) -> None:
    found: Any = load_settings(file, [override]).model_dump()
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "has no '='"),
        ("=3", "has no '='"),
        ("seed=[1", "value is not YAML"),
        ("name.deep=1", "'deep' is not inside a section"),
        ("stages.5.steps=1", "'5' is not inside a section"),
        ("stages.*.steps=0", "stages.0.steps = 0"),
        ("stages.1.stepz=1", "unknown key 'stages.1.stepz'"),
        ("sede=1", "unknown key 'sede'"),
        ("stages.².steps=1", "'²' is not inside a section"),
        ("seed=4611686018427387904", "seed = 4611686018427387904 … less than 4294967296"),
        ('output=""', "output = '' … at least 1 character"),
        (r'output="a\0b"', "output = … a text cannot hold a NUL character"),
        ("loss={mask: 0, dice: 0}", "loss = … : mask and dice are both 0"),
        (
            "early_stopping={patience: 2, min_delta: 1}",
            "early_stopping.min_delta = 1 … less than 1",
        ),
        ("stages.*.learning_rate=.inf", "stages.0.learning_rate = inf … finite number"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay = inf … finite number"),
        ("loss.mask=.inf", "loss.mask = inf … finite number"),
        (
            "train.mix={refshapes: .nan}",
            "train.mix.refshapes = nan: Input should be a finite number",
        ),
        ("train.mix={refshapes: 0}", "train.mix.refshapes = 0: Input should be greater than 0"),
        ("train.mix={}", "train = … : mix gives shares of the family mixed"),
    ],
)
def test_a_set_that_fits_nowhere_is_told(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings(file, [override])
    assert all(part in raised.value.message for part in message.split(" … "))


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("sede=1", "set='sede=1': unknown key 'sede'"),
        ("modle.preset=tiny", "set='modle.preset=tiny': unknown key 'modle'"),
        ("stages.*.steps=-3", "set='stages.*.steps=-3': stages.0.steps = -3"),
        ("seed=7", "{file}: unknown key 'worker'"),
    ],
)
def test_a_wrong_value_is_blamed_on_what_set_it(file: Path, override: str, place: str) -> None:
    if override == "seed=7":
        file.write_text(file.read_text() + "\nworker: 2\n")
    with pytest.raises(ConfigError) as raised:
        load_settings(file, [override])
    assert raised.value.message.startswith(place.format(file=file))


def test_overrides_do_not_write_into_what_they_are_given() -> None:
    raw = raw_settings()
    apply_override(raw, "stages.0.steps=99")
    apply_override(raw, "model.fusion.dim=99")
    assert raw == raw_settings()
    assert SMALL["fusion"]["dim"] == 16


def test_settings_cannot_be_changed_afterwards(file: Path) -> None:
    settings = load_settings(file)
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3  # type: ignore[misc]


# --- paths ----------------------------------------------------------------------------------------


def _with_paths(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "images").mkdir()
    (tmp_path / "sam_vit_b_01ec64.pth").write_text("")
    coco = {"dataset": "coco", "annotations": str(tmp_path / "train.json")}
    raw = raw_settings()
    raw["stages"] = raw["stages"][1:]
    raw["train"] = {**coco, "images": str(tmp_path / "images")}
    raw["val"] = {"mine": coco}
    raw["model"] = merge(
        SMALL, {"image_encoder": {"checkpoint": str(tmp_path / "sam_vit_b_01ec64.pth")}}
    )
    return raw


def test_paths_that_are_there_are_fine(tmp_path: Path) -> None:
    check_paths(check(TrainSettings, _with_paths(tmp_path), "test"))


@pytest.mark.parametrize(
    ("key", "wrong", "near"),
    [
        ("model.image_encoder.checkpoint", "sam_vit_b_01ec46.pth", "sam_vit_b_01ec64.pth"),
        ("train.annotations", "trian.json", "train.json"),
        ("train.images", "image", "images"),
        ("val.mine.annotations", "elsewhere/zzz.json", None),
    ],
)
def test_a_missing_path_is_named_with_its_key_and_what_it_could_be(
    tmp_path: Path, key: str, wrong: str, near: str | None
) -> None:
    raw = apply_override(_with_paths(tmp_path), f"{key}={tmp_path / wrong}")
    with pytest.raises(ConfigError) as raised:
        check_paths(check(TrainSettings, raw, "test"))
    assert raised.value.message.startswith(f"{key} = ")
    assert str(tmp_path / wrong) in raised.value.message
    assert (str(tmp_path / near) in raised.value.fix) if near else ("path" in raised.value.fix)
