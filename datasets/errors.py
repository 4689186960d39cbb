"""Errors of data that cannot be read."""


class SourceError(ValueError):
    """The data cannot be read; the message names the path or column and what was expected."""
