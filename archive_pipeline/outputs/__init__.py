"""Restored pixels as GeoTIFF, JPEG or PNG, with their names and sidecars.

May import `flight` and `geo`; knows nothing of archives.
"""
