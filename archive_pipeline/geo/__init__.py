"""Where pixels lie on the ground: pose to CRS, transform, footprint; boxes to windows.

`georef` and `pose` are what is stored and need no library; `mapping` and `camera` compute.
Imports no other room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
