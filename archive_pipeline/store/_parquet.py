"""Parquet files that a stranger may have made: read within bounds of their size.

Compression, dictionaries and shared prefixes let a file of a megabyte hold terabytes. Snappy, as
this package writes it, makes no more than some twenty bytes of one, and the rest is counted before
it is made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from archive_pipeline.store._parquet_footer import read_footer

MAX_BYTES = 1 << 30  # of a file
EXPANSION = 32  # bytes of texts for each of the file
LEAST = 16 << 20  # bytes of texts that any file may hold
BATCH = 4096  # rows
# By their numbers in the Parquet format.
COMPRESSIONS = {0: "UNCOMPRESSED", 1: "SNAPPY"}
ENCODINGS = {0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 4: "BIT_PACKED", 8: "RLE_DICTIONARY"}


def compressions(schema: pa.Schema, read: Collection[str]) -> dict[str, str]:
    """How to compress each column of a file, by the names that Parquet has for its parts.

    Args:
        read: columns that `read_table` is to read; what others read may expand as it likes.
    """
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(schema.empty_table(), sink)
    parts = pa.parquet.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = [parts.column(n).path for n in range(len(parts))]
    return {path: "SNAPPY" if path.split(".")[0] in read else "ZSTD" for path in paths}


def read_schema(data: bytes) -> pa.Schema:
    """Columns of a file.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    return pa.parquet.read_schema(pa.BufferReader(data))


def read_table(data: bytes, columns: Sequence[str]) -> pa.Table:
    """Columns of numbers, texts and bytes, not of lists; texts and bytes as dictionaries.

    Raises:
        ValueError, pyarrow.ArrowException: the file is damaged, has no such columns, or holds more
            than its size lets expect.
    """
    most = LEAST + EXPANSION * len(data)
    _check(data, set(columns), most)
    schema = read_schema(data)
    if missing := set(columns) - set(schema.names):
        raise ValueError(f"it has no column {min(missing)}")
    texts = [name for name in columns if _is_text(schema.field(name).type)]
    if any(pa.types.is_list(schema.field(name).type) for name in columns):
        raise ValueError("lists may be of any length")
    file = pa.parquet.ParquetFile(
        pa.BufferReader(data),
        read_dictionary=texts,  # a text that many rows share is one
        page_checksum_verification=True,
    )
    batches, total = [], 0
    for batch in file.iter_batches(BATCH, columns=list(columns)):
        total += sum(_text_bytes(batch.column(name)) for name in texts)
        if total > most:
            raise ValueError(f"its texts take more than {most} bytes")
        batches.append(batch)
    if not batches:
        return file.read(columns=list(columns))
    return pa.Table.from_batches(batches).unify_dictionaries().combine_chunks()


def _is_text(kind: pa.DataType) -> bool:
    is_kinds = (pa.types.is_string, pa.types.is_binary)
    is_large_kinds = (pa.types.is_large_string, pa.types.is_large_binary)  # as pandas writes them
    return any(is_kind(kind) for is_kind in (*is_kinds, *is_large_kinds))


def read_texts(data: bytes, columns: Sequence[str]) -> list[list[Any]]:
    """Columns of texts, one list each; missing texts are None.

    Raises: as `read_table` has it.
    """
    table = read_table(data, columns)
    if not all(pa.types.is_dictionary(field.type) for field in table.schema):
        raise ValueError("its columns are no texts")
    return [table[name].to_pylist() for name in columns]


def _check(data: bytes, columns: set[str], most: int) -> None:
    """Refuse what no release writes, and what says of itself that it is too much."""
    rows, chunks = read_footer(data)
    total = 0
    for chunk in (chunk for chunk in chunks if chunk.column in columns):
        total += max(chunk.size, chunk.values)
        if chunk.codec not in COMPRESSIONS or not chunk.encodings <= ENCODINGS.keys():
            raise ValueError(
                f"{chunk.column} has compression {chunk.codec} and encodings "
                f"{sorted(chunk.encodings)}, which are not used in archives"
            )
    if total > most or rows * len(columns) > most:
        raise ValueError(f"its columns take more than {most} bytes")


def _text_bytes(column: Any) -> int:
    """Bytes of a column's texts, each row's counted."""
    lengths = pc.binary_length(column.dictionary)
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
