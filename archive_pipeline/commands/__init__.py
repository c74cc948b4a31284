"""The `archive` command: options in, one call, a table or JSON out.

One module a command. May import every other room, heavy ones inside the functions only.
"""
