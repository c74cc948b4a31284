"""PCDC, the learned image codec: transforms, entropy model, allocation, bitstream.

Tiles of uint8 pixels in, streams out, and back; `training` is what only training needs.
Nothing in it knows of geography, Zarr or Dask. Imports no other room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
