"""What the segmenters of published models share: folders read strictly, frames, tokenizers.

Files come from Hugging Face folders. Nothing in them is executed: classes are named here, never by
a file, and weights are safetensors alone. A tensor that is missing would otherwise stay at random
values without a word, so missing and unexpected tensors are refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from risam_cli.data.images.frames import Filter, Fit, Frame, Pixels
from risam_cli.errors import ModelError, reason_of
from risam_cli.files.hashing import sha256_of_file
from risam_cli.files.jsonlines import load_json, read_text
from risam_cli.segmenters.segmenter import Capabilities, Instances, Texts, Thresholds
from risam_cli.weights.folder import count_weights
from risam_cli.weights.text import quiet

_LONGEST_JSON = 1 << 24
_MOST_SIDE = 1 << 14  # pixels of an input
_READ = (".json", ".txt", ".safetensors", ".model")  # endings of the files that decide results
# Numbers that code computes; files of older versions hold them, and nothing is learned in them.
_COMPUTED = (".position_ids", ".relative_position_index", ".num_batches_tracked")
_FIX = "download the folder again"
# PIL.Image.Resampling, as image processors number it.
_FILTERS: tuple[Filter, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True)
class Folder:
    """A Hugging Face folder on this machine.

    Attributes:
        path: of the folder; name: as the user gave it, a hub's name or the path.
    """

    path: Path
    name: str

    def config(self) -> dict[str, Any]:
        """Its ``config.json``.

        Raises:
            ModelError: missing or damaged.
        """
        return self.json("config.json")

    def json(self, name: str) -> dict[str, Any]:
        """One of its JSON files.

        Raises:
            ModelError: missing, damaged, or no object.
        """
        path = self.path / name
        try:
            value = load_json(read_text(path, _LONGEST_JSON))
        except FileNotFoundError:
            raise ModelError(f"{self.path} lacks {name}", _FIX) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}", _FIX) from None
        if not isinstance(value, dict):
            raise ModelError(f"{path} does not hold a JSON object", _FIX)
        return value

    def files(self) -> list[Path]:
        """The files that decide results, by name."""
        return sorted(p for p in self.path.iterdir() if p.is_file() and p.suffix in _READ)


def hash_folders(folders: Sequence[Folder]) -> str:
    """SHA-256 over the names and the contents of the folders' files, wherever they lie."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in folder.files():
            digest.update(f"{path.name} {sha256_of_file(path)}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def load_weights(kind: type[Any], folder: Folder) -> Any:
    """A network of ``transformers`` with a folder's weights, in float32, for inference.

    Args:
        kind: its class.

    Raises:
        ModelError: damaged files, tensors that are missing, unexpected or of other shapes.
    """
    with quiet():
        try:
            network, info = kind.from_pretrained(
                folder.path,
                dtype=torch.float32,  # half-precision files would stay half otherwise
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told, and refused below
                local_files_only=True,
                trust_remote_code=False,
            )
        except Exception as error:  # transformers passes on whatever a file's bytes lead to
            raise _explained(folder, kind, error) from error
    missing = list(info["missing_keys"])
    surplus = [name for name in info["unexpected_keys"] if not name.endswith(_COMPUTED)]
    wrong = [str(item[0] if isinstance(item, tuple) else item) for item in info["mismatched_keys"]]
    for what, names in (
        ("lacks", missing),
        ("has unexpected", surplus),
        ("has, of other shapes than its config.json says,", wrong),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise ModelError(
                f"{folder.name}: its weights file {what} {len(names)} tensors: {shown}",
                f"{_FIX}; its weights and its config.json belong to different models",
            )
    return network.eval().requires_grad_(False)


def _explained(folder: Folder, kind: type[Any], error: Exception) -> ModelError:
    """What is wrong with a folder that cannot be loaded, on one line."""
    weights = sorted(p.name for p in folder.path.glob("*.safetensors"))
    if not weights:
        pickles = sorted(p.name for p in folder.path.glob("*.bin"))
        beside = f" (only {pickles[0]}, which may hold code)" if pickles else ""
        return ModelError(
            f"{folder.name}: {folder.path} holds no .safetensors weights{beside}",
            "download a revision that has model.safetensors",
        )
    for name in weights:
        try:
            _open(folder.path / name)
        except Exception as damage:  # safetensors has an error of its own
            why = f"{folder.path / name} is damaged or truncated: {reason_of(damage)}"
            return ModelError(why, "download it again")
    return ModelError(f"{folder.name}: cannot load it as {kind.__name__}: {reason_of(error)}", _FIX)


def _open(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="numpy"):
        pass


def load_tokenizer(folder: Folder, words: int) -> Any:
    """The tokenizer of a folder.

    Args:
        words: that the network embeds.

    Raises:
        ModelError: its files are missing or damaged, or it is another network's.
    """
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(
                f"{folder.name}: its tokenizer cannot be loaded: {reason_of(error)}",
                "put its tokenizer files (tokenizer.json, tokenizer_config.json, vocab.json, …) "
                "into the folder",
            ) from error
    # transformers 5 makes a nearly empty tokenizer where a folder's files are missing.
    if not words / 2 <= len(tokenizer) <= words:
        raise ModelError(
            f"{folder.name}: its network embeds {words} tokens, its tokenizer has {len(tokenizer)}",
            "put its own tokenizer files (tokenizer.json, vocab.json, merges.txt, …) into the "
            "folder",
        )
    return tokenizer


def read_frame(folder: Folder, fit: Fit | None = None) -> Frame:
    """The frame that a folder's image processor describes, without that processor.

    ``transformers`` has some image processors with torchvision only. What they do is in their
    numbers: a size, Pillow's filter, mean and standard deviation.

    Args:
        fit: what its network was trained with; None reads it from the size's keys.

    Raises:
        ModelError: no such file, or steps that a frame does not have.
    """
    numbers = _processor_numbers(folder)
    where = f"{folder.name}: its image processor"
    try:
        size = numbers["size"]
        size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
        if "longest_edge" in size and "shortest_edge" in size:
            found: Fit = "shortest"
            sides = size["shortest_edge"], size["longest_edge"]
        elif "longest_edge" in size:
            found, sides = "pad", (size["longest_edge"], size["longest_edge"])
        else:
            found, sides = "stretch", (size["height"], size["width"])
        mean, std = (_three(numbers[key]) for key in ("image_mean", "image_std"))
        unit = 1 / float(numbers.get("rescale_factor", 1 / 255))
        # Where a file leaves it out, its class has it: bilinear, but for CLIP's.
        clip = str(numbers.get("image_processor_type")).startswith("CLIP")
        resample = _FILTERS[int(numbers.get("resample", 3 if clip else 2))]
        height, width = (int(side) for side in sides)
        if min(height, width) < 1 or max(height, width) > _MOST_SIDE:
            raise ValueError(f"size {size}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{where} cannot be read: {error!r}", _FIX) from None
    off = [k for k in ("do_resize", "do_rescale", "do_normalize") if not numbers.get(k, True)]
    crops = numbers.get("do_center_crop") and numbers.get("crop_size") != numbers["size"]
    if off or crops or (fit is not None and found != fit):
        what = "do_center_crop" if crops else off[0] + ": false" if off else f"size {size}"
        raise ModelError(f"{where} says {what}, which this kind of model was not made with", _FIX)
    return Frame(found, height, width, mean, std, round(unit, 9), resample)


def _three(values: Sequence[Any]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _processor_numbers(folder: Folder) -> Mapping[str, Any]:
    for name in _PROCESSORS:
        if (folder.path / name).is_file():
            values = folder.json(name)
            inner = values.get("image_processor")
            if isinstance(inner, dict):
                return inner
            if "image_mean" in values:
                return values
    raise ModelError(
        f"{folder.name}: {folder.path} lacks {_PROCESSORS[0]}, which says how images are prepared",
        "put it into the folder",
    )


class Published:
    """What all published segmenters have; see :class:`risam_cli.segmenters.segmenter.Segmenter`.

    Images and expressions are encoded and decoded one by one: batched they differ in the last bits,
    and a record must not depend on its neighbours.

    Args:
        folders: by part, in order.
        frames, max_tokens: see there.
        network, tokenizer: loaded from the first folder.
        device, precision: where it runs; a lower precision than float32 by autocast.
    """

    kind: str
    thresholds: Thresholds
    capabilities: Capabilities

    def __init__(
        self,
        folders: Mapping[str, Folder],
        frames: tuple[Frame, ...],
        network: Any,
        tokenizer: Any,
        max_tokens: int,
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        self.name = "+".join(folder.name for folder in folders.values())
        self.folders: Mapping[str, str] = {part: folder.name for part, folder in folders.items()}
        self.hash = hash_folders(list(folders.values()))
        self.versions: Mapping[str, str] = {"transformers": version("transformers")}
        self.frames = frames
        self.parameters = sum(
            count_weights(path)[0]
            for folder in folders.values()
            for path in folder.files()
            if path.suffix == ".safetensors"
        )
        self.max_tokens = max_tokens
        self.device = device
        self.precision = precision
        self._network = network.to(device)
        self._tokenizer = tokenizer

    def encode_images(self, inputs: Sequence[Pixels]) -> list[Any]:
        """What :meth:`encode_image` gives of each of B images."""
        with self.autocast():
            return [self.encode_image(inputs, row) for row in range(len(inputs[0].sizes))]

    def encode_image(self, inputs: Sequence[Pixels], row: int) -> Any:
        """Features of one of the images; called within :meth:`autocast`."""
        raise NotImplementedError

    def encode_texts(self, texts: Sequence[str]) -> Texts:
        """What :meth:`encode_text` gives of each of E expressions."""
        each = [self.encode_text(text) for text in texts]
        return Texts([f for f, _, _ in each], [cut for _, cut, _ in each], [w for _, _, w in each])

    def encode_text(self, text: str) -> tuple[Any, int, tuple[str, ...]]:
        """Features of one expression, what it was cut to or 0, and its unknown words."""
        raise NotImplementedError

    def decode(
        self,
        features: Sequence[Any],
        texts: Texts,
        rows: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        instance_threshold: float | None = None,
    ) -> list[Instances]:
        """What :meth:`decode_image` gives of each run of equal rows."""
        threshold = self.thresholds.instance if instance_threshold is None else instance_threshold
        return [
            self.decode_image(
                features[row], [texts.features[k] for k, _ in group], sizes[row], threshold or 0.0
            )
            for row, group in groupby(enumerate(rows), key=lambda item: item[1])
        ]

    def decode_image(
        self, image: Any, texts: Sequence[Any], size: tuple[int, int], threshold: float
    ) -> Instances:
        """Finds expressions in one image, features of both.

        Args:
            size: (H, W); threshold: an instance counts where its score is greater.
        """
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        """The run's precision; nothing where that is float32."""
        lower = self.precision != torch.float32
        return torch.autocast(
            self.device.type, dtype=self.precision if lower else None, enabled=lower
        )

    def tokens_of(self, text: str, **options: Any) -> tuple[Tensor, int, tuple[str, ...]]:
        """Token ids (1, L) of an expression, what it was cut to or 0, and its unknown words.

        A longer expression loses its last words, never its closing special tokens.
        """
        text = text[: 40 * self.max_tokens]  # no token of these vocabularies is so long
        options["verbose"] = False  # what is too long is cut, and said in the record
        ids = self._tokenizer(text, **options)["input_ids"]
        cut = len(ids) > self.max_tokens
        if cut:
            ids = self._tokenizer(text, truncation=True, max_length=self.max_tokens, **options)
            ids = ids["input_ids"]
        return (
            torch.tensor([ids], device=self.device),
            self.max_tokens if cut else 0,
            unknown_words(self._tokenizer, text),
        )


def unknown_words(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The words of a text that a vocabulary does not have, in order, once each."""
    strange = tokenizer.unk_token
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if strange is None or inner is None or strange in text:
        return ()
    found = inner.encode(text, add_special_tokens=False)
    spans = [
        span for token, span in zip(found.tokens, found.offsets, strict=True) if token == strange
    ]
    return tuple(dict.fromkeys(text[start:end] for start, end in spans if end > start))
