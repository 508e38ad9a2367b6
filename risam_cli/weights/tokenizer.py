"""Expressions to token ids, with one fast tokenizer for CLIP, BERT and the small vocabulary."""

from __future__ import annotations

import base64
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from risam_cli.console.text import first_of
from risam_cli.errors import ModelError, reason_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


MAX_CHARACTERS = 10_000
"""Of one expression; what stands behind is cut before it is taken apart."""

_MOST_GROWTH = 64  # times that a tokenizer may lengthen a text before it takes it apart
_MOST_STEPS = 64


@contextmanager
def panics_told() -> Iterator[None]:
    """Turns a panic of the tokenizer's Rust code, which is no Exception, into a ModelError.

    A regular expression without end is such a panic, after ten million steps.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the model's tokenizer.json does not work on an expression: {reason_of(error)}",
            "copy or download the model folder again",
        ) from None


def load_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON, once it is clear that it does not blow expressions up.

    Raises:
        ValueError: it is none, or lengthens texts without measure.
        ModelError: it is one that does not work.
    """
    from tokenizers import Tokenizer

    try:
        parts = json.loads(text)
    except RecursionError:
        raise ValueError("tokenizer.json is nested too deep") from None
    if not isinstance(parts, dict):
        raise ValueError("tokenizer.json holds no object")
    growth, steps = 1, 0
    for section in ("normalizer", "pre_tokenizer", "post_processor"):
        for step in _steps(parts.get(section)):
            steps += 1
            added = [step.get(key) for key in ("content", "prepend", "replacement")]
            growth *= max(1, *(len(one) for one in added if isinstance(one, str)), 1)
            _check_charsmap(step.get("precompiled_charsmap"))
            template = step.get("single")
            growth *= max(1, len(template) // 8) if isinstance(template, list) else 1
    if growth > _MOST_GROWTH or steps > _MOST_STEPS:
        raise ValueError(f"tokenizer.json makes texts {growth} times as long in {steps} steps")
    with panics_told():
        return Tokenizer.from_str(text)


def _check_charsmap(encoded: Any) -> None:
    """SentencePiece's table: its first four bytes are a length that Rust takes the memory for."""
    if encoded is None:
        return
    table = base64.b64decode(str(encoded), validate=True)
    if len(table) < 4 or int.from_bytes(table[:4], "little") > len(table) - 4:
        raise ValueError("the precompiled_charsmap of tokenizer.json is damaged")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """The objects with a type at and below a value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "type" in one:
                yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of E expressions, padded to the longest.

    Attributes:
        input_ids, attention_mask: (E, L) int64; the mask is 0 at padding.
        truncated: for each expression, whether it was cut.
        max_words: the most tokens an expression may have, special tokens included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    truncated: list[bool]
    max_words: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an expression.

    Attributes:
        text: as the vocabulary writes it.
        word: number of the word that it is of, from 0; None for a special token.
        span: where it stands in the expression, first character and the one after the last.
        unknown: the vocabulary has no such word, and this token stands for all of those.
    """

    text: str
    word: int | None
    span: tuple[int, int]
    unknown: bool


class TextTokenizer:
    """Wraps a ``tokenizers.Tokenizer`` that adds its own special tokens.

    Args:
        tokenizer: without padding and truncation; both are done here.
        max_tokens: the most tokens that the text encoder takes; longer expressions lose their
            last words, never their closing special token.
        pad_id: id of padding.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, pad_id: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pad_id = pad_id

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Tokenizes E expressions, E at least 1."""
        import torch

        # Longer texts would fill the memory with tokens that no encoder reads.
        short = [text[:MAX_CHARACTERS] for text in texts]
        with panics_told():
            encoded = [item.ids for item in self.tokenizer.encode_batch(short)]
        cut = [
            ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]
            for ids in encoded
        ]
        length = max(len(ids) for ids in cut)
        input_ids = torch.full((len(cut), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(cut), length), dtype=torch.long)
        for row, ids in enumerate(cut):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        truncated = [
            len(ids) > self.max_tokens or len(text) > MAX_CHARACTERS
            for ids, text in zip(encoded, texts, strict=True)
        ]
        return TokenBatch(input_ids, mask, truncated, self.max_tokens)

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of one expression and where they stand in it, cut as in ``encode``.

        What counts as a word is the tokenizer's own choice: white space parts words, and mostly
        punctuation marks are words of their own.
        """
        with panics_told():
            item = self.tokenizer.encode(text[:MAX_CHARACTERS])
        strange = getattr(self.tokenizer.model, "unk_token", None)
        found = [
            Piece(token, None if special else word, span, not special and token == strange)
            for token, word, span, special in zip(
                item.tokens, item.word_ids, item.offsets, item.special_tokens_mask, strict=True
            )
        ]
        return (
            found if len(found) <= self.max_tokens else [*found[: self.max_tokens - 1], found[-1]]
        )

    def cuts(self, text: str) -> bool:
        """Whether ``encode`` reads only the beginning of an expression."""
        if text.isascii() and len(text) + 2 <= self.max_tokens:
            return False  # it has no more tokens than characters, and two at its ends
        with panics_told():
            tokens = len(self.tokenizer.encode(text[:MAX_CHARACTERS]).ids)
        return tokens > self.max_tokens or len(text) > MAX_CHARACTERS

    def unknown_words(self, text: str) -> tuple[str, ...]:
        """What of an expression the vocabulary does not have, in order, each once."""
        strange = getattr(self.tokenizer.model, "unk_token", None)
        if strange is None:
            return ()
        spans = (piece.span for piece in self.pieces(text) if piece.unknown)
        return tuple(dict.fromkeys(text[start:end] for start, end in spans))

    def to_json(self) -> str:
        """The tokenizer's own JSON, as ``tokenizer.json`` holds it."""
        text: str = self.tokenizer.to_str(pretty=False)
        return text


class KnownWords:
    """How far a tokenizer knows the words of expressions.

    Attributes:
        words: distinct words, whatever their case; unknown: those that it does not know.
        of: how many expressions there are; expressions: how many have an unknown word.
    """

    def __init__(self, tokenizer: TextTokenizer, texts: Iterable[str]) -> None:
        known: dict[str, bool] = {}
        self.of = self.expressions = 0
        for text in texts:
            own = [word.lower() for word in _WORD.findall(text)]
            for word in own:
                if word not in known:
                    known[word] = not tokenizer.unknown_words(word)
            self.of += 1
            self.expressions += not all(known[word] for word in own)
        self.words = len(known)
        self.unknown = [word for word, is_known in known.items() if not is_known]

    @property
    def most(self) -> bool:
        """Whether most of the words are unknown, or most expressions have one that is."""
        return 2 * len(self.unknown) > self.words or 2 * self.expressions > self.of

    def named(self) -> str:
        """The first of the unknown words."""
        return first_of(self.unknown, _NAMED)


_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_NAMED = 8  # unknown words that a message names


def tokenizer_from_words(words: Sequence[str]) -> Tokenizer:
    """A lower-casing whole-word tokenizer with BERT's special tokens; other words are [UNK].

    It reads no stops, commas, quotation marks or brackets: they are no words.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(lowercase=True),
            normalizers.Replace(Regex(r'[.,;:!?"()]'), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer


_MOST_SUBWORDS = 4096
_ALPHABET = string.ascii_lowercase + string.digits + string.punctuation


def with_learned_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer with subwords for the words of ``texts`` that it does not know (ours).

    What it knows keeps its ids, and texts of known words alone are tokenized as before: the new
    tokens come behind. Letters, digits and punctuation marks are among them, so that a word that
    is in no text is spelled and not unknown. A tokenizer that knows every word is given back as it
    is, as are those by bytes, to which no word is unknown.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    model = state["model"]
    if model["type"] not in ("WordLevel", "WordPiece") or tokenizer.pre_tokenizer is None:
        return tokenizer
    strange, prefix = model["unk_token"], model.get("continuing_subword_prefix", "##")
    seen: Counter[str] = Counter()
    for text in texts:
        short = text[:MAX_CHARACTERS]
        plain = tokenizer.normalizer.normalize_str(short) if tokenizer.normalizer else short
        seen.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain))
    unknown = {w: seen[w] for w in sorted(seen) if strange in tokenizer.encode(w).tokens}
    if not unknown:
        return tokenizer
    # With the tokens that were added behind its vocabulary, which would move if they stayed there.
    known: dict[str, int] = tokenizer.get_vocab()
    free = max(known.values()) + 1
    letters = sorted({*_ALPHABET, *"".join(unknown)})
    learned = _subwords(unknown, prefix, _MOST_SUBWORDS)
    spelled = [prefix + letter for letter in letters]
    new = [t for t in dict.fromkeys((*letters, *spelled, *learned)) if t not in known]
    known |= {token: free + number for number, token in enumerate(new)}
    state["model"] = {
        "type": "WordPiece",
        "unk_token": strange,
        "continuing_subword_prefix": prefix,
        "max_input_chars_per_word": model.get("max_input_chars_per_word", 100),
        "vocab": known,
    }
    return Tokenizer.from_str(json.dumps(state))


def _subwords(words: Mapping[str, int], prefix: str, most: int) -> list[str]:
    """Subwords by byte-pair merges over counted words (Sennrich et al. 2016), in their order.

    As the trainers of ``tokenizers``, but that equal counts are told apart by the letters: those
    give other subwords from run to run, and a run must be resumed with the same.

    Args:
        prefix: of what does not begin its word; most: how many at most, each seen twice or more.
    """
    parts = {word: [word[0], *(prefix + letter for letter in word[1:])] for word in words}
    counts: Counter[tuple[str, str]] = Counter()
    holders: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word, times in words.items():
        for pair in pairwise(parts[word]):
            counts[pair] += times
            holders[pair].add(word)
    waiting = [(-times, pair) for pair, times in counts.items()]
    heapify(waiting)
    found: dict[str, None] = {}
    while waiting and len(found) < most:
        times, pair = heappop(waiting)
        if -times != counts[pair]:
            continue  # Counted anew since; it waits under that number too.
        if counts[pair] < 2:
            break
        joined = pair[0] + pair[1].removeprefix(prefix)
        found[joined] = None
        changed = set()
        for word in holders.pop(pair):
            for old in pairwise(parts[word]):
                counts[old] -= words[word]
                changed.add(old)
            merged: list[str] = []
            for part in parts[word]:
                if merged and (merged[-1], part) == pair:
                    merged[-1] = joined
                else:
                    merged.append(part)
            parts[word] = merged
            for new in pairwise(merged):
                counts[new] += words[word]
                holders[new].add(word)
                changed.add(new)
        for one in changed - {pair}:
            heappush(waiting, (-counts[one], one))
    return list(found)
