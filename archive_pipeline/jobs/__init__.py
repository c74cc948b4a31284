"""What the commands and the Python API do: ingest, restore, mosaic, check, info, verify.

Plain functions over the rooms below, in this process or on Dask workers (`cluster`).
May import everything but `commands`.
"""
