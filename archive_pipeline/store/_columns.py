"""Arrow columns of lists, made of arrays at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

# The name that Parquet has for what lists hold.
NUMBERS = pa.list_(pa.field("element", pa.float64()))
SMALL_NUMBERS = pa.list_(pa.field("element", pa.float32()))
WHOLE_NUMBERS = pa.list_(pa.field("element", pa.int64()))
TEXTS = pa.list_(pa.field("element", pa.string()))


def lists(values: Any, lengths: Any) -> pa.ListArray:
    """Lists one after the other.

    Args:
        values: what they hold, (sum of lengths,).
        lengths: whole numbers (n,); those of length 0 are null.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    missing = np.append(lengths == 0, False)
    values = pa.array(values)
    kind = pa.list_(pa.field("element", values.type))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32(), mask=missing), values, type=kind)
