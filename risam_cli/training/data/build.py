"""From data settings to training and validation examples, through the readers that eval uses."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from risam_cli.console.console import Console
from risam_cli.console.text import counted
from risam_cli.data.readers.catalog import open_dataset
from risam_cli.data.readers.held_out import coco_numbers, held_out, is_held_out
from risam_cli.data.readers.source import SampleSource
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.errors import ConfigError, DataError
from risam_cli.files.hashing import sha256_of_file
from risam_cli.settings.data import (
    BenchmarkData,
    CocoData,
    DataSettings,
    MixedData,
    OneData,
    RefShapesData,
)
from risam_cli.settings.train import TrainSettings
from risam_cli.training.data.augment import Augmentation
from risam_cli.training.data.dataset import (
    Examples,
    PackedSamples,
    ReferringSamples,
    ReferringScenes,
)
from risam_cli.training.data.mixed import MixedExamples, copies_of, image_key, without_images
from risam_cli.weights.tokenizer import KnownWords, TextTokenizer
from risam_cli.weights.trained_on import TrainedOn, files_trained_on, to_card


class DataBuilder:
    """Opens the data of a run; each data set once, however many stages ask for it.

    Args:
        settings: checked; console: is told what was opened and what was left out.

    Attributes:
        trained_on: what the training data are, once they are open.
        judged_by: SHA-256 of the annotation files of validation data, once they are open.

    Raises:
        RisamError: files that are missing, damaged or hold nothing.
    """

    def __init__(self, settings: TrainSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.size = settings.model.image_encoder.image_size
        self.target_size = settings.loss.target_size
        self.trained_on: list[TrainedOn] = []
        self.judged_by: dict[str, list[str]] = {}
        self._train: Examples | None = None
        self._held_out: dict[str, Examples] | None = None

    def train(self) -> Examples:
        """The training examples, augmented as the settings say."""
        if self._train is None:
            data = self.settings.train
            if isinstance(data, MixedData):
                self._train = self._mixed(data)
            else:
                self._train = self._one("train", data)
            self._warn_of_overlap(data)
        return self._train

    def held_out(self) -> dict[str, Examples]:
        """The validation examples by name, every epoch the same."""
        if self._held_out is None:
            self._held_out = {}
            for name, data in self.settings.val.items():
                if isinstance(data, MixedData):
                    raise ConfigError(
                        f"val.{name} is mixed", "name its members as validation sets of their own"
                    )
                self._held_out[name] = self._examples(f"val.{name}", data, None)
        return self._held_out

    def texts(self) -> Iterator[str]:
        """The training expressions of files; those of RefShapes have RefShapes' own words."""
        return _texts(self.train())

    def check_words(self, tokenizer: TextTokenizer) -> None:
        """Tells how many words of the data the text encoder does not know, and what it cuts.

        Raises:
            ConfigError: they are most of the training data's words, or are in most of its
                expressions: nothing could be learned of what these speak of.
        """
        told = {"train": self.train(), **{f"val.{k}": d for k, d in self.held_out().items()}}
        for key, data in told.items():
            known = KnownWords(tokenizer, _texts(data))
            if cut := sum(map(tokenizer.cuts, _texts(data))):
                self.console.warn(
                    f"{key}: {cut} of {counted(known.of, 'expression')} are cut: they have "
                    f"more tokens than model.text_encoder.max_tokens, {tokenizer.max_tokens}"
                )
            if not known.words:
                continue
            if not known.unknown:
                self.console.info(
                    f"{key}: {counted(known.words, 'word')}, all known to the text encoder"
                )
                continue
            message = (
                f"{key}: {len(known.unknown)} of {known.words} words, in {known.expressions} of "
                f"{known.of} expressions, are unknown to the text encoder: {known.named()}"
            )
            if key == "train" and known.most:
                raise ConfigError(
                    message,
                    "set model.text_encoder.learn_words to true, or name a pretrained encoder in "
                    "model.text_encoder.source",
                )
            self.console.warn(message)

    def continued(self, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a run that goes on is trained on, before and now, as a model's card says it."""
        now = to_card(self.trained_on)
        before = [one for one in earlier if one not in now]
        if before:
            self.console.warn(
                "the training data have changed since the run began: it goes on with what they "
                "are now, so its weights will not be those of a run on either"
            )
        return [*now, *before]

    def scenes(self, data: DataSettings) -> RefShapes:
        """RefShapes at the encoder's size. Raises ConfigError where the data are no scenes."""
        if not isinstance(data, RefShapesData):
            raise ConfigError("dense stages need RefShapes scenes", "set train.dataset: refshapes")
        return RefShapes(
            data.family,
            data.split,
            data.scenes,
            data.expressions_per_scene,
            self.size,
            data.seed,
            None if data.mix is None else {str(k): share for k, share in data.mix.items()},
            data.variety,
        )

    # --- parts ------------------------------------------------------------------------------------

    def _augmentation(self) -> Augmentation | None:
        chosen = self.settings.augment
        return Augmentation(chosen, self.settings.seed) if chosen.changes else None

    def _one(self, key: str, data: OneData) -> Examples:
        return self._examples(key, data, self._augmentation())

    def _examples(self, key: str, data: OneData, augment: Augmentation | None) -> Examples:
        if isinstance(data, RefShapesData):
            if key.startswith("train"):
                seen = TrainedOn(dataset=data.dataset, split=data.split, family=data.family)
                self.trained_on.append(seen)
            return ReferringScenes(
                self.scenes(data), self.size, self.target_size, data.unknown_word_rate, augment
            )
        return self._samples(key, data, open_source(key, data), augment)

    def _samples(
        self,
        key: str,
        data: CocoData | BenchmarkData,
        source: SampleSource,
        augment: Augmentation | None,
    ) -> Examples:
        _require_images(key, source)
        samples = PackedSamples(source.iterate())
        if out := samples.without_pixels:
            self.console.warn(
                f"{key}: {len(out)} expressions are left out: they have a target, but its mask has "
                f"no pixel; the first is {out[0]!r}"
            )
        if not len(samples):
            raise ConfigError(
                f"{key}: {_named(data)} holds no expressions",
                "add a list 'expressions' to the file, as docs/formats.md shows"
                if isinstance(data, CocoData)
                else f"give another split as {key}.split",
            )
        self.console.info(
            f"{key}: {_named(data)}, {counted(len(samples), 'image')}, "
            f"{counted(samples.expressions, 'expression')}"
            + (f", {samples.pseudo} of them pseudo-labels" if samples.pseudo else "")
            + "".join(f"; {note}" for note in source.notes)
        )
        if key.startswith("train"):
            count = len(source.groups)
            numbers = range(count) if source.order is None else source.order
            self.trained_on.append(files_trained_on(data, source.files, count, numbers))
        else:
            self.judged_by[key] = [sha256_of_file(path) for path in source.files]
        own = (data.pseudo_weight, data.bands) if isinstance(data, CocoData) else (1.0, None)
        return ReferringSamples(samples, self.size, self.target_size, augment, *own)

    def _mixed(self, data: MixedData) -> Examples:
        sources: dict[str, SampleSource] = {}
        aliases: dict[str, str] = {}
        files: set[Path] = set()
        for name, member in data.members.items():
            key = f"train.members.{name}"
            if isinstance(member, RefShapesData):
                continue
            sources[name] = source = open_source(key, member)
            if isinstance(member, BenchmarkData) and is_held_out(member.split):
                raise ConfigError(
                    f"{key}.split = {member.split!r} is held out, as is every image of it",
                    "mix training splits",
                )
            found = held_out(
                member.dataset,
                Path(member.root if isinstance(member, BenchmarkData) else member.annotations),
                source,
                split_by=member.split_by if isinstance(member, BenchmarkData) else None,
                image_root=Path(member.images) if member.images else None,
            )
            aliases |= {image_key(p): f"coco/{n}" for p, n in found.aliases.items()}
            files |= found.files
        held = self._validation_sources()
        files.update(path for source in held for path in _paths_of(source))
        keys = {image_key(path) for path in files}.union(*map(_keys_of, held))
        keys |= {aliases.get(key, key) for key in keys}
        for source in sources.values():
            named = {path: image_key(path) for path in _paths_of(source)}
            apart = [path for path, key in named.items() if aliases.get(key, key) not in keys]
            for copy, original in copies_of(apart, files).items():
                aliases[named[copy]] = image_key(original)
        members = [
            self._member(name, member, sources.get(name), keys, aliases)
            for name, member in data.members.items()
        ]
        weights = [data.weights.get(name, 1.0) for name in data.members]
        mixed = MixedExamples(members, weights, self.settings.seed)
        shares = ", ".join(
            f"{name} {share}" for name, share in zip(data.members, mixed.shares, strict=True)
        )
        self.console.info(f"train: an epoch is {len(mixed)} images: {shares}")
        return mixed

    def _member(
        self,
        name: str,
        member: OneData,
        source: SampleSource | None,
        keys: Collection[str],
        aliases: Mapping[str, str],
    ) -> Examples:
        key = f"train.members.{name}"
        if source is None or isinstance(member, RefShapesData):
            return self._one(key, member)
        kept, images, expressions = without_images(source, keys, aliases)
        self.console.info(
            f"{key}: {images} of {len(source)} images dropped, with {expressions} "
            "expressions: they are in a validation or test split of a member or of this run"
        )
        if not kept.order:
            raise ConfigError(f"{key}: every image is held out somewhere", "remove it from the mix")
        return self._samples(key, member, kept, self._augmentation())

    def _validation_sources(self) -> list[SampleSource]:
        """This run's own validation data, as far as they are files."""
        return [
            open_source(f"val.{name}", data)
            for name, data in self.settings.val.items()
            if isinstance(data, (CocoData, BenchmarkData))
        ]

    def _warn_of_overlap(self, data: DataSettings) -> None:
        """Says so where a plain training set shows images that validation asks about."""
        if isinstance(data, (MixedData, RefShapesData)):
            return
        source, held = open_source("train", data), self._validation_sources()
        both = _keys_of(source).intersection(set().union(*map(_keys_of, held)))
        files = [path for one in held for path in _paths_of(one)]
        apart = [path for path in _paths_of(source) if image_key(path) not in both]
        copies = copies_of(apart, files)
        if both or copies:
            named = f", {next(iter(copies))} as {copies[next(iter(copies))]}" if copies else ""
            self.console.warn(
                f"{counted(len(both) + len(copies), 'image is', 'images are')} in train and in val"
                f"{named}, so figures on val are inflated; "
                "dataset: mixed leaves them out of training"
            )


def _texts(data: Examples) -> Iterator[str]:
    if isinstance(data, MixedExamples):
        for member in data.members:
            yield from _texts(member)
    elif isinstance(data, ReferringSamples):
        for sample in data.samples:
            yield from (expression.text for expression in sample.expressions)


def open_source(key: str, data: CocoData | BenchmarkData) -> SampleSource:
    """The index of a data set.

    Args:
        key: where it stands in the settings, for messages.

    Raises:
        DataError: files are missing or damaged, or the split does not exist.
    """
    try:
        source = open_dataset(
            data.dataset,
            Path(data.annotations if isinstance(data, CocoData) else data.root),
            data.split,
            split_by=data.split_by if isinstance(data, BenchmarkData) else None,
            image_root=Path(data.images) if data.images else None,
        )
    except DataError as error:
        keys = {"image_root": "images"}
        if isinstance(data, CocoData):
            keys["root"] = "annotations"
        message, fix = error.named(lambda name, _: f"{key}.{keys.get(name, name)}")
        raise DataError(f"{key}: {message}", fix) from error
    return source.part(data.chosen(len(source.groups)))


def _keys_of(source: SampleSource) -> set[str]:
    """The images of a split; PhraseCut's by COCO's numbers, where its image list gives them."""
    numbers = coco_numbers(source) if source.dataset == "phrasecut" else {}
    return {
        f"coco/{numbers[path]}" if path in numbers else image_key(path)
        for path in (group.path for group in source.chosen())
    }


def _paths_of(source: SampleSource) -> list[Path]:
    return [group.path for group in source.chosen()]


def _named(data: OneData) -> str:
    if isinstance(data, CocoData):
        return data.annotations + (f" ({data.split})" if data.split != "all" else "")
    return f"{data.dataset} {data.split}"


def _require_images(key: str, source: SampleSource) -> None:
    """Looks for every image file before anything is trained.

    Raises:
        DataError: naming the first that is missing and how many are.
    """
    listed: dict[Path, set[str]] = {}
    missing = []
    for group in source.chosen():
        folder = group.path.parent
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if group.path.name not in listed[folder]:
            missing.append(group.path)
    if missing:
        raise DataError(
            f"{key}: {len(missing)} of {len(source.order or source.groups)} images are missing, "
            f"first {missing[0]}",
            f"give the folder of the images as {key}.images",
        )
