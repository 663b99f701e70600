"""Scores of what a bundle generates."""
