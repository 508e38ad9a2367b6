"""A whole run of ``risam predict``: inputs through the network into an output folder."""

from __future__ import annotations

import json
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from itertools import tee
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.console.console import Progress, get_console
from risam_cli.console.text import counted
from risam_cli.data.inputs.inputs import Entry, Inputs
from risam_cli.errors import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    Interrupted,
    MachineError,
    OutputError,
    RisamError,
    machine_error,
    setting,
    told,
)
from risam_cli.files.jsonlines import load_json
from risam_cli.inference.device import describe_device, precision_name
from risam_cli.inference.feature_cache import CacheSettings, FeatureCache, cache_for
from risam_cli.inference.finish import ImageResult
from risam_cli.inference.pipeline import (
    PredictSettings,
    compute_settings,
    instance_rules,
    predict_samples,
)
from risam_cli.inference.unknown_words import UnknownWords
from risam_cli.interrupts import StopRequest
from risam_cli.model.fast.tuning import PRODUCTS
from risam_cli.runs.folder import RUN, RunFolder
from risam_cli.runs.gallery import write_gallery
from risam_cli.runs.ledger import settings_hash
from risam_cli.runs.ranks import Ranks
from risam_cli.runs.resume import Kept, Place, follow_inputs, prepare, still_to_do
from risam_cli.runs.shard import Shard
from risam_cli.runs.writer import RunCounts, RunWriter, Saving, Stager
from risam_cli.segmenters.segmenter import Segmenter
from risam_cli.types import Failure, Sample
from risam_cli.version import __version__

_SHOWN = 5  # failures told on the console; all are in the file
_PARTS = ("load", "encode", "decode", "finish")
_SHOWN_PARTS = ("read images", "encode", "decode masks", "finish masks")


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
        ranks: the processes that torchrun started, if it did.
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
    ranks: Ranks | None = None

    def entries(self) -> Iterator[Entry]:
        """All entries of all shards, as far as the limit goes."""
        for entry in self.inputs:
            if self.limit is not None and entry.run >= self.limit:
                return
            yield entry


def run_predict(
    plan: RunPlan, segmenter: Segmenter, folder: RunFolder, stream: BinaryIO | None = None
) -> int:
    """Predicts all that is still to do and gives the exit code: 0, or 3 where some items failed.

    Args:
        folder: the output folder, locked.
        stream: gets every record once it is on the disk.

    Raises:
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished work is kept.
        RisamError: the run could not begin, or not go on; finished work is kept.
    """
    identity = identity_of(plan, segmenter)
    if plan.ranks is not None:  # before anything is left that differs
        how = {"settings": identity, "versions": versions(segmenter), "risam": __version__}
        plan.ranks.require_alike(RUN, how, folder.path.parent)
    kept = prepare(folder, identity)
    listing = _Listing(plan)
    if kept.entries:
        plan = plan_to_go_on(folder.path, plan, segmenter)
        if plan.retry_failed:  # before run.json says by which limits
            folder.begin_retry()
            kept.retried.clear()
        kept = follow_inputs(folder, kept, listing.look, plan.shard.picks)
    total = left = None
    if plan.inputs.repeatable:
        total = sum(1 for _ in plan.shard.own(listing.look()))
        left = total - kept.entries
    run = _Run(plan, segmenter, folder, identity, kept, listing)
    run.tell_settings()
    noted = run.report("running")
    status = "failed"
    try:
        if plan.ranks is not None:  # or they begin together
            plan.ranks.require_alike(RUN, noted, folder.path.parent)
        with get_console().progress("predict", total, "inputs", done=kept.entries) as progress:
            run.go(progress, stream, left)
        run.page = write_gallery(folder.path, folder.write, segmenter.name)
        status = "complete"
    except Exception as caught:
        error = caught if isinstance(caught, RisamError) else machine_error(caught)
        if error is None:
            raise
        status = "interrupted" if isinstance(error, Interrupted) else status
        with suppress(OutputError):  # of what was done, to be looked at meanwhile
            write_gallery(folder.path, folder.write, segmenter.name)
        raise to_go_on(error) from caught
    finally:
        # A disk too full for this is told of by the error that is on its way.
        with suppress(OutputError) if status != "complete" else nullcontext():
            run.report(status)
    return run.tell()


class _Listing:
    """The entries of all shards, to be looked at before the run takes them.

    Of a stream, what was looked at is kept until then, and no more is read than that.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._again = plan.entries if plan.inputs.repeatable else None
        self._once = plan.entries()

    def look(self) -> Iterator[Entry]:
        """From the first on, as often as needed."""
        if self._again is not None:
            return self._again()
        self._once, ahead = tee(self._once)
        return ahead

    def take(self) -> Iterator[Entry]:
        """From the first on, for the last time."""
        return self._once


class _Run:
    """The state of one run, for its progress and its ``run.json``."""

    def __init__(
        self,
        plan: RunPlan,
        segmenter: Segmenter,
        folder: RunFolder,
        identity: dict[str, Any],
        kept: Kept,
        listing: _Listing,
    ) -> None:
        self.plan, self.segmenter, self.folder = plan, segmenter, folder
        self.identity, self.kept, self.listing = identity, kept, listing
        self.started = time.perf_counter()
        self.began = datetime.now(UTC)
        self.inputs_hash = blake2b(digest_size=16)
        self.entries: int | None = None  # of all shards; known at the end of the inputs
        self.asked = 0  # entries given to the network so far
        self.images = 0
        self.done = RunCounts()
        self.failed = 0
        self.told = ""  # the last failure's message
        self.kinds = 0  # of failures, those with one message after another being one
        self.spent = dict.fromkeys(_PARTS, 0.0)
        self.writing = 0.0
        self.page: Path | None = None
        self.cache: FeatureCache | None = None
        self.unknown = UnknownWords(segmenter.name)

    def go(self, progress: Progress, stream: BinaryIO | None, images: int | None) -> None:
        stop = threading.Event()
        stager = Stager(self.folder, self.plan.saving)

        def committed(tally: RunCounts) -> None:
            self._count(tally)
            again = {"again": self.done.again} if self.done.again else {}
            progress.advance(
                tally.entries,
                records=self.done.records,
                failures=self.failed,
                **again,
                busy=self._busy(writer.seconds),
            )
            if self._too_many_failures():
                stop.set()

        with ExitStack() as stack:
            asked = stack.enter_context(StopRequest(stop, "stopping after this batch"))
            writer = stack.enter_context(RunWriter(self.folder, stager, committed, stream))
            self.cache = stack.enter_context(
                cache_for(self.plan.feature_cache, self.segmenter, images)
            )
            results = predict_samples(
                self._todo(),
                self.segmenter,
                self.plan.settings,
                sink=stager,
                stop=stop,
                cache=self.cache,
            )
            submitted = 0
            for (entry, place), result in stack.enter_context(closing(results)):
                self._clock(result)
                writer.submit(entry, place, result)
                submitted += 1
            complete = self.entries is not None and submitted == self.asked
            if complete:
                writer.complete()
        self.writing = writer.seconds
        if self._too_many_failures():
            raise RisamError(
                f"stopped: {counted(self.failed, 'item')} failed, more than "
                f"{setting('max_failures')} "
                f"{self.plan.max_failures}; finished work is kept",
                f"see failures.jsonl; continue with {setting('resume')}",
            )
        if asked.requested and not complete:
            raise Interrupted(
                "interrupted; finished work is kept", f"continue with {setting('resume')}"
            )

    def _todo(self) -> Iterator[tuple[Sample, tuple[Entry, Place]]]:
        """The samples still to do, each with its entry and its place among what is done.

        Read in the feeder's thread.
        """
        own = self.plan.shard.own(self._counted())
        for entry, place in still_to_do(self.folder, self.kept, own):
            self.asked += 1
            # An entry that is wrong already keeps its place among the others.
            yield entry.sample or Sample(entry.image, Path(), ()), (entry, place)

    def _counted(self) -> Iterator[Entry]:
        count = 0
        for entry in self.listing.take():
            count += 1
            self.inputs_hash.update(entry.key.encode())
            yield entry
        self.entries = count

    def _clock(self, result: ImageResult) -> None:
        self.images += result.sha256 is not None
        self.unknown.see(result.predictions)
        for part, seconds in result.seconds.items():
            self.spent[part] += seconds

    def _busy(self, writing: float) -> dict[str, float]:
        """Seconds by part so far, in the words that are shown."""
        named = zip(_SHOWN_PARTS, _PARTS, strict=True)
        return {**{name: self.spent[part] for name, part in named}, "write": writing}

    def _count(self, tally: RunCounts) -> None:
        before = self.done
        self.done = RunCounts(
            before.entries + tally.entries,
            before.again + tally.again,
            before.records + tally.records,
            before.no_target + tally.no_target,
        )
        for failure in tally.failures:
            self.failed += 1
            # An image that cannot be read fails once for each of its expressions.
            if failure.message != self.told:
                self.kinds += 1
                _tell_failure(failure, self.kinds, self.folder)
            self.told = failure.message

    def _too_many_failures(self) -> bool:
        allowed = self.plan.max_failures
        return allowed is not None and self.failed > allowed

    # --- what is said of it -----------------------------------------------------------------------

    def tell_settings(self) -> None:
        """Where it is verbose: by what the run goes."""
        console, settings = get_console(), self.plan.settings
        console.debug(
            f"model {self.segmenter.name} ({self.segmenter.hash[:12]}), "
            f"{describe_device(settings.device)}, {precision_name(settings.precision)}"
        )
        for name in ("threshold", "no_target_threshold"):
            console.debug(f"{name.replace('_', ' ')} {self.identity[name]:.4g}")
        if self.kept.entries:
            console.debug(f"{self.kept.entries} inputs were done before")

    def tell(self) -> int:
        """The last word on stderr; gives the exit code."""
        records, nothing, empty = count_records(self.folder.predictions)
        failed = count_lines(self.folder.failures)
        seconds = time.perf_counter() - self.started
        console = get_console()
        for reason, number in sorted(self.plan.inputs.skipped.items()):
            console.info(f"skipped: {number} {reason}")
        if self.entries == 0:
            console.warn("the inputs contain no image")
        rate = f", {self.images / seconds:.3g} images/s" if self.images and seconds else ""
        console.info(
            f"{counted(records, 'record')} in {self.folder.path}: "
            f"{records - nothing - empty} with a mask, "
            f"{nothing} where nothing fits{f', {empty} with an empty mask' if empty else ''}{rate}"
        )
        self.unknown.tell()
        parts = ", ".join(f"{name} {spent:.2f} s" for name, spent in self._seconds().items())
        console.debug(f"seconds (parts overlap): {parts}")
        if self.page is not None:
            console.info(f"gallery: {self.page}")
        if not failed:
            return EXIT_OK
        console.warn(
            f"{counted(failed, 'item')} failed: see {self.folder.failures}; once that is fixed, "
            + told(f"{setting('retry_failed', True)} retries them")
        )
        return EXIT_SOME_FAILED

    def report(self, status: str) -> dict[str, Any]:
        """Writes ``run.json``, and gives what it holds."""
        records = count_lines(self.folder.predictions)
        failed = count_lines(self.folder.failures)
        plan, settings = self.plan, self.plan.settings
        report = {
            "status": status,
            "command": list(plan.command),
            **({} if plan.ranks is None else {"launch": plan.ranks.launch}),
            "risam": __version__,
            "versions": versions(self.segmenter),
            "machine": {
                "platform": platform.platform(),
                "device": describe_device(settings.device),
            },
            "model": {
                "name": self.segmenter.name,
                "hash": self.segmenter.hash,
                **(
                    {}
                    if self.segmenter.kind == "risam"
                    else {"kind": self.segmenter.kind, "folders": dict(self.segmenter.folders)}
                ),
            },
            "settings": self.identity,
            "settings_hash": settings_hash(self.identity),
            "run_settings": run_settings(plan, self.segmenter),
            "shard": {"index": plan.shard.index, "count": plan.shard.count},
            "inputs": {
                "arguments": list(plan.inputs.arguments),
                "expressions": list(plan.inputs.expressions),
                "image_root": None
                if plan.inputs.image_root is None
                else str(plan.inputs.image_root),
                "limit": plan.limit,
                "entries": self.entries,
                "hash": self.inputs_hash.hexdigest() if self.entries is not None else None,
                "skipped": dict(sorted(plan.inputs.skipped.items())),
            },
            "counts": {
                "records": records,
                "failures": failed,
                "this_time": {
                    "entries": self.done.entries + self.done.again,
                    "images": self.images,
                    "records": self.done.records,
                    "no_target": self.done.no_target,
                    "failures": self.failed,
                },
            },
            "started": self.began.isoformat(timespec="seconds"),
            "seconds": self._seconds(),
            "peak_memory_mb": peak_memory_mb(),
            "feature_cache": None if self.cache is None else self.cache.report(),
        }
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        try:
            self.folder.write(RUN, text)
        except OutputError as error:
            raise to_go_on(error) from error
        return report

    def _seconds(self) -> dict[str, float]:
        """By part. Loading, finishing and writing run beside the network, so parts overlap."""
        named = zip(("load_images", "encode", "decode_masks", "finish_masks"), _PARTS, strict=True)
        own = {name: self.spent[part] for name, part in named}
        total = time.perf_counter() - self.started
        before = dict(self.plan.timings)
        parts = {**before, **own, "write": self.writing, "total": sum(before.values()) + total}
        return {name: round(seconds, 3) for name, seconds in parts.items()}


def _tell_failure(failure: Failure, number: int, folder: RunFolder) -> None:
    console = get_console()
    if number <= _SHOWN or console.verbose:
        console.warn(failure.message)
    elif number == _SHOWN + 1:
        console.warn(f"more items failed; all are in {folder.failures}")


# --- what decides the results, and what else run.json tells ---------------------------------------


def identity_of(plan: RunPlan, segmenter: Segmenter) -> dict[str, Any]:
    """All that decides the results apart from the inputs; see :mod:`risam_cli.runs.ledger`."""
    settings = plan.settings
    own = (segmenter.thresholds.mask, segmenter.thresholds.no_target)
    given = (settings.threshold, settings.no_target_threshold)
    threshold, no_target = (a if b is None else b for a, b in zip(own, given, strict=True))
    return {
        "model": segmenter.hash,
        "threshold": threshold,
        "no_target_threshold": no_target,
        "precision": precision_name(settings.precision),
        "device": settings.device.type,
        "save": plan.saving.names,
        "shard": [plan.shard.index, plan.shard.count],
        **({} if plan.feature_cache is None else {"features": "half"}),
        **({"decode": "full"} if settings.full_decode else {}),
        **instance_rules(segmenter, settings),
        **segmenter.versions,
        **({"bands": list(settings.bands)} if settings.bands else {}),
        **({"files": files} if (files := plan.saving.files.to_json()) else {}),
    }


def run_settings(plan: RunPlan, segmenter: Segmenter) -> dict[str, Any]:
    """What a run goes by and its results should not depend on, for ``run.json``."""
    settings = plan.settings
    return {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "threads": _threads(plan, segmenter),
        "product": _product(plan, segmenter),
        **_limits(plan),
    }


def plan_to_go_on(folder: Path, plan: RunPlan, segmenter: Segmenter) -> RunPlan:
    """The plan with what failed before done again, if it failed by other limits than today's.

    Warns where the earlier part was computed by another version or with other threads: the last
    digits of a number may then differ from those of a run in one go.
    """
    try:
        earlier = load_json((folder / RUN).read_bytes())
        before = {**earlier["versions"], "risam": earlier["risam"]}
        ran_by = dict(earlier["run_settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return plan
    if plan.settings.device.type == "cpu":
        before["threads"] = ran_by.get("threads")
    now = {**versions(segmenter), "risam": __version__, "threads": _threads(plan, segmenter)}
    changed = _changes(before, now)
    if changed:
        get_console().warn(
            f"the earlier part of this run was computed differently ({changed}); last digits may "
            + told(f"differ from an uninterrupted run; {setting('overwrite')} starts over")
        )
    if ran_by.get("product") in PRODUCTS:
        plan = replace(plan, settings=replace(plan.settings, product=ran_by["product"]))
    changed = _changes({key: ran_by.get(key) for key in _limits(plan)}, _limits(plan))
    if not changed or plan.retry_failed:
        return plan
    get_console().info(f"the limits changed ({changed}): failed items are retried")
    return replace(plan, retry_failed=True)


def to_go_on(error: RisamError) -> RisamError:
    """The error, with how to go on once its cause is gone."""
    if not isinstance(error, (OutputError, MachineError)) or "resume" in error.settings:
        return error
    message, *fixes = error.args
    fix = ", then ".join(filter(None, [" or ".join(fixes), f"continue with {setting('resume')}"]))
    return type(error)(f"{message}; finished work is kept", fix)


def _threads(plan: RunPlan, segmenter: Segmenter) -> int | None:
    """That work on one image; None where torch's own number, which may change, does."""
    return compute_settings(segmenter, plan.settings).cores.threads or None


def _product(plan: RunPlan, segmenter: Segmenter) -> str | None:
    """The kernel of a CPU's large products."""
    if plan.settings.device.type != "cpu":
        return None
    return compute_settings(segmenter, plan.settings).tuning.product(plan.settings.precision)


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


def count_records(path: Path) -> tuple[int, int, int]:
    """Records of a file, how many say that nothing fits, and how many others have an empty mask.

    None where there is no file.
    """
    records = nothing = empty = 0
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            records += line.endswith(b"\n")
            says_so = b'"no_target": true' in line
            nothing += says_so
            empty += not says_so and b'"area": 0,' in line
    return records, nothing, empty


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
