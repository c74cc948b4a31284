"""Restored pixels as GeoTIFF, JPEG or PNG, with their names and sidecars.

Writes what a `flight.Raster` gives it; knows nothing of archives.
May import `flight` and `geo`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
