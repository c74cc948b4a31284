"""Tie points, two-view geometry and reconstructions of frames, before and after archiving.

Given pixels by functions that read windows, it knows neither archives nor jobs.
May import `outputs`, `flight` and `geo`; never `store` or `jobs`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
