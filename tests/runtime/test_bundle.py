"""A bundle is read whole or refused with one sentence: schema, paths, sizes, hashes, the graphs against one another."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle, BundleError, Manifest
from bksdm_runtime.schedule import ScheduleError, make_schedule

Content = dict[str, Any]
Rewrite = Callable[[Path, Callable[[Content], object]], None]


def refuse(folder: Path, match: str) -> str:
    with pytest.raises(BundleError, match=match) as caught:
        bundles.load(folder)
    message = str(caught.value)
    assert len(message) < 500
    assert "\n" not in message
    return message


def test_a_whole_bundle_opens(toy_bundle: Path) -> None:
    opened = bundles.load(toy_bundle)
    assert opened.manifest.variant == "toy"
    assert opened.scheduler_config["_class_name"] == "PNDMScheduler"
    assert opened.sha256 == bundles.file_sha256(toy_bundle / "bundle.json")
    assert opened.component_path("unet") == toy_bundle.resolve() / "unet" / "model.onnx"


def test_manifest_survives_writing_and_reading(toy_bundle: Path) -> None:
    manifest = bundles.load(toy_bundle).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()


def test_manifest_with_nan_parity_is_not_written(toy_bundle: Path) -> None:
    manifest = bundles.load(toy_bundle).manifest
    spoiled = Manifest(**{**vars(manifest), "parity": {"error": float("nan")}})
    with pytest.raises(ValueError, match="JSON compliant"):
        spoiled.to_json()


def test_every_file_has_a_record_but_the_manifest_and_the_engines(toy_copy: Path) -> None:
    (toy_copy / "engines" / "sm90-trt10").mkdir(parents=True)
    (toy_copy / "engines" / "sm90-trt10" / "unet.plan").write_bytes(b"plan")
    (toy_copy / "parity.html").write_text("<html>")
    (toy_copy / "unet" / ".DS_Store").write_bytes(b"")
    records = bundles.file_records(toy_copy)
    assert "parity.html" in records
    assert records["LICENSE"].bytes == (toy_copy / "LICENSE").stat().st_size
    assert not {"bundle.json", "engines/sm90-trt10/unet.plan", "unet/.DS_Store"} & records.keys()
    assert list(records) == sorted(records)


def test_a_flipped_byte_in_any_file_is_found(toy_copy: Path) -> None:
    for name in bundles.load(toy_copy).manifest.files:
        path = toy_copy / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert name in refuse(toy_copy, "changed or damaged")
        path.write_bytes(whole)
    bundles.load(toy_copy)


def test_a_flipped_byte_of_the_schedule_is_found_before_it_is_read(toy_copy: Path) -> None:
    path = toy_copy / bundles.SCHEDULER_CONFIG
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        with pytest.raises(BundleError, match=f"{bundles.SCHEDULER_CONFIG} was changed or damaged"):
            bundles.load(toy_copy, verify=False)


def test_a_flipped_byte_in_the_manifest_is_refused_or_changes_the_hash(toy_copy: Path) -> None:
    path = toy_copy / "bundle.json"
    whole, before = path.read_bytes(), bundles.load(toy_copy).sha256
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert bundles.load(toy_copy).sha256 != before
        except BundleError:
            continue


def test_a_truncated_file_is_found_without_hashing(toy_copy: Path) -> None:
    path = toy_copy / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"unet/model.onnx has [\d,]+ bytes, bundle.json says"):
        bundles.load(toy_copy, verify=False)


def test_without_verify_only_the_hashes_are_skipped(toy_copy: Path) -> None:
    path = toy_copy / "unet" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert isinstance(bundles.load(toy_copy, verify=False), Bundle)
    refuse(toy_copy, "unet/model.onnx was changed or damaged")


def test_a_missing_file_is_named(toy_copy: Path) -> None:
    (toy_copy / "vae_decoder" / "model.onnx").unlink()
    refuse(toy_copy, "vae_decoder/model.onnx is missing")


@pytest.mark.parametrize("name", ["unet/model.onnx.data", "tokenizer/added_tokens.json", "scheduler/other.json"])
def test_an_unlisted_file_where_a_graph_could_read_it_is_refused(toy_copy: Path, name: str) -> None:
    (toy_copy / name).write_bytes(b"sneaked in")
    refuse(toy_copy, f"{name} is not listed in bundle.json")


def give_external_weights(folder: Path, location: str) -> Path:
    """Move the U-Net's weights to a file beside its graph, as an exporter (or an attacker) may; list only the graph."""
    graph = folder / "unet" / "model.onnx"
    weights = graph.parent / location
    weights.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.load(graph)
    onnx.external_data_helper.convert_model_to_external_data(model, location=location, size_threshold=0)
    onnx.save(model, graph)
    return weights


@pytest.mark.parametrize("location", ["model.onnx.data", "w/x.data", "w/v/x.data", ".DS_Store"])
def test_unlisted_weights_in_a_folder_below_a_component_were_loaded_and_never_verified(
    toy_copy: Path, location: str, rewrite_manifest: Rewrite
) -> None:
    weights = give_external_weights(toy_copy, location)
    records = {name: vars(record) for name, record in bundles.file_records(toy_copy).items()}
    rewrite_manifest(toy_copy, _set("files", value=records))
    if records.pop(f"unet/{location}", None):  # no record is made of a .DS_Store
        bundles.load(toy_copy)
    rewrite_manifest(toy_copy, _set("files", value=records))
    assert weights.is_file()
    refuse(toy_copy, f"unet/{location} is not listed in bundle.json")


def test_a_linked_folder_below_a_component_is_refused(toy_copy: Path) -> None:
    (toy_copy / "engines").mkdir()
    (toy_copy / "engines" / "x.data").write_bytes(b"weights")
    (toy_copy / "unet" / "w").symlink_to(toy_copy / "engines")
    refuse(toy_copy, "unet/w is a linked folder")


def test_a_shallow_unet_lies_beside_the_unet_and_takes_its_features(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, rewrite_manifest: Rewrite
) -> None:
    folder = make_toy_bundle(tmp_path / "bundle", step_cache=True)
    assert bundles.load(folder).component_path("unet_shallow") == folder / "unet" / "shallow.onnx"
    narrower = {"name": "deep_features", "dtype": "float32", "axes": ["batch", 3, "height", "width"]}
    rewrite_manifest(folder, _set("components", "unet_shallow", "inputs", 3, value=narrower))
    refuse(folder, r"unet_shallow.inputs: deep_features must be \[batch, 8, height, width\], found \[batch, 3,")
    whole = {**narrower, "axes": ["batch", "deep", "height", "width"]}
    rewrite_manifest(folder, _set("components", "unet", "outputs", 1, value=whole))
    refuse(folder, r"components.unet.outputs must give deep_features, \[batch, channels, height, width\]")


@pytest.mark.parametrize("path", ["model.onnx", "scheduler/model.onnx", "vae_decoder/unet.onnx", "unet.onnx"])
def test_a_component_outside_its_own_folder_is_refused(toy_copy: Path, path: str, rewrite_manifest: Rewrite) -> None:
    shutil.move(toy_copy / "unet" / "model.onnx", toy_copy / path)
    records = {name: vars(record) for name, record in bundles.file_records(toy_copy).items()}
    rewrite_manifest(toy_copy, _set("files", value=records))
    rewrite_manifest(toy_copy, _set("components", "unet", "path", value=path))
    refuse(toy_copy, "components.unet.path must lie in the folder unet/")


def test_an_unreadable_file_is_said_without_an_error_number(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundles, "file_sha256", fail)
    assert "[Errno" not in refuse(toy_copy, r"cannot be read: Permission denied \(.*\)")


def test_a_saved_dpm_solver_config_holds_minus_infinity_and_is_read(toy_copy: Path, rewrite_manifest: Rewrite) -> None:
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_config(toy_copy / "scheduler")
    assert "-Infinity" in (toy_copy / "scheduler" / "scheduler_config.json").read_text()
    records = {name: vars(record) for name, record in bundles.file_records(toy_copy).items()}
    rewrite_manifest(toy_copy, _set("files", value=records))
    config = bundles.load(toy_copy).scheduler_config
    assert config["lambda_min_clipped"] == -math.inf
    assert len(make_schedule(config, steps=20, sampler="dpmsolver++").timesteps) == 20
    for name in ("beta_start", "steps_offset", "trained_betas"):
        with pytest.raises(ScheduleError, match=f"'{name}'"):
            make_schedule({**config, name: -math.inf}, steps=20, sampler="dpmsolver++")


def test_files_of_the_user_at_the_top_and_engines_are_ignored(toy_copy: Path) -> None:
    (toy_copy / "vase.png").write_bytes(b"a picture")
    (toy_copy / "engines").mkdir()
    (toy_copy / "engines" / "unet.plan").write_bytes(b"plan")
    (toy_copy / "unet" / ".DS_Store").write_bytes(b"")
    bundles.load(toy_copy)


def test_external_weights_are_ordinary_files(toy_copy: Path, rewrite_manifest: Rewrite) -> None:
    (toy_copy / "unet" / "model.onnx.data").write_bytes(b"weights")
    records = bundles.file_records(toy_copy)
    rewrite_manifest(
        toy_copy, lambda content: content.update(files={name: vars(record) for name, record in records.items()})
    )
    bundles.load(toy_copy)
    (toy_copy / "unet" / "model.onnx.data").write_bytes(b"weightz")
    refuse(toy_copy, "unet/model.onnx.data was changed or damaged")


def test_no_folder_and_no_manifest_are_said_plainly(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "there is no such folder")
    refuse(tmp_path, "has no bundle.json: bksdm-export writes bundles")
    (tmp_path / "model_index.json").write_text("{}")
    refuse(tmp_path, "a diffusers checkpoint: export it first")


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        "a\\b",
        "C:/x",
        "C:x",
        "a//b",
        "./a",
        "a/.",
        "",
        "a/",
        "a\nb",
        "a\0b",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(toy_copy: Path, path: str, rewrite_manifest: Rewrite) -> None:
    def list_it(content: Content) -> None:
        content["files"][path] = {"bytes": 1, "sha256": "0" * 64}

    rewrite_manifest(toy_copy, list_it)
    refuse(toy_copy, "not a path inside the bundle|printable text")


@pytest.mark.parametrize("place", ["component", "licence"])
def test_a_component_or_licence_path_that_leaves_the_folder_is_refused(
    toy_copy: Path, place: str, rewrite_manifest: Rewrite
) -> None:
    def point_outside(content: Content) -> None:
        if place == "component":
            content["components"]["unet"]["path"] = "../model.onnx"
        else:
            content["licence"]["file"] = "/etc/passwd"

    rewrite_manifest(toy_copy, point_outside)
    refuse(toy_copy, "not a path inside the bundle")


def test_a_link_that_leaves_the_folder_is_refused(toy_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(toy_copy / "unet" / "model.onnx", outside)
    (toy_copy / "unet" / "model.onnx").symlink_to(outside)
    refuse(toy_copy, "unet/model.onnx is a link that leaves the folder")


def test_a_linked_folder_that_leaves_is_refused_and_a_linked_root_is_not(toy_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(toy_copy)
    bundles.load(tmp_path / "link")
    shutil.move(toy_copy / "unet", tmp_path / "unet")
    (toy_copy / "unet").symlink_to(tmp_path / "unet")
    refuse(toy_copy, "is a link that leaves the folder")


def _set(*keys: str | int, value: object) -> Callable[[Content], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def _delete(*keys: str) -> Callable[[Content], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


UNET_INPUTS = ("components", "unet", "inputs")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("schema_version", value=2), r"schema version 2 is unknown \(this bksdm reads 1\): upgrade bksdm"),
        (_set("schema_version", value=0), "export the bundle again"),
        (_set("schema_version", value=True), "schema_version must be a whole number"),
        (_set("schema_version", value="1"), "schema_version must be a whole number"),
        (_set("schema_version", value=10**5000), "JSON|huge"),
        (_delete("schema_version"), "schema_version is missing"),
        (_delete("model"), "model is missing"),
        (_delete("model", "tokens"), r"model\.tokens is missing"),
        (_set("surprise", value=1), "surprise is unknown"),
        (_set("x" * 100_000, value=1), r"x\.\.\. is unknown"),
        (_set("model", "surprise", value=1), r"model\.surprise is unknown"),
        (_set("variant", value=3), "variant must be printable text"),
        (_set("variant", value="\x1b[2J"), "variant must be printable text"),
        (_set("variant", value="\ud800"), "variant must be printable text"),
        (_set("precision", value="int3"), "precision must be fp32 or fp16 or int8, found"),
        (_set("storage", value=[]), "storage must be fp32 or fp16 or int8, found an array"),
        (_set("model", value=[]), "model must be an object, found an array"),
        (_set("model", "tokens", value=77.0), r"model\.tokens must be a whole number"),
        (_set("model", "tokens", value=-1), r"model\.tokens must be a whole number"),
        (_set("model", "scaling_factor", value="0.18"), r"model\.scaling_factor must be a number"),
        (_set("model", "scaling_factor", value=0), "scaling_factor must be positive"),
        (_set("model", "scaling_factor", value=10**400), "scaling_factor must be a number that fits"),
        (_set("model", "height", value=65), r"model\.height \(65\) must be a multiple"),
        (_set("model", "size_multiple", value=12), "size_multiple"),
        (_set("model", "guidance_scale", value=0.5), "guidance_scale must be at least 1"),
        (_set("files", value=[]), "files must be an object"),
        (_set("files", "LICENSE", value=None), "LICENSE must be an object, found null"),
        (_set("files", "LICENSE", "sha256", value="ABC"), "64 lower-case hexadecimal digits"),
        (_set("files", "LICENSE", "bytes", value=-1), "bytes must be a whole number"),
        (_delete("files", "LICENSE"), "files does not list LICENSE"),
        (_delete("files", "unet/model.onnx"), "files does not list unet/model.onnx"),
        (_delete("files", "scheduler/scheduler_config.json"), "files does not list scheduler/scheduler_config.json"),
        (_delete("files", "tokenizer/vocab.json"), "tokenizer/vocab.json is not listed"),
        (_set("tools", "onnx", value=1), "tools.onnx must be printable text"),
        (_set("parity", value="fine"), "parity must be an object"),
        (_delete("components", "unet"), r"components\.unet is missing"),
        (
            _set("components", "safety_checker", value={"path": "a", "inputs": [], "outputs": []}),
            "safety_checker is unk",
        ),
        (_set("components", "unet", "inputs", value={}), "must be an array of at most"),
        (_set(*UNET_INPUTS, value=[]), "unet.inputs must be sample, timestep, encoder_hidden_states, found none"),
        (_set(*UNET_INPUTS, value=[{"name": "a"}] * 17), "must be an array of at most 16"),
        (_set(*UNET_INPUTS, 0, "dtype", value="bfloat16"), "dtype must be"),
        (_set(*UNET_INPUTS, 0, "dtype", value="int64"), "sample must be float32 or float16, found int64"),
        (_set(*UNET_INPUTS, 0, "dtype", value="float16"), "sample is float16 in a bundle of precision fp32"),
        (_set(*UNET_INPUTS, 0, "name", value="timestep"), "has a tensor name twice"),
        (_set(*UNET_INPUTS, 0, "name", value="latents"), "must be sample, timestep, encoder_hidden_states, found lat"),
        (_set(*UNET_INPUTS, 0, "axes", value=["batch", 4, "height"]), r"sample must be \[batch, 4, height, width\]"),
        (_set(*UNET_INPUTS, 0, "axes", value=["batch", 4, 64, 64]), r"found \[batch, 4, 64, 64\]"),
        (_set(*UNET_INPUTS, 0, "axes", value=["batch", 8, "height", "width"]), r"found \[batch, 8, height, width\]"),
        (_set(*UNET_INPUTS, 0, "axes", value=["", 4, "h", "w"]), r"axes\[0\] must be a positive whole number or"),
        (_set(*UNET_INPUTS, 0, "axes", value=[True, 4, "h", "w"]), r"axes\[0\] must be"),
        (_set(*UNET_INPUTS, 0, "axes", value=[1.5, 4, "h", "w"]), r"axes\[0\] must be"),
        (_set(*UNET_INPUTS, 2, "axes", value=["batch", 77, 768]), r"encoder_hidden_states must be \[batch, 77, 16\]"),
        (
            _set("model", "context_dim", value=32),
            r"last_hidden_state must be \[batch, 77, 32\], found \[batch, 77, 16\]",
        ),
        (_set("components", "text_encoder", "inputs", 0, "dtype", value="float32"), "must be int32 or int64"),
    ],
)
def test_a_wrong_field_gives_one_sentence(
    toy_copy: Path, change: Callable[[Content], None], match: str, rewrite_manifest: Rewrite
) -> None:
    if match == "JSON|huge":  # json.dumps cannot print that number, an attacker can
        path = toy_copy / "bundle.json"
        path.write_text(path.read_text().replace('"schema_version": 1', f'"schema_version": 1{"0" * 5000}'))
    else:
        rewrite_manifest(toy_copy, change)
    refuse(toy_copy, match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "must hold a JSON object, found an array"),
        (b"null", "must hold a JSON object, found null"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": NaN}', "has NaN, which is not JSON"),
        (b'{"a": Infinity}', "has Infinity, which is not JSON"),
        (b'{"a": 1e999}', "has a number out of range"),
        (b'{"a": 1, "a": 2}', "has the key a twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b" " * (9 << 20), "too large"),
    ],
    ids=lambda value: value[:16].hex() if isinstance(value, bytes) else "",
)
@pytest.mark.parametrize("name", ["bundle.json", "scheduler/scheduler_config.json"])
def test_hostile_json_gives_one_sentence(
    toy_copy: Path, name: str, content: bytes, match: str, rewrite_manifest: Rewrite
) -> None:
    (toy_copy / name).write_bytes(content)
    if name != "bundle.json":
        records = bundles.file_records(toy_copy)
        rewrite_manifest(toy_copy, _set("files", name, value=vars(records[name])))
    assert name in refuse(toy_copy, match)


def test_minus_infinity_is_not_read_in_the_manifest(toy_copy: Path) -> None:
    (toy_copy / "bundle.json").write_text('{"a": -Infinity}')
    refuse(toy_copy, "has -Infinity, which is not JSON")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(toy_bundle: Path, data: st.DataObject) -> None:
    content: Any = json.loads((toy_bundle / "bundle.json").read_text())
    place = content
    while True:  # walk to a random place
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    with contextlib.suppress(BundleError):  # anything else is the failure
        Manifest.from_json(json.dumps(content))


def test_a_component_that_the_bundle_lacks_is_named(toy_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"has no upscaler \(it has text_encoder"):
        bundles.load(toy_bundle).component_path("upscaler")


def test_no_demo_in_this_build_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "__file__", str(tmp_path / "bundle.py"))
    with pytest.raises(BundleError, match="ships no demo bundle"):
        bundles.demo()


@pytest.mark.parametrize(("written", "read"), [(None, 1), (1, 1), (2, 2)])
def test_a_bundle_that_says_nothing_of_its_tokens_has_them_all(
    toy_bundle: Path, tmp_path: Path, written: int | None, read: int
) -> None:
    text = json.loads((toy_bundle / "bundle.json").read_text())
    text.pop("token_downsampling")
    if written is not None:
        text["token_downsampling"] = written
    assert bundles.Manifest.from_json(json.dumps(text)).token_downsampling == read
    with pytest.raises(BundleError, match="token_downsampling must be a whole number from 1 to 64, found 0"):
        bundles.Manifest.from_json(json.dumps({**text, "token_downsampling": 0}))
