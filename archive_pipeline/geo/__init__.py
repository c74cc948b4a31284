"""Where pixels lie on the ground: pose to CRS, transform, footprint; boxes to windows.

Imports no other room.
"""
