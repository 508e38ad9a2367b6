"""Small Hugging Face folders of text encoders with random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.networks import TEXTS, randomize

WORDS = sorted({word for text in TEXTS for word in text.split()})


def clip_tokenizer_files(folder: Path) -> None:
    """vocab.json, merges.txt and their settings, as OpenAI's folders have them."""
    letters = sorted({letter for word in WORDS for letter in word})
    units = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts[:2] = [parts[0] + parts[1]]
    units += sorted({merge.replace(" ", "") for merge in merges} - set(units))
    vocabulary = [*units, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 16,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def clip_config(folder: Path, **changes: Any) -> Any:
    from transformers import CLIPTextConfig

    size = len(json.loads((folder / "vocab.json").read_text()))
    return CLIPTextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=8,
        bos_token_id=size - 2, eos_token_id=changes.pop("eos_token_id", size - 1), pad_token_id=1,
        **changes,
    )  # fmt: skip


def make_clip(folder: Path, **changes: Any) -> Path:
    from transformers import CLIPTextModel

    folder.mkdir()
    clip_tokenizer_files(folder)
    randomize(CLIPTextModel(clip_config(folder, **changes)), 1).save_pretrained(folder)
    return folder


def make_bert(folder: Path, words: Sequence[str] = ()) -> Path:
    """A BERT of the small words, and of others where some are given."""
    from transformers import BertConfig, BertModel

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s"]
    vocabulary += sorted({*words} - {*vocabulary})
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    randomize(BertModel(config), 2).save_pretrained(folder)
    return folder
