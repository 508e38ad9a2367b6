"""The output folder of a run: whose it is, who may write to it, and how to start anew in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from risam_cli.errors import OutputError, setting
from risam_cli.files.confine import require_own, require_under
from risam_cli.files.folder import OTHER, SPLICE, OutputFolder
from risam_cli.files.jsonlines import load_json
from risam_cli.files.locks import PRIVATE
from risam_cli.files.write import (
    sync_file,
    sync_folder,
    sync_folders,
    sync_tree,
    write_file,
    writing,
)
from risam_cli.outputs.gallery import remove_pages
from risam_cli.outputs.naming import GALLERY, MASKS, OVERLAYS
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.ledger import LEDGER, own_path, read_marks, read_redone

RUN = "run.json"
_OWN = (PREDICTIONS, FAILURES, RUN, LEDGER)  # the ledger last: it says what is still to delete
_SPLICED = (PREDICTIONS, FAILURES, LEDGER, RUN)  # in the order in which they are replaced


class RunFolder(OutputFolder):
    """The output folder of a run of predict, or of a merge; see its base.

    Attributes:
        predictions, failures, ledger: the records, what has no record, what was done.
        redo: entries that were computed again and are not yet in their places.

    Args:
        path: made if it is not there.

    Raises:
        OutputError: as its base.
    """

    stays = True  # no later run takes the masks for images

    def __init__(self, path: Path) -> None:
        pictures = (MASKS, OVERLAYS, GALLERY)
        # Before the base, which closes where it fails.
        self.predictions, self.failures = path / PREDICTIONS, path / FAILURES
        self.ledger, self.redo = path / LEDGER, redo_of(path)
        self.incoming = path / PRIVATE / "incoming"
        self._retry = path / PRIVATE / "retry"
        self._gone = path / PRIVATE / "gone"
        super().__init__(path, "predict", (*_OWN, *pictures), shared=pictures)
        try:
            with writing(path, OTHER):
                self.finish_splice()
                require_own(path, _OWN)  # again: the splice may have brought what was planted in it
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the lock back; a folder that no run was begun in is left as it was found."""
        if self._lock is None:
            return
        if self.holds_run():
            with suppress(OSError, OutputError):
                self.finish_splice()
        else:
            shutil.rmtree(self.incoming, ignore_errors=True)
            for path in (self.redo, self._retry, self._gone, *map(self.spliced, _SPLICED)):
                with suppress(OSError):
                    path.unlink()
        super().close()

    def holds_run(self) -> bool:
        """Whether there is anything of a run in it."""
        return any((self.path / name).exists() for name in _OWN)

    def start_anew(self) -> None:
        """Deletes what this tool wrote here, and nothing else.

        Raises:
            OutputError: as :meth:`require_known`.
        """
        self.require_known()
        if self.ledger.exists():
            self.delete(mark.path for mark in read_marks(self.ledger))
        for redone, _ in read_redone(self.redo):
            self.delete(mark.path for mark in redone.line.files)
        self.redo.unlink(missing_ok=True)
        self.end_retry()
        for name in _OWN:
            (self.path / name).unlink(missing_ok=True)
        remove_pages(self.path)
        for name in (MASKS, OVERLAYS, GALLERY):
            remove_empty_folders(self.path / name)

    def require_known(self) -> None:
        """Makes sure that it is known what an earlier run wrote here.

        Empty files are those of a run that was ended before it had a ledger: nothing else is its.

        Raises:
            OutputError: the folder holds records but no ledger that says what belongs to them.
        """
        held = [name for name in _OWN if (self.path / name).exists()]
        if any((self.path / name).stat().st_size for name in held) and LEDGER not in held:
            raise OutputError(
                f"{self.path} holds {', '.join(held)} but no {LEDGER} that says what else "
                "belongs to it",
                f"delete the folder yourself, or choose another {setting('output')}",
            )

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes masks, overlays and gallery items by what a ledger calls them."""
        for path in paths:
            place = self.path / path
            # A ledger is a file's word, and a folder under masks/ may be a link.
            require_under(self.path, place.parent)
            with suppress(ValueError, NotADirectoryError):  # no name that a file can have
                place.unlink(missing_ok=True)

    @property
    def attempt(self) -> int:
        """The retry of all failures that is not through yet, counted from 1; 0 where none is."""
        with suppress(OSError, ValueError):
            return int(self._retry.read_bytes()[:9])
        return 0

    def begin_retry(self) -> None:
        """From now on and until it is through, whatever failed is to be done again.

        Raises:
            OutputError: this cannot be noted.
        """
        write_file(self._retry, str(self.attempt + 1))

    def end_retry(self) -> None:
        """All that failed was done again."""
        self._retry.unlink(missing_ok=True)

    # --- replacing files together -----------------------------------------------------------------

    def spliced(self, name: str) -> Path:
        """Where the new version of records, failures, ledger or ``run.json`` is written."""
        return self.private / f"{name}.new"

    def splice(self, gone: Collection[str] = ()) -> None:
        """Puts new versions of files in place, and all that is incoming: all or none of it.

        Args:
            gone: masks, overlays and gallery items to delete then.
        """
        for name in _SPLICED:
            if self.spliced(name).exists():
                sync_file(self.spliced(name))
        if gone:
            write_file(self._gone, json.dumps(sorted(gone)))
        sync_tree(self.incoming)
        (self.private / SPLICE).touch()
        sync_folder(self.private)
        self.finish_splice()

    def finish_splice(self) -> None:
        """Ends a splice that was begun; drops one that was only prepared."""
        marker = self.private / SPLICE
        if marker.exists():
            self._move_in()
            for name in _SPLICED:
                if self.spliced(name).exists():
                    self.place([(self.spliced(name), name)])
            self._delete_gone()
            self.redo.unlink(missing_ok=True)
            self.end_retry()
            marker.unlink()
        for name in _SPLICED:
            self.spliced(name).unlink(missing_ok=True)
        self._gone.unlink(missing_ok=True)
        shutil.rmtree(self.incoming, ignore_errors=True)

    def _delete_gone(self) -> None:
        """Deletes what no ledger lists any more, with the folders that held nothing else."""
        with suppress(FileNotFoundError, ValueError, TypeError):
            paths = [own_path(path) for path in load_json(self._gone.read_bytes())]
            self.delete(paths)
            folders = {(self.path / path).parent for path in paths}
            for folder in folders:
                with suppress(OSError):
                    os.removedirs(folder)
            sync_folders(self.path, folders)

    def _move_in(self) -> None:
        """Puts incoming files in the places that they have names for."""
        for folder, _, names in os.walk(self.incoming):
            inside = os.path.relpath(folder, self.incoming).replace(os.sep, "/")
            target = "" if inside == "." else f"{inside}/"
            self.place([(Path(folder, name), f"{target}{name}") for name in names])


def redo_of(folder: Path) -> Path:
    """The journal of an output folder's run."""
    return folder / PRIVATE / "redo.jsonl"


def remove_empty_folders(root: Path) -> None:
    """Removes a folder and those under it as far as they hold no file."""
    for folder, _, _ in os.walk(root, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)


def asked_before(folder: Path) -> tuple[str, ...]:
    """What the run in a folder asked of every image that had no expression of its own; nothing
    where there is no run, or its ``run.json`` is damaged.
    """
    try:
        asked = load_json((folder / RUN).read_bytes())["inputs"]["expressions"]
        return tuple(asked) if all(isinstance(text, str) for text in asked) else ()
    except (OSError, ValueError, KeyError, TypeError):
        return ()
