"""What a flight directory holds: files, their pixels, their metadata blocks.

On this machine or at fsspec URLs; nothing that a file claims is believed unchecked.
May import `geo` only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
