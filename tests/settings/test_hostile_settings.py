"""YAML by an attacker, as training settings and as a category map: plain values, and not many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from risam_cli import cli
from risam_cli.errors import ConfigError
from risam_cli.files.safe_yaml import load_yaml


def _bomb(levels: int) -> str:
    """Each list holds nine times the one before."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def _merge_bomb(levels: int) -> str:
    """Merge keys are written out while they are read, before anything can count them."""
    lines = ["a0: &a0 {k0: 1, k1: 1, k2: 1, k3: 1, k4: 1, k5: 1, k6: 1, k7: 1, k8: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


ODD = {
    "object": '!!python/object/apply:os.system ["touch MARKER"]',
    "object within": 'name: !!python/object/apply:os.system ["touch MARKER"]',
    "object by new": "a: !!python/object/new:os.system [touch MARKER]",
    "name": "name: !!python/name:os.system",
    "module": "name: !!python/module:os",
    "bomb": _bomb(30),
    "merge bomb": _merge_bomb(12),
    "holds itself": "a: &a [*a]",
    "holds itself as a key": "a: &a {b: *a}",
    "deep": "[" * 20_000,
    "deep objects": "{a: " * 5000,
    "no int": 'seed: !!int ""',
    "no float": 'seed: !!float ""',
    "no bool": "seed: !!bool x",
    "no time": "seed: !!timestamp x",
    "no date": "seed: 2024-13-45",
    "digits": "seed: " + "9" * 5000,
    "list as key": "? [a]\n: b",
    "NUL": "a: \0",
    "escape": '"\x1b]0;x\\a": 1',
    "two documents": "a: 1\n---\nb: 2",
    "tab": "\ta: 1",
    "unknown alias": "a: *b",
    "unknown tag": "a: !evil 1",
}
WRONG = {
    "sexagesimal": "seed: " + ":".join(["1"] * 3000),
    "tuple": "- 1",
    "NaN": "seed: .nan",
    "set": "!!set {a, b}",
    "HTML": '"<script>": 1',
}


@pytest.mark.parametrize("what", [*ODD, *WRONG])
def test_settings_and_maps_are_refused_in_one_line(what: str, tmp_path: Path, capsys: Any) -> None:
    marker = tmp_path / "owned"
    text = {**ODD, **WRONG}[what].replace("MARKER", str(marker))
    path = tmp_path / "x.yaml"
    path.write_text(text)
    record = {"id": "1", "image": "a.png", "expression": "x"}
    record["segmentation"] = {"size": [4, 4], "counts": [4, 4, 8]}  # type: ignore[assignment]
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    export = ["export-masks", str(tmp_path / "p.jsonl"), "--to", "coco", "-o", str(tmp_path / "o")]
    for command in (["train", str(path)], [*export, "--category-map", str(path)]):
        assert cli.main(command) == 1
        err = capsys.readouterr().err
        assert "internal error" not in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert len(err) < 2000
        assert not {c for c in err if c < " " and c != "\n"}
    assert not marker.exists()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("what", ODD)
def test_the_loader_itself_refuses(what: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        load_yaml(ODD[what])


def test_a_set_is_read_with_the_same_care() -> None:
    from risam_cli.settings.load import apply_override

    assert apply_override({"a": {"b": 1}}, "a.b=[1, 2]") == {"a": {"b": [1, 2]}}
    for value in ('!!int ""', "[" * 20_000, "&a [*a]"):
        with pytest.raises(ConfigError, match="not YAML"):
            apply_override({}, f"a.b={value}")


def test_anchors_of_honest_files_still_work() -> None:
    text = "base: &base {a: 1, b: [1, 2]}\nother: {<<: *base, a: 2}\nwhen: 2024-05-06\nempty:"
    loaded = load_yaml(text)
    assert loaded["other"] == {"a": 2, "b": [1, 2]}
    assert loaded["empty"] is None
    assert load_yaml("") is None
