"""SAM's weights into this project's modules: official ``.pth`` files and Hugging Face folders.

Both are read without running code that they may hold. Loading is strict: every encoder weight
of the file is used and none of the encoder's is missing, or :class:`ModelError` says which.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from risam_cli.errors import ModelError
from risam_cli.files.hashing import sha256_of_file
from risam_cli.files.jsonlines import load_json
from risam_cli.model.image_encoder import (
    ConvStem,
    ImageEncoder,
    resize_pos_embed,
    resize_rel_pos,
)
from risam_cli.model.rivals.sam import SamMaskDecoder
from risam_cli.weights.torch_files import load_plain

ENCODER = "image_encoder."
_SIZES = {(768, 12): "ViT-B", (1024, 24): "ViT-L", (1280, 32): "ViT-H"}
_MOST_SIDE = 1024  # of a grid of position embeddings; SAM's is 64
_WANTED = "give an official SAM .pth file or a Hugging Face SAM folder (facebook/sam-vit-base)"
_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of a file; of several, over their hashes in order."""
    digests = [sha256_of_file(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def load_sam_encoder(encoder: ImageEncoder, path: Path) -> str:
    """Fills an image encoder with SAM's weights; adapters, and nothing else, keep their own.

    Where the encoder is built for another input size than the checkpoint, position embeddings
    and the global blocks' relative-position tables are interpolated here, once.

    Args:
        encoder: of the checkpoint's width, depth and windows, with SAM's patch embedding.
        path: an official ``.pth`` file, a ``.safetensors`` file of either layout, or a Hugging
            Face folder, sharded or not.

    Returns:
        :func:`sha256_of` the files that were read.

    Raises:
        ModelError: a file that cannot be read, holds code, or does not fit the encoder.
    """
    if isinstance(encoder.patch_embed, ConvStem):
        raise ModelError(
            f"{path}: SAM's weights begin with a patch embedding, image_encoder.stem is set",
            "set image_encoder.stem to null, or image_encoder.checkpoint to null",
        )
    tensors, files = read_sam(path)
    weights = {
        name.removeprefix(ENCODER): tensor
        for name, tensor in tensors.items()
        if name.startswith(ENCODER)
    }
    own = {name: p for name, p in encoder.state_dict().items() if ".adapter." not in name}
    _check_size(path, weights, encoder)
    _check_names(path, weights.keys(), own.keys(), "the image encoder")
    resized = _resized(path, weights, encoder)
    _copy(path, resized, own)
    return sha256_of(files)


def load_sam_decoder(decoder: SamMaskDecoder, path: Path) -> None:
    """Fills the baseline's decoder with SAM's prompt-encoder parts and mask decoder.

    What SAM has no weights for (the sentence's projection, the no-target token and head) keeps
    its own; of SAM, the prompts of points, boxes and masks and the three heads for ambiguous
    masks are not used.

    Raises:
        ModelError: a file that cannot be read, or a decoder of another size than SAM's.
    """
    weights = decoder_names(read_sam(path)[0])
    own = {
        name: tensor
        for name, tensor in decoder.state_dict().items()
        if name.startswith(SamMaskDecoder.SAM_PARTS)
    }
    _check_names(path, [name for name in weights if name in own], own.keys(), "SAM's mask decoder")
    _copy(path, weights, own)


def read_sam(path: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """Reads a SAM checkpoint of either layout under segment-anything's names.

    Returns:
        The tensors, mapped from the files where that is possible, and the files in order.

    Raises:
        ModelError: nothing there, a damaged file, one that holds code, or one that is no SAM.
    """
    tensors: dict[str, Tensor] = {}
    if path.is_dir():
        files = weight_files(path)
    elif path.is_file():
        files = [path]
    else:
        raise ModelError(f"no SAM checkpoint at {path}", _WANTED)
    for file in files:
        tensors.update(_read_file(file))
    if any(name.startswith("vision_encoder.") for name in tensors):
        tensors = from_hugging_face(tensors)
    if not any(name.startswith(ENCODER) for name in tensors):
        first = ", ".join(sorted(tensors)[:3]) or "none"
        raise ModelError(f"{path} holds no weights of a SAM encoder, only {first}", _WANTED)
    return tensors, files


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: safetensors before pickles, shards in order.

    Raises:
        ModelError: there is none, or an index that names what is not there.
    """
    for name in _FOLDER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        try:
            shards = set(load_json(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path} is not an index of weights: {error!r}", "download it again"
            ) from error
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ModelError(f"{path} names a file outside its folder: {shard!r}", "fix it")
            if not (folder / shard).is_file():
                raise ModelError(f"{path} names {shard!r}, which is missing", "download it again")
        return [folder / shard for shard in sorted(shards)]
    raise ModelError(f"folder {folder} holds none of {', '.join(_FOLDER_FILES)}", _WANTED)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from risam_cli.weights.folder import read_tensors

        return read_tensors(path)
    # Mapped, so that a ViT-H's 2.6 GB need not be in memory twice.
    held: Any = load_plain(path, mapped=True)
    if not isinstance(held, dict) or not all(isinstance(v, Tensor) for v in held.values()):
        raise ModelError(f"{path} is not a plain table of weights by name", _WANTED)
    return {str(name): tensor for name, tensor in held.items()}


# --- names of the two layouts ---------------------------------------------------------------------

_LAYER = r"(mask_decoder\.transformer\.layers\.\d+)"
_FEED_FORWARD = r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))"
_POSITIONS = r"(?:shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding"
_FROM_HUGGING_FACE = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
        (r"vision_encoder\.layers\.", "image_encoder.blocks."),
        (r"vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (r"vision_encoder\.", "image_encoder."),
        (_POSITIONS, "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        (
            r"mask_decoder\.transformer\.layer_norm_final_attn\.",
            "mask_decoder.transformer.norm_final_attn.",
        ),
        (_LAYER + r"\.layer_norm(\d)\.", r"\1.norm\2."),
        (r"mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
        (r"mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
        (r"mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
        # A feed-forward of SAM's has three layers: here proj_in, layers.0 and proj_out.
        (_FEED_FORWARD + r"\.proj_in\.", r"\1.layers.0."),
        (_FEED_FORWARD + r"\.layers\.0\.", r"\1.layers.1."),
        (_FEED_FORWARD + r"\.proj_out\.", r"\1.layers.2."),
    )
]


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames ``transformers``' ``SamModel`` weights to segment-anything's names.

    Each name is changed by the first rule that fits; others, which nothing here uses, stay.
    """
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in _FROM_HUGGING_FACE:
            if match := pattern.match(name):
                name = match.expand(new) + name[match.end() :]
                break
        renamed[name] = tensor
    return renamed


def decoder_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM's weights under the names that :class:`SamMaskDecoder` gives its parts."""
    return {
        name.removeprefix("prompt_encoder."): tensor
        for name, tensor in tensors.items()
        if name.startswith(("mask_decoder.", "prompt_encoder."))
    }


# --- does it fit ----------------------------------------------------------------------------------


def _check_size(path: Path, weights: Mapping[str, Tensor], encoder: ImageEncoder) -> None:
    """Says what a file is where its width or depth is not the encoder's."""
    projection = weights.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        return  # Missing names and wrong shapes are told one by one.
    blocks = {int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d{1,9})\.", name))}
    found = (projection.shape[0], len(blocks))
    own = (encoder.pos_embed.shape[-1], len(encoder.blocks))
    if found != own:
        preset = _SIZES.get(found, "").lower().replace("-", "_")
        fix = f"set model.preset: {preset}" if preset else "set image_encoder to its sizes"
        raise ModelError(
            f"{path} is {_named(found)}, the model's image encoder is {_named(own)}",
            f"{fix}, or give the file that fits",
        )


def _named(size: tuple[int, int]) -> str:
    text = f"width {size[0]}, {size[1]} blocks"
    return f"a {_SIZES[size]} ({text})" if size in _SIZES else f"a ViT of {text}"


def _check_names(path: Path, found: Iterable[str], wanted: Iterable[str], what: str) -> None:
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    for problem, names in (("lacks", missing), ("has unknown", surplus)):
        if names:
            raise ModelError(
                f"{path} {problem} {len(names)} tensors of {what}: {', '.join(names[:3])}"
                + (", …" if len(names) > 3 else ""),
                _WANTED,
            )


def _resized(path: Path, weights: Mapping[str, Tensor], encoder: ImageEncoder) -> dict[str, Tensor]:
    """Brings position embeddings and global relative-position tables to the encoder's grid."""
    out = dict(weights)
    positions = weights["pos_embed"]
    shape = tuple(positions.shape)
    # Known before it is resized, which takes a multiple of its memory.
    fits = len(shape) == 4 and shape[0] == 1 and shape[3] == encoder.pos_embed.shape[3]
    if not fits or shape[1] != shape[2] or not 0 < shape[1] <= _MOST_SIDE:
        raise ModelError(f"{path}: pos_embed is {shape}, not a square grid", _WANTED)
    theirs, ours = positions.shape[1], encoder.pos_embed.shape[1]
    out["pos_embed"] = resize_pos_embed(positions, ours, ours)
    blocks: Any = encoder.blocks
    for index, block in enumerate(blocks):
        window: int = block.window
        # Windows are the same at every input size: their tables fit as they are or not at all.
        expected = 2 * (window or theirs) - 1
        for axis in ("h", "w"):
            name = f"blocks.{index}.attn.rel_pos_{axis}"
            table = weights[name]
            if table.ndim != 2 or table.shape[1] != getattr(block.attn, f"rel_pos_{axis}").shape[1]:
                raise ModelError(f"{path}: {name} is {tuple(table.shape)}", _WANTED)
            if table.shape[0] != expected:
                here = f"windows of {window}" if window else "global attention"
                raise ModelError(
                    f"{path}: {name} has {table.shape[0]} rows, {here} at a grid of {theirs} needs "
                    f"{expected}",
                    "set image_encoder.window and global_blocks as in the checkpoint",
                )
            if not window:
                out[name] = resize_rel_pos(table, 2 * ours - 1)
    return out


def _copy(path: Path, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copies by name into tensors that share memory with a module's parameters."""
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise ModelError(
                f"{path}: {name} is {tuple(weights[name].shape)}, the model's is "
                f"{tuple(tensor.shape)}",
                "set the model's sizes as in the checkpoint, or give the file that fits",
            )
        if not weights[name].is_floating_point():
            raise ModelError(f"{path}: {name} holds {weights[name].dtype}, no weights", _WANTED)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
