"""The version of bksdm that runs."""

from importlib import metadata


def version() -> str:
    """The installed version; "0+source" when it runs from a source tree that is not installed."""
    try:
        return metadata.version("bksdm")
    except metadata.PackageNotFoundError:
        return "0+source"
