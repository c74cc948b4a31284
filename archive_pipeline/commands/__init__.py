"""The `archive` command: options in, one call of `api`, a table or JSON out.

One module a command; nothing that is heavy is imported before the command runs.
May import everything.
"""
