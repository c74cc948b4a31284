"""What the commands and the Python API do: ingest, restore, mosaic, check, info, verify, open.

Plain functions over the rooms below, in this process or on Dask workers (`cluster`).
May import everything but `commands` and `api`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
