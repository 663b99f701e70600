"""Why graphs are not PyTorch's: the node where the error appears, and what to try instead."""

from __future__ import annotations

from bksdm_export import graphs
from bksdm_export.divergence import Divergence, first_divergence
from bksdm_export.graphs import IN_INT8
from bksdm_export.reference import Case, Reference, samples
from bksdm_export.request import ExportRequest, downsample, load, round_to
from bksdm_export.verify import Parity
from bksdm_export.wrappers import wrap
from bksdm_runtime.bundle import Bundle


def first_wrong_node(request: ExportRequest, bundle: Bundle, reference: Reference, parity: Parity) -> list[str]:
    """The first node of the first wrong component where the error appears; nothing if only pictures are wrong.

    A search that fails is said, and hides nothing: what is over its tolerance stands before it.
    """
    for name, compared in parity.components.items():
        if bundle.manifest.precision == "int8" and name in IN_INT8:
            continue  # every node differs
        accepted = parity.tolerance.components[name]
        wrong = [case for case, one in zip(reference.cases[name], compared, strict=True) if not one.error <= accepted]
        if wrong:
            try:
                found = _search(request, bundle, name, wrong[0], accepted)
            except Exception as error:  # torch's and onnxruntime's own kinds; a graph that cannot run ends here
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                return [f"the node in {name} was not found ({reason:.200})"]
            return [f"in {name} {found}" if found else f"no single node of {name} is over its tolerance"]
    return []


def _search(request: ExportRequest, bundle: Bundle, name: str, case: Case, accepted: float) -> Divergence | None:
    checkpoint = load(request)
    if bundle.manifest.storage != bundle.manifest.precision:
        round_to(checkpoint, bundle.manifest.storage)
    downsample(checkpoint, request.token_downsampling)
    component = graphs.components(bundle.manifest.model, "fp32", deep=graphs.deep_channels(checkpoint))[name]
    module = wrap(checkpoint, name, features=request.step_cache)
    for one in samples(case):  # one at a time: the traced program takes a single timestep
        if found := first_divergence(bundle.component_path(name), module, component, one, accepted):
            return found
    return None


def advice(request: ExportRequest, parity: Parity) -> list[str]:
    """What else to ask for where pictures are too far from exact ones."""
    said: list[str] = []
    if any(one.failures() for one in parity.likenesses):
        if request.int8_like is not None:
            said.append("without --int8-like the layers to leave in fp32 are measured")
        elif request.precision == "int8":
            said.append(f"an --int8-error below {request.int8_error:g} leaves more layers in fp32")
        if request.token_downsampling > 1:
            said.append(f"a --token-downsampling below {request.token_downsampling} leaves more tokens to attend to")
    return said
