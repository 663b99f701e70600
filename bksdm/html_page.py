"""Self-contained HTML pages: one look for all that the commands show of a model, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent);
  --soft: color-mix(in srgb, currentColor 62%, transparent); --good: #18794e; --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff6369; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .soft, figcaption { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
.verdict { font-size: 1.1rem; font-weight: 600; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .8rem; margin: .4rem 0; }
.prompt { margin-top: 1.4rem; }
figure { margin: 0; }
figure img, .none { width: 100%; display: block; box-sizing: border-box;
  border: 1px solid var(--line); border-radius: 4px; image-rendering: pixelated; }
.none { padding: 3rem .5rem; text-align: center; }
figcaption { font-size: .85rem; margin-top: .25rem; }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page. title: text; body, style: as they are."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
{body}</html>
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML."""
    lines = ["<table><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{cell}</td>" for cell in row), "</tr>\n"]
    return "".join([*lines, "</table>\n"])


def image(pixels: NDArray[np.uint8], label: str) -> str:
    """A picture [H, W, 3] in the page itself."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")
    return f'<img alt="{escape(label)}" src="{uri}">'
