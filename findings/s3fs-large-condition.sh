#!/usr/bin/env bash
# s3fs: a condition on a write is asked of S3 while the object is small, and dropped when it is large.
#
# Keyword arguments of `pipe_file`, `put_file` and `open` go to the S3 call that they fit; others are left
# out without a word. `IfMatch` (replace only what I read) and `IfNoneMatch="*"` (only if nothing is there)
# fit PutObject. From twice the chunk size on, 100 MiB in `pipe_file`, the same call is a multipart upload:
# its keywords go to CreateMultipartUpload, which knows no conditions, while CompleteMultipartUpload, which
# does, gets none of them. So a lost update shows in no test with small data, and large objects, an image's
# shard, are replaced though another writer came first. `mode="create"` puts its condition at the right
# call; for "replace only what I read" there is no such mode, and a misspelt keyword is dropped at any size.
# s3fs documents `mode="create"` and says nothing of conditions among the keywords.
#
# Seen with s3fs 2026.9.0, aiobotocore 3.10.0, moto 5.2.5 as the server, Python 3.11, Linux x86-64, chunks
# of 5 MiB, an object there already:
#   1 byte   IfNoneMatch kept, IfMatch of another ETag kept, mode="create" kept, misspelt replaced
#   11 MiB   IfNoneMatch replaced, IfMatch of another ETag replaced, mode="create" kept
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "s3fs==2026.9.0" "aiobotocore==3.10.0" "moto==5.2.5" "flask==3.1.3" "flask-cors==6.0.5"
cd "$folder"
export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_DEFAULT_REGION=us-east-1
venv/bin/python - <<'PYTHON'
import logging
from typing import Any

import s3fs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
CHUNK = 5 * 2**20
KEY = "bucket/key"
OTHER = '"00000000000000000000000000000000"'  # an ETag that the object never had


def outcome(fs: s3fs.S3FileSystem, data: bytes, **condition: Any) -> str:
    """What has become of an object after a write whose condition does not hold."""
    fs.pipe_file(KEY, b"old")
    try:
        fs.pipe_file(KEY, data, chunksize=CHUNK, **condition)
    except OSError:
        pass
    return "kept" if fs.cat_file(KEY) == b"old" else "replaced"


server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
try:
    host, port = server.get_host_and_port()
    fs = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}")
    fs.mkdir("bucket")
    seen = {}
    for size in (1, 11 * 2**20):
        for condition in (
            {"IfNoneMatch": "*"}, {"IfMatch": OTHER}, {"mode": "create"}, {"IfNoneMatched": "*"}
        ):
            name = next(iter(condition))
            seen[size, name] = outcome(fs, b"n" * size, **condition)
            print(f"{size:9} bytes, {name:13} {seen[size, name]}")
finally:
    server.stop()
small, large = (
    [seen[size, name] for name in ("IfNoneMatch", "IfMatch", "mode", "IfNoneMatched")]
    for size in (1, 11 * 2**20)
)
assert small == ["kept", "kept", "kept", "replaced"]
assert large == ["replaced", "replaced", "kept", "replaced"]
PYTHON
