"""Expressions to token ids."""

from __future__ import annotations

import pytest
import torch

from risam_cli.data.refshapes.vocabulary import VOCABULARY
from risam_cli.weights.tokenizer import TextTokenizer, tokenizer_from_words

WORDS = ["red", "blue", "circle", "left"]
PAD, UNKNOWN, START, END = 0, 1, 2, 3


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return TextTokenizer(tokenizer_from_words(WORDS), max_tokens=5, pad_id=PAD)


def test_ids_masks_and_padding(tokenizer: TextTokenizer) -> None:
    batch = tokenizer.encode(["red circle", "blue"])
    assert batch.input_ids.tolist() == [[START, 4, 6, END], [START, 5, END, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.truncated == [False, False]
    assert batch.max_words == 5


def test_case_punctuation_and_unknown_words(tokenizer: TextTokenizer) -> None:
    pieces = tokenizer.pieces("Red, CIRCLE!")
    assert [piece.text for piece in pieces] == ["[CLS]", "red", "[UNK]", "circle", "[SEP]"]
    assert tokenizer.encode(["a dog"]).input_ids.tolist() == [[START, UNKNOWN, UNKNOWN, END]]


@pytest.mark.parametrize("text", ["", "   ", "\t\n"])
def test_nothing_said_is_still_a_sentence(tokenizer: TextTokenizer, text: str) -> None:
    batch = tokenizer.encode([text])
    assert batch.input_ids.tolist() == [[START, END]]
    assert batch.attention_mask.sum() == 2


def test_long_expressions_lose_words_and_never_their_end(tokenizer: TextTokenizer) -> None:
    batch = tokenizer.encode(["red circle left", "red circle left blue left", "red"])
    assert batch.truncated == [False, True, False]
    assert batch.input_ids[0].tolist() == [START, 4, 6, 7, END]
    assert batch.input_ids[1].tolist() == [START, 4, 6, 7, END]


def test_company_does_not_change_an_expression(tokenizer: TextTokenizer) -> None:
    alone = tokenizer.encode(["red"])
    together = tokenizer.encode(["red", "red circle left"])
    kept = together.attention_mask[0].bool()
    assert together.input_ids[0, kept].tolist() == alone.input_ids[0].tolist()


def test_padding_and_truncation_of_a_published_tokenizer_are_switched_off() -> None:
    raw = tokenizer_from_words(WORDS)
    raw.enable_truncation(3)
    raw.enable_padding(length=20)
    batch = TextTokenizer(raw, max_tokens=10, pad_id=7).encode(["red blue circle left", "red"])
    assert batch.input_ids.shape == (2, 6)
    assert batch.truncated == [False, False]
    assert batch.input_ids[1].tolist() == [START, 4, END, 7, 7, 7]


def test_its_json_makes_the_same_tokenizer_again(tokenizer: TextTokenizer) -> None:
    from tokenizers import Tokenizer

    again = TextTokenizer(Tokenizer.from_str(tokenizer.to_json()), 5, PAD)
    texts = ["Red circle", "something else", ""]
    assert again.encode(texts).input_ids.tolist() == tokenizer.encode(texts).input_ids.tolist()


def test_refshapes_words_are_all_known() -> None:
    tokenizer = TextTokenizer(tokenizer_from_words(VOCABULARY), 200, PAD)
    ids = tokenizer.encode([" ".join(VOCABULARY)]).input_ids
    assert (ids == UNKNOWN).sum() == 0
    assert ids.shape[1] == len(VOCABULARY) + 2
