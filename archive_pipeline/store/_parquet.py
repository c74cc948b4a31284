"""Parquet files that a stranger may have made: read within bounds of their size.

Compression, dictionaries and shared prefixes let a file of a megabyte hold terabytes. Snappy, as
this package writes it, makes no more than some twenty bytes of one, and the rest is counted before
it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

MAX_BYTES = 1 << 30  # of a file
EXPANSION = 32  # bytes of texts for each of the file
LEAST = 16 << 20  # bytes of texts that any file may hold
BATCH = 1024  # rows
COMPRESSIONS = {"UNCOMPRESSED", "SNAPPY"}
ENCODINGS = {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY", "BIT_PACKED"}


def read_texts(data: bytes, columns: Sequence[str]) -> list[list[Any]]:
    """Columns of texts, one list each; missing texts are None.

    Raises:
        ValueError, pyarrow.ArrowException: the file is damaged, has no such columns, or holds more
            than its size lets expect.
    """
    file = pa.parquet.ParquetFile(
        pa.BufferReader(data),
        read_dictionary=list(columns),  # a text that many rows share is one
        page_checksum_verification=True,
    )
    most = LEAST + EXPANSION * len(data)
    _check(file.metadata, set(columns), most)
    found: list[list[Any]] = [[] for _ in columns]
    total = 0
    for batch in file.iter_batches(BATCH, columns=list(columns), use_threads=False):
        for texts, name in zip(found, columns, strict=True):
            column = batch.column(name)
            total += _text_bytes(column)
            if total > most:
                raise ValueError(f"its texts take more than {most} bytes")
            texts += column.to_pylist()
    return found


def _check(metadata: Any, columns: set[str], most: int) -> None:
    """Refuse what no release writes, and what says of itself that it is too much."""
    total = 0
    for group in range(metadata.num_row_groups):
        chunks = (metadata.row_group(group).column(n) for n in range(metadata.num_columns))
        for chunk in (chunk for chunk in chunks if chunk.path_in_schema in columns):
            total += chunk.total_uncompressed_size
            if chunk.compression not in COMPRESSIONS or not ENCODINGS.issuperset(chunk.encodings):
                raise ValueError(f"{chunk.compression} {chunk.encodings} are not used in archives")
    if total > most or metadata.num_rows * len(columns) > most:
        raise ValueError(f"its columns take more than {most} bytes")


def _text_bytes(column: Any) -> int:
    """Bytes of a column's texts, each row's counted."""
    if not pa.types.is_dictionary(column.type):
        raise ValueError(f"{column.type} are no texts")
    lengths = pc.binary_length(column.dictionary)
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
