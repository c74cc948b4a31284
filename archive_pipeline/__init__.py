"""Archive drone flights with a learned codec in ordinary Zarr v3 archives."""

__version__ = "0.1.0"
