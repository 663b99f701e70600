"""parity.html: one self-contained page that shows a person how near the exported model is to PyTorch's."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bksdm_export.precision import ERROR_LIMIT, LIMIT
from bksdm_export.verify import PictureComparison, reference_pixels
from bksdm_runtime.bundle import Manifest

Figures = dict[str, Any]

# Differences of single steps of 255 are invisible; this shows one as a clear grey.
_AMPLIFIED = 32

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


def page(figures: Figures, pictures: Sequence[PictureComparison], manifest: Manifest, why: str = "") -> str:
    """The page's text. why: what failed, for an export that kept nothing."""
    verdict = (
        f'<p class="verdict bad">Not the same as PyTorch: {escape(why)}</p>'
        if why
        else '<p class="verdict good">Every graph and every picture is within its tolerance.</p>'
    )
    stored = "" if manifest.storage == manifest.precision else f", weights stored as {manifest.storage}"
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(manifest.variant)}: parity with PyTorch</title>
<style>{_STYLE}</style>
<h1>{escape(manifest.variant)} in {manifest.precision}{stored}</h1>
<p class="soft">from {escape(manifest.source)}; compared with PyTorch in fp32 through the runtime, on ONNX Runtime's CPU
provider</p>
{verdict}
<h2>Graphs</h2>
<p class="soft">Error: largest difference, as a part of the largest value of the same output; the worst of all cases.
Inputs are real prompts, and latents from PyTorch's own trajectories.</p>
{_graphs(figures["components"])}
{_islands(figures["components"])}
{_sensitive(figures["components"])}
{_likeness(figures)}
<h2>Pictures</h2>
<p class="soft">Drawn from the same noise by diffusers' pipeline and by the runtime. Accepted is a mean difference of
{figures["picture_tolerance"]:g}/255.{_rounding(figures)}</p>
{"".join(_picture(one) for one in pictures)}
<p class="soft">{escape(tools)}</p>
</html>
"""


def _graphs(components: Mapping[str, Any]) -> str:
    rows = [
        (
            escape(name),
            f"{graph['nodes']:,}",
            f"{graph['bytes'] / 1e6:,.1f}",
            f"{graph['seconds']:.0f}",
            _judged(graph["error"], graph["tolerance"]),
            f"{graph['tolerance']:.0e}",
        )
        for name, graph in components.items()
    ]
    cases = "".join(
        f"<details><summary>{escape(name)}: {len(graph['cases'])} cases</summary>"
        + _table(
            ("case", "error"),
            (
                (escape(case["label"]) + _note(case["note"]), _judged(case["error"], graph["tolerance"]))
                for case in graph["cases"]
            ),
        )
        + "</details>"
        for name, graph in components.items()
    )
    return _table(("component", "nodes", "MB", "export s", "error", "accepted"), rows) + cases


def _islands(components: Mapping[str, Any]) -> str:
    rows = [
        (f"{escape(name)}: {escape(island['module'])}", f"{island['peak']:,.0f}", f"{island['error']:.1e}")
        for name, graph in components.items()
        for island in graph["islands"]
    ]
    if not rows:
        return ""
    return (
        '<h2>Kept in fp32</h2><p class="soft">These modules hold values past half of what fp16 holds '
        f"({LIMIT:,.0f}), or fp16 costs one of their operations more than {ERROR_LIMIT:.0e} of its largest value.</p>"
        + _table(("module", "largest value measured", "error measured"), rows)
    )


def _sensitive(components: Mapping[str, Any]) -> str:
    rows = [
        (f"{escape(name)}: {escape(one['layer'])}", f"{one['error']:.1e}")
        for name, graph in components.items()
        for one in graph["sensitive"]
    ]
    if not rows:
        return ""
    return (
        '<h2>Not in int8</h2><p class="soft">Of all layers these would cost the most for the operations they save. '
        "Beside each what int8 in it alone would change in the component's output (root mean square).</p>"
        + _table(("layer", "error measured"), rows)
    )


def _likeness(figures: Figures) -> str:
    rows = [
        (
            escape(one["backend"]),
            *(
                "none" if one[score][which] is None else f"{one[score][which]:.{digits}f}"
                for score, digits in (("psnr", 1), ("lpips", 3))
                for which in ("mean", "worst", "bound")
            ),
        )
        for one in figures.get("likeness", ())
    ]
    if not rows:
        return ""
    head = ("backend", "PSNR, dB", "worst", "at least", "LPIPS", "worst", "at most")
    said = "Of the pictures below, on average, against PyTorch's in fp32 with whole attention."
    return f'<h2>Against exact pictures</h2><p class="soft">{said}</p>' + _table(head, rows)


def _rounding(figures: Figures) -> str:
    if not (rounding := figures.get("rounding")):
        return ""
    return (
        f" PyTorch's weights were rounded to {rounding['storage']} as the graphs' are; that alone changed its own "
        f"first picture by {rounding['mean_difference']:.3f}/255 on average (accepted {rounding['tolerance']:g}/255)."
    )


def _picture(compared: PictureComparison) -> str:
    request, expected = compared.picture.request, reference_pixels(compared.picture)
    ours, difference = f'<div class="none">{escape(compared.note)}</div>', ""
    if compared.pixels is not None:
        ours = _image(compared.pixels, "ours")
        amplified = np.abs(compared.pixels.astype(np.int16) - expected) * _AMPLIFIED
        difference = _image(amplified.clip(0, 255).astype(np.uint8), "difference")
    guidance = f"guidance {request.guidance_scale:g}" + (
        f", not {request.negative_prompt}" * bool(request.negative_prompt)
    )
    return f"""<p class="prompt">{escape(request.prompt)} <span class="soft">seed {request.seed},
{request.width}&times;{request.height}, {request.steps} {request.sampler} steps, {escape(guidance)}</span></p>
<div class="pictures">
<figure>{_image(expected, "PyTorch")}<figcaption>PyTorch</figcaption></figure>
<figure>{ours}<figcaption>ours</figcaption></figure>
<figure>{difference}<figcaption>difference &times;{_AMPLIFIED}: mean {compared.mean:.3f}, largest
{compared.largest:.0f} of 255</figcaption></figure>
</div>
"""


def _image(pixels: NDArray[np.uint8], label: str) -> str:
    """pixels: [H, W, 3]."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")
    return f'<img alt="{label}" src="{uri}">'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["<table><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{cell}</td>" for cell in row), "</tr>\n"]
    return "".join([*lines, "</table>\n"])


def _judged(error: float | None, accepted: float) -> str:
    good = error is not None and error <= accepted
    return f'<span class="{"good" if good else "bad"}">{"none" if error is None else f"{error:.1e}"}</span>'


def _note(note: str) -> str:
    return f'<br><span class="bad">{escape(note)}</span>' if note else ""
