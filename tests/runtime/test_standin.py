"""The stand-in against the bindings of TensorRT 11.4, of TensorRT-RTX and of the CUDA driver: names and parameters."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest

from bksdm_runtime.backends import device
from tests.runtime.standin import (
    HERE,
    DataType,
    Driver,
    ICudaEngine,
    IExecutionContext,
    ILogger,
    Runtime,
    TensorIOMode,
)

LISTED = (Runtime, ICudaEngine, IExecutionContext)
# What is used besides, of an engine that streams or lacks its weights; of TensorRT-RTX alone.
BESIDES = {
    "Runtime": ["engine_host_code_allowed"],
    "ICudaEngine": ["weight_streaming_budget_v2", "get_weight_streaming_automatic_budget"],
    "Refitter": ["refit_cuda_engine"],
    "OnnxParserRefitter": ["refit_from_file"],
}
RTX_ALONE = {
    "ICudaEngine": ["create_runtime_config"],
    "IRuntimeConfig": [
        "create_runtime_cache",
        "set_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
    ],
    "IRuntimeCache": ["serialize", "deserialize"],
    "IExecutionContext": ["is_stream_capturable"],
}
DUMP = """
import json, sys
sys.path.insert(0, sys.argv[1])
library = __import__(sys.argv[2])
enums = {name: list(found.__members__) for name, found in (("Severity", library.ILogger.Severity),
         ("TensorIOMode", library.TensorIOMode), ("DataType", library.DataType))}
classes = {name: {one: getattr(found, one).__doc__ or "" for one in dir(found) if not one.startswith("_")}
           for name, found in vars(library).items() if isinstance(found, type)}
print(json.dumps({"version": library.__version__, "classes": classes, "enums": enums}))
"""
# Of TensorRT's libraries, which the bindings' wheel does not bring: what it takes of them, and their names.
TAKEN = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
LIBRARIES = ("libnvonnxparser.so", "libnvinfer_plugin.so", "libnvinfer.so")


def described(folder: Path, name: str) -> dict[str, Any]:
    """Classes, signatures and enumerations of real bindings, as a fresh process finds them."""
    done = subprocess.run(
        [sys.executable, "-c", DUMP, str(folder), name],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The bindings of TensorRT 11.4, made importable without its libraries, and those of TensorRT-RTX."""
    found = util.find_spec("tensorrt_bindings")
    assert found is not None
    assert found.origin is not None
    folder = tmp_path_factory.mktemp("bindings")
    copied = Path(shutil.copytree(Path(found.origin).parent, folder / "tensorrt_bindings"))
    content = (copied / "tensorrt.so").read_bytes()
    major = metadata.version("tensorrt-cu13-bindings").split(".")[0]
    # Names in the file's tables, of the same length: any function and any library will do, for none is called.
    for names, any_one in ((TAKEN, b"malloc"), ([f"{library}.{major}" for library in LIBRARIES], b"libc.so.6")):
        for name in names:
            wanted = b"\0" + name.encode() + b"\0"
            assert wanted in content, name
            content = content.replace(wanted, (b"\0" + any_one).ljust(len(wanted), b"\0"))
    (copied / "tensorrt.so").write_bytes(content)
    return {
        "TensorRT": described(folder, "tensorrt_bindings"),
        "TensorRT-RTX": described(folder, "tensorrt_rtx"),
    }


@pytest.mark.parametrize("library", ["TensorRT", "TensorRT-RTX"])
def test_the_stand_in_has_the_real_bindings_names_and_parameters(real: dict[str, dict[str, Any]], library: str) -> None:
    classes, enums = real[library]["classes"], real[library]["enums"]
    assert real["TensorRT"]["version"] == HERE.version
    for one in LISTED:
        for name, member in vars(one).items():
            if name.startswith("_"):
                continue
            documented = classes[one.__name__][name]
            if inspect.isfunction(member):
                for parameter in list(inspect.signature(member).parameters)[1:]:
                    assert f"{parameter}:" in documented, f"{one.__name__}.{name}({parameter})"
    for wanted in (BESIDES, *([RTX_ALONE] if library == "TensorRT-RTX" else [])):
        for name, members in wanted.items():
            assert set(members) <= classes[name].keys(), name
    assert [one.name for one in ILogger.Severity] == enums["Severity"]
    assert [one.name for one in TensorIOMode] == enums["TensorIOMode"]
    assert {one.name for one in DataType} <= set(enums["DataType"])


def test_the_stand_in_has_the_real_drivers_names_and_parameters() -> None:
    from cuda.bindings import driver as real_driver

    functions = [name for name in vars(Driver) if name.startswith("cu")]
    assert len(functions) > 25
    for name in functions:
        wanted = list(inspect.signature(getattr(real_driver, name)).parameters)
        assert list(inspect.signature(getattr(Driver, name)).parameters)[1:] == wanted, name
    pretended = Driver()
    for enumeration in ("CUresult", "CUdevice_attribute", "CUstreamCaptureMode"):
        members = {one.name for one in getattr(pretended, enumeration)}
        assert members <= getattr(real_driver, enumeration).__members__.keys()
    used = set(re.findall(r'"(cu[A-Z]\w+)"', Path(device.__file__).read_text()))
    assert used - {"cuStreamEndCapture"} <= set(functions)
