#!/usr/bin/env bash
# pyarrow: metadata that a Parquet writer is given late are in the file, but not in its schema.
#
# `ParquetWriter.add_key_value_metadata` takes key-value metadata after the rows, which is when a GeoParquet
# writer knows its bounding box. They are written: `read_metadata(...).metadata` has them. But
# `read_schema(...)`, `read_table(...).schema` and `ParquetFile(...).schema_arrow` have none of them, as
# long as the file also holds Arrow's own schema, which is pyarrow's default: reading takes the schema's
# metadata from there. With `store_schema=False` the same keys are in all four places.
# So code that looks for a key in the schema's metadata finds it in files whose writer was given it at
# the start, and not in others. Look in `read_metadata`, or give the writer a schema that has the key.
#
# Seen with pyarrow 26.0.1, Python 3.11, Linux x86-64:
#   default      read_metadata [b'ARROW:schema', b'late']   read_schema None       table None   file None
#   no schema    read_metadata [b'late']                    read_schema [b'late']  and so on
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pyarrow==26.0.1"
cd "$folder"
venv/bin/python - <<'PYTHON'
import pyarrow as pa
import pyarrow.parquet as pq

table = pa.table({"x": [1, 2, 3]})
seen = {}
for stored in (True, False):
    with pq.ParquetWriter("a.parquet", table.schema, store_schema=stored) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"late": b"1"})
    places = {
        "read_metadata": pq.read_metadata("a.parquet").metadata,
        "read_schema": pq.read_schema("a.parquet").metadata,
        "table": pq.read_table("a.parquet").schema.metadata,
        "file": pq.ParquetFile("a.parquet").schema_arrow.metadata,
    }
    seen[stored] = {name: sorted(found) if found else None for name, found in places.items()}
    print("default  " if stored else "no schema", seen[stored])
assert seen[True] == {
    "read_metadata": [b"ARROW:schema", b"late"], "read_schema": None, "table": None, "file": None
}
assert set(map(str, seen[False].values())) == {"[b'late']"}
PYTHON
