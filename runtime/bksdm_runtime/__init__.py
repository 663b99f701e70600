"""Torch-free sampling of an exported Stable Diffusion bundle."""
