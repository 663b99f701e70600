"""The BK-SDM model family: variants as rows of a table, block removal, checkpoints."""
