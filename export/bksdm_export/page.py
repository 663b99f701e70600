"""parity.html: one self-contained page that shows a person how near the exported model is to PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from bksdm.html_page import document, image, table
from bksdm_export.precision import ERROR_LIMIT, LIMIT
from bksdm_export.verify import PictureComparison, reference_pixels
from bksdm_runtime.bundle import Manifest

Figures = dict[str, Any]

# Differences of single steps of 255 are invisible; this shows one as a clear grey.
_AMPLIFIED = 32


def page(figures: Figures, pictures: Sequence[PictureComparison], manifest: Manifest, why: str = "") -> str:
    """The page's text. why: what failed, for an export that kept nothing."""
    verdict = (
        f'<p class="verdict bad">Not the same as PyTorch: {escape(why)}</p>'
        if why
        else '<p class="verdict good">Every graph and every picture is within its tolerance.</p>'
    )
    stored = "" if manifest.storage == manifest.precision else f", weights stored as {manifest.storage}"
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    body = f"""<h1>{escape(manifest.variant)} in {manifest.precision}{stored}</h1>
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
{_gate(figures)}
<h2>Pictures</h2>
<p class="soft">Drawn from the same noise by diffusers' pipeline and by the runtime. Accepted is a mean difference of
{figures["picture_tolerance"]:g}/255.{_rounding(figures)}</p>
{"".join(_picture(one) for one in pictures)}
<p class="soft">{escape(tools)}</p>
"""
    return document(f"{manifest.variant}: parity with PyTorch", body)


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
        + table(
            ("case", "error"),
            (
                (escape(case["label"]) + _note(case["note"]), _judged(case["error"], graph["tolerance"]))
                for case in graph["cases"]
            ),
        )
        + "</details>"
        for name, graph in components.items()
    )
    return table(("component", "nodes", "MB", "export s", "error", "accepted"), rows) + cases


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
        + table(("module", "largest value measured", "error measured"), rows)
    )


def _sensitive(components: Mapping[str, Any]) -> str:
    rows = [
        (f"{escape(name)}: {escape(one['layer'])}", f"{one['error']:.1e}")
        for name, graph in components.items()
        for one in graph["sensitive"]
    ]
    if not rows:
        return ""
    others = {
        escape(name): escape(graph["sensitive_of"]) for name, graph in components.items() if graph["sensitive_of"]
    }
    taken = "".join(
        f" Those of {name} are taken over from {source}, where they were measured." for name, source in others.items()
    )
    return (
        '<h2>Not in int8</h2><p class="soft">Of all layers these would cost the most for the operations they save. '
        f"Beside each what int8 in it alone would change in the component's output (root mean square).{taken}</p>"
        + table(("layer", "error measured"), rows)
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
    return f'<h2>Against exact pictures</h2><p class="soft">{said}</p>' + table(head, rows)


def _gate(figures: Figures) -> str:
    if not (found := figures.get("gate")):
        return ""
    answers = {True: "passed", False: "failed", None: "not told"}
    rows = [
        (escape(q["what"]), escape(q["found"]), escape(q["accepted"]), answers[q["passed"]]) for q in found["questions"]
    ]
    said = f"{found['pairs']} further pictures beside PyTorch's in fp32; intervals at {found['level']:.0%}."
    return f'<h2>Gate</h2><p class="soft">{said}</p>' + table(("question", "found", "accepted", ""), rows)


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
        ours = image(compared.pixels, "ours")
        amplified = np.abs(compared.pixels.astype(np.int16) - expected) * _AMPLIFIED
        difference = image(amplified.clip(0, 255).astype(np.uint8), "difference")
    guidance = f"guidance {request.guidance_scale:g}" + (
        f", not {request.negative_prompt}" * bool(request.negative_prompt)
    )
    return f"""<p class="prompt">{escape(request.prompt)} <span class="soft">seed {request.seed},
{request.width}&times;{request.height}, {request.steps} {request.sampler} steps, {escape(guidance)}</span></p>
<div class="pictures">
<figure>{image(expected, "PyTorch")}<figcaption>PyTorch</figcaption></figure>
<figure>{ours}<figcaption>ours</figcaption></figure>
<figure>{difference}<figcaption>difference &times;{_AMPLIFIED}: mean {compared.mean:.3f}, largest
{compared.largest:.0f} of 255</figcaption></figure>
</div>
"""


def _judged(error: float | None, accepted: float) -> str:
    good = error is not None and error <= accepted
    return f'<span class="{"good" if good else "bad"}">{"none" if error is None else f"{error:.1e}"}</span>'


def _note(note: str) -> str:
    return f'<br><span class="bad">{escape(note)}</span>' if note else ""
