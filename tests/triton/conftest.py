"""One server for all tests of the folder, with the demo bundle on one thread of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bksdm_export.triton_repository import RepositoryRequest, write_repository
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline
from tests.triton.server import Server, is_installed

ONE = EngineSettings(backend="onnxruntime", threads=1)
SLOTS, MAX_QUEUE = 4, 12


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.triton)
            if not is_installed():
                item.add_marker(pytest.mark.skip(reason="needs tritonserver: make .venv-triton/.ready"))


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    request = RepositoryRequest(
        bundle=bundles.demo(),
        output=tmp_path_factory.mktemp("triton") / "models",
        sizes=((128, 128), (64, 128)),
        slots=SLOTS,
        fronts=16,
        max_queue=MAX_QUEUE,
        max_steps=400,
        steps=4,
        backend="onnxruntime",
        threads=1,
        settings=ONE,
    )
    write_repository(request)
    return request.output


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(repository, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="session")
def alone() -> Pipeline:
    """What draws a picture by itself, outside the server."""
    return Pipeline.open(bundles.demo(), ONE)
