"""The archive on Zarr v3: layout, commits, index, locks, leases, images.

May import `codec`, `pcdc`, `flight` and `geo`.
"""
