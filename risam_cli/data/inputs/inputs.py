"""What the user names on the command line, as a stream of entries in a fixed order.

An entry is one image file, or one line of a manifest: the unit that ledgers, shards and limits
count in. Reading costs no image: only names, and the manifests' text. Ids and the number of an
expression within its image depend on the inputs alone, so every shard gives the same ones.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from risam_cli.data.identity import existing, has_words, image_key
from risam_cli.data.images.files import require_inside
from risam_cli.data.inputs import manifest
from risam_cli.data.inputs.counting import NameCounts
from risam_cli.data.inputs.tars import TarIndex, is_tar
from risam_cli.data.inputs.walk import (
    Unreadable,
    is_image_name,
    kind_of_file,
    match_pattern,
    walk_images,
    walk_remote,
)
from risam_cli.data.readers.coco import open_coco
from risam_cli.data.readers.source import SampleSource
from risam_cli.errors import DataError, UsageError, setting, told
from risam_cli.files.jsonlines import brief
from risam_cli.files.remote import require_known
from risam_cli.files.store import (
    RemotePath,
    is_pattern,
    is_url,
    join,
    kind_of,
    match_urls,
    place,
)
from risam_cli.types import Expression, Failure, Sample

MAX_CHARACTERS = 10_000
"""Of one expression. No text encoder reads so many; a legend, a page or a tokenizer would choke."""

_PHRASE = re.compile(r"[^\W\d_][\w'’,.?!-]*(?: [\w'’,.?!-]+)*")
"""Words as a phrase has them; a name with a slash or a suffix is none."""
_TELL = (
    f"give {setting('expression', 'TEXT')} or {setting('expressions', 'FILE')}, or a manifest that "
    "brings its own"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file or one manifest line.

    Attributes:
        index: its number among all entries, from 0.
        run: which stretch of entries with one image it is in; shards are dealt these.
        sample: what is to be predicted; None where nothing of it can be.
        failures: what is wrong with it already.
        where: its manifest and line, for messages; empty for a file.
        key: a hash of what it asks and, after a hyphen, one of what the results are called; if it
            changed, so did the input.
    """

    index: int
    run: int
    sample: Sample | None
    failures: tuple[Failure, ...]
    where: str
    key: str

    @property
    def image(self) -> str:
        """The image as named."""
        return self.sample.image if self.sample is not None else self.failures[0].image

    @property
    def size(self) -> int:
        """How many records and failures come of it."""
        return len(self.failures) + (0 if self.sample is None else len(self.sample.expressions))


@dataclass(frozen=True, slots=True)
class _Wish:
    """An entry before it is numbered."""

    image: str
    path: Path | None
    asked: tuple[tuple[str | None, str], ...]  # own id or None, text
    where: str = ""
    name: str = ""
    size: tuple[int, int] | None = None
    error: str = ""


@dataclass(slots=True)
class Inputs:
    """The inputs of a run; iterating gives :class:`Entry` after entry.

    Args:
        arguments: files, folders, patterns, manifests, ``-``; as given.
        expressions: asked of every image that brings none.
        image_root: where relative paths in manifests start; by default beside the manifest, and
            in the working folder for stdin.
        exclude: a folder that is not walked into: the output.
        confine: refuse images that a manifest or a stream names outside of where its paths start.
        null_separated: stdin holds NUL-terminated paths.
        skipped: filled while iterating: why files were skipped, and how many.
    """

    arguments: Sequence[str]
    expressions: Sequence[str] = ()
    image_root: Path | None = None
    exclude: Path | None = None
    confine: bool = False
    null_separated: bool = False
    skipped: Counter[str] = field(default_factory=Counter)
    _coco: dict[str, SampleSource] = field(default_factory=dict)
    _tars: TarIndex = field(default_factory=TarIndex)

    def __post_init__(self) -> None:
        self.arguments = [
            str(place(one)) if one.startswith("file://") else one for one in self.arguments
        ]

    @property
    def repeatable(self) -> bool:
        """Whether it can be iterated more than once."""
        return not any(argument == "-" or _is_stream(argument) for argument in self.arguments)

    def check(self) -> None:
        """Finds what is wrong with the inputs as far as it can be known without reading them all.

        Raises:
            UsageError: images without an expression; stdin named twice; an empty name.
            DataError: an input that does not exist, holds no image, or is no manifest.
        """
        if list(self.arguments).count("-") > 1:
            raise UsageError("stdin ('-') is named twice", "name it once")
        require_askable(self.expressions)
        for argument in self.arguments:
            self._refuse_phrase(argument)
        for argument in self.arguments:
            if argument != "-":
                self._check(argument)
        self.skipped.clear()

    def __iter__(self) -> Iterator[Entry]:
        """Entries in order.

        Raises:
            DataError: an input as a whole can no longer be read.
        """
        self.skipped.clear()
        ids, numbers = NameCounts(), NameCounts()
        run, last = -1, None
        for index, wish in enumerate(self._wishes()):
            stretch = wish.image or wish.name
            run, last = (run, last) if stretch == last else (run + 1, stretch)
            yield self._entry(wish, index, run, ids, numbers)

    def common_folder(self) -> str | None:
        """The folder that all inputs share, where each is an absolute path; else None.

        Folders count as they are given, files by the folders that they lie in.

        Raises:
            DataError: an input as a whole cannot be read.
        """
        common: str | None = None
        for folder in self._folders() if self.repeatable else ():
            if not folder.startswith("/"):
                return None
            common = os.path.commonpath([folder if common is None else common, folder])
        return common

    def require_own_names(self) -> None:
        """Refuse inputs of which two images have one name, whatever their folders.

        Raises:
            UsageError: so it is, or it cannot be known beforehand.
        """
        if not self.repeatable:
            raise UsageError(
                f"{setting('names', 'base')} is not for stdin: its names are not known beforehand",
                "leave it out",
            )
        known: dict[str, str] = {}
        for wish in self._wishes():
            key = image_key(wish.image)
            other = known.setdefault(key.rpartition("/")[2], key)
            if other != key:
                raise UsageError(
                    f"{setting('names', 'base')}: {other} and {key} have the same name",
                    f"give {setting('names', 'relative')}",
                )
        self.skipped.clear()

    def _folders(self) -> Iterator[str]:
        """For each input the folder that names its images; "" for one that is not absolute."""
        for argument in self.arguments:
            if manifest.kind_of(argument) is None:
                path = argument
                while _is_pattern(path) and not os.path.lexists(path):
                    path = os.path.dirname(path)
                inside = os.path.isdir(path)
                yield (path if inside else os.path.dirname(path)) if os.path.isabs(path) else ""
                continue
            exists = os.path.lexists(argument)
            for wish in self._of_path(argument) if exists else self._of_pattern(argument):
                if wish.image:
                    yield os.path.dirname(wish.image) if os.path.isabs(wish.image) else ""

    # --- from arguments to wishes -----------------------------------------------------------------

    def _wishes(self) -> Iterator[_Wish]:
        for argument in self.arguments:
            if argument == "-":
                yield from self._of_stream(sys.stdin.buffer, "<stdin>", null=self.null_separated)
            elif is_url(argument):
                yield from self._of_url(argument)
            elif _is_stream(argument) and manifest.kind_of(argument) in (None, "jsonl"):
                with manifest.open_manifest(Path(argument)) as stream:
                    yield from self._of_stream(stream, argument)
            elif os.path.lexists(argument):
                yield from self._of_path(argument)
            elif _is_pattern(argument):
                yield from self._of_pattern(argument)
            else:
                yield self._of_image(argument)

    def _of_stream(self, stream: BinaryIO, name: str, *, null: bool = False) -> Iterator[_Wish]:
        """Stdin or a pipe: JSON Lines, or paths from the working folder."""
        paths = bool(self.expressions)
        rows = manifest.read_stream(stream, name, paths=paths, null=null)
        yield from self._of_rows(rows, self.image_root or Path())

    def _of_path(self, path: str) -> Iterator[_Wish]:
        yield from self._of_folder(path) if os.path.isdir(path) else self._of_file(path)

    def _of_url(self, url: str) -> Iterator[_Wish]:
        """As a path, of what lies in a store."""
        for one in match_urls(url) if is_pattern(url) else [url]:
            named = manifest.kind_of(one) is not None or is_tar(one) or is_image_name(one)
            if named or kind_of(one) != "directory":  # an image's web address may end in anything
                yield from self._of_file(one)
            else:
                for found in walk_remote(one, self.skipped, self._excluded()):
                    yield self._of_image(found)

    def _of_file(self, path: str) -> Iterator[_Wish]:
        """What a file brings by its name, on a disk or in a store."""
        kind = manifest.kind_of(path)
        if kind == "coco":
            yield from self._of_coco(path)
        elif kind is not None:
            yield from self._of_manifest(path, kind)
        elif is_tar(path):
            yield from self._of_tar(path)
        else:
            yield self._of_image(path)

    def _of_tar(self, path: str) -> Iterator[_Wish]:
        for sample in self._tars.samples(path):
            where = f"{path}: {sample.key}"
            wish = _Wish(f"{path}/{sample.key}", None, (), where, where)
            try:
                if sample.error:
                    wish = replace(wish, image="", where="")
                    raise DataError(sample.error)
                if len(sample.images) != 1:
                    raise DataError(f"{where}: holds {len(sample.images)} images", "give it one")
                (image,) = sample.images
                said = {} if sample.asked is None else sample.asked
                if isinstance(said, dict):
                    said = {**said, "image": str(image)}
                row = manifest.row_of_object(said, where, where)
                if row.error is not None:
                    raise row.error
                asked = self._asked(row.expressions or sample.texts, row.id)
                yield _Wish(row.image, image, asked, where, row.id or where)
            except DataError as error:
                yield replace(wish, error=str(error))

    def _asked(self, texts: tuple[str, ...], own: str | None) -> tuple[tuple[str | None, str], ...]:
        """Expressions, or those asked of all, each with its id where there is one."""
        texts = texts or tuple(self.expressions)
        if own is None or len(texts) == 1:
            return tuple((own, text) for text in texts)
        return tuple((f"{own}#{k}", text) for k, text in enumerate(texts))

    def _of_pattern(self, pattern: str) -> Iterator[_Wish]:
        manifests = manifest.kind_of(pattern) is not None or is_tar(pattern)
        given: set[str] = set()
        for path in match_pattern(pattern):
            if os.path.isdir(path) and os.path.islink(path):
                self.skipped["linked folders"] += 1
            elif manifests or os.path.isdir(path) or is_image_name(path):
                for wish in self._of_path(path):
                    # A folder that matches holds files that match as well.
                    key = "" if manifests else os.path.normpath(wish.image)
                    if not key or key not in given:
                        given.add(key)
                        yield wish
            else:
                self.skipped[kind_of_file(path)] += 1

    def _of_folder(self, folder: str) -> Iterator[_Wish]:
        for found in walk_images(folder, self.skipped, self._excluded()):
            if isinstance(found, Unreadable):
                message = f"{found.path}: {found.reason}"
                yield _Wish("", None, (), name=found.path, error=message)
            else:
                yield self._of_image(found)

    def _of_image(self, path: str) -> _Wish:
        return _Wish(path, place(path), self._asked((), None))

    def _of_manifest(self, path: str, kind: str) -> Iterator[_Wish]:
        base = self.image_root or place(path).parent
        with manifest.open_manifest(place(path)) as stream:
            if kind == "jsonl":
                rows = manifest.read_stream(stream, path)
            else:
                rows = manifest.read_table(stream, path)
            yield from self._of_rows(rows, base)

    def _of_rows(self, rows: Iterator[manifest.Row], base: Path) -> Iterator[_Wish]:
        for row in rows:
            asked = self._asked(row.expressions, row.id)
            path, wrong = None, ""
            try:
                if row.error is not None:
                    raise row.error
                path = self._locate(row.image, base, row.where)
            except DataError as error:
                wrong = str(error)
            yield _Wish(row.image, path, asked, row.where, row.id or row.name, error=wrong)

    def _of_coco(self, path: str) -> Iterator[_Wish]:
        base = self.image_root or place(path).parent
        for group in self._open_coco(path).groups:
            own = tuple((phrase.id or None, phrase.text) for phrase in group.phrases)
            asked = own or tuple((None, text) for text in self.expressions)
            if not asked:
                self.skipped["images without an expression"] += 1
                continue
            wish = _Wish(group.image, group.path, asked, path, group.image, group.size)
            try:
                own_place = group.path
                if not isinstance(own_place, RemotePath):
                    own_place = Path(os.path.abspath(own_place))
                found = self._locate(str(own_place), base, f"{path}: {group.image}")
                yield replace(wish, path=found)
            except DataError as error:
                yield replace(wish, path=None, error=str(error))

    def _open_coco(self, path: str) -> SampleSource:
        if path not in self._coco:
            self._coco[path] = open_coco(place(path), self.image_root, bare_images=True)
        return self._coco[path]

    def _locate(self, image: str, base: Path, where: str) -> Path:
        """The file of an image that a manifest names, in whichever spelling it is there.

        Raises:
            DataError: it can be no file, or is outside of ``base`` and only what is inside may be
                read.
        """
        if "\0" in image:
            raise DataError(f"{where}: {image!r} is not a valid file path")
        found = join(base, image)
        if not isinstance(found, RemotePath) and not isinstance(base, RemotePath):
            found = Path(existing(str(found)))
        if self.confine:
            require_inside(found, base, f"{where}: {image!r}")
        return found

    def _excluded(self) -> str | None:
        if isinstance(self.exclude, RemotePath):
            return self.exclude.url.rstrip("/")
        return None if self.exclude is None else os.path.realpath(self.exclude)

    # --- from wishes to entries -------------------------------------------------------------------

    def _entry(
        self, wish: _Wish, index: int, run: int, ids: NameCounts, numbers: NameCounts
    ) -> Entry:
        expressions: list[Expression] = []
        failures: list[Failure] = []

        def fail(name: str, text: str | None, message: str) -> None:
            failures.append(Failure(name, wish.image, text, "read", "DataError", message))

        if wish.path is None:
            asked = wish.asked if wish.image and len(wish.asked) else ()
            for own, text in asked:
                fail(own or f"{wish.image}#{numbers.add(wish.image)}", text, wish.error)
            if not asked:
                fail(wish.name, None, wish.error)
        elif not wish.asked:
            where = f"{wish.where}: {wish.image}" if wish.where else wish.image
            fail(wish.name or wish.image, None, told(f"{where}: no expression; {_TELL}"))
        else:
            for own, text in wish.asked:
                number = numbers.add(image_key(wish.image))
                name = f"{wish.image}#{number}" if own is None else own
                problem = self._problem(name, text, wish.where, ids)
                if problem:
                    fail(name, text, problem)
                else:
                    expressions.append(Expression(name, text, number=number))
        sample = None
        if wish.path is not None and expressions:
            sample = Sample(wish.image, wish.path, tuple(expressions), wish.size)
        return Entry(index, run, sample, tuple(failures), wish.where, _key(sample, failures))

    def _problem(self, name: str, text: str, where: str, ids: NameCounts) -> str:
        """What is wrong with one expression; empty where nothing is."""
        place = f"{where}: " if where else ""
        if not has_words(text):
            return f"{place}the expression {text!r} of {name!r} has no words; give some or none"
        if len(text) > MAX_CHARACTERS:
            return (
                f"{place}the expression of {name!r} has {len(text)} characters, more than "
                f"{MAX_CHARACTERS}"
            )
        if not text.isascii() and not _is_text(text):
            return f"{place}the expression of {name!r} is not Unicode text: {text!r}"
        if ids.add(name):
            return f"{place}the id {name!r} was given before; ids must differ"
        return ""

    # --- checks before the start ------------------------------------------------------------------

    def _check(self, argument: str) -> None:
        if not argument:
            raise UsageError("an input is empty (an unset variable?)", "name a file or a folder")
        if "\0" in argument:
            raise UsageError(f"{argument!r} is not a valid file path")
        if is_url(argument):
            self._check_url(argument)
        elif not os.path.lexists(argument):
            self._check_absent(argument)
        elif os.path.isdir(argument):
            self._require_expressions(argument)
            skipped: Counter[str] = Counter()
            if next(walk_images(argument, skipped, self._excluded()), None) is None:
                reasons = ", ".join(f"{count} {what}" for what, count in skipped.most_common())
                raise DataError(
                    f"{argument}: no image in this folder"
                    + (f"; skipped: {reasons}" * bool(reasons)),
                    "check the path",
                )
        elif not _is_stream(argument):
            kind = manifest.kind_of(argument)
            if kind is not None:
                self._check_manifest(argument, kind)
            elif not is_tar(argument):
                self._require_expressions(argument)

    def _refuse_phrase(self, argument: str) -> None:
        """Raises DataError where an argument is no path but reads like a phrase."""
        words = " " in argument
        named = not words and os.path.splitext(argument)[1]
        if named or (self.expressions and not words) or not _PHRASE.fullmatch(argument):
            return
        if os.path.lexists(argument):
            return
        raise DataError(
            f"{argument}: no such file or folder (working folder: {os.getcwd()})",
            "" if words else "check the path",
            f"give a phrase by {setting('expression', repr(argument))}",
        )

    def _check_url(self, url: str) -> None:
        """Asks the store once, so that a wrong address or key is told of before anything else."""
        require_known(url)
        urls = match_urls(url) if is_pattern(url) else [url]
        if not urls:
            raise DataError(f"{url}: matches no object", "check the address")
        kind = manifest.kind_of(urls[0])
        if kind is None or kind == "jsonl":
            folder = kind_of(urls[0]) == "directory"
            found = walk_remote(urls[0], Counter(), self._excluded()) if folder else iter(urls)
            if next(found, None) is None:
                raise DataError(f"{url}: no image below this address", "check the address")
            if kind is None and not is_tar(urls[0]):
                self._require_expressions(url)
        else:
            self._check_manifest(urls[0], kind)

    def _check_absent(self, argument: str) -> None:
        where = f"(working folder: {os.getcwd()})"
        if _is_pattern(argument):
            found = match_pattern(argument)
            if not found:
                raise DataError(
                    f"{argument}: matches no file {where}",
                    "check the pattern; * ? [ ] are wildcards, [[] is a literal [",
                )
            images = any(os.path.isdir(path) or is_image_name(path) for path in found)
        else:
            images = is_image_name(argument)
            if not images:
                raise DataError(f"{argument}: no such file or folder {where}", "check the path")
        if images:
            self._require_expressions(argument)

    def _check_manifest(self, argument: str, kind: str) -> None:
        if kind == "coco":
            source = self._open_coco(argument)
            if not any(group.phrases for group in source.groups):
                self._require_expressions(argument)
        else:
            with manifest.open_manifest(place(argument)) as stream:
                if kind == "table":
                    table = manifest.open_table(stream, argument)
                    if "expression" not in table.columns:
                        self._require_expressions(argument)

    def _require_expressions(self, argument: str) -> None:
        if not self.expressions:
            raise UsageError(f"{argument}: no expression is given for its images", _TELL)


def require_askable(expressions: Sequence[str]) -> None:
    """Make sure that expressions that were typed can be asked for.

    Raises:
        UsageError: one has no words, is not Unicode text or is too long.
    """
    for text in expressions:
        if not has_words(text):
            raise UsageError(
                f"the expression {text!r} has no words", f"give words after {setting('expression')}"
            )
        if not _is_text(text):
            raise UsageError(f"the expression {text!r} is not Unicode text")
        if len(text) > MAX_CHARACTERS:
            raise UsageError(
                f"the expression {brief(text)} has {len(text)} characters",
                f"give {MAX_CHARACTERS} or fewer",
            )


def _is_pattern(argument: str) -> bool:
    return any(char in argument for char in "*?[")


def _is_text(text: str) -> bool:
    """Whether it can be encoded: JSON and command lines can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_stream(argument: str) -> bool:
    """Whether it is a pipe, such as a shell's <(…): read once, from its beginning."""
    try:
        return stat.S_ISFIFO(os.stat(argument).st_mode)
    except (OSError, ValueError):
        return False


def _key(sample: Sample | None, failures: Sequence[Failure]) -> str:
    """Two hashes: of the image and the texts, and of what their records and masks are called."""
    asked = () if sample is None else sample.expressions
    image = "" if sample is None else sample.image
    wrong = [[failure.id, failure.expression] for failure in failures]
    called = [[one.id, one.number] for one in asked]
    return f"{_hash([image, [one.text for one in asked], wrong], 12)}-{_hash(called, 8)}"


def _hash(value: object, size: int) -> str:
    return blake2b(json.dumps(value).encode(), digest_size=size).hexdigest()
