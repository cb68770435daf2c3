"""Pickles of lists and NumPy arrays, read without running anything that stands in them."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from dejavu_exp.datasets.annotations import storable
from dejavu_exp.errors import DataError

Item: TypeAlias = int | str

EXPECTED = "expected one list or NumPy array of numbers or names for each image"
WAY_OUT = (
    "Such files can run programs when they are read, so nothing else is accepted. Write the annotations as a Parquet "
    "file with the columns id and tags, and use tagger=precomputed."
)
DTYPE = re.compile(r"[iu][1248]|[US]\d+|O8?|b1|f[248]")
ERRORS = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError, OverflowError,
)  # fmt: skip
"""What the standard unpickler raises for files that are cut short or were written to harm."""


class _RefusedError(Exception):
    """Something that is neither a list nor of NumPy; the text says what."""


def read_arrays(path: Path) -> list[list[Item]]:
    """One list of whole numbers or texts for each entry of a pickled list or NumPy array.

    Nothing that the file names is imported or called: NumPy's few functions have stand-ins here that note what they are
    given, and the arrays are then built from checked types and sizes.

    Args:
        path: a pickle, protocol 0 to 5, of NumPy 1 or 2.

    Returns:
        N lists: the rows of a list of lists or of arrays, of an object array of those, or of an array (N, K). Of the
        pair [objects, scores] that the released annotation step writes, each with an entry an image, the objects.

    Raises:
        DataError: the file is cut short, holds anything else (named in the error), or claims more than it holds.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    try:
        _survey(data)
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        return _rows(content, budget=len(data))
    except _RefusedError as error:
        raise DataError(f"{path} holds {error}; {EXPECTED}. {WAY_OUT}") from error
    except ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: is damaged, or no pickle of lists and arrays ({reason[:200]}); {EXPECTED}. Fetch it again."
        ) from error


def _survey(data: bytes) -> None:
    """Walk through the file's operations, of which nothing is carried out."""
    end = 0
    for operation, argument, position in pickletools.genops(data):
        # The unpickler makes room for all numbers up to this one at once.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise _RefusedError(f"the number {argument} for one of its parts, more than the file has bytes")
        if operation.name.startswith("EXT"):
            raise _RefusedError(f"the registered class {argument}")
        end = int(position or 0) + 1
    if end != len(data):
        raise _RefusedError(f"{len(data) - end} bytes after the end of its first object")


class _Unpickler(pickle.Unpickler):
    """The standard unpickler, with stand-ins for the little of NumPy that its arrays need."""

    def find_class(self, module: str, name: str) -> _Function:
        """The stand-in of a name, new each time so that a file cannot change it.

        Raises:
            _RefusedError: there is none.
        """
        if (module, name) not in KNOWN:
            raise _RefusedError(f"the class or function {module}.{name}")
        return _Function(f"{module}.{name}", KNOWN[module, name])

    def persistent_load(self, pid: object) -> NoReturn:
        """References to things outside of the file are refused."""
        raise _RefusedError(f"a reference to something outside of the file, {pid!r:.100}")


class _Noted:
    """What a file does with a name is noted and cannot reach further."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise _RefusedError(f"a state for {self}")


class _Function(_Noted):
    """A name of NumPy in the file."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., object]) -> None:
        self.name = name
        self.make = make

    def __call__(self, *arguments: object) -> object:
        return self.make(*arguments)

    def __repr__(self) -> str:
        return self.name


class _Type(_Noted):
    """numpy.dtype(code, align, copy), with its byte order in the state."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not DTYPE.fullmatch(code):
            raise _RefusedError(f"NumPy values of the type {code!r:.100}")
        self.code = code
        self.order = "="

    def __setstate__(self, state: object) -> None:
        order, *parts = state[1:5] if isinstance(state, tuple) and len(state) >= 5 else (None,)
        if order not in ("<", ">", "=", "|") or any(part is not None for part in parts):
            raise _RefusedError(f"NumPy values with parts of their own, {state!r:.100}")
        self.order = str(order)

    def numpy(self) -> np.dtype[Any]:
        """The type; never of size 0, which would allow any number of values in no bytes."""
        found = np.dtype(self.order + self.code)
        if not found.itemsize:
            raise _RefusedError("NumPy values of no size")
        return found


class _Array(_Noted):
    """numpy.ndarray, whose content comes in the state: (version, shape, type, Fortran order, bytes or list)."""

    __slots__ = ("state",)

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _RefusedError("an array without shape, type and values")
        self.state = state[1:]

    def values(self) -> Any:  # noqa: ANN401 - nested lists
        """Nested lists of the array's values, those of an object array as they are.

        Raises:
            _RefusedError: shape, type and values do not go together.
        """
        shape, kind, fortran, content = self.state or ((), None, False, b"")
        if not isinstance(kind, _Type) or not _usable(shape):
            raise _RefusedError(f"an array of shape {shape!r:.100}, where one or two dimensions can be used")
        if kind.numpy().hasobject:
            return _objects(shape, content)
        raw = _bytes(content)
        if math.prod(shape) * kind.numpy().itemsize != len(raw):
            raise _RefusedError(f"an array of shape {shape} and type {kind.numpy()} in {len(raw)} bytes")
        return _from_bytes(raw, kind).reshape(shape, order="F" if fortran else "C").tolist()


class _Buffer(_Array):
    """numpy's _frombuffer(bytes, type, shape, order), the form of protocol 5."""

    __slots__ = ()

    def __init__(self, content: object, kind: object, shape: object, order: object, *_: object) -> None:
        self.state = (shape, kind, order == "F", content)


def _scalar(kind: object, content: object = b"") -> object:
    """What numpy's scalar(type, bytes) gives: the value itself."""
    if not isinstance(kind, _Type) or kind.numpy().hasobject:
        raise _RefusedError("a NumPy value of an object's type")
    raw = _bytes(content)
    if len(raw) != kind.numpy().itemsize:
        raise _RefusedError(f"a NumPy value of type {kind.numpy()} in {len(raw)} bytes")
    return _from_bytes(raw, kind)[0].item()


def _from_bytes(raw: bytes, kind: _Type) -> npt.NDArray[Any]:
    """The values in the bytes, shape (N,)."""
    values = np.frombuffer(raw, kind.numpy())
    # NumPy itself would make texts of characters that do not exist.
    if values.dtype.kind == "U" and (np.frombuffer(raw, f"{kind.order}u4") > sys.maxunicode).any():
        raise _RefusedError("texts of characters that do not exist")
    return values


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """_codecs.encode, which is how protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"a text in the encoding {encoding!r:.100}")
    return text.encode("latin1")


def _instance(*arguments: object) -> NoReturn:
    """copyreg._reconstructor, the way of protocols 0 and 1 to an instance, whose class is refused before this."""
    raise _RefusedError("an instance of a class")


def _no_bytes(*arguments: object) -> bytes:
    """bytes(), which is how protocols 0 to 2 write none."""
    if arguments:
        raise _RefusedError("a call of bytes with arguments")
    return b""


KNOWN: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("copy_reg", "_reconstructor"): _instance,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Buffer for core in ("core", "_core")},
}
"""Every name that a file may use, and its stand-in."""


def _usable(shape: object) -> bool:
    """True for one or two dimensions; rows without values are not usable, since there could be any number of them."""
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        return False
    return len(shape) == 1 or (len(shape) == 2 and shape[1] > 0)


def _bytes(content: object) -> bytes:
    """The bytes of an array; Python 2 wrote them as a text."""
    if isinstance(content, str):
        return content.encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise _RefusedError(f"an array whose values are {_name(content)}")
    return bytes(content)


def _objects(shape: tuple[int, ...], content: object) -> list[Any]:
    """An object array's values, a row at a time where there are two dimensions."""
    if not isinstance(content, list) or math.prod(shape) != len(content):
        raise _RefusedError(f"an object array of shape {shape} with other values")
    return (
        content
        if len(shape) == 1
        else [content[start : start + shape[1]] for start in range(0, len(content), shape[1])]
    )


def _rows(content: object, budget: int) -> list[list[Item]]:
    """The entries as lists of whole numbers and texts.

    Args:
        content: what was read.
        budget: how many values there can be, since each takes a byte or more where none is used twice.
    """
    rows = []
    for number, entry in enumerate(_objects_of_pair(_sequence(content, "its content"))):
        values = _sequence(entry, f"entry {number}")
        budget -= len(values)
        if budget < 0:
            raise _RefusedError("more values than bytes, the same ones again and again")
        rows.append([_item(value, number) for value in values])
    return rows


def _objects_of_pair(entries: list[Any]) -> list[Any]:
    """The objects where the entries are the pair of objects and scores: two lists whose own entries are lists."""
    pair = [_sequence(entry, f"entry {number}") for number, entry in enumerate(entries)] if len(entries) == 2 else []
    if not any(pair) or not all(isinstance(item, list | tuple | _Array) for part in pair for item in part):
        return entries
    objects, scores = pair
    if len(objects) != len(scores):
        raise _RefusedError(f"the objects of {len(objects)} images and the scores of {len(scores)}")
    return objects


def _sequence(value: object, where: str) -> list[Any]:
    if isinstance(value, _Array):
        value = value.values()
    if not isinstance(value, list | tuple):
        raise _RefusedError(f"{_name(value)} as {where}")
    return list(value)


def _item(value: object, number: int) -> Item:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > 63:
            raise _RefusedError(f"a number of {value.bit_length()} bits in entry {number}, more than an index has")
        return value
    raise _RefusedError(f"{_name(value)} in entry {number}, which is neither a whole number nor a name")


def _name(value: object) -> str:
    return f"the name {value}" if isinstance(value, _Function) else f"a value of type {type(value).__name__.strip('_')}"
