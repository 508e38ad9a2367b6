"""What a run of predict is asked to do, and what of that decides its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from risam_cli.data.inputs.inputs import Entry, Inputs
from risam_cli.engine.shard import Shard
from risam_cli.engine.stager import Saving
from risam_cli.inference.compute import Model
from risam_cli.inference.device import precision_name
from risam_cli.inference.feature_cache import CacheSettings
from risam_cli.inference.pipeline import PredictSettings

if TYPE_CHECKING:
    from risam_cli.config import ModelSettings


class NamedModel(Model, Protocol):
    """What is needed of :class:`risam_cli.weights.load.LoadedModel`."""

    @property
    def name(self) -> str:
        """Its folder's name."""

    @property
    def hash(self) -> str:
        """SHA-256 over its files."""

    @property
    def settings(self) -> ModelSettings:
        """As its folder says them; asked for where features are kept."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run does.

    Attributes:
        limit: take only the first so many images.
        max_failures: stop once more than so many items failed.
        retry_failed: do again what failed in the earlier run.
        command: as typed, for ``run.json``.
        timings: seconds spent before, by part.
        feature_cache: where the image encoder's features are kept; None keeps none.
    """

    inputs: Inputs
    settings: PredictSettings
    saving: Saving
    shard: Shard = field(default_factory=Shard)
    limit: int | None = None
    max_failures: int | None = None
    retry_failed: bool = False
    command: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    feature_cache: CacheSettings | None = None

    def entries(self) -> Iterator[Entry]:
        """All entries of all shards, as far as the limit goes."""
        for entry in self.inputs:
            if self.limit is not None and entry.run >= self.limit:
                return
            yield entry

    def own_entries(self) -> Iterator[Entry]:
        """The entries of this shard."""
        return (entry for entry in self.entries() if self.shard.has(entry))


def identity_of(plan: RunPlan, loaded: NamedModel) -> dict[str, Any]:
    """All that decides the results apart from the inputs; see :mod:`risam_cli.engine.ledger`."""
    settings = plan.settings
    own = (loaded.threshold, loaded.no_target_threshold)
    given = (settings.threshold, settings.no_target_threshold)
    threshold, bar = (a if b is None else b for a, b in zip(own, given, strict=True))
    return {
        "model": loaded.hash,
        "threshold": threshold,
        "no_target_threshold": bar,
        "precision": precision_name(settings.precision),
        "device": settings.device.type,
        "save": plan.saving.names,
        "shard": [plan.shard.index, plan.shard.count],
        **({} if plan.feature_cache is None else {"features": "half"}),
        **({"decode": "full"} if settings.full_decode else {}),
    }
