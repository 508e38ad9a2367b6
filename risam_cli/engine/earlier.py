"""What ``run.json`` tells of the part of a run that is there already, before it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from risam_cli.console.console import get_console
from risam_cli.engine.run_facts import versions
from risam_cli.engine.run_folder import RUN
from risam_cli.engine.run_plan import NamedModel, RunPlan
from risam_cli.inference.pipeline import compute_settings
from risam_cli.version import __version__


def run_settings(plan: RunPlan, loaded: NamedModel) -> dict[str, Any]:
    """What a run goes by and its results should not depend on, for ``run.json``."""
    settings = plan.settings
    return {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "threads": _threads(plan, loaded),
        **_limits(plan),
    }


def plan_to_go_on(folder: Path, plan: RunPlan, loaded: NamedModel) -> RunPlan:
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
    now = {**versions(), "risam": __version__, "threads": _threads(plan, loaded)}
    changed = _changes(before, now)
    if changed:
        get_console().warn(
            f"the earlier part of this run was computed otherwise ({changed}); last digits may "
            "differ from a run in one go, --overwrite starts anew"
        )
    changed = _changes({key: ran_by.get(key) for key in _limits(plan)}, _limits(plan))
    if not changed or plan.retry_failed:
        return plan
    get_console().info(f"other limits than before ({changed}): what failed is tried again")
    return replace(plan, retry_failed=True)


def _threads(plan: RunPlan, loaded: NamedModel) -> int | None:
    """That work on one image; None where torch's own number, which may change, does."""
    return compute_settings(loaded, plan.settings).cores.threads or None


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
