"""Settings of training and validation data, and of what is done to training pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from risam_cli.settings.base import Settings

RefShapesFamily = Literal["refshapes", "refshapes+", "refshapesg", "grefshapes"]
Share = Annotated[float, Field(gt=0)]


class RefShapesData(Settings):
    """Scenes of RefShapes, drawn while they are used."""

    dataset: Literal["refshapes"]
    family: Literal["refshapes", "refshapes+", "refshapesg", "grefshapes", "mixed"] = "mixed"
    mix: dict[RefShapesFamily, Share] | None = Field(
        None, description="shares of the families in mixed; None is equal ones"
    )
    split: Literal["train", "val", "testA", "testB", "testC"] = "train"
    variety: Literal["plain", "wide"] = Field(
        "plain", description="wide: many proportions, looks and grammars; testC always is"
    )
    scenes: int | None = Field(None, gt=0, le=10_000_000)
    expressions_per_scene: int = Field(6, gt=0, le=1000)
    seed: int = Field(0, ge=0)
    unknown_word_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of expressions whose noun is replaced by a word "
        "outside the vocabulary, and which then refer to nothing",
    )

    @model_validator(mode="after")
    def _check(self) -> RefShapesData:
        if self.mix is not None and (self.family != "mixed" or not self.mix):
            raise ValueError("mix gives shares of the family mixed, for one family at least")
        return self

    def paths(self) -> Iterator[tuple[str, Path]]:
        """Keys and paths that must be there: none."""
        return iter(())


class PartOfFile(Settings):
    """Which images of a file to take, so that one file can both train and validate."""

    limit: int | None = Field(None, gt=0, description="the first so many images")
    only_every: int | None = Field(None, gt=1, description="of n images the first alone, as held")
    leave_out_every: int | None = Field(None, gt=1, description="of n images all but the first")

    @model_validator(mode="after")
    def _one_part(self) -> PartOfFile:
        if self.only_every is not None and self.leave_out_every is not None:
            raise ValueError("give only_every or leave_out_every, not both")
        return self

    def takes(self, number: int) -> bool:
        """Whether the image with this number, from 0, belongs to the part."""
        if self.only_every is not None:
            return number % self.only_every == 0
        return self.leave_out_every is None or number % self.leave_out_every > 0

    def chosen(self, count: int) -> list[int]:
        """The numbers of the part's images, of ``count`` in all."""
        return [number for number in range(count) if self.takes(number)][: self.limit]


Band = Annotated[int, Field(gt=0)]


class CocoData(PartOfFile):
    """COCO-style JSON of image/expression pairs."""

    dataset: Literal["coco"]
    annotations: str = Field(description="the JSON file; in val by default that of train")
    images: str | None = Field(None, description="folder that file names are relative to")
    split: str = Field("all", description="take the records that carry this split; all is all")
    bands: tuple[Band, Band, Band] | None = Field(
        None, description="which bands of TIFFs with four or more are red, green and blue, from 1"
    )
    pseudo_weight: float = Field(
        1.0,
        gt=0,
        le=1,
        description="weight in the loss of expressions that the file marks as pseudo, their masks "
        "being a model's answers",
    )

    def paths(self) -> Iterator[tuple[str, Path]]:
        """Keys and paths that must be there."""
        yield "annotations", Path(self.annotations)
        if self.images is not None:
            yield "images", Path(self.images)


class BenchmarkData(PartOfFile):
    """A benchmark in its own files, read as ``risam eval`` reads it."""

    dataset: Literal["refcoco", "refcoco+", "refcocog", "refclef", "grefcoco", "phrasecut"]
    root: str = Field(description="the folder that holds refcoco/, …, or the data set's own")
    images: str | None = Field(None, description="folder of the images; else looked for near root")
    split: str = "train"
    split_by: str | None = Field(None, description="who made the splits: unc, umd, google, …")

    def paths(self) -> Iterator[tuple[str, Path]]:
        """Keys and paths that must be there."""
        yield "root", Path(self.root)
        if self.images is not None:
            yield "images", Path(self.images)


OneData = Annotated[RefShapesData | CocoData | BenchmarkData, Field(discriminator="dataset")]


class MixedData(Settings):
    """Several data sets together, without any image that one of them holds out.

    Images of any validation or test split of any member, and of this run's own validation data,
    are dropped from all members.
    """

    dataset: Literal["mixed"]
    members: dict[str, OneData] = Field(min_length=1, description="by names of your own")
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="how often a member is drawn, against once an epoch; 1 where not given",
    )

    @model_validator(mode="after")
    def _check(self) -> MixedData:
        for name, weight in self.weights.items():
            if name not in self.members:
                raise ValueError(f"weights has {name!r}, members are {', '.join(self.members)}")
            if not 0 < weight <= 1000:
                raise ValueError(
                    f"the weight of {name!r} is {weight}, it must be above 0, at most 1000"
                )
        return self

    def paths(self) -> Iterator[tuple[str, Path]]:
        """Keys and paths that must be there."""
        for name, member in self.members.items():
            for key, path in member.paths():
                yield f"members.{name}.{key}", path


DataSettings = Annotated[
    RefShapesData | CocoData | BenchmarkData | MixedData, Field(discriminator="dataset")
]


class AugmentSettings(Settings):
    """Changes to training pictures that keep their expressions true.

    See :mod:`risam_cli.training.data.augment`; nothing is changed by default.
    """

    flip: float = Field(0.0, ge=0, le=1, description="chance to mirror; left and right are swapped")
    crop: float = Field(0.0, ge=0, le=1, description="chance to cut out a part with all referents")
    crop_least: float = Field(0.5, gt=0, le=1, description="least part of each side that is kept")
    shrink: float = Field(
        1.0, gt=0, le=1, description="smallest part of the input that the longest side takes"
    )
    jitter: float = Field(0.0, ge=0, le=1, description="chance of other colours, if none is named")
    expressions_per_image: int | None = Field(
        None, gt=0, description="most expressions of an image at a time, drawn again each epoch"
    )

    @property
    def changes(self) -> bool:
        """Whether anything is drawn again each epoch."""
        return self != AugmentSettings()

    @property
    def changes_pixels(self) -> bool:
        """Whether images differ from epoch to epoch, so that their features cannot be cached."""
        return self.changes and not (
            self.flip == self.crop == self.jitter == 0.0 and self.shrink == 1.0
        )
