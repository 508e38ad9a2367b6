"""risam from Python: a model that takes paths, Pillow images and arrays, one or many.

::

    import risam_cli

    model = risam_cli.load()
    result = model.predict("photo.jpg", "the dog on the left")
    result.mask, result.score

It is the engine of ``risam predict``, with the same results to the bit: on a CPU always, on a GPU
where the batches are the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, cast, overload

from risam_cli.api.inputs import (
    ImageLike,
    Item,
    Source,
    expressions_of,
    is_one,
    points_of,
    sample_of,
    samples_of,
    texts_of,
    whole_number,
)
from risam_cli.api.results import ExplanationResult, Result, Results, source_rgb
from risam_cli.data.images.images import EncoderImage, read_for_encoder
from risam_cli.errors import (
    ImageError,
    ModelError,
    RisamError,
    UsageError,
    keyword,
    told,
    use_front_end,
)
from risam_cli.explain.attention import Attention, explain
from risam_cli.explain.explainer import explain_image
from risam_cli.explain.explanation import Shown
from risam_cli.inference.device import choose_device, choose_precision, precision_name
from risam_cli.inference.feeder import ReadySample
from risam_cli.inference.pipeline import (
    Encoded,
    PredictSettings,
    Session,
    compute_settings,
    predict_samples,
)
from risam_cli.segmenters.resolve import load_segmenter, require_risam
from risam_cli.segmenters.segmenter import Segmenter
from risam_cli.types import Failure, Sample

if TYPE_CHECKING:
    import torch

_PARAMETERS = {"expression": "expressions", "json": "with_json"}  # where names differ


def parameter_name(key: str, value: str) -> str | None:
    """What Python calls a setting: the parameter of a function below, or None."""
    name = _PARAMETERS.get(key, key)
    functions = (load, Model.predict_iter, EncodedImage.explain, ExplanationResult.save)
    known = any(name in inspect.signature(function).parameters for function in functions)
    return keyword(name, value) if known else None


use_front_end(parameter_name)  # until a command runs

__all__ = ["EncodedImage", "ImageLike", "Model", "Result", "Results", "load"]


class Thresholds(TypedDict, total=False):
    """Probabilities in 0..1; None is the model's own.

    Attributes:
        threshold: a pixel is in the mask where its probability is greater.
        no_target_threshold: the mask is emptied where the probability that nothing fits is
            greater.
    """

    threshold: float | None
    no_target_threshold: float | None


class Options(Thresholds, total=False):
    """As :class:`Thresholds`.

    Attributes:
        progress: show a bar by tqdm.
    """

    progress: bool


def load(
    model: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    *,
    batch_size: int = 8,
    workers: int | None = None,
    full_decode: bool = False,
) -> Model:
    """Loads a model.

    Args:
        model: a bundled model's name, a folder written by ``risam train``, or a published model:
            a short name such as ``florence2``, a Hugging Face folder or hub name, or
            ``KIND:FOLDER_OR_HUB_NAME[+SECOND]``; None is the bundled model.
        device: ``auto`` (CUDA, then MPS, then CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``auto`` (bf16 where the device has it fast, else fp32), ``fp32``, ``bf16`` or
            ``fp16``.
        batch_size: images encoded at a time; a CPU takes them one by one.
        workers: processes that read image files, 0 for threads; None chooses by the device.
        full_decode: scale large images down from all of their pixels, whatever that takes.

    Raises:
        UsageError: an unknown device or precision, or one that this machine does not have.
        ModelError: no such model, or a damaged one.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    workers = None if workers is None else whole_number("workers", workers, 0)
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen)
    settings = PredictSettings(
        chosen, dtype, batch_size=batch_size, workers=workers, full_decode=full_decode
    )
    return Model(load_segmenter(model, device=chosen, precision=dtype), settings)


class Model:
    """A loaded model; made by :func:`load`. May be used from several threads."""

    def __init__(self, segmenter: Segmenter, settings: PredictSettings) -> None:
        self._segmenter = segmenter
        self._settings = settings

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self._segmenter.name

    @property
    def hash(self) -> str:
        """SHA-256 over its files."""
        return self._segmenter.hash

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._settings.device

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        return precision_name(self._settings.precision)

    @property
    def threshold(self) -> float:
        """Its own probability from where a pixel is in the mask."""
        return self._segmenter.thresholds.mask

    @property
    def no_target_threshold(self) -> float:
        """Its own probability from where nothing fits."""
        return self._segmenter.thresholds.no_target

    def __repr__(self) -> str:
        return f"<Model {self.name!r} on {self.device}, {self.precision}>"

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: ImageLike, expressions: str, **options: Unpack[Options]
    ) -> Result: ...

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: ImageLike, expressions: Sequence[str], **options: Unpack[Options]
    ) -> Results: ...

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: Iterable[ImageLike], expressions: str, **options: Unpack[Options]
    ) -> Results: ...

    @overload
    def predict(
        self, images: Iterable[ImageLike], expressions: Sequence[str], **options: Unpack[Options]
    ) -> list[Results]: ...

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        expressions: str | Sequence[str],
        **options: Unpack[Options],
    ) -> Result | Results | list[Results]:
        """Finds what each expression refers to in each image.

        Args:
            images: one, or several: a list, any iterable, or an array (N, H, W, 3).
            expressions: one, or several that are all asked of every image. An image is encoded
                once however many they are.
            options: ``threshold`` and ``no_target_threshold``, see :class:`Thresholds`;
                ``progress=True`` shows a bar by tqdm.

        Returns:
            One image and one expression: a :class:`Result`. One of either: :class:`Results`, in
            the order of the other. Several of both: a list with one :class:`Results` an image.

        Raises:
            ImageError: an image that cannot be read; nothing is returned then. For lists that
                may hold bad images see :meth:`predict_iter`.
            ModelError: the network failed on an expression.
            UsageError: an expression without words, a threshold out of 0..1.
        """
        one = is_one(images)
        many = [cast(ImageLike, images)] if one else cast(Iterable[ImageLike], images)
        found = list(self.predict_iter(many, expressions, keep_images=True, **options))
        if not isinstance(expressions, str):
            return found[0] if one else found
        return found[0][0] if one else Results(result for results in found for result in results)

    def predict_iter(
        self,
        images: Iterable[Item],
        expressions: str | Sequence[str] | None = None,
        *,
        threshold: float | None = None,
        no_target_threshold: float | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        keep_images: bool = False,
        progress: bool = False,
    ) -> Iterator[Results]:
        """As :meth:`predict`, one image after another, for sets of any size.

        The source is read in a thread of its own, at most 64 images ahead of the results.

        Args:
            images: images, or pairs of an image and its own expressions.
            expressions: asked of every image that brings none.
            on_error: ``raise``, or ``keep`` to go on and list what failed in
                :attr:`Results.failures`.
            keep_images: let results hold images that were given as arrays, so that they can show
                themselves; the memory grows with them.

        Yields:
            The results of one image, in the order of ``images``.

        Raises:
            RisamError: as :meth:`predict`.
        """
        settings = self._with(threshold, no_target_threshold)
        common = None if expressions is None else texts_of(expressions)
        if on_error not in ("raise", "keep"):
            raise UsageError(f"on_error {on_error!r} is unknown", "give 'raise' or 'keep'")
        is_sequence = hasattr(images, "__getitem__") and not hasattr(images, "__iter__")
        if is_one(images) and not is_sequence:  # of a text its letters, of an array its rows
            raise UsageError(f"the images are a {type(images).__name__}", "give a list of images")
        samples = samples_of(
            images,
            common,
            self._segmenter.frames,
            keep=keep_images,
            full_decode=settings.full_decode,
        )
        results = self._results(samples, settings, on_error == "raise")
        if not progress:
            return results
        from tqdm.auto import tqdm

        total = len(images) if isinstance(images, Sized) else None
        return iter(tqdm(results, total=total, unit="image"))

    def _results(
        self,
        samples: Iterator[tuple[Sample, Source | None]],
        settings: PredictSettings,
        raises: bool,
    ) -> Iterator[Results]:
        with closing(predict_samples(samples, self._segmenter, settings)) as stream:
            for source, found in stream:
                if raises and found.failures:
                    raise _error_of(found.failures[0])
                yield Results(
                    (Result(prediction, source) for prediction in found.predictions),
                    found.failures,
                )

    def encode(self, image: ImageLike) -> EncodedImage:
        """Encodes an image once, to ask it again and again.

        Raises:
            ImageError: it cannot be read. ModelError: the network failed on it.
        """
        frames, whole = self._segmenter.frames, self._settings.full_decode
        sample, source = sample_of(image, (), frames, 0, full_decode=whole)
        if isinstance(sample, ReadySample):
            pixels, why = sample.ready.image, sample.ready.error
        else:
            pixels, why = read_for_encoder(sample.path, frames, full_decode=whole), ""
        if pixels is None:
            raise ImageError(told(why))
        return EncodedImage(self, sample.image, pixels, source)

    def _with(
        self, threshold: float | None = None, no_target_threshold: float | None = None
    ) -> PredictSettings:
        for name, value in (("threshold", threshold), ("no_target_threshold", no_target_threshold)):
            try:
                fits = value is None or (math.isfinite(value) and 0 <= value <= 1)
            except TypeError:
                fits = False
            if not fits:
                raise UsageError(f"{name} {value!r} is not a number in 0..1")
        return replace(self._settings, threshold=threshold, no_target_threshold=no_target_threshold)

    def _session(self, settings: PredictSettings) -> Session:
        return Session(self._segmenter, compute_settings(self._segmenter, settings))


class EncodedImage:
    """An image with its features on the device; made by :meth:`Model.encode`.

    Attributes:
        image: its path as given, or the name that it got.
        size: (H, W) in pixels.
    """

    def __init__(self, model: Model, name: str, pixels: EncoderImage, source: Source) -> None:
        self._model = model
        self._source = source
        self._encoded: Encoded = model._session(model._settings).encode(pixels)
        self.image = name
        self.size = pixels.size

    def __repr__(self) -> str:
        return f"<EncodedImage {self.image!r}, {self.size[1]}x{self.size[0]}>"

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, expressions: str, **options: Unpack[Thresholds]
    ) -> Result: ...

    @overload
    def predict(self, expressions: Sequence[str], **options: Unpack[Thresholds]) -> Results: ...

    def predict(
        self,
        expressions: str | Sequence[str],
        **options: Unpack[Thresholds],
    ) -> Result | Results:
        """As :meth:`Model.predict` on this image, without encoding it again."""
        settings = self._model._with(**options)
        no_target = settings.no_target_threshold
        no_target = self._model.no_target_threshold if no_target is None else no_target
        asked = expressions_of(self.image, texts_of(expressions))
        sample = Sample(self.image, Path(self.image), asked)
        found = self._model._session(settings).ask(self._encoded, sample, no_target)
        if found.failures:
            raise _error_of(found.failures[0])
        results = Results(Result(prediction, self._source) for prediction in found.predictions)
        return results[0] if isinstance(expressions, str) else results

    def attention(self, expression: str) -> Attention:
        """What the words looked at and what the regions heard; see :class:`Attention`.

        Raises:
            UsageError: it is not one text. ModelError: the network failed on it.
        """
        if not isinstance(expression, str):
            raise UsageError(
                f"the expression is a {type(expression).__name__}", "give one text at a time"
            )
        (text,) = texts_of(expression)
        model = self._model
        loaded = require_risam(model._segmenter, "attention").loaded
        session = model._session(model._settings)
        return explain(session, loaded.tokenizer, self._encoded, text)

    def explain(
        self,
        expressions: str | Sequence[str],
        *,
        points: Sequence[tuple[float, float]] = (),
        block: int | None = None,
        head: int | None = None,
    ) -> ExplanationResult:
        """What ``risam explain`` shows: a page that a notebook displays, and files to ``save``.

        Args:
            points: (x, y) in pixels of the image, whose words the picture shows; else a grid.
            block, head: what the picture shows, counted from 0; None is the mean over all.

        Raises:
            UsageError: a point that is not in the image, a block or head that there is not.
            ImageError: the image cannot be read any more. ModelError: the network failed.
        """
        model = self._model
        require_risam(model._segmenter, "explain")
        rgb = source_rgb(self._source, self.size)
        block = None if block is None else whole_number("block", block)
        head = None if head is None else whole_number("head", head)
        shown = Shown(points_of(points), block=block, head=head)
        explanation = explain_image(
            model._session(model._settings),
            self._encoded,
            self.image,
            rgb,
            texts_of(expressions),
            shown,
            model.no_target_threshold,
        )
        return ExplanationResult.of(explanation)


def _error_of(failure: Failure) -> RisamError:
    if failure.error in ("ImageError", "DataError"):
        return ImageError(failure.message)
    return ModelError(failure.message)
