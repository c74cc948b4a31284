"""Archive drone flights with a learned codec in ordinary Zarr v3 archives.

    import archive_pipeline as ap

    ap.ingest("flight_dir", ratio=48)           # into ./archive.zarr
    pixels = ap.open("archive.zarr").window((-94.7963, 29.2842, -94.7958, 29.2846))
    ap.restore("archive.zarr", output="restored")

`ingest`, `restore`, `check`, `info`, `remove`, `retire`, `verify_detection` and
`verify_photogrammetry` are the commands of `archive`, with their options' names; `open` gives
images as arrays. Everything that can go wrong is an `ArchivePipelineError`. A module is loaded when
something in it is first asked for.
"""

import lazy_loader

from archive_pipeline._version import __version__

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]
