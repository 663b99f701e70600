"""parity.html stands on its own and says what a person needs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_export.page import page
from bksdm_export.precision import Island
from bksdm_export.reference import Picture, PictureRequest
from bksdm_export.report import GraphFacts, summary, table
from bksdm_export.verify import Comparison, Parity, Tolerance, compare_picture
from bksdm_runtime import bundle as bundles


class Tags(HTMLParser):
    """Collects attributes that load something, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_from_elsewhere(exported: Callable[..., Path]) -> None:
    text = (exported("fp16") / "parity.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert len(tags.loads) == 12  # four pictures: PyTorch's, ours, the difference
    assert all(uri.startswith("data:image/png;base64,") for uri in tags.loads)
    assert not re.search(r"https?://|@import|url\(|<script", text)


def test_the_pictures_are_the_pictures(exported: Callable[..., Path]) -> None:
    text = (exported("fp16") / "parity.html").read_text()
    uris = re.findall(r'alt="(PyTorch|ours|difference)" src="data:image/png;base64,([^"]+)"', text)
    assert [label for label, _ in uris] == ["PyTorch", "ours", "difference"] * 4
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))).astype(int) for _, uri in uris]
    expected, ours, difference = images[:3]
    assert expected.shape == (64, 64, 3)
    np.testing.assert_array_equal(difference, np.clip(32 * np.abs(expected - ours), 0, 255))


@pytest.fixture
def failing() -> tuple[Parity, dict[str, GraphFacts]]:
    request = PictureRequest("<script>alert(1)</script> & co", 7, 8, 8, 4, 7.5)
    picture = Picture(request, np.full((8, 8, 3), 0.5, np.float32))
    parity = Parity(
        Tolerance({"unet": 1e-5}, 0.1),
        {"unet": (Comparison("64x64", float("inf"), "4 of 8 values are NaN or infinite"),)},
        (compare_picture(picture, None, "unet gave NaN"),),
    )
    return parity, {"unet": GraphFacts(10, 1000, 1.0, "fp16", (Island("mid_block", 81_000.0, 0.0123),))}


def test_a_failure_reads_as_one_and_prompts_are_text(
    failing: tuple[Parity, dict[str, GraphFacts]], exported: Callable[..., Path]
) -> None:
    manifest = bundles.load(exported("fp32")).manifest
    text = page(summary(*failing), failing[0].pictures, manifest, "unet differs by inf")
    assert "Not the same as PyTorch: unet differs by inf" in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "4 of 8 values are NaN or infinite" in text
    assert "81,000" in text
    assert "1.2e-02" in text
    assert "within its tolerance" not in text


def test_the_table_has_a_line_for_each_component(exported: Callable[..., Path]) -> None:
    lines = table(exported("fp32")).splitlines()
    assert [line.split()[0] for line in lines[:5]] == [
        "component",
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5].startswith("4 pictures differ from PyTorch's by 0.000/255")
