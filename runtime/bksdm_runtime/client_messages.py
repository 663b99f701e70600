"""What a client says to the server and hears from it: requests, answers and errors as messages of gRPC."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import grpc  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2  # pyright: ignore[reportMissingTypeStubs]

from bksdm_runtime.request import RequestError
from bksdm_runtime.served_request import DTYPES, FIELDS, Limits, LimitsError, filled, is_unavailable

MODEL = "txt2img_core"
PICTURE_OUTPUTS, STEP_OUTPUTS, PREVIEW_OUTPUT = ("png", "seed_used"), ("step", "of_steps"), "preview_image"
# Without it an error in a stream comes as text, with no code (Triton 24.08 and later know it).
_WITH_CODES = ("triton_grpc_error", "true")
_OPTIONS = (("grpc.max_receive_message_length", -1),)  # 4 MB by default, less than a picture of 2048 px has

# Neither library ships types; what comes out of them is cast where it arrives.
_grpc, _messages = cast(Any, grpc), cast(Any, service_pb2)


class ClientError(Exception):
    """No picture came; the message is one sentence."""


class RefusedError(ClientError):
    """The request cannot be served as it stands: the field, its value and what is allowed."""


class UnavailableError(ClientError):
    """The server is full, starting or ending: the same request may be served later."""


class GoneError(ClientError):
    """There is no server at the address, it went away under the picture, or this client is closed."""


class TimedOutError(ClientError):
    """The picture did not come within the client's `timeout`; the server has dropped it."""


class FailedError(ClientError):
    """The server lost the picture, or is not one of ours; its log says more."""


@dataclass(frozen=True)
class Picture:
    """A finished picture. png: the file, which carries how it was made; seed: what draws it again."""

    png: bytes
    seed: int

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png))

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """[H, W, 3]."""
        return np.asarray(self.image)


@dataclass(frozen=True)
class Step:
    """An evaluation is done: which, from 0, of how many. preview: [h, w, 3] uint8, where it was asked for."""

    index: int
    total: int
    preview: NDArray[np.uint8] | None


class Fields(TypedDict, total=False):
    """What a request may say beside its prompt; what is left out or None is the server's default, the seed random."""

    negative_prompt: str | None
    seed: int | None
    steps: int | None
    guidance_scale: float | None
    height: int | None
    width: int | None
    sampler: str | None


class Target:
    """Where a client's calls go, and what their answers and errors mean."""

    def __init__(self, address: str, timeout: float | None, headers: Mapping[str, str] | None) -> None:
        scheme, found, rest = address.rpartition("://")
        if found and scheme not in ("grpc", "grpcs"):
            raise ValueError(f"{address} is no address of gRPC: host:port is one, grpcs://host:port another")
        self.address, self._secure = rest.rstrip("/"), scheme == "grpcs"
        self._timeout = timeout
        self._metadata = (*(headers or {}).items(), _WITH_CODES)

    def channel(self, library: Any) -> Any:
        if self._secure:
            return library.secure_channel(self.address, _grpc.ssl_channel_credentials(), options=_OPTIONS)
        return library.insecure_channel(self.address, options=_OPTIONS)

    def options(self) -> dict[str, Any]:
        """Of every call."""
        return {"timeout": self._timeout, "metadata": self._metadata}

    def config_request(self) -> Any:
        return _messages.ModelConfigRequest(name=MODEL)

    def limits(self, answer: Any) -> Limits:
        """Raises FailedError."""
        parameters = {str(name): str(value.string_value) for name, value in answer.config.parameters.items()}
        try:
            return Limits.from_parameters(parameters)
        except LimitsError as error:
            raise FailedError(f"{self.address}: {MODEL} is not of a repository by bksdm-triton: {error}") from None

    def item(self, response: Any) -> Step | Picture:
        """Raises UnavailableError and FailedError."""
        if said := str(response.error_message):  # of a server that knows no codes; of a full queue even here (2.51)
            raise self._unavailable(said) if is_unavailable(said) else FailedError(f"{self.address}: {said}")
        values = _tensors(response.infer_response)
        try:
            if "png" in values:
                return Picture(values["png"], int(values["seed_used"]))
            return Step(int(values["step"]) - 1, int(values["of_steps"]), values.get(PREVIEW_OUTPUT))
        except KeyError:
            raise self.no_picture() from None

    def no_picture(self) -> FailedError:
        return FailedError(f"{self.address}: the server ended without a picture: its log says why")

    def closed(self) -> GoneError:
        return GoneError(f"{self.address}: this client is closed")

    def _unavailable(self, said: str) -> UnavailableError:
        return UnavailableError(f"{self.address} draws no more pictures now, try again later: {said}")

    def error(self, error: Any) -> ClientError:
        """What ended a call, as one of ours."""
        code, codes = error.code(), _grpc.StatusCode
        said = str(error.details() or code.name).strip()
        said = said if len(said) <= 500 else f"{said[:500]}..."
        if code is codes.INVALID_ARGUMENT:
            return RefusedError(said)
        if code is codes.DEADLINE_EXCEEDED:
            return TimedOutError(f"{self.address}: no picture within {self._timeout:g} s")
        if is_unavailable(said):
            return self._unavailable(said)
        if code is codes.UNAVAILABLE:
            return GoneError(f"{self.address} cannot be reached: {said}")
        if code is codes.CANCELLED:
            return GoneError(f"{self.address}: the connection was closed under the picture")
        if code is codes.NOT_FOUND:
            return FailedError(f"{self.address} serves no {MODEL}: {said}")
        return FailedError(f"{self.address}: {said}")


def _outputs(*, steps: bool, preview: bool) -> Sequence[str]:
    """What to ask the core for: a picture, and with `steps` each step."""
    wanted = (*STEP_OUTPUTS, *PICTURE_OUTPUTS) if steps else PICTURE_OUTPUTS
    return (*wanted, PREVIEW_OUTPUT) if preview else wanted


def request_for(prompt: str, fields: Mapping[str, Any], limits: Limits, *, steps: bool, preview: bool = False) -> Any:
    """The core's whole request, what is left out filled in. Raises RefusedError and TypeError."""
    given = {name: value for name, value in fields.items() if value is not None}
    if unknown := sorted(set(given) - set(Fields.__annotations__)):
        raise TypeError(f"{unknown[0]} is no field of a request: known are {', '.join(Fields.__annotations__)}")
    values = {"prompt": prompt, **given, "format": "png", "preview": preview}
    try:
        arrays = filled({name: _array(name, value) for name, value in values.items()}, limits)
    except RequestError as error:
        raise RefusedError(str(error)) from None
    request = _messages.ModelInferRequest(model_name=MODEL)
    for name, array in arrays.items():
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, FIELDS[name].datatype
        tensor.shape.extend([1, 1])
        value = cast(object, array.item())
        raw = len(value).to_bytes(4, "little") + value if isinstance(value, bytes) else array.tobytes()
        request.raw_input_contents.append(raw)
    for name in _outputs(steps=steps, preview=preview):
        request.outputs.add().name = name
    return request


def _array(name: str, value: object) -> NDArray[np.generic]:
    """A field as the server takes it, [1]. Raises RequestError."""
    datatype = FIELDS[name].datatype
    if isinstance(value, str):
        try:
            return np.array([value.encode()], np.object_)
        except UnicodeEncodeError:
            raise RequestError(f"{name} is not valid Unicode text: {ascii(value)[:60]}") from None
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = {"BYTES": False, "BOOL": isinstance(value, bool), "FP32": whole or isinstance(value, float)}
    if not fits.get(datatype, whole):
        raise RequestError(f"{name} must be {datatype}, found {value!r:.60}")
    try:
        return np.array([value], DTYPES[datatype])
    except OverflowError:
        raise RequestError(f"{name} does not fit {datatype}, found {value!r:.60}") from None


def _tensors(response: Any) -> dict[str, Any]:
    """A response's outputs, of its one request: a number, bytes, or an array without the batch."""
    found: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        content = cast(bytes, raw)
        if tensor.datatype == "BYTES":  # each begins with its length
            found[tensor.name] = content[4:]
            continue
        shape = cast("tuple[int, ...]", tuple(tensor.shape))
        array = np.ndarray(shape[1:], DTYPES[tensor.datatype], content)
        found[tensor.name] = array if array.ndim > 1 else array.item()
    return found
