"""The image encoder's features, computed once and kept on disk: for train, eval and predict.

What is kept is what the encoder gives before Feature Enhancement (three taps, and the stem's
features where there are any), so that all that is trained on top of a frozen encoder can change.
It is kept in half precision, and with a cache every run works on that: features that were just
computed are rounded to half precision too, so results do not depend on what was in the cache.

An entry is found by the encoder's weights and settings, the number format it ran in, and the scaled
pixels that it saw; so whatever changes the input (another size, an augmentation) is another entry.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from risam_cli.console.console import get_console
from risam_cli.data.images.transforms import PIXEL_MEAN, PIXEL_STD
from risam_cli.errors import UsageError
from risam_cli.files.sizes import parse_size, show_size
from risam_cli.inference.device import precision_name
from risam_cli.inference.feature_store import Bytes, Entry, FeatureStore, Stored
from risam_cli.model.image_encoder import EncoderFeatures
from risam_cli.segmenters.risam import RisamSegmenter
from risam_cli.segmenters.segmenter import Segmenter

if TYPE_CHECKING:
    from risam_cli.settings.model import ImageEncoderSettings

DEFAULT_LIMIT = parse_size("50GB")
_WRITERS = 2
_WAITING = 8  # entries that may wait for the disk; then the network waits
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_TAPS = ("shallow", "middle", "deep")  # what every encoder gives
_COMPUTED = {str(t).removeprefix("torch."): t for t in (torch.float32, *_NAMES)}


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Where features are kept, and how many bytes all of that folder may take."""

    folder: Path
    limit: int = DEFAULT_LIMIT


@dataclass(frozen=True, slots=True)
class HalfFeatures:
    """The features of one image in half precision.

    Attributes:
        tensors: ``shallow``, ``middle``, ``deep`` and maybe ``fine``, each (C, h, w), in float16;
            in bfloat16 where a value is too large for it.
        computed: the types that the encoder gave them in.
    """

    tensors: dict[str, Tensor]
    computed: dict[str, torch.dtype]

    def to(self, device: torch.device) -> HalfFeatures:
        """The same on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return HalfFeatures(moved, self.computed)


class FeatureCache:
    """The features of one encoder, computed where they are not on disk yet.

    Args:
        store: of this encoder; see :func:`open_feature_cache`.
        device: of the network. On a CPU missing images are encoded one by one, so that what is
            kept does not depend on its neighbours.
    """

    def __init__(self, store: FeatureStore, device: torch.device) -> None:
        self.store = store
        self.device = device
        self._pool = ThreadPoolExecutor(_WRITERS, "risam-features")
        self._room = threading.BoundedSemaphore(_WAITING)
        self._waiting: dict[str, HalfFeatures] = {}  # to be written

    def close(self) -> None:
        """Waits until all that was computed is written."""
        self._pool.shutdown(wait=True)

    def find(self, key: str) -> HalfFeatures | None:
        """What is kept of an image, or waits to be; None where nothing is.

        On the host (for a GPU, pinned), but for what waits.
        """
        waits = self._waiting.get(key)
        if waits is not None:
            return waits
        allocate = _pinned if self.device.type == "cuda" else None
        entry = self.store.read(key, allocate, require=_from_entry)
        return None if entry is None else _from_entry(entry)

    def features(
        self,
        keys: Sequence[str],
        found: Sequence[HalfFeatures | None],
        encode: Callable[[Sequence[int]], EncoderFeatures],
    ) -> EncoderFeatures:
        """The features of B images, as if all had been on disk.

        Args:
            keys: of the images, see :func:`image_key`.
            found: what :meth:`find` gave.
            encode: encodes the images of some rows.
        """
        whole = list(found)
        missing = [row for row, one in enumerate(whole) if one is None]
        alone = self.device.type == "cpu"
        for rows in [[row] for row in missing] if alone else [missing] if missing else []:
            made = encode(rows)
            for place, row in enumerate(rows):
                whole[row] = half = _halved(made, place)
                self._keep(keys[row], half)
        return _together([one.to(self.device) for one in whole if one is not None])

    def tell(self) -> None:
        """Says on the console what the cache did."""
        counts = self.store.counts
        damaged = f", {counts.damaged} were damaged" if counts.damaged else ""
        get_console().info(
            f"feature cache: {counts.read} read, {counts.written} added "
            f"({show_size(counts.bytes_written)}){damaged}"
        )

    def report(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"folder": str(self.store.folder), **asdict(self.store.counts)}

    def _keep(self, key: str, half: HalfFeatures) -> None:
        """Has features written beside the network; waits where the disk is behind."""
        if not self.store.adds:
            return
        self._room.acquire()
        self._waiting[key] = half

        def release(done: Future[None]) -> None:
            self._waiting.pop(key, None)
            self._room.release()

        self._pool.submit(self._write, key, half).add_done_callback(release)

    def _write(self, key: str, half: HalfFeatures) -> None:
        if all(bool(tensor.isfinite().all()) for tensor in half.tensors.values()):
            self.store.write(key, _to_entry(half))


@contextmanager
def open_feature_cache(
    settings: CacheSettings,
    encoder: nn.Module,
    shape: ImageEncoderSettings,
    *,
    device: torch.device,
    precision: torch.dtype,
    images: int | None,
) -> Iterator[FeatureCache]:
    """The cache of an encoder; says on the console how large it may get.

    Args:
        encoder: finished, on its device; what changes in it later is not seen.
        shape: its settings.
        images: that are going to be asked for, where that is known.

    Raises:
        OutputError: the folder cannot be made or read.
    """
    about = {
        "encoder": hash_weights(encoder),
        # Taps leave no trace in the weights.
        "settings": shape.model_dump(mode="json", exclude={"checkpoint"}),
        "preprocessing": f"longest side {shape.image_size}, padded; mean {PIXEL_MEAN}, "
        f"std {PIXEL_STD}",
        "precision": precision_name(precision),
        "kept": "float16",
    }
    store = FeatureStore(settings.folder, about, settings.limit)
    _announce(store, bytes_an_image(shape), images)
    cache = FeatureCache(store, device)
    try:
        yield cache
    finally:
        cache.close()
        cache.tell()


def cache_for(
    settings: CacheSettings | None, segmenter: Segmenter, images: int | None
) -> AbstractContextManager[FeatureCache | None]:
    """:func:`open_feature_cache` of a segmenter; without settings it is not looked at.

    Raises:
        UsageError: it is one whose features cannot be kept.
    """
    if settings is None:
        return nullcontext()
    if not isinstance(segmenter, RisamSegmenter):
        raise UsageError(
            f"the image features of {segmenter.name}, a {segmenter.kind}, cannot be kept in a "
            "feature cache",
            "leave the cache out",
        )
    return open_feature_cache(
        settings,
        segmenter.loaded.model.image_encoder,
        segmenter.loaded.settings.image_encoder,
        device=segmenter.device,
        precision=segmenter.precision,
        images=images,
    )


def image_key(rgb: NDArray[np.uint8]) -> str:
    """The key of a scaled image (h, w, 3): 32 hexadecimal digits of its pixels and shape."""
    digest = hashlib.blake2b(f"{rgb.shape[0]}x{rgb.shape[1]} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all that a module's results depend on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_as_bytes(tensor).data)
    return digest.hexdigest()


def bytes_an_image(shape: ImageEncoderSettings) -> int:
    """Bytes that the features of one image take, without the file's header."""
    cells = (shape.image_size // shape.patch_size) ** 2
    fine = 16 * shape.stem[1] if shape.stem else 0
    return 2 * cells * (2 * shape.dim + shape.out_dim + fine)


def _announce(store: FeatureStore, each: int, images: int | None) -> None:
    many = f"{images} images make up to {show_size(each * images)}, " if images else ""
    get_console().info(
        f"feature cache {store.folder}: {show_size(each)} an image; {many}"
        f"limit {show_size(store.limit)}; {store.held} images of this encoder are there, "
        f"{show_size(store.used)} in all"
    )
    if images and each * images > store.limit:
        get_console().warn(
            f"the feature cache's limit holds {store.limit // each} of {images} images; "
            "the others are encoded each time"
        )


# --- half precision and back ----------------------------------------------------------------------


def _halved(features: EncoderFeatures, row: int) -> HalfFeatures:
    """One image's features in half precision."""
    tensors, computed = {}, {}
    for name in (*_TAPS, "fine"):
        batch: Tensor | None = getattr(features, name)
        if batch is None:
            continue
        value = batch[row]
        half = value.half()
        if not half.isfinite().all() and value.isfinite().all():
            half = value.bfloat16()
        tensors[name], computed[name] = half.contiguous(), value.dtype
    return HalfFeatures(tensors, computed)


def _together(images: Sequence[HalfFeatures]) -> EncoderFeatures:
    """B images' features in the types that the encoder gave them in."""
    kinds = images[0].computed
    whole = {
        name: torch.stack([one.tensors[name].to(kind) for one in images])
        for name, kind in kinds.items()
    }
    return EncoderFeatures(whole["shallow"], whole["middle"], whole["deep"], whole.get("fine"))


def _to_entry(half: HalfFeatures) -> Entry:
    arrays = {
        name: Stored(_NAMES[tensor.dtype], tuple(tensor.shape), _as_bytes(tensor))
        for name, tensor in half.tensors.items()
    }
    notes = {name: str(kind).removeprefix("torch.") for name, kind in half.computed.items()}
    return Entry(arrays, notes)


def _from_entry(entry: Entry) -> HalfFeatures:
    """Raises KeyError or RuntimeError where it is not what :func:`_to_entry` makes."""
    named = {name: entry.arrays[name] for name in (*_TAPS, *entry.arrays)}
    tensors = {
        name: torch.from_numpy(one.data).view(_TYPES[one.dtype]).view(one.shape)
        for name, one in named.items()
    }
    return HalfFeatures(tensors, {name: _COMPUTED[entry.notes[name]] for name in tensors})


def _as_bytes(tensor: Tensor) -> Bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()


def _pinned(size: int) -> Bytes:
    """Memory that a GPU reads from without waiting for us."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
