"""A real Triton Inference Server, started and stopped by the tests: `tritonserver` of nvidia-pytriton, no container."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-triton"
_REGION = "triton_python_backend_shm_region_"
_SHARED = Path("/dev/shm")
_STARTS_IN = 120  # seconds, on two busy cores; 6 measured on idle ones


def is_installed() -> bool:
    return (ENVIRONMENT / ".ready").is_file()


class Server:
    """A server of a repository on free ports, from `with` to its end; its log is a file."""

    def __init__(self, repository: Path, folder: Path, *options: str, config: str = "cpu") -> None:
        self.repository = repository
        self.folder = folder
        self.options = options
        self.config = config
        self.http, self.grpc, self.metrics_port = _free_ports(3)
        self.log = folder / "tritonserver.log"
        self._regions: set[str] = set()
        self.left_behind: list[str] = []  # shared memory that it had not given back when it ended

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        (site,) = ENVIRONMENT.glob("lib/python3.*/site-packages")
        python = site.parent.name.removeprefix("python")
        packed = site / "pytriton" / "tritonserver"
        backends = self.folder / "backends"
        if not backends.exists():
            (backends / "python").mkdir(parents=True)
            for path in (
                packed / "backends" / "python" / "libtriton_python.so",
                packed / "backends" / "python" / "triton_python_backend_utils.py",
                packed / "python_backend_stubs" / python / "triton_python_backend_stub",
            ):
                shutil.copy2(path, backends / "python")
        libraries = [str(site / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        environment = {
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(libraries),
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.folder),
        }
        command = [
            str(packed / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--model-config-name={self.config}",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            *(f"--load-model={path.name}" for path in sorted(self.repository.iterdir())),
            *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self.metrics_port}",
            "--metrics-interval-ms=200",
            "--allow-gpu-metrics=false",
            *(self.options or ["--exit-timeout-secs=5"]),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.folder, start_new_session=True
            )

    def stop(self) -> None:
        """End it and every process of its own that is left, with their shared memory."""
        # Unloading takes a second an instance, and past --exit-timeout-secs it leaves 1 MiB of each behind.
        self._note_regions()
        if self.process.poll() is None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        self.left_behind = sorted(region for region in self._regions if (_SHARED / region).exists())
        for region in self._regions:
            (_SHARED / region).unlink(missing_ok=True)

    def _note_regions(self) -> None:
        self._regions |= {word for words in self._stubs().values() for word in words if word.startswith(_REGION)}

    def wait_until_ready(self, seconds: float = _STARTS_IN) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver ended with {self.process.returncode}:\n{self.said()[-4000:]}")
            if self.status("/v2/health/ready") == 200:
                self._note_regions()  # now too: that of a stub that is killed later stays for ever
                return
            time.sleep(0.1)
        raise TimeoutError(f"tritonserver is not ready after {seconds} s:\n{self.said()[-4000:]}")

    def said(self) -> str:
        """Its log, without the tables that it draws."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if line[:1] not in ("|", "+", ""))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http}{path}"

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url(path), timeout=5) as response:
                return response.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def post(self, path: str, content: Any = None, *, timeout: float = 60) -> tuple[int, Any]:
        """The status and the JSON (or the text, where it is none) of an answer. content: JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        request = urllib.request.Request(self.url(path), body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, _parsed(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error.read())

    def metrics(self) -> dict[str, float]:
        """Every metric by its name and labels, as Prometheus writes them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def statistics(self, model: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url(f"/v2/models/{model}/stats"), timeout=5) as response:
            return json.loads(response.read())["model_stats"][0]

    def stubs(self, model: str) -> list[int]:
        """The processes that run a model's Python."""
        path = str(self.repository / model / "1" / "model.py")
        return [pid for pid, words in self._stubs().items() if path in words]

    def memory(self) -> tuple[int, int]:
        """Bytes: what its processes hold for themselves, and what they share."""
        own = 0
        for pid in (self.process.pid, *self._stubs()):
            with suppress(OSError):  # one that ends
                words = Path(f"/proc/{pid}/status").read_text().split()
                own += int(words[words.index("RssAnon:") + 1]) * 1024
        return own, sum((_SHARED / region).stat().st_blocks * 512 for region in self._regions)

    def _stubs(self) -> dict[int, list[str]]:
        """Arguments of this server's processes that run Python, by their id."""
        found: dict[int, list[str]] = {}
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if words[0].endswith("triton_python_backend_stub") and any(str(self.repository) in word for word in words):
                found[int(folder.name)] = words
        return found


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
