"""Models and allocation policies that an archive carries: readers of it need nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress

from archive_pipeline.pcdc.model_files import CONFIG, DENOISER_FILES, WEIGHTS
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, ImageEntry, is_model, policy_key

_TRANSFORM = frozenset((CONFIG, WEIGHTS))
_FILES = _TRANSFORM.union(DENOISER_FILES)
_DECODERS = {  # by a model's files; with some of a denoiser's its hash is another
    _TRANSFORM: ["deterministic"],
    _FILES: ["deterministic", "diffusion"],
}


def add_model(archive: Archive, sha256: str, files: dict[str, bytes]) -> None:
    """Store a model's files, where they are not there or damaged.

    Raises:
        ArchiveError: the store fails.
    """
    with suppress(ArchiveError):
        read_model(archive, sha256)
        return
    for name in sorted(files, reverse=True):  # config.json last: then the folder is complete
        archive.write_key(f"models/{sha256}/{name}", files[name])


def read_model(archive: Archive, sha256: str) -> dict[str, bytes]:
    """The files of a stored model.

    Raises:
        ArchiveError: one is missing or too large, or they do not have this hash.
    """
    from archive_pipeline.pcdc.model_files import DENOISER_FILES, FILES, MAX_BYTES, digest

    files = {}
    for name in FILES + DENOISER_FILES:
        data = archive.read_key(f"models/{sha256}/{name}", MAX_BYTES[name])
        if data is None and name in DENOISER_FILES:
            continue
        if data is None:
            raise ArchiveError(f"{archive.url}: models/{sha256}/{name} is missing")
        files[name] = data
    if digest(files) != sha256:
        raise ArchiveError(f"{archive.url}: models/{sha256} is damaged: its hash is another")
    return files


def ensure_model(archive: Archive, sha256: str) -> None:
    """Make a stored model known to the codec, unless this process knows it already.

    Raises:
        ArchiveError: it is missing, or its contents do not have this hash.
    """
    from archive_pipeline.codec.models import is_known, register

    if not is_known(sha256):
        register(read_model(archive, sha256))


def add_policy(archive: Archive, data: bytes) -> str:
    """Store an allocation policy's file, for workers that encode; returns its SHA-256.

    Raises:
        ArchiveError: the store fails.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        read_policy(archive, sha256)
    except ArchiveError:  # it is not there, or damaged
        archive.write_key(policy_key(sha256), data)
    return sha256


def ensure_policy(archive: Archive, sha256: str, model: str, device: str = "cpu") -> None:
    """Make a stored policy for a known model known to the codec, unless it is already.

    Args:
        device: where the model will be used.

    Raises:
        ArchiveError: it is missing, damaged, or for another codec.
    """
    from archive_pipeline.codec.models import codec_for, is_known_policy, register_policy
    from archive_pipeline.pcdc.policy import PolicyError

    if is_known_policy(sha256):
        return
    data = read_policy(archive, sha256)
    try:
        register_policy(data, codec_for(model, device).model.networks.config.latents)
    except PolicyError as error:
        raise ArchiveError(f"{archive.url}: {policy_key(sha256)}: {error}") from error


def read_policy(archive: Archive, sha256: str) -> bytes:
    """Read a stored policy's file.

    Raises:
        ArchiveError: it is missing, or its contents do not have this hash.
    """
    from archive_pipeline.pcdc.policy import MAX_FILE_BYTES

    data = archive.read_key(policy_key(sha256), MAX_FILE_BYTES)
    if data is None:
        raise ArchiveError(f"{archive.url}: {policy_key(sha256)} is missing")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArchiveError(f"{archive.url}: {policy_key(sha256)} is damaged: its hash is another")
    return data


def decoders_of(keys: Iterable[str]) -> dict[str, list[str]]:
    """What models can decode with, by their SHA-256: "deterministic", "diffusion" or both.

    Args:
        keys: of an archive, those below models/.
    """
    files: dict[str, set[str]] = {}
    for key in keys:
        _, sha256, *name = key.split("/", 2)
        if is_model(sha256):
            files.setdefault(sha256, set()).update(name)
    return {sha256: [*_DECODERS.get(_FILES & files[sha256], [])] for sha256 in sorted(files)}


def require_denoiser(archive: Archive, entry: ImageEntry) -> None:
    """Make sure that an image can be decoded with denoising steps; lossless ones always can.

    Raises:
        ArchiveError: its model has no denoiser, or is missing or damaged.
    """
    if entry.record["codec"] != "pcdc":
        return
    from archive_pipeline.codec.models import has_denoiser

    sha256 = entry.record["model"]
    ensure_model(archive, sha256)
    if not has_denoiser(sha256):
        raise ArchiveError(
            f"{entry.flight}/{entry.id}: its model {sha256[:12]} has no denoiser; "
            "--steps 0 restores it"
        )
