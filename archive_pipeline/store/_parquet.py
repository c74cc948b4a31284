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


def schema_of(data: bytes) -> pa.Schema:
    """What columns a file has; nothing of them is read.

    Raises:
        ValueError, pyarrow.ArrowException: the file is damaged.
    """
    return pa.parquet.read_schema(pa.BufferReader(data))


def read_table(data: bytes, schema: pa.Schema) -> pa.Table:
    """A table of this schema.

    Raises:
        ValueError, pyarrow.ArrowException: the file is damaged, has other columns, or holds more
            than its size lets expect.
    """
    texts = [field.name for field in schema if _is_text(field.type)]
    file = pa.parquet.ParquetFile(
        pa.BufferReader(data),
        read_dictionary=texts,
        page_checksum_verification=True,
    )
    most = LEAST + EXPANSION * len(data)
    _check(file.metadata, set(schema.names), most)
    batches: list[pa.RecordBatch] = []
    total = 0
    for batch in file.iter_batches(16 * BATCH, columns=schema.names, use_threads=False):
        for name in schema.names:
            column = batch.column(name)
            total += _text_bytes(column) if name in texts else column.nbytes
        if total > most:
            raise ValueError(f"its columns take more than {most} bytes")
        batches.append(batch)
    return pa.Table.from_batches(batches).cast(schema) if batches else schema.empty_table()


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_binary(plain))


def _check(metadata: Any, columns: set[str], most: int) -> None:
    """Refuse what no release writes, and what says of itself that it is too much."""
    total = 0
    for group in range(metadata.num_row_groups):
        chunks = (metadata.row_group(group).column(n) for n in range(metadata.num_columns))
        for chunk in (c for c in chunks if c.path_in_schema.partition(".")[0] in columns):
            total += max(chunk.total_uncompressed_size, chunk.num_values)
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
