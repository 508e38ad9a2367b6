"""A settings file may extend another."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import REPO
from support.settings_files import load_settings

from risam_cli.errors import ConfigError
from risam_cli.settings.load import read_settings_file

CONFIGS = REPO / "configs"


def test_what_a_file_does_not_set_comes_from_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("a: {b: 1, c: 2}\nd: [1, 2]\ne: 3\n")
    (tmp_path / "sub" / "middle.yaml").write_text("extends: ../base.yaml\na: {c: 4}\n")
    (tmp_path / "top.yaml").write_text("extends: sub/middle.yaml\nd: [5]\n")
    found = read_settings_file(tmp_path / "top.yaml")
    assert found == {"a": {"b": 1, "c": 4}, "d": [5], "e": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nothing.yaml\n", "cannot read .*nothing.yaml"),
        ("extends: a.yaml\n", "leads back to a file that extends it"),
        ("extends: [b.yaml]\n", "is not a file name"),
        ("extends: list.yaml\n", "list.yaml holds no settings"),
    ],
)
def test_a_file_that_cannot_be_extended_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=message):
        read_settings_file(tmp_path / "a.yaml")


def test_each_ablation_differs_from_the_base_by_what_its_name_says() -> None:
    base = load_settings(CONFIGS / "ablations" / "risam.yaml").model_dump()
    differing = {
        "no_vision_guided": {"model.fusion.vision_guided"},
        "no_language_guided": {"model.fusion.language_guided"},
        "no_query_token": {"model.decoder.query_token"},
        "no_feature_enhancement": {"model.fusion.feature_enhancement"},
        "no_adapters": {"model.image_encoder.adapter_dim"},
        "sam": {"model.kind"},
        "cris": {"model.kind", "model.decoder.layers", "stages.0.learning_rate"},
        "rela": {"model.kind", "model.decoder.layers", "loss.minimap"},
    }
    files = {p.stem for p in (CONFIGS / "ablations").glob("*.yaml")} - {"risam", "encoder"}
    assert files == set(differing)
    for name, keys in differing.items():
        other = load_settings(CONFIGS / "ablations" / f"{name}.yaml").model_dump()
        assert _differences(base, other) == keys | {"name", "output"}


def _differences(first: object, second: object, where: str = "") -> set[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = first.keys() | second.keys()
        pairs = [(str(key), first.get(key), second.get(key)) for key in keys]
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple):
        pairs = [(str(k), a, b) for k, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        return set() if first == second else {where}
    return {d for key, a, b in pairs for d in _differences(a, b, f"{where}.{key}".lstrip("."))}
