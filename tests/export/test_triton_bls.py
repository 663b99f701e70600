"""The plain layout: its configurations against Triton's schema and the graphs' real inputs and outputs; refusals."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bksdm_export import triton_cli
from bksdm_export.errors import ExportError
from bksdm_export.triton_bls import COMPONENTS, config, loop_config
from bksdm_export.triton_config import FRONT, Serving
from bksdm_export.triton_repository import RepositoryRequest, write_repository
from bksdm_runtime import bundle as bundles
from bksdm_runtime.plans import EngineKey, Machine, Plan, Range, graph_sha256, key_path
from bksdm_runtime.served_request import Limits

LIMITS = Limits(sizes=((128, 128),), max_steps=50, steps=25, guidance_scale=2.0)
ADA = Machine("tensorrt", "10.3.0", "8.9")
OF_TRITON = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def written(tmp_path: Path, **changes: Any) -> Path:
    request = {"bundle": bundles.demo(), "output": tmp_path / "models", "layout": "bls", **changes}
    write_repository(RepositoryRequest(**request))
    return request["output"]


def with_engines(tmp_path: Path, *machines: Machine, onnx_hash: str | None = None, latents: int = 16) -> Path:
    """The demo's bundle with engines of two profiles that nobody built."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.demo(), folder)
    bundle = bundles.load(folder)
    shapes = {"sample": (2, 4, latents, latents), "timestep": (2,), "encoder_hidden_states": (2, 77, 64)}
    profile = {name: Range(shape, shape, shape) for name, shape in shapes.items()}
    for machine in machines:
        for component in COMPONENTS:
            path = key_path(bundle, machine, component)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = f"plan of {component}".encode()
            path.with_suffix(".plan").write_bytes(content)
            key = EngineKey(component, onnx_hash or graph_sha256(bundle, component), machine, (profile, profile), {})
            plan = Plan(key, path.with_suffix(".plan"), len(content), hashlib.sha256(content).hexdigest(), 1.0, 1)
            path.write_text(plan.to_json(), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("place", ["config.pbtxt", "configs/cpu.pbtxt"])
def test_a_component_is_configured_as_its_graph_is(tmp_path: Path, name: str, place: str) -> None:
    folder = written(tmp_path) / name
    found = parsed((folder / place).read_text())
    assert (found.name, found.backend, found.max_batch_size) == (name, "onnxruntime", 0)
    graph = onnx.load(str(folder / "1" / "model.onnx"), load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    for configured, real in ((found.input, graph.input), (found.output, graph.output)):
        of_graph = {one.name: one.type.tensor_type for one in real if one.name not in weights}
        assert {one.name for one in configured} == of_graph.keys()
        for one in configured:
            assert model_config_pb2.DataType.Name(one.data_type) == OF_TRITON[of_graph[one.name].elem_type]
            dims = [axis.dim_value or -1 for axis in of_graph[one.name].shape.dim]
            assert list(one.dims) == dims
    group = model_config_pb2.ModelInstanceGroup
    assert found.instance_group[0].kind == (group.KIND_GPU if place == "config.pbtxt" else group.KIND_CPU)


def test_graphs_are_one_file_with_the_bundles_which_verifies_without_its_engines(tmp_path: Path) -> None:
    folder = written(tmp_path, bundle=with_engines(tmp_path, ADA))
    assert sorted(path.name for path in folder.iterdir()) == sorted((FRONT, *COMPONENTS))
    copied = folder / FRONT / "1" / "bundle"
    assert not (copied / "engines").exists()
    assert bundles.load(copied).sha256 == bundles.load(bundles.demo()).sha256
    shutil.rmtree(folder)
    folder = written(tmp_path)
    assert (folder / "unet" / "1" / "model.onnx").samefile(folder / FRONT / "1" / "bundle" / "unet" / "model.onnx")
    onnx.load(str(folder / "unet" / "1" / "model.onnx"))  # with the weights beside it, where it keeps any there


def test_engines_are_served_as_plans_with_all_their_profiles_and_say_what_for(tmp_path: Path) -> None:
    folder = written(tmp_path, bundle=with_engines(tmp_path, ADA))
    for name in COMPONENTS:
        text = (folder / name / "config.pbtxt").read_text()
        assert text.startswith("# built with TensorRT 10.3.0 on SM 8.9, and for nothing else\n")
        found = parsed(text)
        assert found.backend == "tensorrt"
        assert list(found.instance_group[0].profile) == ["0", "1"]
        assert (folder / name / "1" / "model.plan").read_bytes() == f"plan of {name}".encode()
        assert sorted(path.name for path in (folder / name).iterdir()) == ["1", "config.pbtxt"]
    assert parsed((folder / FRONT / "config.pbtxt").read_text()).parameters["backend"].string_value == "tensorrt"


def test_the_loop_takes_what_the_front_takes() -> None:
    found = parsed(loop_config(Serving(LIMITS, slots=3), "onnxruntime"))
    assert (found.name, found.backend, found.instance_group[0].count) == (FRONT, "python", 3)
    assert [one.name for one in found.input if not one.optional] == ["prompt"]
    assert Limits.from_parameters({name: one.string_value for name, one in found.parameters.items()}) == LIMITS


def test_a_half_precision_graph_is_configured_in_it() -> None:
    component = bundles.load(bundles.demo()).manifest.components["unet"]
    half = type(component)(
        component.path, tuple(type(one)(one.name, "float16", one.axes) for one in component.inputs), component.outputs
    )
    types = {one.name: one.data_type for one in parsed(config("unet", half, None, on_gpu=True)).input}
    assert set(types.values()) == {model_config_pb2.TYPE_FP16}


def test_engines_of_several_machines_must_be_chosen(tmp_path: Path) -> None:
    source = with_engines(tmp_path, ADA, Machine("tensorrt", "10.3.0", "9.0"))
    with pytest.raises(ExportError, match=r"choose --engines sm89-trt10\.3\.0 or sm90-trt10\.3\.0"):
        written(tmp_path, bundle=source)
    folder = written(tmp_path, bundle=source, engines="sm90-trt10.3.0")
    assert "SM 9.0" in (folder / "unet" / "config.pbtxt").read_text()
    with pytest.raises(ExportError, match="has no engines 'sm75'"):
        written(tmp_path, bundle=source, engines="sm75", force=True)


def test_engines_of_another_graph_or_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="was built from another graph or other weights"):
        written(tmp_path, bundle=with_engines(tmp_path, ADA, onnx_hash="0" * 64))
    shutil.rmtree(tmp_path / "bundle")
    with pytest.raises(ExportError, match="was not built for 128x128"):
        written(tmp_path, bundle=with_engines(tmp_path, ADA, latents=8))
    assert not (tmp_path / "models").exists()


def test_the_command_writes_the_layout_and_says_that_it_has_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models"
    assert triton_cli.run([str(bundles.demo()), "-o", str(target), "--layout", "bls"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert (target / "unet" / "1" / "model.onnx").is_file()
    assert triton_cli.run([str(bundles.demo()), "-o", str(target), "--engines", "x"]) == 2
    assert "--engines is of --layout bls" in capsys.readouterr().err
    triton_cli.run(["--help"])
    assert "have not run it yet" in " ".join(capsys.readouterr().out.split())
