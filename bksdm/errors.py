"""What goes wrong with a checkpoint, said in one sentence."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message is one sentence that says what to do."""
