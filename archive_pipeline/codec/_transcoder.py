"""JPEG files to JPEG XL and back, in a process of its own; run as a script by `transcoding`.

A stream of a few kilobytes can make libjxl take gigabytes, or crash it. Here it has the memory and
the time that a request allows, and nothing else is lost with it.

A request is `REQUEST` and the data, an answer `ANSWER` and the data or the reason.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# "e" encode or "d" decode; bytes of memory, seconds of the processor, bytes of the answer at most
REQUEST = struct.Struct("<cQQQQ")
ANSWER = struct.Struct("<?Q")  # whether it is an answer, and its length


def limit_to(memory: int, seconds: int) -> None:
    """Let this process take so much more than it has taken; only Linux keeps to the memory."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def main() -> None:
    """Answer requests until there are no more."""
    import imagecodecs

    codecs: dict[bytes, Callable[..., bytes | bytearray]] = {
        b"e": imagecodecs.jpegxl_encode_jpeg,
        b"d": imagecodecs.jpegxl_decode_jpeg,
    }
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        kind, memory, seconds, most, size = REQUEST.unpack(head)
        data = requests.read(size)
        limit_to(memory, seconds)
        try:
            done, answer = True, codecs[kind](data, out=most, numthreads=1)
        except Exception as error:
            done, answer = False, (str(error) or type(error).__name__).encode()
        answers.write(ANSWER.pack(done, len(answer)))
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    main()
