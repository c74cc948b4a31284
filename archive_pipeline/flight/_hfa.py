"""The names of other files in an Erdas Imagine file (HFA), which may be a stranger's."""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

# Next, previous, parent, child, data, size of the data, name, type.
_ENTRY = struct.Struct("<6I64s32s")
_MOST_ENTRIES = 1 << 17
_MOST_BYTES = 1 << 20
_TEXT = re.compile(rb"[\x20-\x7e]{2,}")


def companions(file: BinaryIO) -> list[str]:
    """Names of the files that hold an image's pixels (`.ige`) or overviews (`.rrd`).

    GDAL joins them to the image's folder. Names of overviews come with what stands around them.

    Raises:
        ValueError: the file is damaged, or keeps a name where it cannot be told from other data;
            one line.
    """
    try:
        return _companions(file)
    except struct.error as error:
        raise ValueError("damaged: its tree of entries (HFA) cannot be followed") from error


def _companions(file: BinaryIO) -> list[str]:
    file.seek(16)
    file.seek(struct.unpack("<I", file.read(4))[0])
    _, _, root, _, dictionary = struct.unpack("<IIIHI", file.read(18))
    file.seek(dictionary)
    known = _is_usual(file.read(_MOST_BYTES).partition(b"\0")[0].lower())
    found: list[str] = []
    pending, seen = [root], {0}
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        if len(seen) > _MOST_ENTRIES:
            raise ValueError("damaged: its tree (HFA) has too many entries")
        file.seek(at)
        head = file.read(_ENTRY.size)
        following, _, _, child, start, size, name, kind = _ENTRY.unpack(head)
        pending += [following, child]
        name, kind = (text.partition(b"\0")[0].lower() for text in (name, kind))
        if name not in (b"externalrasterdms", b"rrdnameslist"):
            continue
        file.seek(start)
        data = file.read(min(size, _MOST_BYTES))
        if name == b"rrdnameslist":
            texts = _TEXT.findall(data)
        elif known and kind == b"imgexternalraster":
            texts = [data[8 : 8 + struct.unpack_from("<I", data)[0]].rstrip(b"\0")]
        else:
            raise ValueError("names the file of its pixels in a way that is not known")
        found += [text.decode("latin-1") for text in texts]
    return found


def _is_usual(types: bytes) -> bool:
    """Whether a dictionary, in lower case, has the name where GDAL and Erdas put it."""
    raster = re.findall(rb"\{([^{}]*)\}imgexternalraster,", types)
    texts = types.count(b"}emif_string,")
    return (
        types.count(b"}imgexternalraster,") == len(raster) == 1
        and raster[0].startswith(b"1:oemif_string,filename,")
        and texts == types.count(b"{0:pcstring,}emif_string,") > 0
    )
