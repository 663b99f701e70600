"""Engines of real graphs, built by TensorRT-RTX ahead of time: parsing, types, profiles and serialisation are its own.

What this does not show: that an engine runs, and that TensorRT 8.6, 10 or 11 build it, which they cannot without a GPU
(`make gpu-check`). That what is asked of them has their names is tested against the bindings of 11.4.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from bksdm import checkpoint as checkpoints
from bksdm_export import (
    build_cli,
    builder_process,
    cli,
    engine_proof,
    fuse,
    graphs,
    memory,
    plan_builder,
    recipe,
    tensorrt_versions,
    to_onnx,
    to_tensorrt,
)
from bksdm_export.builder_process import Progress, build_apart
from bksdm_export.errors import ExportError
from bksdm_export.graph_types import check_types
from bksdm_export.plan_builder import Job
from bksdm_export.precision import to_half
from bksdm_export.profiles import Sizes, Span, profiles, sizes
from bksdm_export.reference import Reference
from bksdm_export.request import ExportRequest
from bksdm_export.tensorrt_versions import Installed, Options
from bksdm_export.to_tensorrt import BuildRequest, build_engines
from bksdm_export.verify import verify_component, verify_pictures
from bksdm_export.wrappers import wrap
from bksdm_runtime import bundle as bundles
from bksdm_runtime import plans
from bksdm_runtime.bundle import BundleError
from bksdm_runtime.devices import cuda_devices
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline, Step
from bksdm_runtime.plans import Machine, Range
from bksdm_runtime.request import Request

RTX = Machine("tensorrt-rtx", "1.7.1.116", "8.9")
FACTS = graphs.ModelFacts(77, 768, 4, 8, 0.18215, 8, 512, 512, 7.5)
ONE, PIXELS = Span(1, 1, 1), Span(512, 512, 512)


@pytest.fixture
def bundle(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle in half precision that a test may build engines in."""
    return Path(shutil.copytree(exported("fp16"), tmp_path / "bundle"))


def run(*arguments: str | Path) -> int:
    return build_cli.run([str(one) for one in arguments])


# --- profiles --------------------------------------------------------------------------------------------------------


def test_a_span_is_one_number_or_three() -> None:
    assert Span.parse("2") == Span(2, 2, 2)
    assert Span.parse("1:2:8") == Span(1, 2, 8)
    assert (str(Span(2, 2, 2)), str(Span(1, 2, 8))) == ("2", "1:2:8")
    for text in ("", "a", "1:2", "2:1:8", "1:9:8", "0", "-1", "1:2:3:4", "1.5", "\N{ARABIC-INDIC DIGIT TWO}"):
        with pytest.raises(ValueError, match="smallest"):
            Span.parse(text)


def test_the_default_is_one_picture_of_the_models_own_size_in_fixed_shapes() -> None:
    [one] = sizes([], [], [], FACTS)
    assert one == Sizes(ONE, PIXELS, PIXELS)
    components = graphs.components(FACTS, "fp16", deep=320)
    found = {name: profiles(name, part, FACTS, [one], unguided=False) for name, part in components.items()}

    def fixed(*shape: int) -> Range:
        return Range(shape, shape, shape)

    assert found["text_encoder"] == ({"input_ids": fixed(1, 77)},)
    assert found["vae_decoder"] == ({"latent_sample": fixed(1, 4, 64, 64)},)
    assert found["vae_encoder"] == ({"sample": fixed(1, 3, 512, 512)},)
    unet = {"sample": fixed(2, 4, 64, 64), "timestep": fixed(2), "encoder_hidden_states": fixed(2, 77, 768)}
    assert found["unet"] == (unet,)
    assert found["unet_shallow"] == ({**unet, "deep_features": fixed(2, 320, 64, 64)},)


def test_ranges_reach_every_axis_and_unguided_rows_are_a_profile_of_their_own() -> None:
    component = graphs.components(FACTS, "fp16")["unet"]
    wanted = [Sizes(Span(1, 2, 4), Span(256, 512, 768), PIXELS), Sizes(ONE, PIXELS, PIXELS)]
    found = profiles("unet", component, FACTS, wanted, unguided=True)
    assert [profile["sample"].smallest for profile in found] == [
        (2, 4, 32, 64),
        (2, 4, 64, 64),
        (1, 4, 32, 64),
        (1, 4, 64, 64),
    ]
    assert [profile["sample"].largest for profile in found] == [
        (8, 4, 96, 64),
        (2, 4, 64, 64),
        (4, 4, 96, 64),
        (1, 4, 64, 64),
    ]
    decoder = graphs.components(FACTS, "fp16")["vae_decoder"]
    assert len(profiles("vae_decoder", decoder, FACTS, [*wanted, wanted[0]], unguided=True)) == 2  # no two alike


def test_lists_of_sizes_go_together_or_count_for_all() -> None:
    two = sizes([], [PIXELS, Span(768, 768, 768)], [PIXELS], FACTS)
    assert [one.height.fastest for one in two] == [512, 768]
    with pytest.raises(ExportError, match="2 --height for 3 profiles"):
        sizes([ONE] * 3, [PIXELS] * 2, [], FACTS)
    with pytest.raises(ExportError, match="--width 500: this model takes multiples of 8 px"):
        sizes([], [], [Span(500, 500, 500)], FACTS)


# --- the lint --------------------------------------------------------------------------------------------------------


def test_every_exported_graph_is_of_types_that_tensorrt_takes(exported: Callable[..., Path]) -> None:
    opened = bundles.load(exported("fp16"))
    for name, component in opened.manifest.components.items():
        types = check_types(name, opened.component_path(name), component)
        assert types.float16 > 10 * types.float32, name


def test_mixed_types_are_said_by_the_nodes_name(bundle: Path, tmp_path: Path) -> None:
    opened = bundles.load(bundle)
    model = onnx.load(opened.component_path("unet"), load_external_data=False)
    place, node = next(
        (i, one) for i, one in enumerate(model.graph.node) if one.name == "up_blocks.0.resnets.0.norm1/Add"
    )
    cast = helper.make_node("Cast", [node.input[0]], ["wide"], to=onnx.TensorProto.FLOAT, name="widened")
    node.input[0] = "wide"
    model.graph.node.insert(place, cast)
    (tmp_path / "mixed.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        ExportError, match=r"unet: TensorRT would refuse its types: .*up_blocks\.0\.resnets\.0\.norm1/Add"
    ):
        check_types("unet", tmp_path / "mixed.onnx", opened.manifest.components["unet"])


def test_onnx_runtimes_own_operators_and_other_types_are_said(bundle: Path) -> None:
    opened = bundles.load(bundle)
    component = opened.manifest.components["unet"]
    with pytest.raises(ExportError, match=r"unet: node \S+ is com\.microsoft\.\w+, ONNX Runtime's own operator"):
        check_types("unet", fuse.fused_path(opened.component_path("unet")), component)
    single = replace(component, inputs=tuple(replace(spec, dtype="float32") for spec in component.inputs))
    with pytest.raises(ExportError, match=r"unet: input sample is float16, bundle\.json says float32"):
        check_types("unet", opened.component_path("unet"), single)


# --- real engines ----------------------------------------------------------------------------------------------------


def test_a_bundle_gets_an_engine_of_every_component(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, "--library", "tensorrt-rtx", "--sm", "8.9") == 0
    out, err = capsys.readouterr()
    opened = bundles.load(bundle)  # what engines/ holds is no part of its hashes
    folder = bundle / "engines" / "sm89-rtx1.7.1.116"
    assert out.split() == [str(folder / f"{name}.json") for name in opened.manifest.components]
    sizes = r"2x4x8x8 +[\d,]+ \+ \d+ +\d+\.\d +\d+\.\d +\d\.\d\d +not compared"
    assert re.search(rf"unet +TensorRT-RTX 1\.7\.1\.116 on SM 8\.9 +{sizes}\n", err)
    assert "unet: building" in err
    for name in opened.manifest.components:
        plan = plans.find(opened, name, RTX)
        plans.verify(plan)
        assert plan.bytes > 100_000
        assert 100e6 < plan.peak_bytes < 3e9  # the builder's own, whatever this process has
    assert {path.name for path in (bundle / "engines").iterdir()} == {folder.name}
    assert len(list(folder.iterdir())) == 2 * len(opened.manifest.components)
    for here, why in (
        (replace(RTX, sm="12.0"), "engines/sm89-rtx1.7.1.116 was built for SM 8.9"),
        (replace(RTX, version="1.8.0.1"), r"was built with TensorRT-RTX 1\.7\.1\.116"),
    ):
        with pytest.raises(BundleError, match=why):
            plans.find(opened, "unet", here)

    seen: list[Progress] = []
    request = BuildRequest(bundle, "tensorrt-rtx", ("8.9",))
    assert [one.fresh for one in build_engines(request, seen.append)] == [False] * 4
    assert not seen
    wider = replace(request, components=("vae_decoder",), batches=(Span(1, 1, 2),), heights=(Span(64, 64, 128),))
    [built] = build_engines(wider, seen.append)
    assert built.fresh
    assert built.plan.key.profiles[0]["latent_sample"] == Range((1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 16, 8))
    assert len(list(folder.iterdir())) == 8  # the older plan is gone
    assert {one.phase for one in seen} >= {"starting", "Building engine"}
    assert any(one.step == one.steps > 0 for one in seen)
    other = build_engines(replace(request, components=("text_encoder",), sms=("8.6", "8.6", "12.0")))
    assert [one.plan.key.machine.sm for one in other] == ["8.6", "12.0"]  # side by side
    assert len(plans.built(opened)) == 6


def test_a_damaged_plan_is_built_again_and_force_builds_all(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = BuildRequest(bundle, "tensorrt-rtx", ("8.9",), components=("text_encoder",))
    [first] = build_engines(request)
    first.plan.path.write_bytes(b"\0" + first.plan.path.read_bytes()[1:])
    [second] = build_engines(request)
    assert second.fresh
    assert "text_encoder is built again: engine" in caplog.text
    assert [one.fresh for one in build_engines(request)] == [False]
    assert [one.fresh for one in build_engines(replace(request, force=True))] == [True]


def test_sizes_are_added_to_those_that_are_there(bundle: Path) -> None:
    request = BuildRequest(bundle, "tensorrt-rtx", ("8.9",), ("vae_decoder",), options=Options(optimization_level=1))
    build_engines(request)
    taller = replace(request, heights=(Span(128, 128, 128),), add=True, options=Options())
    for fresh in (True, False):  # a second time there is nothing to add
        [built] = build_engines(taller)
        assert built.fresh == fresh
        assert [str(profile["latent_sample"]) for profile in built.plan.key.profiles] == ["1x4x8x8", "1x4x16x8"]
        assert built.plan.key.flags == {"optimization_level": 1}
    key = built.plan.path.with_name("vae_decoder.json")
    key.write_text(key.read_text().replace('"optimization_level"', '"colour"'))
    with pytest.raises(ExportError, match="an engine's key has the flag colour, which this bksdm does not know"):
        build_engines(replace(taller, heights=(Span(64, 64, 64),), batches=(), widths=(Span(128, 128, 128),)))
    key.write_text("{")
    [alone] = build_engines(taller)  # nothing to add to
    assert alone.fresh
    [alone] = build_engines(replace(taller, add=False))
    assert [str(profile["latent_sample"]) for profile in alone.plan.key.profiles] == ["1x4x16x8"]


def test_on_its_own_gpu_an_engine_is_compared_with_its_graph_and_a_wrong_one_is_not_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for the engine here is the graph on ONNX Runtime, with something added."""
    real, added = engine_proof.open_engine, [np.float32(0)]

    def opened(bundle: bundles.Bundle, name: str, settings: EngineSettings) -> Callable[..., Any]:
        run = real(bundle, name, EngineSettings(backend="onnxruntime", threads=1))
        share = added[0] if settings.backend == "tensorrt-rtx" else np.float32(0)
        return lambda inputs: {one: array + share * np.abs(array).max() for one, array in run(inputs).items()}

    monkeypatch.setattr(engine_proof, "compute_capability", lambda: "8.9")
    monkeypatch.setattr(engine_proof, "open_engine", opened)
    request = BuildRequest(bundle, "tensorrt-rtx", ("8.9",))
    added[0] = np.float32(0.01)
    built = build_engines(request)
    assert all(one.error == pytest.approx(0.01, rel=0.01) for one in built)
    assert "1.0e-02" in build_cli.table(built)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    for wrong, why in (
        (0.2, r"differs from its graph by 0\.2 of the largest value, accepted is 0\.05"),
        (np.nan, "by nan of"),
    ):
        added[0] = np.float32(wrong)
        with pytest.raises(ExportError, match=f"text_encoder: the engine {why}" if wrong == 0.2 else why):
            build_engines(replace(request, force=True))
        assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    [other] = build_engines(replace(request, sms=("8.6",), components=("text_encoder",)))
    assert other.error is None  # not its GPU
    with pytest.raises(ExportError, match="by nan of"):
        build_engines(replace(request, sms=("8.9",), components=("vae_decoder",), heights=(Span(128, 128, 128),)))
    (bundle / "engines" / "sm89-rtx1.7.1.116" / "unet.json").unlink()
    with pytest.raises(ExportError, match="unet: the engine differs"):
        build_engines(replace(request, components=("unet",), options=Options(optimization_level=0)))
    assert not (bundle / "engines" / "sm89-rtx1.7.1.116" / "unet.json").exists()


def test_what_each_flag_asks_is_in_the_key(bundle: Path) -> None:
    options = Options(optimization_level=1, workspace=2**30, weight_streaming=True)
    [built] = build_engines(BuildRequest(bundle, "tensorrt-rtx", ("8.9",), ("text_encoder",), options=options))
    assert built.plan.key.flags == {"optimization_level": 1, "workspace": 2**30, "weight_streaming": True}
    assert plans.read(plans.key_path(bundles.load(bundle), RTX, "text_encoder")).key == built.plan.key


# --- what goes wrong -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str, int]] = {
    "no GPU and no --sm": (
        [],
        r"no GPU here to build for, and no --sm names one \(TensorRT-RTX 1.* knows 7\.5, 8\.0",
        1,
    ),
    "an SM it does not know": (
        ["--sm", "9.0"],
        r"does not build for SM 9\.0: choose from 7\.5, 8\.0, 8\.6, 8\.9, 12\.0",
        1,
    ),
    "version compatible": (["--sm", "8.9", "--version-compatible"], "builds no version-compatible engines", 1),
    "hardware": (["--sm", "8.9", "--hardware", "ampere+"], "builds for the compute capabilities that --sm names", 1),
    "no such component": (["--sm", "8.9", "--component", "safety"], "has no safety: choose from text_encoder, unet", 1),
    "no SM at all": (["--sm", "89"], r"does not build for SM 89: choose from 7\.5", 1),
    "off the grid": (["--sm", "8.9", "--height", "100"], "--height 100: this model takes multiples of 8 px", 1),
    "no number": (["--batch", "two"], "'two' is no whole number, and no smallest:fastest:largest like 1:2:8", 2),
    "no TensorRT": (["--library", "tensorrt"], r"needs tensorrt: pip install 'bksdm\[tensorrt,build\]'", 2),
}


@pytest.mark.parametrize(("flags", "why", "code"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_sentence(
    exported: Callable[..., Path], capsys: pytest.CaptureFixture[str], flags: list[str], why: str, code: int
) -> None:
    assert run(exported("fp16"), *flags) == code
    err = capsys.readouterr().err
    assert re.search(why, err)
    assert "Traceback" not in err
    assert not (exported("fp16") / "engines").exists()


def test_other_bundles_are_refused(
    exported: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nothing", "--sm", "8.9") == 1
    assert "there is no such folder" in capsys.readouterr().err
    int8 = Path(shutil.copytree(exported("fp32"), tmp_path / "int8"))
    manifest = int8 / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', '"precision": "int8"'))
    assert run(int8, "--sm", "8.9") == 1
    assert "of precision fp16 or fp32, and" in capsys.readouterr().err


CRASHES: dict[str, tuple[str, str]] = {
    "a crash": (
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        r"TensorRT crashed \(SIGSEGV\): it said nothing",
    ),
    "killed": (
        "import os; os.kill(os.getpid(), 9)",
        r"the builder was killed \(out of memory\?\): close other programs",
    ),
    "what is no line of ours": (
        'import os; os.write(1, b\'{\\n[]\\n{"phase": "x", "step": 1, "steps": 2}\\n\'); os._exit(5)',
        r"unet is not built \(x\): the builder ended with exit code 5",
    ),
    "its own words": (
        "import sys; sys.exit('[E] first: Half and Float\\n[E] second\\n[!] Invalid Engine')",
        r"unet is not built \(starting\): first: Half and Float",
    ),
    "no plan": ("pass", "the builder wrote no plan"),
    "another exit": ("import os; os._exit(5)", "the builder ended with exit code 5"),
}


@pytest.mark.parametrize(("script", "why"), CRASHES.values(), ids=CRASHES)
def test_a_builder_that_dies_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    build_engines(BuildRequest(bundle, "tensorrt-rtx", ("8.9",), ("text_encoder",)))
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    monkeypatch.setattr(builder_process, "BUILDER", (sys.executable, "-c", script))
    with pytest.raises(ExportError, match=why):
        build_engines(BuildRequest(bundle, "tensorrt-rtx", ("8.9",)))
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_graph_that_tensorrt_cannot_read_is_said_in_its_words(bundle: Path, tmp_path: Path) -> None:
    opened = bundles.load(bundle)
    key = to_tensorrt._key(opened, "text_encoder", RTX, sizes([], [], [], opened.manifest.model), BuildRequest(bundle))
    (tmp_path / "half.onnx").write_bytes(opened.component_path("text_encoder").read_bytes()[:5000])
    job = Job("tensorrt-rtx", str(tmp_path / "half.onnx"), str(tmp_path / "plan"), "8.9", key.profiles, Options())
    with pytest.raises(ExportError, match=r"text_encoder is not built \(starting\): (?!Traceback|.*crashed).*[Pp]arse"):
        build_apart(job, "text_encoder", tmp_path, lambda _: None)


def test_what_tensorrt_refuses_is_said_in_its_own_words_and_not_polygraphys(tmp_path: Path) -> None:
    half, single = (helper.make_tensor_value_info(name, kind, [2]) for name, kind in (("a", 10), ("b", 1)))
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"], name="mixed")], "g", [half, single],
        [helper.make_tensor_value_info("c", 1, [2])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "mixed.onnx").write_bytes(model.SerializeToString())
    two = Range((2,), (2,), (2,))
    job = Job(
        "tensorrt-rtx", str(tmp_path / "mixed.onnx"), str(tmp_path / "plan"), "8.9", ({"a": two, "b": two},), Options()
    )
    with pytest.raises(ExportError, match=r"text_encoder is not built .*(Half|Float|type)"):
        build_apart(job, "text_encoder", tmp_path, lambda _: None)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_takes_its_builder_along_and_is_taken_up_again(bundle: Path, sign: int) -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    # What runs in the background of a shell, as these tests may, has SIGINT ignored.
    script = (
        "import signal; signal.signal(2, signal.default_int_handler); from bksdm_export.build_cli import main; main()"
    )
    command = [sys.executable, "-c", script, str(bundle), "--sm", "8.9"]
    running = subprocess.Popen(
        [*command, "--component", "unet"], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
    )
    job = None
    for _ in range(600):
        job = next(bundle.glob("engines/building-*/job.json"), None)
        if job is not None and _builders(job):
            break
        time.sleep(0.1)
    assert job is not None
    running.send_signal(sign)
    _, err = running.communicate(timeout=60)
    assert running.returncode == (-sign if sign == signal.SIGKILL else 130)
    if sign == signal.SIGINT:
        assert err.strip().splitlines()[-1] == "bksdm-build: interrupted"
        assert not list((bundle / "engines").iterdir())
    for _ in range(100):
        if not _builders(job):
            break
        time.sleep(0.1)
    assert not _builders(job)
    [built] = build_engines(BuildRequest(bundle, "tensorrt-rtx", ("8.9",), ("text_encoder",)))
    assert built.fresh
    assert not list(bundle.glob("engines/building-*"))


def _builders(job: Path) -> list[str]:
    """Processes that build this job."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(job).encode() in words:
            found.append(path.parent.name)
    return found


# --- bksdm-export --target tensorrt ----------------------------------------------------------------------------------


def test_an_export_goes_on_to_engines(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(request: ExportRequest, progress: object) -> Path:
        assert request.precision == "fp16"
        return Path(shutil.copytree(exported("fp16"), request.output, dirs_exist_ok=True))

    monkeypatch.setattr(recipe, "export_variant", export)
    monkeypatch.setattr(tensorrt_versions, "compute_capability", lambda: "8.9")  # of the GPU that this would be on
    output = tmp_path / "bundle"
    flags = ["--weights", "demo", "--target", "tensorrt", "-o", str(output)]
    assert cli.run(flags) == 0
    out, err = capsys.readouterr()
    assert out.strip().splitlines()[-1] == str(output)
    assert "vae_encoder" in err
    opened = bundles.load(output)
    assert opened.manifest.precision == "fp16"
    assert len(plans.built(opened, "tensorrt-rtx")) == 4

    monkeypatch.setattr(builder_process, "BUILDER", (sys.executable, "-c", "import os; os._exit(5)"))
    shutil.rmtree(output / "engines")
    assert cli.run([*flags, "--force"]) == 1
    assert f"exit code 5 (the bundle is whole: go on with bksdm-build {output})" in capsys.readouterr().err
    bundles.load(output)


def test_what_cannot_be_built_here_is_told_before_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    flags = ["--weights", "demo", "--target", "tensorrt", "-o", str(output)]
    assert cli.run(flags) == 1
    assert "there is no GPU here to build for" in capsys.readouterr().err
    assert cli.run([*flags, "--precision", "int8"]) == 2
    assert "--target tensorrt is for --precision fp16, and this is int8" in capsys.readouterr().err
    assert not output.exists()


# --- TensorRT, which cannot build here -------------------------------------------------------------------------------


def library(version: str) -> Any:
    """Of TensorRT what is asked of it here, as far as that version has it."""
    major = int(version.split(".")[0])
    flags = SimpleNamespace(TF32=1, VERSION_COMPATIBLE=2)
    levels = SimpleNamespace(NONE=0, AMPERE_PLUS=1)
    if major >= 10:
        flags.WEIGHT_STREAMING, flags.STRIP_PLAN = 3, 4
        levels.SAME_COMPUTE_CAPABILITY = 2
    return SimpleNamespace(
        __version__=version,
        BuilderFlag=flags,
        HardwareCompatibilityLevel=levels,
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        PreviewFeature=SimpleNamespace(PROFILE_SHARING_0806="sharing"),
        LayerType=SimpleNamespace(CONSTANT=1, SHAPE=2, SOFTMAX=3, CONVOLUTION=4),
        float32="float32",
        **({"IProgressMonitor": object} if major >= 10 else {}),
    )


@pytest.mark.parametrize(("version", "typed"), [("8.6.0", False), ("10.13.3.9", True), ("11.4.0.106", True)])
def test_each_version_is_asked_in_its_own_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, typed: bool
) -> None:
    """Polygraphy's own loaders are made, which check what they are given, and look for TensorRT only when they run."""
    import polygraphy.config

    monkeypatch.setattr(polygraphy.config, "USE_TENSORRT_RTX", False)
    here = Installed("tensorrt", library(version))
    timing = tmp_path / "timing.cache"
    timing.write_bytes(b"timings")
    network = tensorrt_versions.network(here, tmp_path / "model.onnx", lambda network: None)
    config = tensorrt_versions.config(here, Options(0, 2**30, "ampere+"), "8.9", timing, None, profiles=["one"])
    assert network._network.strongly_typed == typed
    made = config._config
    assert (made.fp16, made.precision_constraints) == ((False, None) if typed else (True, "obey"))
    assert (made.builder_optimization_level, made.hardware_compatibility_level) == (0, 1)
    assert made.memory_pool_limits == {"workspace": 2**30}
    assert (made.timing_cache_path, made.profiles, made.preview_features) == (str(timing), ["one"], None)
    done: list[tuple[object, ...]] = []
    asked = SimpleNamespace(
        clear_flag=lambda flag: done.append(("clear", flag)),
        set_preview_feature=lambda feature, on: done.append((feature, on)),
    )
    config._func(None, None, asked)
    assert done == [("clear", 1), *([] if typed else [("sharing", True)])]  # TF32; profiles that two contexts share

    layers = [layer(3, "float32"), layer(4, "float16"), layer(1, "float32"), layer(4, "float32", "int32")]
    network._func(SimpleNamespace(num_layers=4, get_layer=layers.__getitem__))
    held = [one.precision for one in layers]
    assert held == ([None] * 4 if typed else ["float32", None, None, None])
    assert tensorrt_versions.reports_progress(here) == typed
    with pytest.raises(
        ExportError, match=rf"TensorRT {version} builds on the GPU that is to run the engine, and there"
    ):
        tensorrt_versions.target(here, "8.9")
    monkeypatch.setattr(tensorrt_versions, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(tensorrt_versions, "device_name", lambda: "NVIDIA H100")
    assert tensorrt_versions.target(here, None) == "9.0"
    assert tensorrt_versions.model(here, Options()) == "NVIDIA H100"
    assert tensorrt_versions.model(here, Options(hardware="same-sm")) == ""
    with pytest.raises(ExportError, match=r"which is SM 9\.0, not for SM 8\.9"):
        tensorrt_versions.target(here, "8.9")
    tensorrt_versions.check(here, Options(version_compatible=True))
    if not typed:
        with pytest.raises(ExportError, match=r"TensorRT 8\.6\.0 has no --weight-streaming"):
            tensorrt_versions.check(here, Options(weight_streaming=True))
        with pytest.raises(ExportError, match=r"TensorRT 8\.6\.0 has no --hardware same-sm"):
            tensorrt_versions.check(here, Options(hardware="same-sm"))


def test_what_is_asked_of_a_builder_has_the_names_of_the_real_bindings(tmp_path: Path) -> None:
    """Those of 11.4, from their wheel: their file names what it has, and they do not load without a GPU's libraries."""
    found = find_spec("tensorrt_bindings")
    assert found is not None
    assert found.origin is not None
    content = Path(found.origin).with_name("tensorrt.so").read_bytes()
    names = (
        *("VERSION_COMPATIBLE", "WEIGHT_STREAMING", "STRIP_PLAN", "TF32", "STRONGLY_TYPED"),
        *("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY", "WORKSPACE", "IProgressMonitor", "builder_optimization_level"),
        *("hardware_compatibility_level", "progress_monitor", "phase_start", "phase_finish", "step_complete"),
        *("create_timing_cache", "clear_flag", "set_preview_feature", "num_layers", "set_output_type"),
    )
    missing = [name for name in names if name.encode() not in content]
    assert not {*missing} - {"set_output_type"}  # which weakly typed networks alone had
    assert b"PROFILE_SHARING_0806" not in content  # 8.6's: later it is so without being asked


def test_flags_keep_a_zero_and_come_back_as_options() -> None:
    assert Options(optimization_level=0).flags() == {"optimization_level": 0}
    assert Options().flags() == {}
    for options in (Options(), Options(0), Options(3, 2**30, "ampere+", True, True, True)):
        assert Options.of(options.flags()) == options


def layer(kind: int, *dtypes: str) -> Any:
    one = SimpleNamespace(type=kind, num_outputs=len(dtypes), precision=None, types=[])
    one.get_output = lambda i: SimpleNamespace(dtype=dtypes[i])
    one.set_output_type = lambda i, dtype: one.types.append((i, dtype))
    return one


def test_a_timing_cache_is_the_users_and_of_one_gpu_and_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = to_tensorrt._timing_cache(
        Installed("tensorrt", library("11.4.0.106")), Machine("tensorrt", "11.4.0.106", "8.9")
    )
    assert path == tmp_path / "bksdm" / "timings" / "sm89-trt11.4.0.106.cache"
    assert to_tensorrt._timing_cache(Installed("tensorrt-rtx", None), RTX) is None


def test_timings_of_earlier_builds_are_read_and_those_of_this_one_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import polygraphy.backend.trt as loaders
    import polygraphy.config

    given: list[Any] = []

    def engine_bytes(network: Any, config: Any, save_timing_cache: str) -> Callable[[], bytes]:
        given.append((config._config.timing_cache_path, save_timing_cache))
        return lambda: b"plan"

    monkeypatch.setattr(polygraphy.config, "USE_TENSORRT_RTX", False)
    monkeypatch.setattr(loaders, "EngineBytesFromNetwork", engine_bytes)
    monkeypatch.setattr(tensorrt_versions, "installed", lambda name: Installed(name, library("11.4.0.106")))
    timing = tmp_path / "timings"
    profile = {"sample": Range((2, 4), (2, 4), (2, 4))}
    job = Job("tensorrt", "a.onnx", str(tmp_path / "plan"), "8.9", (profile,), Options(), str(timing))
    plan_builder.build(job)
    timing.write_bytes(b"timings")
    plan_builder.build(job)
    assert given == [(None, str(timing)), (str(timing), str(timing))]
    assert (tmp_path / "plan").read_bytes() == b"plan"


def test_a_job_survives_its_json() -> None:
    profile = {"sample": Range((1, 4), (2, 4), (3, 4))}
    job = Job("tensorrt", "a.onnx", "a.plan", "8.9", (profile, profile), Options(3, hardware="same-sm"), "timings")
    assert Job.from_json(job.to_json()) == job
    assert json.loads(job.to_json())["options"]["workspace"] is None


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "vae_decoder", "text_encoder"])
def test_full_size_tiny_builds_for_three_gpus(name: str, tmp_path: Path) -> None:
    """The true architecture with random weights, 512 px, two rows. SM 8.6, 8.9 and 12.0."""
    checkpoint = checkpoints.load("random", variant="tiny")
    facts = graphs.model_facts(checkpoint)
    component = graphs.components(facts, "fp16")[name]
    module = wrap(checkpoint, name)
    del checkpoint
    to_half(module, ())
    model = to_onnx.to_onnx(to_onnx.to_exported_program(module, component), component)
    to_onnx.save(model, tmp_path / "model.onnx")
    weights = to_onnx.weight_bytes(model)
    to_onnx.release(model)
    del module, model
    memory.give_back()
    check_types(name, tmp_path / "model.onnx", component)
    shapes = profiles(name, component, facts, sizes([], [], [], facts), unguided=False)
    for sm in ("8.6", "8.9", "12.0"):
        plan = tmp_path / f"{sm}.plan"
        job = Job("tensorrt-rtx", str(tmp_path / "model.onnx"), str(plan), sm, shapes, Options())
        peak = build_apart(job, name, tmp_path, lambda _: None)
        assert weights < plan.stat().st_size < 1.5 * weights + 20e6
        assert peak < 8 * weights + 1e9
        plan.unlink()


@pytest.mark.slow
def test_a_range_of_sizes_and_two_profiles_build(exported: Callable[..., Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported("fp16"), tmp_path / "bundle"))
    flags = ["--sm", "8.9", "--component", "unet", "--batch", "1:2:8", "--height", "64:64:128", "--unguided"]
    assert run(bundle, "--library", "tensorrt-rtx", *flags) == 0
    plan = plans.find(bundles.load(bundle), "unet", RTX)
    assert [str(profile["sample"]) for profile in plan.key.profiles] == ["2x4x8x8 to 16x4x16x8", "1x4x8x8 to 8x4x16x8"]

    def shapes(rows: int, height: int) -> dict[str, tuple[int, ...]]:
        return {"sample": (rows, 4, height, 8), "timestep": (rows,), "encoder_hidden_states": (rows, 77, 32)}

    assert [plan.key.profile_for(shapes(rows, 12)) for rows in (1, 3, 8, 9, 16, 17)] == [1, 1, 1, 0, 0, None]
    assert plan.key.profile_for(shapes(2, 20)) is None


def test_help_needs_nothing_installed() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'polygraphy', 'tensorrt', 'tensorrt_rtx', 'cuda'): sys.modules[name] = None\n"
        "from bksdm_export.build_cli import run\n"
        "assert run(['--help']) == 0 and run(['--version']) == 0\n"
        "raise SystemExit(run(['bundle']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert (done.returncode, "--height" in done.stdout) == (2, True)
    said = "bksdm-build: needs onnx: pip install 'bksdm[tensorrt,build]', or 'bksdm[tensorrt-rtx,build]'"
    assert done.stderr.strip() == said


def test_sizes_that_are_the_same_in_all_profiles_are_fixed_in_the_network() -> None:
    tensor = SimpleNamespace(name="sample", shape=None)
    network = SimpleNamespace(num_inputs=1, get_input=lambda _: tensor)
    first, second = Range((2, 4, 8), (2, 4, 8), (2, 4, 16)), Range((1, 4, 8), (1, 4, 8), (1, 4, 16))
    plan_builder._fix_sizes(network, [{"sample": first}])
    assert tensor.shape == (2, 4, -1)
    plan_builder._fix_sizes(network, [{"sample": first}, {"sample": second}])
    assert tensor.shape == (-1, 4, -1)


# --- on a GPU --------------------------------------------------------------------------------------------------------
# Their tolerances are those of fp16 on ONNX Runtime's CUDA provider with room to spare: none was measured here yet.


def libraries_here() -> list[str]:
    """Those that are installed and build for the GPU here: TensorRT-RTX knows no data-centre GPU of Hopper's."""
    found = []
    for name, module in tensorrt_versions.MODULES.items():
        if find_spec(module) is not None and cuda_devices():
            try:
                tensorrt_versions.target(tensorrt_versions.installed(name), None)
            except ExportError:
                continue
            found.append(name)
    return found


FOUND = libraries_here()
on_a_gpu = pytest.mark.skipif(not FOUND, reason="needs a CUDA device, and TensorRT or TensorRT-RTX that builds for it")
APPLE = Request("a red apple", "grey", seed=3, steps=8, height=64, width=64)


@pytest.fixture(scope="module", params=FOUND or ["none"])
def on_plans(request: pytest.FixtureRequest, exported: Callable[..., Path], tmp_path_factory: Any) -> tuple[Path, str]:
    """`build_smallest()` with engines for this GPU, 64 to 1024 px, and the backend that runs them."""
    folder = Path(shutil.copytree(exported("fp16"), tmp_path_factory.mktemp("engines") / "bundle"))
    side = (Span(64, 64, 1024),)
    build_engines(BuildRequest(folder, request.param, (), (), (Span(1, 1, 2),), side, side, unguided=True))
    return folder, request.param


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_gives_what_pytorch_gives(on_plans: tuple[Path, str], smallest_reference: Reference) -> None:
    folder, backend = on_plans
    opened, settings = bundles.load(folder), EngineSettings(backend=backend)
    for name, cases in smallest_reference.cases.items():
        small = [case for case in cases if len(next(iter(case.inputs.values()))) <= 2]
        for compared in verify_component(opened, name, small, settings):
            assert compared.error < 0.03, (name, compared)
    for picture in verify_pictures(opened, smallest_reference, settings):
        assert picture.mean < 2, picture


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_draws_what_the_host_draws(on_plans: tuple[Path, str]) -> None:
    folder, backend = on_plans
    device, host = (Pipeline.open(folder, EngineSettings(backend=name)) for name in (backend, "onnxruntime"))
    for change in ({}, {"guidance_scale": 1.0}, {"guidance_interval": (0.3, 0.8)}, {"sampler": "euler"}):
        one = replace(APPLE, **change)
        found, wanted = ([item for item in pipe.generate([one]) if isinstance(item, Step)] for pipe in (device, host))
        for got, want in zip(found, wanted, strict=True):  # along the trajectory
            assert np.abs(got.latents - want.latents).max() < 0.03 * np.abs(want.latents).max()
        [ours], [theirs] = device.draw([one]), host.draw([one])
        error = np.mean((ours.astype(float) - theirs.astype(float)) ** 2)
        assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 30
    for side in (256, 512, 768, 1024):
        device.draw([replace(APPLE, height=side, width=side, steps=2)])  # NaN is an error


@pytest.mark.gpu
@on_a_gpu
def test_a_hundred_pictures_take_no_more_memory_and_graphs_change_nothing(
    on_plans: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def used() -> int:
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.check_output(asked, text=True).splitlines()[0])

    folder, backend = on_plans
    pipeline = Pipeline.open(folder, EngineSettings(backend=backend))
    [first] = pipeline.draw([APPLE])
    before = used()
    for seed in range(100):
        pipeline.draw([replace(APPLE, seed=seed)])
    assert used() - before < 16
    assert (pipeline.draw([APPLE])[0] == first).all()
    loaded_plan = importlib.import_module("bksdm_runtime.backends.loaded_plan")
    monkeypatch.setattr(loaded_plan.Bound, "can_be_captured", False)
    assert (Pipeline.open(folder, EngineSettings(backend=backend)).draw([APPLE])[0] == first).all()
