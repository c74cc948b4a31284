"""The version: of the package, of `archive --version`, in archives and in reports."""

__version__ = "0.2.0"
