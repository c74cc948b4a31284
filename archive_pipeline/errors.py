"""The error to catch. Each room has its own kinds of it."""


class ArchivePipelineError(Exception):
    """Something that cannot be done; one line that names the file, image or place, and why."""


class UsageError(ArchivePipelineError, ValueError):
    """Arguments, or options, that make no sense together; one line that names them."""
