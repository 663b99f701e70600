"""A model repository: what lies in it, that its configurations are Triton's and agree with its code, refusals."""

from __future__ import annotations

import ast
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bksdm_export import cli, triton_cli, triton_repository
from bksdm_export.errors import ExportError
from bksdm_export.triton_config import CORE, FRONT, Serving, core, front, warm_up_files
from bksdm_export.triton_repository import RepositoryRequest, write_repository
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import BundleError
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.preview import Preview
from bksdm_runtime.served_request import DTYPES, FIELDS, Limits, read

SOURCES = Path(triton_repository.__file__).parent / "triton"
LIMITS = Limits(sizes=((512, 512), (512, 768)), max_steps=50, steps=25, guidance_scale=7.5)
TYPES = {"BYTES": "TYPE_STRING"} | {name: f"TYPE_{name}" for name in ("UINT64", "INT32", "FP32", "BOOL", "UINT8")}


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Preview:
    """A preview that no picture is drawn for."""
    preview = Preview(np.zeros((5, 3), np.float32), 1.0, 2)
    monkeypatch.setattr(triton_repository, "fit_preview", lambda pipeline: preview)
    return preview


def written(tmp_path: Path, **changes: Any) -> Path:
    settings = EngineSettings(backend="onnxruntime", threads=1)
    request = {"bundle": bundles.demo(), "output": tmp_path / "models", "settings": settings, **changes}
    write_repository(RepositoryRequest(**request))
    return request["output"]


def config(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


CONFIGS: dict[str, Callable[[], str]] = {
    f"{FRONT}/config.pbtxt": lambda: front(Serving(LIMITS)),
    f"{CORE}/config.pbtxt": lambda: core(Serving(LIMITS), on_gpu=True),
    f"{CORE}/configs/cpu.pbtxt": lambda: core(Serving(LIMITS), on_gpu=False),
}


# Configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_tritons_own_schema_and_names_nothing_twice(name: str) -> None:
    found = config(CONFIGS[name]())
    assert found.name == name.partition("/")[0]
    assert found.backend == "python"
    tensors = Counter(tensor.name for tensor in (*found.input, *found.output))
    assert max(tensors.values()) == 1
    assert max(Counter(one.name for one in found.model_warmup).values(), default=1) == 1
    assert len(found.instance_group) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_are_the_fields_of_a_request_with_their_types(name: str) -> None:
    found = config(CONFIGS[name]())
    inputs = {one.name: model_config_pb2.DataType.Name(one.data_type) for one in found.input}
    expected = {field.name: TYPES[field.datatype] for field in FIELDS.values()}
    if found.name == FRONT:
        del expected["preview"]
    assert inputs == expected
    assert all(list(one.dims) == [1] for one in found.input)


def test_the_core_streams_batches_and_has_no_optional_inputs() -> None:
    found = config(CONFIGS[f"{CORE}/config.pbtxt"]())
    assert found.model_transaction_policy.decoupled
    assert found.max_batch_size == Serving(LIMITS).slots
    assert not any(one.optional for one in found.input)
    policy = found.dynamic_batching.default_queue_policy
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 60_000_000)


def test_the_front_asks_for_a_prompt_alone_and_does_not_batch() -> None:
    found = config(CONFIGS[f"{FRONT}/config.pbtxt"]())
    assert [one.name for one in found.input if not one.optional] == ["prompt"]
    assert found.max_batch_size == 0
    assert not found.HasField("dynamic_batching")
    assert found.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert found.instance_group[0].count > Serving(LIMITS).slots  # or they would keep its slots empty


def test_one_configuration_is_for_a_gpu_and_the_other_for_a_cpu_and_nothing_else_differs() -> None:
    on_gpu, on_cpu = (config(CONFIGS[f"{CORE}/{name}"]()) for name in ("config.pbtxt", "configs/cpu.pbtxt"))
    group = model_config_pb2.ModelInstanceGroup
    assert on_gpu.instance_group[0].kind == group.KIND_GPU
    assert on_cpu.instance_group[0].kind == group.KIND_CPU
    on_gpu.ClearField("instance_group")
    on_cpu.ClearField("instance_group")
    assert on_gpu == on_cpu


def test_the_limits_come_back_from_the_parameters() -> None:
    for text in CONFIGS.values():
        found = config(text())
        assert Limits.from_parameters({name: one.string_value for name, one in found.parameters.items()}) == LIMITS


def test_every_served_size_is_warmed_up_by_a_request_that_the_core_accepts() -> None:
    files = warm_up_files(LIMITS)
    sizes = []
    for one in config(CONFIGS[f"{CORE}/config.pbtxt"]()).model_warmup:
        fields: dict[str, Any] = {}
        for name, tensor in one.inputs.items():
            content = files[tensor.input_data_file]
            assert model_config_pb2.DataType.Name(tensor.data_type) == TYPES[FIELDS[name].datatype]
            dtype = DTYPES[FIELDS[name].datatype]
            if dtype is np.object_:
                assert int.from_bytes(content[:4], "little") == len(content) - 4
                fields[name] = np.array([content[4:]], dtype)
            else:
                fields[name] = np.frombuffer(content, dtype)
        request = read(fields, LIMITS).request
        assert request.steps == 1
        sizes.append(request.size)
    assert tuple(sizes) == LIMITS.sizes


@pytest.mark.parametrize("model", [FRONT, CORE])
def test_a_model_answers_with_its_configured_outputs(model: str) -> None:
    """Every output is named in its code, or in the service that hands it the name."""
    code = (SOURCES / model / "model.py").read_text()
    literals = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    outputs = {one.name for one in config(CONFIGS[f"{model}/config.pbtxt"]()).output}
    assert outputs - {"png", "png_b64"} <= literals


@pytest.mark.parametrize("model", [FRONT, CORE])
def test_a_model_imports_the_runtime_and_no_torch(model: str) -> None:
    tree = ast.parse((SOURCES / model / "model.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    tops = {str(name).partition(".")[0] for name in imported}
    assert "bksdm_runtime" in tops
    assert not tops & {"torch", "onnx", "bksdm", "bksdm_export", "diffusers", "transformers"}


# What lies in the folder


def test_a_repository_has_both_models_and_a_bundle_that_verifies(tmp_path: Path, fitted: Preview) -> None:
    folder = written(tmp_path, sizes=((128, 128), (64, 128)), slots=4)
    assert sorted(path.name for path in folder.iterdir()) == [FRONT, CORE]
    for model in (FRONT, CORE):
        assert (folder / model / "1" / "model.py").read_bytes() == (SOURCES / model / "model.py").read_bytes()
    assert bundles.load(folder / CORE / "1" / "bundle").sha256 == bundles.load(bundles.demo()).sha256
    assert Preview.from_json((folder / CORE / "1" / "preview.json").read_text()).rmse == fitted.rmse
    served = config((folder / CORE / "config.pbtxt").read_text())
    assert [one.name for one in served.model_warmup] == ["128x128", "128x64"]
    for one in served.model_warmup:
        for tensor in one.inputs.values():
            assert (folder / CORE / "warmup" / tensor.input_data_file).is_file()


def test_a_size_that_is_left_out_is_the_models_own(tmp_path: Path, fitted: Preview) -> None:
    served = config((written(tmp_path) / CORE / "config.pbtxt").read_text())
    assert served.parameters["sizes"].string_value == "128x128"
    assert served.parameters["guidance_scale"].string_value == "2.0"


def test_linked_files_are_the_bundles_own(tmp_path: Path, fitted: Preview) -> None:
    source = tmp_path / "bundle"

    shutil.copytree(bundles.demo(), source)
    folder = written(tmp_path, bundle=source, link=True)
    assert (folder / CORE / "1" / "bundle" / "unet" / "model.onnx").samefile(source / "unet" / "model.onnx")


def test_engines_come_along(tmp_path: Path, fitted: Preview) -> None:

    source = tmp_path / "bundle"
    shutil.copytree(bundles.demo(), source)
    (source / "engines" / "8.9-trt10.3").mkdir(parents=True)
    (source / "engines" / "8.9-trt10.3" / "unet.plan").write_bytes(b"plan")
    folder = written(tmp_path, bundle=source)
    assert (folder / CORE / "1" / "bundle" / "engines" / "8.9-trt10.3" / "unet.plan").read_bytes() == b"plan"


def test_the_demos_previews_resemble_its_pictures() -> None:
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime", threads=1))
    preview = triton_repository.fit_preview(pipeline)
    assert preview.pictures == 2
    assert preview.psnr > 20  # 22.3 dB measured: an emoji's edges are what a linear map loses


# Refusals


def test_what_is_no_repository_is_not_replaced(tmp_path: Path, fitted: Preview) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not a model repository"):
        written(tmp_path, force=True)


def test_a_bundle_is_no_repository(tmp_path: Path, fitted: Preview) -> None:

    shutil.copytree(bundles.demo(), tmp_path / "models")
    with pytest.raises(ExportError, match="is not a model repository"):
        written(tmp_path, force=True)


def test_a_repository_is_replaced_by_force_alone(tmp_path: Path, fitted: Preview) -> None:
    written(tmp_path)
    with pytest.raises(ExportError, match="exists"):
        written(tmp_path)
    folder = written(tmp_path, slots=3, force=True)
    assert config((folder / CORE / "config.pbtxt").read_text()).max_batch_size == 3


def test_a_failed_write_leaves_nothing(tmp_path: Path, fitted: Preview, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton_repository.shutil, "copytree", full)
    with pytest.raises(ExportError, match="disk is full"):
        written(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_repository_in_its_own_bundle_is_refused(tmp_path: Path, fitted: Preview) -> None:

    source = tmp_path / "bundle"
    shutil.copytree(bundles.demo(), source)
    with pytest.raises(ExportError, match="lies in the bundle"):
        written(tmp_path, bundle=source, output=source / "models")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sizes": ((129, 128),)}, "height 129 does not fit this model"),
        ({"sizes": ((128, 8192),)}, "width must be a whole number from 1 to 4096"),
        ({"max_steps": 2000}, "at most 1000"),
    ],
)
def test_what_the_model_cannot_serve_is_refused(
    tmp_path: Path, fitted: Preview, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ExportError, match=says):
        written(tmp_path, **changes)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        written(tmp_path, bundle=tmp_path)


# The command


def test_the_command_prints_the_repositorys_path(
    tmp_path: Path, fitted: Preview, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models"
    assert triton_cli.run([str(bundles.demo()), "-o", str(target), "--size", "128x64", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{target}\n"
    assert "previews: 48.1 dB" in captured.err
    assert config((target / CORE / "config.pbtxt").read_text()).parameters["sizes"].string_value == "128x64"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["BUNDLE"], 2, "Missing option '-o'"),
        (["BUNDLE", "-o", "out", "--size", "128"], 2, "is not WIDTHxHEIGHT"),
        (["BUNDLE", "-o", "out", "--slots", "0"], 2, "0 is not in the range"),
        (["nothing", "-o", "out"], 1, "bksdm-triton: bundle nothing: there is no such folder"),
        (["BUNDLE", "-o", "out", "--size", "129x128"], 1, "bksdm-triton: width 129 does not fit this model"),
    ],
)
def test_misuse_and_failure_are_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert triton_cli.run([str(bundles.demo()) if one == "BUNDLE" else one for one in arguments]) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_export_for_triton_writes_bundle_and_repository(
    tmp_path: Path, fitted: Preview, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exported(request: Any, progress: object) -> Path:
        assert request.precision == "fp32"
        return Path(shutil.copytree(bundles.demo(), request.output))

    monkeypatch.setattr("bksdm_export.recipe.export_variant", exported)
    target = tmp_path / "demo"
    arguments = ["--weights", "demo", "--target", "triton", "-o", str(target)]
    assert cli.run(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(target), f"{target}-triton"]
    assert bundles.load(tmp_path / "demo-triton" / CORE / "1" / "bundle").sha256 == bundles.load(target).sha256
    shutil.rmtree(target)
    assert cli.run(arguments) == 1  # before anything is exported
    assert "demo-triton exists: choose another --output" in capsys.readouterr().err
    assert not target.exists()


def test_every_option_has_help() -> None:
    options = [one for one in triton_cli.command.params if isinstance(one, click.Option)]
    assert all(one.help for one in options if one.name != "version")


def test_a_preview_file_is_plain_json(tmp_path: Path, fitted: Preview) -> None:
    content = json.loads((written(tmp_path) / CORE / "1" / "preview.json").read_text())
    assert content.keys() == {"matrix", "rmse", "psnr", "pictures"}
