"""JPEG files as JPEG XL streams, some 20 % smaller, and back to the byte.

libjxl does it, by way of imagecodecs, in processes of its own (`_transcoder`).
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from archive_pipeline.codec import _transcoder
from archive_pipeline.codec._transcoder import ANSWER, REQUEST
from archive_pipeline.errors import require

EXTRA = "jpegxl"  # of this package's, which brings imagecodecs
JXL_SIGNATURE = b"\0\0\0\x0cJXL \r\n\x87\n"
# Of frames that are recompressed: at 57 bytes a pixel, libjxl 0.11 takes 3.8 GB for so many.
MAX_PIXELS = 1 << 26
# Measured with libjxl 0.11: 57 bytes a pixel to encode, 18 to decode, beside the data themselves.
_PIXEL_BYTES = {b"e": 96, b"d": 48}
_BASE_BYTES = 128 << 20
_DATA_TIMES = 8  # the data's size, for copies of it and buffers that grow
_SECONDS = 60
_PIXELS_A_SECOND = 250_000  # a tenth of what a slow machine does


class TranscodingError(ValueError):
    """A stream that libjxl refuses, or that takes more than its size allows."""


class _Transcoder:
    """One process that recompresses or reconstructs a JPEG at a time."""

    def __init__(self) -> None:
        script = str(Path(_transcoder.__file__))
        # -P: its folder's modules are not to hide others of their name
        self._process = subprocess.Popen(
            [sys.executable, "-P", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, kind: bytes, pixels: int, most: int, data: bytes) -> bytes:
        """The data transcoded, at most so many bytes.

        Raises:
            TranscodingError: they cannot be.
            EOFError: the process is gone.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        memory = _BASE_BYTES + _PIXEL_BYTES[kind] * pixels + _DATA_TIMES * (len(data) + most)
        seconds = _SECONDS + pixels // _PIXELS_A_SECOND
        try:
            process.stdin.write(REQUEST.pack(kind, memory, seconds, most, len(data)))
            process.stdin.write(data)
            process.stdin.flush()
        except OSError as error:
            raise EOFError from error
        head = process.stdout.read(ANSWER.size)
        if len(head) < ANSWER.size:
            raise EOFError
        done, size = ANSWER.unpack(head)
        answer = process.stdout.read(size)
        if len(answer) < size:
            raise EOFError
        if not done:
            raise TranscodingError(answer.decode(errors="replace"))
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        self._process.kill()
        self._process.wait()


_lock = threading.Lock()
_idle: list[_Transcoder] = []


def recompress(jpeg: bytes, pixels: int) -> bytes:
    """A JPEG file as a JPEG XL stream that `reconstruct` makes the same file of; this is tried.

    Args:
        pixels: of the picture.

    Raises:
        TranscodingError: libjxl refuses it (CMYK, 4:1:1, 12 bits, damage), or it is too large.
        NotInstalled: imagecodecs is not.
    """
    if pixels > MAX_PIXELS:
        raise TranscodingError(f"it has more than {MAX_PIXELS >> 20} megapixels")
    stream = _transcode(b"e", jpeg, pixels, len(jpeg) + (64 << 10))
    if reconstruct(stream, len(jpeg), pixels) != jpeg:
        raise TranscodingError("it does not come back to the byte")
    return stream


def reconstruct(stream: bytes, size: int, pixels: int) -> bytes:
    """The JPEG file that a JPEG XL stream was made of.

    Args:
        size: of the file, in bytes.
        pixels: of the picture, which bound what memory is taken.

    Raises:
        TranscodingError: the stream is damaged, or of another file.
        NotInstalled: imagecodecs is not.
    """
    jpeg = _transcode(b"d", stream, pixels, size)
    if len(jpeg) != size:
        raise TranscodingError(f"it is a JPEG of {len(jpeg)} bytes, not {size}")
    return jpeg


def _transcode(kind: bytes, data: bytes, pixels: int, most: int) -> bytes:
    require("imagecodecs", "JPEG frames kept as JPEG XL: reading them", EXTRA)
    with _lock:
        transcoder = _idle.pop() if _idle else None
    transcoder = transcoder or _Transcoder()
    try:
        answer = transcoder.ask(kind, pixels, most, data)
    except TranscodingError:
        _keep(transcoder)
        raise
    except EOFError:
        transcoder.close()
        raise TranscodingError("libjxl takes more than such a picture does, or crashes") from None
    except BaseException:  # interrupted: what it answers next is not for the next request
        transcoder.close()
        raise
    _keep(transcoder)
    return answer


def _keep(transcoder: _Transcoder) -> None:
    """Keep a process for the next request; one a core at most."""
    with _lock:
        if len(_idle) < (os.cpu_count() or 1):
            _idle.append(transcoder)
            return
    transcoder.close()


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()


if hasattr(os, "register_at_fork"):  # a fork's answers would go to its parent
    os.register_at_fork(after_in_child=_idle.clear)
