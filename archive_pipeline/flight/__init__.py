"""What a flight directory holds: files, their pixels, their metadata blocks.

May import `geo` only.
"""
