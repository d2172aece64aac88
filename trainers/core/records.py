"""Examples as bytes and back: dataclasses of arrays, numbers and JSON values, without a pickle that could run code."""

import dataclasses
import json
import struct
from functools import cache
from typing import Any, TypeVar, get_type_hints

import numpy as np

T = TypeVar("T")

LENGTH = struct.Struct("<I")


def packed(value: Any) -> bytes:
    """A dataclass whose fields are dataclasses, one-dimensional arrays of int64 or bool, or JSON values.

    Token ids take four bytes, truth values a bit.
    """
    arrays: list[np.ndarray] = []
    skeleton = json.dumps(_skeleton(value, arrays), allow_nan=False).encode()
    return LENGTH.pack(len(skeleton)) + skeleton + b"".join(map(_array_bytes, arrays))


def unpacked(kind: type[T], content: bytes) -> T:
    """What :func:`packed` was given, which was of this class."""
    (size,) = LENGTH.unpack_from(content)
    end = LENGTH.size + size
    found: T = _Reader(content, end).value(kind, json.loads(content[LENGTH.size : end]))
    return found


def _skeleton(value: Any, arrays: list[np.ndarray]) -> Any:
    """JSON in which an array is its length; the arrays follow in the order in which they stand there."""
    if dataclasses.is_dataclass(value):
        return [_skeleton(getattr(value, field.name), arrays) for field in dataclasses.fields(value)]
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return [len(value), value.dtype == np.bool_]
    return value


def _array_bytes(array: np.ndarray) -> bytes:
    if array.dtype == np.bool_:
        return np.packbits(array).tobytes()
    small = array.astype(np.int32)
    assert np.array_equal(small, array), "no token id is so large"
    return small.tobytes()


class _Reader:
    def __init__(self, content: bytes, offset: int) -> None:
        self._content, self._offset = content, offset

    def value(self, kind: Any, skeleton: Any) -> Any:
        if dataclasses.is_dataclass(kind):
            return kind(*map(self.value, _field_types(kind), skeleton))  # type: ignore[arg-type, operator]
        return self._array(*skeleton) if kind is np.ndarray else skeleton

    def _array(self, length: int, truth: bool) -> np.ndarray:
        if truth:
            return np.unpackbits(self._next(np.uint8, -(-length // 8)), count=length).astype(bool)
        return self._next(np.int32, length).astype(np.int64)

    def _next(self, kind: Any, count: int) -> Any:
        found = np.frombuffer(self._content, kind, count, self._offset)
        self._offset += found.nbytes
        return found


@cache
def _field_types(kind: Any) -> list[Any]:
    hints = get_type_hints(kind)
    return [hints[field.name] for field in dataclasses.fields(kind)]
