"""Errors that are caught where torch need not be: a class of its own module would bring that with it."""


class ClipError(Exception):
    """A CLIP network that cannot be used; the message is one sentence."""
