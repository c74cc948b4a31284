"""`archive serve`: an archive over HTTP, for browsers, GIS and catalogues; read only.

May import every room but `commands`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
