"""Scores of what a bundle or a checkpoint generates."""
