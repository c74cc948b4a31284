"""PCDC, the learned image codec: transforms, entropy model, allocation, bitstream.

Nothing in this package knows of geography, Zarr or Dask.
"""
