"""Objects of S3 buckets that are deleted only if they hold the bytes that they should.

Nothing is moved aside there in one step. What stands in for that is the bucket's own: it deletes
on the condition that an object still has the ETag that its bytes were read with, or it keeps
versions, so that a deletion can be looked at and taken back. Which of them a bucket does is tried
on an object of our own: stores, and clients, that do not know the condition delete all the same.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from archive_pipeline.flight.aside import PREFIX, Kept
from archive_pipeline.flight.locations import _filesystem, _one_line

PROTOCOLS = "s3://", "s3a://"
PROBE = f"{PREFIX}probe"  # hidden: no flight has it
MARK = b"`archive retire` learned from this object how its bucket deletes; it may go\n"
NO_ETAG = f'"{"0" * 32}"'  # of no object
NULL = "null"  # S3's name for the version of what is written while none are kept
CHUNK = 1 << 20
NO_WAY = (
    "its bucket neither deletes on a condition (If-Match) nor keeps versions, so that a file that "
    "is written just then would be lost"
)


@dataclass(frozen=True)
class Way:
    """How a bucket deletes.

    Attributes:
        conditional: only what still has the ETag that is named.
        versioned: what is deleted is kept as an earlier version.
    """

    conditional: bool
    versioned: bool


@dataclass(frozen=True)
class Held:
    """An object whose bytes were just read, and are the ones that were asked for.

    Attributes:
        etag: changes with its bytes.
        version: its id; "null" where the bucket kept none when it was written.
    """

    url: str
    etag: str
    version: str


def in_bucket(place: object) -> bool:
    """Whether a place is an object of S3."""
    return isinstance(place, str) and place.startswith(PROTOCOLS)


def plain(url: str) -> str:
    """A URL of S3 in one spelling, without slashes at its end."""
    return f"s3://{url.partition('://')[2].rstrip('/')}" if in_bucket(url) else url.rstrip("/")


def bucket_of(url: str) -> str:
    """The URL of an object's bucket."""
    return "/".join(plain(url).split("/")[:3])


def read(url: str, sha256: str) -> Held:
    """Read an object's bytes.

    Raises:
        Kept: they have another SHA-256, or cannot be read.
    """
    fs, bucket, key = _address(url)
    try:
        with _one_line():
            from fsspec.asyn import sync

            digest, etag, version = sync(fs.loop, _digest, fs, bucket, key)
    except OSError as error:
        raise Kept(f"it cannot be read: {error}") from error
    if digest != sha256:
        raise Kept("it was changed since it was archived")
    if not etag:
        raise Kept("its store tells no ETag of it")
    return Held(url, etag, version)


def way_of(folder: str) -> Way:
    """Find out how the bucket of a folder deletes, by an object that is written there and goes.

    Raises:
        Kept: nothing can be written there.
    """
    fs, bucket, key = _address(f"{plain(folder)}/{PROBE}")
    try:
        with _one_line():
            written = fs.call_s3("put_object", Bucket=bucket, Key=key, Body=MARK)
    except OSError as error:
        raise Kept(f"its bucket lets nothing be written to try how it deletes: {error}") from error
    versioned = _version(written) != NULL
    try:
        with _one_line():
            conditional = _is_conditional(fs, bucket, key, written["ETag"])
    except OSError as error:
        raise Kept(f"how its bucket deletes cannot be found out: {error}") from error
    finally:
        _clear(fs, bucket, key, versioned)
    return Way(conditional, versioned)


def delete(held: Held, way: Way) -> None:
    """Delete an object that was read, if it still is the one.

    Raises:
        Kept: it is another by now, or cannot be deleted. It is there.
        OSError: whether it is there cannot be told.
    """
    fs, bucket, key = _address(held.url)
    if not way.conditional and not way.versioned:
        raise Kept(NO_WAY)
    condition = {"IfMatch": held.etag} if way.conditional else {}
    try:
        with _one_line():
            fs.call_s3("delete_object", Bucket=bucket, Key=key, **condition)
    except OSError as error:
        # an answer that was lost and asked for again fails, too
        if not is_there(held.url):
            return
        changed = _status(error.__cause__) == 412
        reason = "it was changed just now" if changed else f"it cannot be deleted: {error}"
        raise Kept(reason) from error
    if not condition and take_back(held.url, held.version):
        raise Kept("it was changed just now")


def is_there(url: str) -> bool:
    """Whether an object exists; of one with versions, whether it shows.

    Raises:
        OSError: that cannot be told; its text is one line.
    """
    try:
        fs, bucket, key = _address(url)
        with _one_line():
            fs.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    except Kept as error:
        raise OSError(str(error)) from error
    except OSError as error:
        raise OSError(f"it is not known whether it is there, run it again: {error}") from error
    return True


def take_back(url: str, version: str) -> bool:
    """Take back a deletion that hid a later version than the one that was to go.

    Returns:
        Whether a later one was there; it shows.

    Raises:
        OSError: that cannot be told, or not be done; its text is one line.
    """
    try:
        fs, bucket, key = _address(url)
        with _one_line():
            versions, markers = _history(fs, bucket, key)
            if not versions or versions[0]["VersionId"] == version:
                return False
            hidden = {entry["VersionId"]: entry for entry in versions}
            since = hidden[version]["LastModified"] if version in hidden else None
            for marker in markers:  # it showed when it was read: those behind it came later
                if since is None or marker["LastModified"] >= since:
                    _forget(fs, bucket, key, marker["VersionId"])
    except Kept as error:
        raise OSError(str(error)) from error
    except OSError as error:
        raise OSError(f"a later version of it may be hidden by a delete marker: {error}") from error
    return True


def _address(url: str) -> tuple[Any, str, str]:
    """fsspec's file system, the bucket and the key.

    Raises:
        Kept: there are none, or s3fs would take another object for it.
    """
    try:
        with _one_line():
            fs, path = _filesystem(url)
    except OSError as error:
        raise Kept(str(error)) from error
    bucket, key, version = fs.split_path(path)
    # behind "?versionId=" s3fs takes a version for what may be the object's name
    if version is not None or f"s3://{bucket}/{key}" != plain(url):
        raise Kept("its name can be taken for that of another object")
    return fs, bucket, key


async def _digest(fs: Any, bucket: str, key: str) -> tuple[str, str, str]:
    """SHA-256, ETag and version of an object, all of one answer."""
    found = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    digest = hashlib.sha256()
    async with found["Body"] as body:
        while data := await body.read(CHUNK):
            digest.update(data)
    return digest.hexdigest(), found.get("ETag") or "", _version(found)


def _version(answer: dict[str, Any]) -> str:
    """The version that an answer names."""
    return str(answer.get("VersionId") or NULL)


def _is_conditional(fs: Any, bucket: str, key: str, etag: str) -> bool:
    """Whether our own object stays if another ETag is named, and goes if its own is."""
    for named, stays in ((NO_ETAG, True), (etag, False)):
        try:
            fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=named)
        except OSError as error:
            if not stays or _status(error) != 412:
                return False
        else:
            if stays:
                return False
        try:
            fs.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            if stays:
                return False
        else:
            if not stays:
                return False
    return True


def _clear(fs: Any, bucket: str, key: str, versioned: bool) -> None:
    """Leave nothing of our own object, as far as that is allowed."""
    with suppress(OSError), _one_line():
        if not versioned:
            fs.call_s3("delete_object", Bucket=bucket, Key=key)
            return
        for entry in [entry for some in _history(fs, bucket, key) for entry in some]:
            _forget(fs, bucket, key, entry["VersionId"])


def _history(fs: Any, bucket: str, key: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Versions and delete markers of an object, the latest first."""
    versions: list[dict[str, Any]] = []
    markers: list[dict[str, Any]] = []
    where: dict[str, str] = {}
    while True:
        found = fs.call_s3("list_object_versions", Bucket=bucket, Prefix=key, **where)
        versions += (v for v in found.get("Versions", ()) if v["Key"] == key)
        markers += (m for m in found.get("DeleteMarkers", ()) if m["Key"] == key)
        # names that go on behind the key come after it
        if not found.get("IsTruncated") or found.get("NextKeyMarker") != key:
            return versions, markers
        where = {"KeyMarker": key, "VersionIdMarker": found["NextVersionIdMarker"]}


def _forget(fs: Any, bucket: str, key: str, version: str) -> None:
    fs.call_s3("delete_object", Bucket=bucket, Key=key, VersionId=version)


def _status(error: BaseException | None) -> int | None:
    """HTTP's status of what S3 answered."""
    response = getattr(getattr(error, "__cause__", None), "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status is not None else None
