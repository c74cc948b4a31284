"""The error to catch. Each room has its own kinds of it."""


class ArchivePipelineError(Exception):
    """Something that cannot be done; one line that names the file, image or place, and why."""


class UsageError(ArchivePipelineError, ValueError):
    """Arguments, or options, that make no sense together; one line that names them."""


def root_cause(error: BaseException) -> BaseException:
    """The first of the errors that led to one; GDAL says there what happened, and only there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
