"""The `pcdc` codec of Zarr, how it runs, and where its models are found.

What Zarr's registry loads by name; everything else asks for models and settings here.
May import `pcdc` only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
