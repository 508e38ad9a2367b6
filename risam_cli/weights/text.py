"""Text encoders from Hugging Face folders or names, from a model folder, or made small."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from risam_cli.errors import ModelError, reason_of
from risam_cli.weights.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    panics_told,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn
    from transformers import PretrainedConfig

    from risam_cli.weights.folder import StoredModel


@dataclass(frozen=True)
class TextParts:
    """A text backbone with all that is needed to build it again."""

    backbone: nn.Module
    config: PretrainedConfig
    tokenizer: TextTokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars, reports and warnings off the terminal: what matters is checked."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # critical
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def small_bert(
    tokenizer: Tokenizer, hidden: int, layers: int, heads: int, max_tokens: int
) -> TextParts:
    """A BERT over a tokenizer's words with random weights and no dropout."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return TextParts(_backbone(config), config, TextTokenizer(tokenizer, max_tokens, 0))


def pretrained_text(source: str, max_tokens: int) -> TextParts:
    """A CLIP or BERT text encoder by folder or hub name, with its tokenizer.

    Raises:
        ModelError: a folder or name that cannot be loaded, or a tokenizer without a fast form.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel, CLIPTextModel

    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            config = config.text_config if config.model_type == "clip" else config
            if config.is_encoder_decoder:
                raise ValueError(f"a {config.model_type} is not an encoder of its own")
            kind: Any = {"clip_text_model": CLIPTextModel, "bert": BertModel}.get(
                config.model_type, AutoModel
            )
            # As _backbone builds it again from a model folder.
            bare = {"add_pooling_layer": False} if kind is BertModel else {}
            backbone, report = kind.from_pretrained(
                source, config=config, trust_remote_code=False, output_loading_info=True, **bare
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        lacking = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if lacking:
            raise ValueError(f"its files lack {len(lacking)} weights, first {lacking[0]!r}")
    except Exception as error:  # transformers passes on whatever a file's bytes lead to
        raise ModelError(
            f"cannot load text encoder {source!r}: {reason_of(error)}",
            "give a folder with config.json, weights and tokenizer files, or a name that is in "
            "the local Hugging Face cache or on the hub; or none: model.text_encoder.source null "
            "and vocabulary data learn the words of the training expressions",
        ) from error
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ModelError(f"text encoder {source!r} has no tokenizer.json", "convert its tokenizer")
    words = fast.get_vocab_size()
    if not config.vocab_size / 2 <= words <= config.vocab_size:
        # transformers 5 makes an empty tokenizer where a folder's files are missing.
        raise ModelError(
            f"text encoder {source!r} embeds {config.vocab_size} tokens, its tokenizer has {words}",
            "put the tokenizer's own files (tokenizer.json, vocab.txt, …) into the folder",
        )
    limit = min(max_tokens, int(config.max_position_embeddings))
    # transformers 5 keeps a file's half precision, which nothing behind the backbone has.
    backbone = backbone.float()
    pad_id = int(tokenizer.pad_token_id or 0)
    return TextParts(backbone, config, TextTokenizer(fast, limit, pad_id))


def grow_embeddings(text: TextParts, tokenizer: Tokenizer) -> TextParts:
    """The same encoder over a tokenizer that begins with its own tokens and has more behind them.

    The new embeddings are drawn with the spread of the old, which stay as they are.

    Raises:
        ModelError: an encoder whose embeddings are not BERT's.
    """
    import torch
    from torch import nn

    backbone: Any = text.backbone
    config: Any = text.config
    embeddings: Any = getattr(backbone, "embeddings", None)
    table = getattr(embeddings, "word_embeddings", None)
    if not isinstance(table, nn.Embedding):
        raise ModelError(
            f"cannot add words to a text encoder of kind {config.model_type}",
            "set model.text_encoder.learn_words to false",
        )
    rows, width = table.weight.shape
    needed = max(tokenizer.get_vocab().values()) + 1
    wider = nn.Embedding(max(rows, needed), width, table.padding_idx)
    with torch.no_grad():
        nn.init.normal_(wider.weight, std=float(table.weight.std()))
        wider.weight[:rows] = table.weight
    embeddings.word_embeddings = wider
    if isinstance(config, PlainConfig):
        config = PlainConfig({**config.to_dict(), "vocab_size": len(wider.weight)})
    else:
        config.vocab_size = len(wider.weight)
    backbone.config = config
    before = text.tokenizer
    return TextParts(backbone, config, TextTokenizer(tokenizer, before.max_tokens, before.pad_id))


def text_from_folder(stored: StoredModel, max_tokens: int) -> TextParts:
    """The text encoder of a model folder, with random weights until the folder's are loaded.

    Raises:
        ModelError: a text configuration or tokenizer that cannot be read.
    """
    try:
        config = _stored_config(stored.text_config)
        tokenizer = load_tokenizer(stored.tokenizer)
        # Ids of its own words, and of those that it puts around every text.
        with panics_told():
            around = tokenizer.encode("").ids
        highest = max([*tokenizer.get_vocab().values(), *around], default=0)
        if highest >= config.vocab_size:
            raise ValueError(
                f"its tokenizer gives id {highest}, the encoder knows {config.vocab_size}"
            )
        _require_room(config, stored)
        backbone = _backbone(config)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(
            f"{stored.folder}: text encoder cannot be built: {reason_of(error)}",
            "copy or download the folder again",
        ) from error
    limit = min(max_tokens, int(config.max_position_embeddings))
    pad_id = int(config.pad_token_id or 0)
    return TextParts(backbone, config, TextTokenizer(tokenizer, limit, pad_id))


def _require_room(config: Any, stored: StoredModel) -> None:
    """Of a kind whose sizes have names of their own: that its weights can be in the files.

    Raises:
        ValueError: there are more of them than the files have bytes.
    """
    if config.model_type in ("bert", "clip_text_model"):
        return
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    elsewhere = sum(int(needed["size"]) for needed in stored.needs)
    if weights > (stored.folder / "model.safetensors").stat().st_size + elsewhere:
        raise ValueError(f"it asks for {weights} weights, more than its files have bytes")


def _backbone(config: Any) -> Any:
    """An untrained backbone for a configuration, without a pooler that nothing would use."""
    if isinstance(config, PlainConfig):
        return _bert(config)
    from transformers import AutoModel, BertModel, CLIPTextModel

    if config.model_type == "bert":
        return BertModel(config, add_pooling_layer=False)
    if config.model_type == "clip_text_model":
        return CLIPTextModel(config)
    return AutoModel.from_config(config)


class PlainConfig:
    """A stored Hugging Face configuration, with its values as attributes, without transformers."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The values as stored."""
        return dict(self._values)

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same as JSON; ``use_diff`` is transformers' and changes nothing here."""
        return json.dumps(self._values, indent=2, sort_keys=True) + "\n"


def _stored_config(values: Mapping[str, Any]) -> Any:
    """The configuration of a model folder; importing transformers takes seconds, BERT needs none.

    Raises:
        KeyError, ValueError: values that are missing, or of a model that is not known.
    """
    if _is_plain_bert(values):
        return PlainConfig(values)
    from transformers import AutoConfig

    # How attention is computed is this machine's matter; a name with a slash would be code to
    # fetch and run.
    rest = {k: v for k, v in values.items() if k not in _NOT_FROM_FILES}
    return AutoConfig.for_model(rest.pop("model_type"), **rest)


_NOT_FROM_FILES = frozenset(
    {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "auto_map"}
)
_BERT_NUMBERS = (
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
)


def _is_plain_bert(values: Mapping[str, Any]) -> bool:
    """Whether it is BERT as published, as :mod:`risam_cli.weights.bert` reads it."""
    return (
        values.get("model_type") == "bert"
        and values.get("hidden_act") == "gelu"
        and values.get("position_embedding_type", "absolute") == "absolute"
        and not any(values.get(key) for key in ("is_decoder", "add_cross_attention"))
        and all(type(values.get(key)) in (int, float) for key in _BERT_NUMBERS)
        and "pad_token_id" in values
    )


def _bert(config: Any) -> nn.Module:
    from risam_cli.weights.bert import Bert

    return Bert(
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        types=config.type_vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        inner=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        eps=config.layer_norm_eps,
        pad_id=config.pad_token_id,
        config=config,
    )
