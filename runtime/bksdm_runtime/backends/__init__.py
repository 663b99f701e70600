"""One module per inference library; each imports its library at its own top and nowhere else does."""
