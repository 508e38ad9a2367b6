"""What is said where the files of a model are not there and cannot be had, however it is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from risam_cli.cli import main
from risam_cli.errors import ModelError
from risam_cli.segmenters.names import KNOWN
from risam_cli.segmenters.resolve import load_segmenter

CPU = {"device": torch.device("cpu"), "precision": torch.float32}

# What is named, with DINO and SAM for folders that are here, and what is said to be missing.
ABSENT = [
    *((name, known.parts[0]) for name, known in KNOWN.items()),
    ("me/mine", "me/mine"),
    ("clipseg:me/mine", "me/mine"),
    ("florence2:me/mine", "me/mine"),
    ("sam3:me/mine", "me/mine"),
    ("grounded-sam:me/dino", "me/dino"),
    ("grounded-sam:me/dino+me/sam", "me/dino"),
    ("grounded-sam:DINO+me/sam", "me/sam"),
    ("grounded-sam:DINO", "facebook/sam-vit-base"),
    ("grounded-sam:me/dino+SAM", "me/dino"),
    ("DINO+me/sam", "me/sam"),
    ("me/dino+me/sam", "me/dino"),
    ("DINO", "facebook/sam-vit-base"),
]


@pytest.fixture(params=["HF_HUB_OFFLINE is set", "the hub cannot be reached"])
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Why nothing can be downloaded, with an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import httpx

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    told: str = request.param
    if told.startswith("HF"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return told

    def refuse(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise httpx.ConnectError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return told


def test_every_name_says_in_one_line_how_its_files_are_to_be_had(
    reason: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    for named, missing in ABSENT:
        model = named.replace("DINO", str(folders / "dino")).replace("SAM", str(folders / "sam"))
        output = tmp_path / "out"
        arguments = ["predict", str(tmp_path / "a.png"), "-e", "the dog", "-o", str(output)]
        assert main([*arguments, "--model", model]) == 1, named
        seen = capsys.readouterr()
        [line] = seen.err.splitlines()
        assert line.startswith(f"error: {missing} is not in the cache {tmp_path / 'cache'}"), named
        assert reason in line
        assert "config.json, model.safetensors, preprocessor_config.json and the tok" in line
        assert f"hf download {missing} --local-dir DIR" in line
        assert seen.out == ""
        assert not output.exists()
        # No different where it is fetched ahead.
        assert main(["models", "fetch", model]) == 1
        assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.usefixtures("reason")
def test_what_published_models_cannot_do_is_said_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    picture, output = str(tmp_path / "a.png"), ["-o", str(tmp_path / "out")]
    cache = ["--feature-cache", str(tmp_path / "kept")]
    shapes = ["--dataset", "refshapes", "--split", "val", "--limit", "2"]
    for arguments in (
        ["explain", picture, "-e", "the dog", *output],
        ["predict", picture, "-e", "the dog", *cache, *output],
        ["eval", *shapes, *cache, *output],
        ["eval", *shapes, "--fit-no-target", *output],
    ):
        for model in ("sam3", "me/mine"):
            assert main([*arguments, "--model", model]) in (1, 2)
            told = capsys.readouterr().err
            assert "published" in told, arguments
            assert "is not in the cache" not in told
            assert "Traceback" not in told
            assert not (tmp_path / "kept").exists()
    both = ["predict", picture, "-e", "the dog", "--instances", "--select", "best", *output]
    assert main(both) == 2
    assert "contradict" in capsys.readouterr().err


# Files of a folder by kind, and what is said where one is gone.
LACKING = [
    ("clipseg", "config.json", "config.json"),
    ("clipseg", "model.safetensors", r"holds no \.safetensors"),
    ("clipseg", "processor_config.json", "preprocessor_config.json"),
    ("clipseg", "tokenizer.json", "tokenizer"),
    ("florence2", "config.json", "config.json"),
    ("florence2", "model.safetensors", r"holds no \.safetensors"),
    ("florence2", "processor_config.json", "processor_config.json"),
    ("florence2", "tokenizer.json", "tokenizer"),
    ("sam3", "config.json", "config.json"),
    ("sam3", "model.safetensors", r"holds no \.safetensors"),
    ("sam3", "preprocessor_config.json", "preprocessor_config.json"),
    ("sam3", "tokenizer.json", "tokenizer"),
    ("dino", "config.json", "config.json"),
    ("dino", "model.safetensors", r"holds no \.safetensors"),
    ("dino", "processor_config.json", "preprocessor_config.json"),
    ("dino", "tokenizer.json", "tokenizer"),
    ("sam", "config.json", "config.json"),
    ("sam", "model.safetensors", r"holds no \.safetensors"),
    ("sam", "preprocessor_config.json", "preprocessor_config.json"),
    ("sam2", "preprocessor_config.json", "preprocessor_config.json"),
]


@pytest.mark.parametrize(("kind", "gone", "told"), LACKING)
def test_a_folder_without_a_file_names_it(
    kind: str, gone: str, told: str, folders: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders / kind, tmp_path / "copy"))
    names = [gone, "tokenizer_config.json"] if gone == "tokenizer.json" else [gone]
    for name in names:
        (copy / name).unlink()
    source = f"grounded-sam:{copy}+{folders / 'sam'}" if kind == "dino" else str(copy)
    if kind.startswith("sam") and kind != "sam3":
        source = f"grounded-sam:{folders / 'dino'}+{copy}"
    with pytest.raises(ModelError, match=told) as caught:
        load_segmenter(source, **CPU)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    assert caught.value.fix
