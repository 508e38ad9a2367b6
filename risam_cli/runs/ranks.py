"""The processes of one run that torchrun starts: each its part, and one folder at the end.

They share nothing but the output folder. Each works in a ``shard-…`` of its own below it and notes
there, in a JSON file, which start of torchrun it belongs to, how it works and whether it is done.
Whoever finds all parts done by this start puts them together: the last to finish. So none waits for
another, one that died costs its own batch only, and what is half done never looks whole.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from risam_cli.console.console import Console, get_console, set_console
from risam_cli.console.text import counted
from risam_cli.errors import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    Interrupted,
    OutputError,
    RisamError,
    UsageError,
    setting,
)
from risam_cli.files.folder import OutputFolder
from risam_cli.files.jsonlines import load_json
from risam_cli.files.locks import Taken
from risam_cli.runs.folder import RUN, RunFolder
from risam_cli.runs.merge import SHARDS, differing, find_parts, merge_parts, versions_of
from risam_cli.runs.shard import Shard

F = TypeVar("F", bound=OutputFolder)

_GRACE = 3.0  # seconds in which the first process tells of an error that all meet
_PATIENCE = 60.0  # seconds for a process to leave the part that it has finished


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that torchrun started.

    Attributes:
        shard: its part.
        launch: the same for all processes of one start, another after a restart.
        restarted: torchrun had to start them again, after one of them ended.
    """

    shard: Shard
    launch: str
    restarted: bool = False

    @property
    def leads(self) -> bool:
        """Whether it is the one that speaks for all."""
        return self.shard.index == 0

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """What all processes meet is the first one's to tell.

        The others wait before they tell of an error: torchrun ends them once the first has.
        """
        try:
            yield
        except RisamError as error:
            if not self.leads and not isinstance(error, Interrupted):
                time.sleep(_GRACE)
                message, *fixes = error.args
                error.args = (
                    f"process {self.shard.index} of {self.shard.count}: {message}",
                    *fixes,
                )
            raise

    @contextmanager
    def quietly(self, *, silent: bool = False) -> Iterator[None]:
        """Progress is the first process's to show.

        Args:
            silent: so are warnings, for all have the same.
        """
        console = get_console()
        if not self.leads:
            set_console(Console(quiet=True, stream=io.StringIO() if silent else None))
        try:
            yield
        finally:
            set_console(console)

    # --- before the work --------------------------------------------------------------------------

    def begin(self, output: Path, *, resume: bool, overwrite: bool) -> bool:
        """Whether this process has a part to do below ``output``, which is looked at first.

        A folder that holds the whole run already is the first process's to look through alone.

        Raises:
            OutputError: it holds another run, or parts for another number of processes, and it was
                not said what to do with it.
        """
        whole = (output / RUN).exists()
        if whole:
            resume, overwrite = self.settled(output, resume=resume, overwrite=overwrite)
        if overwrite:
            if self.leads:
                if whole:
                    with RunFolder(output) as folder:
                        folder.start_anew()
                remove_parts(output, but=self.shard.count)
            return True
        if whole and not resume:
            raise holds_another(output)
        if whole:
            if self.leads:
                remove_parts(output)
            return False
        self.require_count(output)
        return True

    def require_count(self, output: Path) -> None:
        """Make sure that all parts are those of so many processes. Raises OutputError."""
        for path in part_folders(output):
            count = int(path.name.rpartition("-")[2])
            if count != self.shard.count:
                raise holds_parts(output, count)

    def settled(
        self, folder: Path, name: str = RUN, *, resume: bool, overwrite: bool
    ) -> tuple[bool, bool]:
        """What to do with what a folder holds: after a restart, what was begun before it goes on.

        Args:
            name: of the file in which the start was noted.

        Returns:
            Whether to resume it, and whether to start over in it.
        """
        if not self.restarted:
            return resume, overwrite
        try:
            began = _launch(load_json((folder / name).read_bytes())["launch"])
        except FileNotFoundError:  # killed before there was anything to lose
            return True, False
        except (OSError, ValueError, KeyError, TypeError):
            return resume, overwrite
        return (True, False) if began == _launch(self.launch) else (resume, overwrite)

    def require_alike(self, name: str, own: Mapping[str, Any], output: Path) -> None:
        """To be called before this process notes how it works, and after.

        Args:
            name: of the file in which it is noted, with ``settings``, ``versions``, ``risam``.
            own: what this process notes there.

        Raises:
            UsageError: another process of this start works by other settings or versions.
        """
        for index in range(self.shard.count):
            other = self._noted(Shard(index, self.shard.count).folder(output), name)
            if other is None or index == self.shard.index:
                continue
            changed = differing(other["settings"], own["settings"])
            changed = changed or differing(versions_of(other), versions_of(own))
            if changed:
                if index > self.shard.index:  # which sees it too, and tells
                    time.sleep(_GRACE)
                raise UsageError(
                    f"the processes of this run differ: {changed} (process {index} and this one)",
                    "start all of them with the same options, model and installation",
                )

    # --- after the work ---------------------------------------------------------------------------

    def all_done(self, name: str, output: Path) -> bool:
        """Whether every part is done by this start of torchrun."""
        noted = (
            self._noted(Shard(index, self.shard.count).folder(output), name)
            for index in range(self.shard.count)
        )
        return all(one is not None and one["status"] == "complete" for one in noted)

    def merge(self, output: Path, *, keep: bool) -> int | None:
        """Put the parts together where this process is the last; gives the exit code of all.

        None where it is not: then its own is 0, for torchrun ends the others once one fails.

        Args:
            keep: leave the parts as they are.

        Raises:
            RisamError: the parts do not belong together, or cannot be written.
        """
        if not self.all_done(RUN, output):
            return None
        try:
            parts = find_parts([output])
            if keep:
                failures = sum(part.run["counts"]["failures"] for part in parts)
                return EXIT_SOME_FAILED if failures else EXIT_OK
            with get_console().progress("merge", parts[0].entries, "inputs") as progress:
                merged = merge_parts(parts, output, link=True, advance=progress.advance)
        except RisamError as error:
            if isinstance(error, Taken) or (output / RUN).exists():  # two were the last
                return None
            raise
        remove_parts(output)
        console = get_console()
        console.info(f"{counted(merged.records, 'record')} of {len(parts)} processes in {output}")
        if not merged.failures:
            return EXIT_OK
        console.warn(f"{counted(merged.failures, 'item')} failed: see {output / 'failures.jsonl'}")
        return EXIT_SOME_FAILED

    def _noted(self, part: Path, name: str) -> dict[str, Any] | None:
        """What the process of a part noted in this start; None where it did not yet."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted = load_json((part / name).read_bytes())
            if noted["launch"] == self.launch and isinstance(noted["settings"], dict):
                return dict(noted)
        return None


def ranks_of_environment(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """This process among those of torchrun, by RANK and WORLD_SIZE; None without torchrun."""
    rank, size = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    if not rank.isdigit() or not size.isdigit() or int(size) < 2:
        return None
    start = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    launch = ":".join([*(environment.get(key, "") for key in keys), start])
    return Ranks(Shard(int(rank) % int(size), int(size)), launch, start not in ("", "0"))


def _launch(noted: str) -> str:
    """What all starts of one torchrun have in common."""
    return str(noted).rpartition(":")[0]


# --- the folders of parts -------------------------------------------------------------------------


def part_folders(output: Path) -> list[Path]:
    """The parts below an output folder, by name."""
    found = output.glob(SHARDS) if output.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and path.name[-5:].isdigit())


def holds_another(output: Path) -> OutputError:
    """The error of a folder that holds a run already."""
    return OutputError(
        f"{output} holds another run",
        f"continue it with {setting('resume')}, replace it with {setting('overwrite')}, or "
        f"choose another {setting('output')}",
    )


def holds_parts(output: Path, count: int) -> OutputError:
    """The error of a folder that holds parts of a run in another number of processes."""
    return OutputError(
        f"{output} holds the parts of a run in {count} processes",
        f"continue it with {setting('resume')} in {count} processes, start over with "
        f"{setting('overwrite')}, or choose another {setting('output')}",
    )


def remove_parts(output: Path, but: int = 0) -> None:
    """Delete what this tool wrote in parts, but in those of ``but`` processes."""
    for path in part_folders(output):
        if int(path.name.rpartition("-")[2]) == but:
            continue
        with patiently(partial(RunFolder, path)) as folder:
            folder.start_anew()
        with suppress(OSError):
            path.rmdir()


def patiently(take: Callable[[], F]) -> F:
    """A part's folder, which its process is about to leave."""
    began = time.monotonic()
    while True:
        try:
            return take()
        except Taken:
            if time.monotonic() - began > _PATIENCE:
                raise
            time.sleep(0.1)
