"""REFER's pickled lists, read without giving the file a chance to run anything.

A pickle is a program. Two locks stand before it: the whole stream is scanned first, and any
instruction beyond building lists, dicts, tuples, sets, strings and numbers refuses the file before
one instruction is carried out; and the unpickler itself can import nothing.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from risam_cli.errors import DataError, reason_of

_PLAIN_NAMES = """
    PROTO FRAME MARK STOP POP POP_MARK DUP NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
"""
_PLAIN = frozenset(_PLAIN_NAMES.split())
_BY_CODE = {opcode.code: opcode for opcode in pickletools.opcodes}
_STORES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_HASHED = frozenset(["TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"])
_INTEGERS = frozenset(["INT", "LONG", "LONG1", "LONG4"])
_MOST_BITS = 256
_MOST_ITEMS = 64
_FIX = "download the file from the benchmark's own source; no code in it was run"


class _NothingToImport(pickle.Unpickler):
    """The second lock: plain containers need no class, so none is ever looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it asks for a persistent object")


class _Bounded(pickle._Unpickler):
    """For pickles with tuples, of which few are of any length and none holds another.

    Whatever is a key is hashed each time, item by item: tuples of tuples of the same tuple, thirty
    deep, take a few hundred bytes in a file and years. Written in Python, so that a signal can end
    it, too.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    find_class = _NothingToImport.find_class
    persistent_load = _NothingToImport.persistent_load

    def append_checked(self, code: int) -> None:
        """As the instruction that makes a tuple or a frozen set."""
        pickle._Unpickler.dispatch[code](self)  # type: ignore[arg-type]
        made = self.stack[-1]
        if len(made) > _MOST_ITEMS or any(isinstance(one, (tuple, frozenset)) for one in made):
            raise pickle.UnpicklingError("it holds tuples within tuples, or long ones")


for _name in _HASHED:
    _code = ord(next(one.code for one in pickletools.opcodes if one.name == _name))
    _Bounded.dispatch[_code] = partial(_Bounded.append_checked, code=_code)


def load_plain_pickle(path: Path) -> Any:
    """The value of a pickle that holds built-in containers, strings and numbers only.

    Strings of Python 2 are read as Latin-1, as REFER's own loader does.

    Raises:
        DataError: the file cannot be read, is not a whole pickle, or holds anything else; in the
            last case before any of it is carried out.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason_of(error)}") from error
    unpickler = _Bounded if _scan(data, path) else _NothingToImport
    try:
        return unpickler(io.BytesIO(data), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a readable pickle: {reason_of(error)}", _FIX) from error
    except (IndexError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise DataError(f"{path} is a damaged pickle: {reason_of(error)}", _FIX) from error


def _scan(data: bytes, path: Path) -> bool:
    """Refuse any stream with an instruction that does more than build plain values.

    Returns:
        Whether it makes values that are hashed item by item.
    """
    hashed = False
    try:
        for name, argument, position in _instructions(data):
            if name not in _PLAIN:
                asked = f" {argument!r}" if isinstance(argument, str) else ""
                raise DataError(
                    f"{path} is refused: at byte {position} its pickle asks to "
                    f"{_meaning(name)}{asked[:80]}",
                    "a refs file holds lists, dicts, strings and numbers only; " + _FIX,
                )
            hashed = hashed or name in _HASHED
            if name in _INTEGERS and int(argument).bit_length() > _MOST_BITS:
                raise DataError(f"{path} is refused: an integer of absurd size at {position}", _FIX)
            # The C unpickler sizes its memo by the largest index, so a wild one is a memory bomb.
            if name in _STORES and int(argument or 0) > len(data):
                raise DataError(f"{path} is refused: memo index {argument} at {position}", _FIX)
    except DataError:
        raise
    except Exception as error:
        # pickletools raises whatever the bad bytes led to: ValueError, struct.error, IndexError …
        raise DataError(f"{path} is not a whole pickle: {reason_of(error)}", _FIX) from error
    return hashed


def _instructions(data: bytes) -> Iterator[tuple[str, Any, int]]:
    """Name, argument and place of every instruction up to the end of the pickle.

    As ``pickletools.genops``, but for strings of Python 2 that are not ASCII, on which that stops.
    """
    stream = io.BytesIO(data)
    while True:
        position = stream.tell()
        opcode = _BY_CODE[stream.read(1).decode("latin-1")]
        argument = None
        if opcode.name == "STRING":
            if not stream.readline().endswith(b"\n"):
                raise ValueError(f"the string at byte {position} does not end")
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        yield opcode.name, argument, position
        if opcode.name == "STOP":
            return


def _meaning(name: str) -> str:
    if name in ("GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
        return "import a name"
    if name in ("REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"):
        return "call a function"
    if name in ("BUILD", "PERSID", "BINPERSID"):
        return "rebuild an object"
    return f"run the instruction {name}"
