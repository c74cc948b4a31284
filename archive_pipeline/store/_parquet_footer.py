"""What a Parquet file says of its columns, read without pyarrow.

pyarrow ends the whole process where it is asked for columns' metadata that are damaged (26.0:
`terminate called after throwing an instance of 'parquet::ParquetException'`). Reading the columns
themselves is safe, so only this look before it is our own. A footer is a struct in Thrift's
compact protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_BYTES = 1 << 20  # of a footer; an index's has some 15 kB a million images
MAX_DEPTH = 16  # of structs and lists
MAGIC = b"PAR1"


@dataclass(frozen=True)
class Chunk:
    """One column of one row group.

    Attributes:
        column: its name, or that of the struct that it is a field of.
        codec, encodings: numbers as the Parquet format has them.
        values, size: how many there are and their bytes without compression, as the file says.
    """

    column: str
    codec: int
    encodings: frozenset[int]
    values: int
    size: int


def read_footer(data: bytes) -> tuple[int, list[Chunk]]:
    """Number of rows, and all chunks of a file.

    Raises:
        ValueError: the footer is damaged.
    """
    length = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[-4:] != MAGIC or length > min(len(data) - 12, MAX_BYTES):
        raise ValueError("it has no footer, or one that is larger than allowed")
    try:
        footer = _Compact(data[len(data) - 8 - length : -8]).struct(0)
        chunks = [chunk[3] for group in footer[4] for chunk in group[1]]
        return _number(footer[3]), [
            Chunk(
                chunk[3][0].decode(),
                _number(chunk[4]),
                frozenset(map(_number, chunk[2])),
                _number(chunk[5]),
                _number(chunk[6]),
            )
            for chunk in chunks
        ]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("its footer is damaged") from error


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("its footer is damaged")
    return value


class _Compact:
    """Values of Thrift's compact protocol; structs are dicts by their fields' numbers."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            # a field's truth is its kind
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        if kind in (1, 2, 3):  # a boolean in a list, a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:  # a floating-point number
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):  # a list, a set
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            self._expect(count)  # a byte each, at least
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"its footer has a field of kind {kind}")

    def _expect(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise ValueError("its footer ends early")

    def _bytes(self, count: int) -> bytes:
        self._expect(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("its footer has a number that is too large")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
