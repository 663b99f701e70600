"""Stable Diffusion checkpoint -> verified ONNX bundle."""
