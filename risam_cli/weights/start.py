"""The network that a training run starts from, and which of its frozen parts lie in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from risam_cli.console.console import Console
from risam_cli.errors import ConfigError, ModelError, reason_of
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.model.risam import Risam
from risam_cli.model.rivals.sam import SamMaskDecoder
from risam_cli.settings.model import ModelSettings, TextEncoderSettings
from risam_cli.settings.train import TrainSettings
from risam_cli.weights import folder as model_folders
from risam_cli.weights import frozen, lora
from risam_cli.weights.build import add_lora, build_model, learn_words, new_text_parts
from risam_cli.weights.load import LoadedModel, load_model
from risam_cli.weights.sam import load_sam_decoder, load_sam_encoder
from risam_cli.weights.text import TextParts
from risam_cli.weights.tokenizer import TextTokenizer
from risam_cli.weights.torch_files import load_plain, require_sealed


def start_model(
    settings: TrainSettings, console: Console, texts: Callable[[], Iterable[str]] = tuple
) -> tuple[Risam, TextParts, tuple[frozen.Needed, ...]]:
    """The network with its first weights, its text parts, and the frozen parts that lie in files.

    Args:
        texts: the training expressions; called where the text encoder learns words from them.

    Raises:
        ModelError: weights that are not there or do not fit; ConfigError: an ``init_from`` of
            another network.
    """
    if settings.init_from is not None:
        return _from_model_folder(settings, console, texts)
    chosen = settings.model
    learns = chosen.text_encoder.learns_words
    text = new_text_parts(chosen.text_encoder, texts() if learns else ())
    if learns:
        _tell_of_words(console, text)
    model = build_model(chosen, text)
    if settings.init_encoder_from is not None:
        start_encoder(model.image_encoder, settings.init_encoder_from)
    needs = []
    checkpoint, source = chosen.image_encoder.checkpoint, chosen.text_encoder.source
    if checkpoint is not None:
        _load_sam(model, Path(checkpoint), console)
        if not trains_image_encoder(settings):
            needs.append(frozen.describe(frozen.IMAGE_ENCODER, checkpoint))
    if source is not None and not trains_text_encoder(chosen.text_encoder):
        needs.append(frozen.describe(frozen.TEXT_ENCODER, source))
    for needed in needs:
        console.info(
            f"{needed.part.replace('_', ' ')}: {needed.name} stays frozen; model folders name it "
            f"and its SHA-256 {needed.sha256}, but do not contain it"
        )
    return model, text, tuple(needs)


def _tell_of_words(console: Console, text: TextParts, before: int = 0) -> None:
    size = text.tokenizer.tokenizer.get_vocab_size()
    console.info(
        f"text encoder: {size - before} tokens learned from the training expressions, {size} in all"
        if size > before
        else "text encoder: it knows every word of the training expressions"
    )


def trains_image_encoder(settings: TrainSettings) -> bool:
    """Whether any stage changes SAM's own weights."""
    return any(stage.kind == "dense" or stage.train_encoder == "yes" for stage in settings.stages)


def trains_text_encoder(settings: TextEncoderSettings) -> bool:
    """Whether the text encoder's own weights change; LoRA leaves them as they are."""
    return settings.trainable and settings.lora is None


def train_text_encoder(model: Risam, settings: TextEncoderSettings) -> None:
    """Asks for gradients of what the settings train of the text backbone."""
    for name, parameter in model.text_encoder.backbone.named_parameters():
        trained = settings.trainable if settings.lora is None else lora.is_lora(name)
        parameter.requires_grad_(trained)


def _load_sam(model: Risam, path: Path, console: Console) -> None:
    digest = load_sam_encoder(model.image_encoder, path)
    console.info(f"image encoder from {path}, SHA-256 {digest}")
    decoder = model.mask_decoder
    if not isinstance(decoder, SamMaskDecoder):
        return
    if decoder.size == SamMaskDecoder.SAM_SIZE:
        load_sam_decoder(decoder, path)
    else:
        console.warn(
            f"the mask decoder starts from scratch: its (dim, heads, layers, ffn_dim) are "
            f"{decoder.size}, SAM's {SamMaskDecoder.SAM_SIZE}"
        )


def _from_model_folder(
    run: TrainSettings, console: Console, texts: Callable[[], Iterable[str]]
) -> tuple[Risam, TextParts, tuple[frozen.Needed, ...]]:
    """The network of the settings with all weights of a model folder; only parts that start
    at zero may be new (adapters, the stem's way to the deep features, no-target evidence, LoRA).
    """
    settings, source = run.model, str(run.init_from)
    ours = settings.text_encoder.lora
    loaded = load_model(source, device=torch.device("cpu"), keep_lora=ours is not None)
    model_folders.require_undamaged(model_folders.find_model(source))
    _require_same(settings, loaded, source)
    theirs = loaded.settings.text_encoder.lora
    backbone = loaded.model.text_encoder.backbone
    config: Any = backbone.config
    if ours is not None and theirs is None:
        add_lora(backbone, config.model_type, settings.text_encoder)
    elif ours is not None and ours != theirs:
        raise ConfigError(
            f"model.text_encoder.lora is not that of init_from {source}",
            "give it the same values, or leave it out to merge it into the weights",
        )
    tokens = min(settings.text_encoder.max_tokens, int(config.max_position_embeddings))
    known = loaded.tokenizer
    text = TextParts(backbone, config, TextTokenizer(known.tokenizer, tokens, known.pad_id))
    if settings.text_encoder.learns_words:
        text = learn_words(text, texts())
        _tell_of_words(console, text, known.tokenizer.get_vocab_size())
    model = build_model(settings, text)
    weights = loaded.model.state_dict()
    model.load_state_dict(weights, strict=False)  # The sections are equal.
    merged = theirs is not None and ours is None  # The base is then no longer the file's.
    kept = {
        frozen.IMAGE_ENCODER: not trains_image_encoder(run),
        frozen.TEXT_ENCODER: not trains_text_encoder(settings.text_encoder) and not merged,
    }
    needs = tuple(needed for needed in loaded.needs if kept[needed.part])
    return model.train().requires_grad_(True), text, needs


def _require_same(settings: ModelSettings, loaded: LoadedModel, source: str) -> None:
    theirs, ours = _flat(loaded.settings), _flat(settings)
    for key, value in ours.items():
        held = theirs.get(key)
        # Parts that start at zero change nothing where they are new.
        new = key.endswith(_AT_ZERO) and not held
        if value != held and not new:
            raise ConfigError(
                f"model.{key} is {value!r}, init_from {source} has {held!r}",
                "give the model section the values of that folder's config.json, or take only "
                "its image encoder, with init_encoder_from",
            )


_AT_ZERO = ("adapter_dim", "stem_in_deep", "no_target_evidence")
_FREE = {
    "image_encoder": {"checkpoint"},
    "text_encoder": {"max_tokens", "learn_words", "trainable", "lora"},
}
"""What may differ from the folder that a network starts from: it changes no weight's shape."""


def _flat(settings: ModelSettings) -> dict[str, Any]:
    """What makes a network the same one, by its keys."""
    free = {**_FREE}
    if settings.text_encoder.vocabulary is None:  # they are of a small BERT alone
        free["text_encoder"] = free["text_encoder"] | {"hidden", "layers", "heads"}
    held = settings.model_dump(
        include={"image_encoder", "text_encoder", "fusion", "decoder"}, exclude=free
    )
    sections = {f"{name}.{key}": v for name, part in held.items() for key, v in part.items()}
    return {"kind": settings.kind, **sections}


# --- an encoder out of an earlier training --------------------------------------------------------

_PREFIX = "image_encoder."


def start_encoder(encoder: ImageEncoder, source: str) -> None:
    """Fills an image encoder with an earlier one's weights; parts that start at zero may be new.

    Args:
        encoder: of the earlier one's sizes.
        source: a model folder or bundled model, or the ``checkpoints/last.pt`` of a training
            run, which may have ended with a dense stage.

    Raises:
        ModelError: a file that cannot be read or holds code, or an encoder that does not fit.
    """
    weights = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in _tensors(source).items()
        if name.startswith(_PREFIX)
    }
    own = encoder.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            if ".adapter." in name or name.startswith("stem_in_deep."):
                continue
            raise ModelError(
                f"init_encoder_from {source} has no image encoder weight {name}",
                "give the best/ of that run, which holds what it left frozen too"
                if Path(source).is_file()
                else "give the model section the values of that training",
            )
        if weights[name].shape != tensor.shape:
            raise ModelError(
                f"init_encoder_from {source}: {name} is {tuple(weights[name].shape)}, the "
                f"encoder's is {tuple(tensor.shape)}",
                "give model.image_encoder the values of that training",
            )
    unused = [name for name in weights if name not in own]
    if unused:
        raise ModelError(
            f"init_encoder_from {source} has a weight that the encoder lacks: {unused[0]}",
            "give model.image_encoder the values of that training",
        )
    encoder.load_state_dict({**own, **weights})


def _tensors(source: str) -> Mapping[str, Tensor]:
    path = Path(source)
    try:
        if path.is_file():
            state: Any = load_plain(path)
            model = state.get("model") if isinstance(state, dict) else None
            if not isinstance(model, dict) or not all(
                isinstance(value, Tensor) for value in model.values()
            ):
                raise ModelError(
                    f"init_encoder_from {path} is not a checkpoint of risam train",
                    "give the last.pt of a run; SAM's own file is model.image_encoder.checkpoint",
                )
            require_sealed(path)
            return model
        folder = model_folders.find_model(source)
        stored = model_folders.read_model_folder(folder)
        model_folders.require_undamaged(folder)
        if stored.needs:
            return load_model(folder, device=torch.device("cpu")).model.state_dict()
        return load_file(folder / model_folders.WEIGHTS_FILE)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        SafetensorError,
    ) as error:
        raise ModelError(
            f"init_encoder_from {source} cannot be read: {reason_of(error)}",
            "give a model folder or a training run's checkpoints/last.pt",
        ) from error
