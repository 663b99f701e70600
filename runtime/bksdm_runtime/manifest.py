"""What bundle.json says: the schema, how it is written and read, and what must agree inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bksdm_runtime.contract import FLOATS, INTEGERS, Component, ModelFacts, TensorSpec, check_components
from bksdm_runtime.strict_json import Fields, JsonError, parse_object

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PRECISIONS = ("fp32", "fp16", "int8")
MAX_FILES = 10_000
_MAX_FILE_BYTES = 1 << 50


class BundleError(Exception):
    """A bundle that cannot be trusted or used; the message is one sentence for the user."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the lower-case hexadecimal SHA-256 of its content."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Licence:
    """Licence of the weights. file: path of the notice, posix, relative to the bundle."""

    name: str
    file: str


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json.

    precision: dtype of the graphs' arithmetic, fp32, fp16 or int8 (most layers of U-Net and VAE decoder, fp32 the
    rest); storage: dtype of the stored weights, likewise.
    token_downsampling: in the U-Net's outermost stages every so many-th token in both directions has keys and values,
    1: all have, which alone is exact.
    parity: what was compared with PyTorch, free-form; tools: name -> version of what made the bundle.
    """

    variant: str
    source: str
    precision: str
    storage: str
    model: ModelFacts
    components: Mapping[str, Component]
    files: Mapping[str, FileRecord]
    parity: Mapping[str, object]
    licence: Licence
    tools: Mapping[str, str]
    token_downsampling: int = 1
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of bundle.json; equal manifests give equal bytes. Raises ValueError on a NaN in `parity`."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read and check every field, and the components against one another. Raises BundleError."""
        try:
            manifest = _manifest(Fields(parse_object(text), ""))
            check_components(manifest.components, manifest.model, manifest.precision)
            _check_listed(manifest)
        except JsonError as error:
            raise BundleError(f"{MANIFEST_NAME}: {error}") from None
        return manifest


def check_path(name: str) -> str:
    """Return `name` when it is a plain relative posix path below a folder. Raises JsonError otherwise."""
    parts = name.split("/")
    if "\\" in name or ":" in name or "\n" in name or any(part in ("", ".", "..") for part in parts):
        raise JsonError(f"{ascii(name)[:80]} is not a path inside the bundle")
    return name


def _manifest(fields: Fields) -> Manifest:
    version = fields.integer("schema_version", 0, 1 << 31)
    if version != SCHEMA_VERSION:
        advice = "upgrade bksdm" if version > SCHEMA_VERSION else "export the bundle again"
        raise JsonError(f"schema version {version} is unknown (this bksdm reads {SCHEMA_VERSION}): {advice}")
    fields.only(*Manifest.__dataclass_fields__)
    model = fields.fields("model")
    model.only(*ModelFacts.__dataclass_fields__)
    licence = fields.fields("licence")
    licence.only("name", "file")
    files: dict[str, FileRecord] = {}
    for name, record in fields.fields("files").items():
        record.only("bytes", "sha256")
        sha256 = record.text("sha256")
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise JsonError(f"{record.where}.sha256 must be 64 lower-case hexadecimal digits")
        files[check_path(name)] = FileRecord(record.integer("bytes", 0, _MAX_FILE_BYTES), sha256)
    if len(files) > MAX_FILES:
        raise JsonError(f"files lists {len(files):,} files, at most {MAX_FILES:,} are read")
    components: dict[str, Component] = {}
    for name, component in fields.fields("components").items():
        component.only("path", "inputs", "outputs")
        components[name] = Component(
            check_path(component.text("path")), _tensor_specs(component, "inputs"), _tensor_specs(component, "outputs")
        )
    return Manifest(
        variant=fields.text("variant"),
        source=fields.text("source"),
        precision=fields.choice("precision", PRECISIONS),
        storage=fields.choice("storage", PRECISIONS),
        model=ModelFacts(
            tokens=model.integer("tokens", 2, 4096),
            context_dim=model.integer("context_dim", 1, 65536),
            latent_channels=model.integer("latent_channels", 1, 1024),
            vae_scale_factor=model.integer("vae_scale_factor", 1, 64),
            scaling_factor=model.number("scaling_factor"),
            size_multiple=model.integer("size_multiple", 1, 1024),
            height=model.integer("height", 1, 16384),
            width=model.integer("width", 1, 16384),
            guidance_scale=model.number("guidance_scale"),
        ),
        components=components,
        files=files,
        parity=fields.mapping("parity"),
        licence=Licence(licence.text("name"), check_path(licence.text("file"))),
        tools=fields.texts("tools"),
        # Older bundles do not say, and have all.
        token_downsampling=fields.integer("token_downsampling", 1, 64) if "token_downsampling" in fields else 1,
        schema_version=version,
    )


def _tensor_specs(component: Fields, name: str) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    for value, where in component.array(name, 16):
        fields = Fields(value, where)
        fields.only("name", "dtype", "axes")
        axes: list[str | int] = []
        for axis, place in fields.array("axes", 8):
            named = isinstance(axis, str) and axis != "" and axis.isprintable()
            sized = isinstance(axis, int) and not isinstance(axis, bool) and 0 < axis < 1 << 31
            if not isinstance(axis, (str, int)) or not (named or sized):
                raise JsonError(f"{place} must be a positive whole number or the name of a dynamic axis")
            axes.append(axis)
        specs.append(TensorSpec(fields.text("name"), fields.choice("dtype", FLOATS + INTEGERS), tuple(axes)))
    if len({spec.name for spec in specs}) != len(specs):
        raise JsonError(f"{component.where}.{name} has a tensor name twice")
    return tuple(specs)


def _check_listed(manifest: Manifest) -> None:
    listed = [manifest.licence.file, SCHEDULER_CONFIG, *(part.path for part in manifest.components.values())]
    for path in listed:
        if path not in manifest.files:
            raise JsonError(f"files does not list {path}")
