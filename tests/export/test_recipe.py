"""From a checkpoint to a bundle that the runtime takes, or to nothing at all."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from bksdm.checkpoint import Checkpoint
from bksdm.errors import CheckpointError
from bksdm_export import bundle_files, graphs, recipe, report, to_onnx
from bksdm_export.errors import ExportError
from bksdm_export.graph_writer import export_graph
from bksdm_export.recipe import export_variant
from bksdm_export.reference import Reference
from bksdm_export.report import GraphFacts
from bksdm_export.request import ExportRequest
from bksdm_export.verify import CUDA, ORT, Comparison, Parity, compare_picture, verify_component
from bksdm_export.wrappers import wrap
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.pipeline import Images, Pipeline
from bksdm_runtime.request import Request

REPOSITORY = Path(__file__).parents[2]
KINDS = [("fp32", "fp32"), ("fp32", "fp16"), ("fp16", "fp16")]


@pytest.mark.parametrize(("precision", "storage"), KINDS)
def test_the_bundle_passes_every_check_of_its_reader(
    exported: Callable[..., Path], precision: str, storage: str
) -> None:
    bundle = bundles.load(exported(precision, storage), verify=True)
    manifest = bundle.manifest
    assert (manifest.precision, manifest.storage) == (precision, storage)
    assert set(manifest.components) == set(graphs.COMPONENTS)
    assert manifest.model.size_multiple == 8
    assert {"parity.json", "parity.html", "LICENSE", "model_index.json", "tokenizer/tokenizer.json"} <= set(
        manifest.files
    )
    assert {"bksdm", "torch", "onnxruntime"} <= set(manifest.tools)


@pytest.mark.parametrize(("precision", "storage"), KINDS)
def test_parity_figures_are_within_their_tolerances_and_stand_beside_them(
    exported: Callable[..., Path], precision: str, storage: str
) -> None:
    folder = exported(precision, storage)
    figures = json.loads((folder / "parity.json").read_text())
    assert set(figures["components"]) == set(graphs.COMPONENTS)
    for graph in figures["components"].values():
        assert 0 < graph["error"] <= graph["tolerance"]
        assert graph["cases"]
    assert len(figures["pictures"]) == 4
    assert all(picture["mean_difference"] <= figures["picture_tolerance"] for picture in figures["pictures"])
    brief = bundles.load(folder).manifest.parity
    assert json.loads(json.dumps(brief))["components"].keys() == figures["components"].keys()


@pytest.mark.parametrize(("precision", "storage"), KINDS)
def test_the_runtime_draws_pytorchs_pictures(
    exported: Callable[..., Path], smallest_reference: Reference, precision: str, storage: str
) -> None:
    """Alone, not in the batch that the export verified."""
    pipeline = Pipeline.open(exported(precision, storage), ORT)
    picture = smallest_reference.pictures[2]
    request = picture.request
    items = pipeline.generate(
        [Request(request.prompt, "", request.seed, request.steps, 7.5, request.height, request.width)]
    )
    [images] = [item for item in items if isinstance(item, Images)]
    # Measured: 0 in fp32, 0.03 stored as fp16, 0.04 in fp16.
    assert compare_picture(picture, images.pixels[0]).mean < (0.01 if storage == "fp32" else 0.2)


def test_every_license_travels_along(exported: Callable[..., Path], smallest_folder: Path) -> None:
    manifest = bundles.load(exported("fp32")).manifest
    assert (exported("fp32") / manifest.licence.file).read_text() == (smallest_folder / "LICENSE").read_text()
    assert manifest.licence.name


def test_no_path_of_this_machine_is_in_the_bundle(exported: Callable[..., Path], smallest_folder: Path) -> None:
    for path in exported("fp32").rglob("*"):
        if path.is_file() and path.name not in {
            "bundle.json",
            "parity.html",
        }:  # those name the source that was asked for
            assert str(smallest_folder).encode() not in path.read_bytes(), path
            assert b"site-packages" not in path.read_bytes(), path


@pytest.fixture
def refused_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of the VAE decoder that ONNX Runtime does not open."""
    save = to_onnx.save

    def changed(model: ir.Model, path: Path, shared: Path | None = None) -> None:
        if path.parent.name == "vae_decoder":
            next(node for node in model.graph if node.op_type == "Conv").op_type = "Konv"
        save(model, path, shared)

    monkeypatch.setattr(to_onnx, "save", changed)


@pytest.mark.usefixtures("refused_decoder")
def test_a_graph_that_cannot_run_is_one_sentence_and_a_page(smallest_folder: Path, tmp_path: Path) -> None:
    """onnxruntime's own exception came out of the search for the node."""
    with pytest.raises(ExportError, match=r"vae_decoder cannot be compared at .*Konv") as raised:
        export_variant(ExportRequest(tmp_path / "bundle", weights=str(smallest_folder)))
    assert "the node in vae_decoder was not found" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [page.name for page in tmp_path.iterdir()] == ["bundle.failed.html"]


def test_fused_graphs_are_compared_where_there_is_a_gpu(
    exported: Callable[..., Path], smallest_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one here: what the GPU would give is made up."""
    errors = {"unet": 2e-3}

    def on_the_gpu(bundle: Bundle, name: str, cases: Any, settings: EngineSettings = ORT) -> tuple[Comparison, ...]:
        if settings is CUDA:
            return (Comparison("a case", errors.get(name, 1e-3)),)
        return verify_component(bundle, name, cases, settings)

    monkeypatch.setattr(recipe, "_cuda_starts", lambda _: True)
    monkeypatch.setattr(recipe, "verify_component", on_the_gpu)

    def compare() -> Parity:
        bundle = bundles.load(exported("fp16"))
        return recipe._compare(bundle, smallest_reference, smallest_reference.pictures, None, lambda _: None)

    sound = compare()
    assert sound.failures() == []
    facts = GraphFacts(nodes=1, bytes=1, seconds=1.0, precision="fp16")
    figures = report.summary(sound, dict.fromkeys(sound.components, facts))["components"]
    assert {name: graph["fused_error"] for name, graph in figures.items()} == {
        name: errors.get(name, 1e-3) for name in graphs.COMPONENTS
    }
    errors["unet"] = 0.5
    [said] = compare().failures()
    assert said == "unet, fused for CUDA, differs by 5.0e-01 (accepted 1e-02) at a case"


def test_a_gpu_that_does_not_start_leaves_the_export_alone(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("CUDAExecutionProvider did not start")

    bundle = bundles.load(exported("fp32"))
    monkeypatch.setattr(recipe, "has_cuda", lambda: True)
    monkeypatch.setattr(recipe, "open_engine", refuse)
    assert not recipe._cuda_starts(bundle)
    assert "are not compared with PyTorch: CUDAExecutionProvider did not start" in caplog.text
    monkeypatch.setattr(recipe, "open_engine", lambda *_: None)
    assert recipe._cuda_starts(bundle)


def test_scheduler_settings_are_checked_before_anything_is_drawn(smallest_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(smallest_folder, tmp_path / "checkpoint")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    stages: list[str] = []
    with pytest.raises(ExportError, match="cannot sample with the checkpoint's scheduler settings"):
        export_variant(ExportRequest(tmp_path / "bundle", weights=str(folder)), stages.append)
    assert stages == ["loading the checkpoint"]


# diffusers' Euler calls np.array on a torch tensor, which numpy 2 deprecates for torch's __array__
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_a_checkpoint_that_comes_with_euler_is_proven_with_a_sampler_that_it_allows(
    smallest_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(smallest_folder, tmp_path / "checkpoint")
    path = folder / "scheduler" / "scheduler_config.json"
    euler = diffusers.EulerDiscreteScheduler.from_config(json.loads(path.read_text()))
    euler.save_config(path.parent)
    config = json.loads(path.read_text())
    del config["skip_prk_steps"]
    path.write_text(json.dumps(config))
    bundle = export_variant(ExportRequest(tmp_path / "bundle", weights=str(folder)))
    figures = json.loads((bundle / "parity.json").read_text())
    assert {picture["sampler"] for picture in figures["pictures"]} <= {"ddim", "euler"}
    assert all(picture["mean_difference"] <= 0.1 for picture in figures["pictures"])


def test_rounded_weights_are_compared_with_the_same_rounded_weights(exported: Callable[..., Path]) -> None:
    single, rounded = (json.loads((exported("fp32", kind) / "parity.json").read_text()) for kind in ("fp32", "fp16"))
    for name, graph in rounded["components"].items():
        assert graph["tolerance"] == single["components"][name]["tolerance"]
    assert 0 < rounded["rounding"]["mean_difference"] < 0.2  # measured 0.03
    assert "rounding" not in single


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"precision": "fp16", "storage": "fp32"}, "fp16 stored as fp32 is not written: choose from fp32 stored as"),
        ({"precision": "int3"}, "there is no precision 'int3': choose from fp32, fp16, int8"),
        ({"storage": "int3"}, "there is no storage 'int3': choose from fp32, fp16, int8"),
        ({"precision": "fp16", "storage": "int8"}, "fp16 stored as int8 is not written: choose from fp32 stored as"),
        ({"storage": ""}, "there is no storage ''"),
        ({"depth": "deep"}, "there is no verification depth 'deep': choose from quick, full"),
    ],
)
def test_a_choice_that_there_is_not_makes_no_request(choice: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        ExportRequest(tmp_path / "bundle", weights="nowhere", **choice)


def test_an_existing_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(ExportError, match="--force"):
        export_variant(ExportRequest(tmp_path, weights="nowhere"))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write to .*file/bundle: Not a directory"):
        export_variant(ExportRequest(tmp_path / "file" / "bundle", weights="nowhere"))


def test_the_current_folder_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no name, so that "." was a ValueError after all the work."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="is the folder you are in"):
        export_variant(ExportRequest(Path(), weights="nowhere"))


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_refused_before_pytorch_draws(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
    monkeypatch.setattr(recipe, "make_reference", lambda *_: pytest.fail("it drew"))
    with pytest.raises(ExportError, match=r"the bundle takes about 0\.\d\d GB, and .* has 0\.00 GB free"):
        export_variant(ExportRequest(tmp_path / "made" / "bundle", weights=str(smallest_folder)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "storage"), KINDS)
def test_the_expected_size_is_that_of_the_bundle_or_somewhat_more(
    exported: Callable[..., Path], build_smallest: Callable[..., Checkpoint], precision: str, storage: str
) -> None:
    folder = exported(precision, storage)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    expected = bundle_files.expected_bytes(build_smallest(), storage)
    assert size < expected < 1.1 * size + 16e6


def test_onnxruntime_may_be_installed_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With onnxruntime-gpu an export failed when all graphs were made."""
    find = metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(metadata, "version", version)
    assert bundle_files.tools()["onnxruntime"] == onnxruntime.__version__


def test_weights_that_are_not_there_are_the_checkpoints_own_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        export_variant(ExportRequest(tmp_path / "bundle", weights=str(tmp_path / "nowhere")))
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_is_the_model_with_its_loras(
    build_smallest: Callable[..., Checkpoint], smallest_folder: Path, tmp_path: Path
) -> None:
    """Against diffusers' own pipeline, into which PEFT loads the same files."""
    whole = build_smallest()
    generator = torch.Generator().manual_seed(0)
    for name, layer in (("a", "attn1.to_q"), ("b", "attn2.to_out.0")):
        key = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.{layer}"
        tensors = {f"{key}.lora.{role}.weight": torch.randn(shape, generator=generator)
                   for role, shape in (("down", (2, 16)), ("up", (16, 2)))}  # fmt: skip
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "pytorch_lora_weights.safetensors")
    loras = ((str(tmp_path / "a"), 1.0), (str(tmp_path / "b"), -0.5))
    folder = export_variant(ExportRequest(tmp_path / "bundle", weights=str(smallest_folder), loras=loras))
    source = bundles.load(folder).manifest.source
    assert source.endswith(
        "with LoRA a/pytorch_lora_weights.safetensors at scale 1, "
        "with LoRA b/pytorch_lora_weights.safetensors at scale -0.5"
    )
    assert (folder / "LICENSE").read_text().startswith("Changed: the LoRA b/")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a model that has another adapter already
        pipeline = diffusers.StableDiffusionPipeline(
            whole.vae, whole.text_encoder, whole.tokenizer, whole.unet,
            diffusers.PNDMScheduler.from_config(whole.scheduler_config), None, None, requires_safety_checker=False,
        )  # fmt: skip
        for name in ("a", "b"):
            pipeline.load_lora_weights(str(tmp_path / name), adapter_name=name)
        pipeline.set_adapters(["a", "b"], [1.0, -0.5])
    noisy, context = torch.randn((2, 4, 8, 8), generator=generator), torch.randn((2, 77, 32), generator=generator)
    with torch.no_grad():
        expected = pipeline.unet(noisy, torch.tensor([500, 500]), context).sample
        pipeline.disable_lora()
        plain = pipeline.unet(noisy, torch.tensor([500, 500]), context).sample
    session = onnxruntime.InferenceSession(folder / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
    given = {
        "sample": noisy.numpy(),
        "timestep": np.array([500.0, 500.0], np.float32),
        "encoder_hidden_states": context.numpy(),
    }
    [found] = session.run(None, given)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=8e-6)  # measured 8.9e-7


def test_an_export_killed_while_it_writes_leaves_no_bundle(smallest_folder: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in ("export", "runtime", "."))
    command = [sys.executable, "-c", "from bksdm_export.cli import main; main()"]
    options = ["--weights", str(smallest_folder), "-o", str(tmp_path / "bundle")]
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stderr is not None
        assert any("unet: PyTorch to ONNX" in line for line in process.stderr)
        process.send_signal(signal.SIGKILL)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".bundle.partial-")
    assert (left / "bundle" / "text_encoder" / "model.onnx").is_file()


def test_an_exported_component_is_freed(build_smallest: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """onnxscript's rewrite rules kept the weights of the last graphs: an export held every weight to its end."""
    checkpoint = build_smallest()
    component = graphs.components(graphs.model_facts(checkpoint), "fp32")["unet"]
    weights = [weakref.ref(parameter) for parameter in checkpoint.unet.parameters()]
    modules = [wrap(checkpoint, "unet")]
    del checkpoint
    export_graph(tmp_path / "model.onnx", "unet", modules.pop(), component, (), ("fp32", "fp32"))
    gc.collect()
    assert [weight for weight in weights if weight() is not None] == []


@pytest.mark.parametrize(
    "variant",
    [pytest.param("tiny", marks=pytest.mark.slow), pytest.param("sd-v1.4", marks=pytest.mark.exhaustive)],
)
def test_full_size_exports_within_its_memory(variant: str, tmp_path: Path) -> None:
    """2.2 times the weights in fp32: a checkpoint that loads can be exported."""
    figures = tmp_path / "figures.json"
    benchmark = [sys.executable, str(REPOSITORY / "benchmarks" / "export.py"), "--variants", variant]
    result = subprocess.run(
        [*benchmark, "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    [row] = json.loads(figures.read_text())["rows"]
    assert row["variant"] == variant
    assert row["ratio"] < 2.2, result.stdout  # measured: 1.90 and 1.50, on one core
    assert np.isfinite(row["seconds"])
