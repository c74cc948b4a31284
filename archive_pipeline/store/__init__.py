"""The archive on Zarr v3: layout, commits, index, locks, leases, images.

`Archive` and `ArchivedImage` read, `ImageWriter` writes; the layout is told in `archive`.
May import `codec`, `pcdc`, `flight` and `geo`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
