"""Expressions to token ids."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from risam_cli.data.refshapes.vocabulary import VOCABULARY
from risam_cli.weights import tokenizer as tokenizer_module
from risam_cli.weights.tokenizer import (
    TextTokenizer,
    tokenizer_from_words,
    with_learned_words,
)

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
    text = "Red, CIRCLE!"
    pieces = tokenizer.pieces(text)
    assert [piece.text for piece in pieces] == ["[CLS]", "red", "circle", "[SEP]"]
    assert [text[slice(*piece.span)] for piece in pieces[1:-1]] == ["Red", "CIRCLE"]
    assert tokenizer.unknown_words("(a red circle).") == ("a",)
    assert tokenizer.unknown_words("red-blue") == ("-",)
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


# --- words learned from the data ------------------------------------------------------------------

MINE = ["the boat", "two boats", "The boats!", "a café", "the red circle", "unboat"]


def test_learned_words_come_behind_what_was_known_and_change_no_expression_of_it() -> None:
    before = tokenizer_from_words(VOCABULARY)
    after = with_learned_words(before, MINE)
    old, new = before.get_vocab(), after.get_vocab()
    assert {word: new[word] for word in old} == old
    assert sorted(new.values()) == list(range(len(new)))
    for text in ("the red circle", "the small green stars left of the cross", ""):
        assert after.encode(text).ids == before.encode(text).ids
    wrapped = TextTokenizer(after, 32, 0)
    assert [wrapped.unknown_words(text) for text in MINE] == [()] * len(MINE)
    tokens = after.encode("the boat").tokens
    assert tokens == ["[CLS]", "the", "boat", "[SEP]"]
    # A word of no text is spelled by what was learned, in letters where nothing else is left.
    assert after.encode("Boaty, xyz").tokens[1:-1] == ["boat", "##y", "x", "##y", "##z"]


def test_tokens_that_were_added_behind_the_vocabulary_keep_their_ids() -> None:
    before = tokenizer_from_words(WORDS)
    before.add_tokens(["sofa"])
    before.add_special_tokens(["<loc>"])
    after = with_learned_words(before, MINE)
    old, new = before.get_vocab(), after.get_vocab()
    assert {word: new[word] for word in old} == old
    assert sorted(new.values()) == list(range(len(new)))
    for text in ("red sofa <loc>", "<loc>"):
        assert after.encode(text).ids == before.encode(text).ids


def test_learning_follows_from_the_texts_alone() -> None:
    code = (
        "from risam_cli.weights.tokenizer import *;import hashlib;"
        f"t = with_learned_words(tokenizer_from_words([]), {MINE!r});"
        "print(hashlib.sha256(t.to_str().encode()).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1


def test_where_all_words_are_known_nothing_is_learned() -> None:
    known = tokenizer_from_words(VOCABULARY)
    assert with_learned_words(known, ["the red circle"]) is known
    once = with_learned_words(known, MINE)
    assert with_learned_words(once, MINE) is once


def test_merges_are_those_of_the_reference_where_no_counts_are_equal() -> None:
    """Byte-pair merges of `tokenizers`, on words whose pairs all occur unequally often."""
    words = {"abcd": 10, "ab": 20, "xcd": 5, "ef": 3, "g": 9}
    learner = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=24, min_frequency=2, continuing_subword_prefix="##", show_progress=False
    )
    learner.train_from_iterator([" ".join([w] * n) for w, n in words.items()], trainer)
    letters = {w[0] for w in words} | {c for w in words for c in w}
    letters |= {"##" + c for w in words for c in w[1:]}
    by_id = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    learned = [token for token, _ in by_id if token not in letters]
    assert learned == ["ab", "##cd", "abcd", "xcd", "ef"]
    assert tokenizer_module._subwords(words, "##", 100) == learned
