"""The `pcdc` codec of Zarr, and where its models are found.

May import `pcdc` only.
"""
