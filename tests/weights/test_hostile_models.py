"""Model folders by an attacker: no code runs, no memory is taken on a file's word."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import hostile_images

from risam_cli import cli
from risam_cli.errors import ModelError
from risam_cli.weights.folder import read_model_folder
from risam_cli.weights.tokenizer import MAX_CHARACTERS, TextTokenizer, load_tokenizer

Tamper = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of a sound model folder."""
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    return copy


def _verify(folder: Path, capsys: Any) -> tuple[int, str]:
    code = cli.main(["models", "verify", str(folder)])
    out, err = capsys.readouterr()
    assert "internal error" not in err
    assert "\x1b" not in out + err
    return code, err


def _safetensors(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WEIGHTS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "a header of 2^64 bytes": struct.pack("<Q", (1 << 64) - 1),
    "a header that is no JSON": _safetensors(b"nope"),
    "a header without end": _safetensors(b"[" * 100_000),
    "overlapping tensors": _safetensors(
        {"a": _tensor("F32", [2], 0, 8), "b": _tensor("F32", [2], 4, 12)}, bytes(12)
    ),
    "offsets beyond the file": _safetensors({"a": _tensor("F32", [1 << 40], 0, 1 << 42)}),
    "offsets that run backwards": _safetensors({"a": _tensor("F32", [1], 4, 0)}, bytes(4)),
    "a shape that overflows": _safetensors({"a": _tensor("F32", [1 << 62, 8], 0, 8)}, bytes(8)),
    "a side below zero": _safetensors({"a": _tensor("F32", [-1], 0, 4)}, bytes(4)),
    "an unknown type": _safetensors({"a": _tensor("Q99", [1], 0, 4)}, bytes(4)),
    "a type that torch has not": _safetensors({"a": _tensor("F4", [8], 0, 4)}, bytes(4)),
    "a name with escapes": _safetensors({"\x1b]0;x\x07": _tensor("F32", [1], 0, 4)}, bytes(4)),
    "a thousand empty tensors": _safetensors(
        {f"k{n}": _tensor("F32", [0, 1 << 60], 0, 0) for n in range(1000)}
    ),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_lie_are_refused(what: str, folder: Path, capsys: Any) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[what])
    code, err = _verify(folder, capsys)
    assert code == 1
    assert "model.safetensors" in err or "config.json" in err
    assert cli.main(["models", "inspect", str(folder), "--tensors"]) in (0, 1)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "internal error" not in err


def _set(path: str, value: Any) -> Tamper:
    def change(config: dict[str, Any]) -> None:
        *sections, key = path.split("/")
        for section in sections:
            config = config[section]
        config[key] = value

    return change


BOMBS: dict[str, Tamper] = {
    "width": _set("model/image_encoder/dim", 48 * 10**6),
    "width of 400 digits": _set("model/image_encoder/dim", 48 * 10**400),
    "depth": lambda config: config["model"]["image_encoder"].update(
        depth=10**7, taps=[0, 1, 10**7 - 1]
    ),
    "input": _set("model/image_encoder/image_size", 16 * 10**5),
    "window": _set("model/image_encoder/window", 10**5),
    "feed-forward": _set("model/image_encoder/mlp_ratio", 1e300),
    "feed-forward without end": _set("model/image_encoder/mlp_ratio", 1e999),
    "stem": _set("model/image_encoder/stem", [4 * 10**6, 4, 4]),
    "neck": _set("model/image_encoder/out_dim", 10**6),
    "blocks": _set("model/fusion/blocks", 10**8),
    "fusion": _set("model/fusion/ffn_dim", 10**9),
    "decoder": _set("model/decoder/layers", 10**8),
    "mask vectors": _set("model/decoder/mask_dim", 10**9),
    "text width": _set("text/hidden_size", 102_400),
    "text layers": _set("text/num_hidden_layers", 10**7),
    "vocabulary": _set("text/vocab_size", 10**10),
    "positions": _set("text/max_position_embeddings", 10**10),
    "other kind": lambda config: config.update(
        text={"model_type": "gpt2", "n_embd": 10**5, "n_layer": 2, "n_head": 8, "vocab_size": 64}
    ),
}


@pytest.mark.parametrize("what", BOMBS)
def test_no_memory_is_taken_on_the_word_of_a_setting(
    what: str, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    config = json.loads((folder / "config.json").read_text())
    BOMBS[what](config)
    (folder / "config.json").write_text(json.dumps(config))
    if what != "other kind":  # whose size is taken without memory
        monkeypatch.setattr("risam_cli.weights.build.build_model", _must_not_be_called)
        monkeypatch.setattr("risam_cli.weights.text._backbone", _must_not_be_called)
    code, err = _verify(folder, capsys)
    assert code == 1
    assert any(word in err for word in ("its files h", "its grid", "beyond 63 bits", "finite"))
    assert len(err) < 600


def _must_not_be_called(*arguments: Any) -> None:
    raise AssertionError("memory would be taken")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[" * 100_000, "cannot be read"),
        ("config.json", '{"format": ' + "9" * 5000 + "}", "cannot be read"),
        ("config.json", '{"format": NaN}', "format nan"),
        ("config.json", "\0", "cannot be read"),
        ("config.json", '{"a":' * 40 + "1" + "}" * 40, "deep"),
        ("config.json", " " * (1 << 21), "longer than 1 MiB"),
        ("card.json", '{"a":' * 900 + "1" + "}" * 900, "deep"),
        ("card.json", "[" * 100_000, "cannot be read"),
        ("tokenizer.json", "[" * 100_000, "nested too deep"),
        ("tokenizer.json", "{}", "text encoder cannot be built"),
        ("tokenizer.json", "9" * 5000, "text encoder cannot be built"),
    ],
)
def test_json_that_is_odd_is_told(
    name: str, content: str, words: str, folder: Path, capsys: Any
) -> None:
    (folder / name).write_text(content)
    command = "inspect" if name == "card.json" else "verify"
    assert cli.main(["models", command, str(folder)]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert "internal error" not in err


def test_a_card_is_shown_not_obeyed(folder: Path, capsys: Any) -> None:
    card = {"name": "\x1b]0;owned\x07\x1b[2J", "figures": {"\x1b[31m": 1}, "\u202e": "a\nb"}
    (folder / "card.json").write_text(json.dumps(card))
    assert cli.main(["models", "inspect", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & set(out + err)
    assert "owned" in out


def test_no_kernel_of_strangers_is_asked_for(folder: Path, monkeypatch: Any) -> None:
    """A configuration may name code on the hub as its way to compute attention."""
    from transformers import AutoConfig

    from risam_cli.weights.text import text_from_folder

    config = json.loads((folder / "config.json").read_text())
    # Not BERT as published, so that transformers builds it.
    config["text"] |= {"attn_implementation": "evil/kernel", "hidden_act": "relu"}
    config["text"] |= {"_attn_implementation": "evil/kernel", "auto_map": {"AutoModel": "x--y.Z"}}
    (folder / "config.json").write_text(json.dumps(config))
    seen: list[dict[str, Any]] = []
    real = AutoConfig.for_model

    def watched(kind: str, **values: Any) -> Any:
        seen.append(values)
        return real(kind, **values)

    monkeypatch.setattr(AutoConfig, "for_model", watched)
    text_from_folder(read_model_folder(folder), 32)
    assert len(seen) == 1
    assert "evil" not in json.dumps(seen)
    assert "auto_map" not in seen[0]


# --- tokenizers -----------------------------------------------------------------------------------


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _template(single: list[dict[str, Any]]) -> dict[str, Any]:
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    special = {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}}
    head = {"type": "TemplateProcessing", "single": single, "pair": pair}
    return {**head, "special_tokens": special}


GROWTH: dict[str, dict[str, Any]] = {
    "six replacements": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [_replace({"String": "a"}, "a" * 1000)] * 6,
        }
    },
    "prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "template": {
        "post_processor": _template([{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * 9999)
    },
    "steps": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}] * 1000,
        }
    },
    "charsmap of 4 GB": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "charsmap of nothing": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
}


@pytest.mark.parametrize("what", GROWTH)
def test_a_tokenizer_that_blows_texts_up_is_refused(what: str, folder: Path, capsys: Any) -> None:
    """In Rust, memory that is not to be had ends the process."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **GROWTH[what]}))
    code, err = _verify(folder, capsys)
    assert code == 1
    assert "tokenizer.json" in err


@pytest.mark.parametrize("shift", [100_000, 4_294_000_000])
def test_ids_beyond_the_vocabulary_are_refused(shift: int, folder: Path, capsys: Any) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: number + shift for word, number in words.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, err = _verify(folder, capsys)
    assert code == 1
    assert "the encoder knows 64" in err


PANICS: dict[str, dict[str, Any]] = {
    "catastrophic pattern": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


@pytest.mark.parametrize("what", PANICS)
def test_a_panic_of_the_tokenizer_fails_its_expression_only(
    what: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **PANICS[what]}))
    (tmp_path / "a.png").write_bytes(hostile_images.saved("PNG"))
    asked = ["-e", "a" * 40 + "!", "-e", "red circle"]
    common = ["--model", str(folder), "-o", str(tmp_path / "out")]
    assert cli.main(["predict", str(tmp_path / "a.png"), *asked, *common]) == 3
    err = capsys.readouterr().err
    assert "tokenizer.json does not work" in err
    rows = (tmp_path / "out/failures.jsonl").read_text().splitlines()
    assert len(rows) == (1 if what == "catastrophic pattern" else 2)


def test_a_panic_is_told_apart_from_ctrl_c(folder: Path) -> None:
    class Stops:
        def no_padding(self) -> None: ...
        def no_truncation(self) -> None: ...
        def encode_batch(self, texts: list[str]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextTokenizer(Stops(), 8, 0).encode(["x"])  # type: ignore[arg-type]
    text = json.loads((folder / "tokenizer.json").read_text())
    odd = load_tokenizer(json.dumps({**text, **PANICS["pieces of length 0"]}))
    with pytest.raises(ModelError, match="does not work"):
        TextTokenizer(odd, 8, 0).pieces("x")


def test_a_text_without_end_is_cut_and_said_to_be(folder: Path) -> None:
    tokenizer = load_tokenizer((folder / "tokenizer.json").read_text())
    batch = TextTokenizer(tokenizer, 32, 0).encode(["red " * 10**6, " " * 10**6, "red circle"])
    assert batch.truncated == [True, True, False]
    assert batch.input_ids.shape == (3, 32)
    assert MAX_CHARACTERS < 10**5


# --- what stands outside of the folder ------------------------------------------------------------


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "/etc/passwd", "../../..", "a\0b"])
def test_a_needed_file_is_known_before_it_is_read(
    path: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / "pipe") if path == "pipe" else path
    config = json.loads((folder / "config.json").read_text())
    part = {"part": "image_encoder", "name": "sam.pth", "path": path, "size": 0, "sha256": "0"}
    (folder / "config.json").write_text(json.dumps({**config, "format": 2, "needs": [part]}))
    code, err = _verify(folder, capsys)
    assert code == 1
    assert "needs sam.pth" in err


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_text_encoder_of_strangers_runs_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """Neither code beside the configuration nor in a pickle of weights; and no one is asked."""
    from risam_cli.weights.text import pretrained_text

    marker = tmp_path / "owned"
    source = tmp_path / "text"
    source.mkdir()
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass C: pass\n"
    (source / "evil.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    for config in (
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}},
        {"model_type": "bert", "auto_map": {"AutoModel": "evil.C", "AutoTokenizer": "evil.C"}},
    ):
        (source / "config.json").write_text(json.dumps(config))
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(marker)))
        (source / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"AutoTokenizer": ["evil.C", None]}})
        )
        with pytest.raises(ModelError, match="cannot load text encoder"):
            pretrained_text(str(source), 32)
        assert not marker.exists()
