"""What a run of predict is asked to do, and what of that decides its results."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from risam_cli.console.console import get_console
from risam_cli.data.inputs.inputs import Entry, Inputs
from risam_cli.errors import setting, told
from risam_cli.inference.device import precision_name
from risam_cli.inference.feature_cache import CacheSettings
from risam_cli.inference.pipeline import PredictSettings, compute_settings, instance_rules
from risam_cli.runs.folder import RUN
from risam_cli.runs.shard import Shard
from risam_cli.runs.stager import Saving
from risam_cli.segmenters.segmenter import Segmenter
from risam_cli.version import __version__


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


def identity_of(plan: RunPlan, segmenter: Segmenter) -> dict[str, Any]:
    """All that decides the results apart from the inputs; see :mod:`risam_cli.runs.ledger`."""
    settings = plan.settings
    own = (segmenter.thresholds.mask, segmenter.thresholds.no_target)
    given = (settings.threshold, settings.no_target_threshold)
    threshold, bar = (a if b is None else b for a, b in zip(own, given, strict=True))
    return {
        "model": segmenter.hash,
        "threshold": threshold,
        "no_target_threshold": bar,
        "precision": precision_name(settings.precision),
        "device": settings.device.type,
        "save": plan.saving.names,
        "shard": [plan.shard.index, plan.shard.count],
        **({} if plan.feature_cache is None else {"features": "half"}),
        **({"decode": "full"} if settings.full_decode else {}),
        **instance_rules(segmenter, settings),
        **segmenter.versions,
    }


def run_settings(plan: RunPlan, segmenter: Segmenter) -> dict[str, Any]:
    """What a run goes by and its results should not depend on, for ``run.json``."""
    settings = plan.settings
    return {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "threads": _threads(plan, segmenter),
        **_limits(plan),
    }


def plan_to_go_on(folder: Path, plan: RunPlan, segmenter: Segmenter) -> RunPlan:
    """The plan with what failed before done again, if it failed by other limits than today's.

    Warns where the earlier part was computed by another version or with other threads: the last
    digits of a number may then differ from those of a run in one go.
    """
    try:
        earlier = json.loads((folder / RUN).read_bytes())
        before = {**earlier["versions"], "risam": earlier["risam"]}
        ran_by = dict(earlier["run_settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return plan
    if plan.settings.device.type == "cpu":
        before["threads"] = ran_by.get("threads")
    now = {**versions(segmenter), "risam": __version__, "threads": _threads(plan, segmenter)}
    changed = _changes(before, now)
    if changed:
        get_console().warn(
            f"the earlier part of this run was computed otherwise ({changed}); last digits may "
            + told(f"differ from a run in one go, {setting('overwrite')} starts anew")
        )
    changed = _changes({key: ran_by.get(key) for key in _limits(plan)}, _limits(plan))
    if not changed or plan.retry_failed:
        return plan
    get_console().info(f"other limits than before ({changed}): what failed is tried again")
    return replace(plan, retry_failed=True)


def _threads(plan: RunPlan, segmenter: Segmenter) -> int | None:
    """That work on one image; None where torch's own number, which may change, does."""
    return compute_settings(segmenter, plan.settings).cores.threads or None


def _limits(plan: RunPlan) -> dict[str, Any]:
    """What images may fail by."""
    return {"max_pixels": plan.settings.max_pixels, "image_timeout": plan.settings.timeout}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The keys of which both are known and different, such as ``torch 2.3 -> 2.4``."""
    return ", ".join(
        f"{key} {before[key]} -> {now[key]}"
        for key in sorted(before)
        if before[key] is not None and key in now and before[key] != now[key]
    )


def count_lines(path: Path) -> int:
    """Lines of a file; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0


def versions(segmenter: Segmenter) -> dict[str, str]:
    """Of Python and of the packages that a model's results can depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "pillow", "opencv-python-headless", "pycocotools"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return {**found, **segmenter.versions}


def peak_memory_mb() -> float | None:
    """Most memory that this process has held so far, in MiB; None where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
