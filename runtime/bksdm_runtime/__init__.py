"""Torch-free sampling of an exported Stable Diffusion bundle.

    from bksdm_runtime.pipeline import Images, Pipeline, Request

    pipeline = Pipeline.open("out/bk-sdm-small")
    for item in pipeline.generate([Request("a golden vase with flowers")]):
        if isinstance(item, Images):
            ...  # item.pixels: [B, H, W, 3] uint8

This package stays empty so that importing a part of it imports only that part.
"""
