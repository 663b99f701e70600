"""Pictures from a server that `bksdm-triton` made the repository of, over gRPC: sync, async, and step by step.

All of it speaks to the core's stream, a stream for each picture: hanging up, by a timeout or by closing an iterator,
stops the work within a step, and no front is held while a picture is drawn. Built on tritonclient's own generated
stubs, because its `InferenceServerClient` has one stream at a time and hands its answers to a thread of its own.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from typing import TYPE_CHECKING, Any, cast

import grpc  # pyright: ignore[reportMissingTypeStubs]
import grpc.aio  # pyright: ignore[reportMissingTypeStubs]
from tritonclient.grpc import service_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]

from bksdm_runtime.client_messages import (
    ClientError,
    FailedError,
    Fields,
    GoneError,
    Picture,
    RefusedError,
    Step,
    Target,
    TimedOutError,
    UnavailableError,
    request_for,
)
from bksdm_runtime.served_request import Limits

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "FailedError",
    "Fields",
    "GoneError",
    "Picture",
    "RefusedError",
    "Step",
    "TimedOutError",
    "UnavailableError",
]

# Neither library ships types; what comes out of them is cast where it arrives.
_grpc, _aio, _stubs = cast(Any, grpc), cast(Any, grpc.aio), cast(Any, service_pb2_grpc)


class Client:
    """A server's pictures, for threads: one client serves any number of them.

    address: host:port of its gRPC; "grpcs://host:port" for TLS. timeout: seconds for a picture, its wait in the
    server's queue included; None waits for ever. headers: sent along, for a gateway.
    """

    def __init__(
        self, address: str = "127.0.0.1:8001", *, timeout: float | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._target = Target(address, timeout, headers)
        self._channel = self._target.channel(_grpc)
        self._stub = _stubs.GRPCInferenceServiceStub(self._channel)
        self._limits: Limits | None = None

    def limits(self) -> Limits:
        """What the server accepts and fills in; asked once. Raises ClientError."""
        if self._limits is None:
            try:
                answer = self._stub.ModelConfig(self._target.config_request(), **self._target.options())
            except grpc.RpcError as error:
                raise self._target.error(error) from None
            except ValueError:  # of grpc, whose channel is closed
                raise self._target.closed() from None
            self._limits = self._target.limits(answer)
        return self._limits

    def draw(self, prompt: str, **fields: Unpack[Fields]) -> Picture:
        """One picture. Raises ClientError."""
        request = request_for(prompt, fields, self.limits(), steps=False)
        *_, picture = self._whole(request)
        assert isinstance(picture, Picture)
        return picture

    def stream(
        self, prompt: str, *, preview: bool = False, **fields: Unpack[Fields]
    ) -> Generator[Step | Picture, None, None]:
        """Each step, and then the picture; closing the generator cancels. preview: a small picture with every step.

        Nothing is asked before the first item is. Raises ClientError.
        """
        yield from self._whole(request_for(prompt, fields, self.limits(), steps=True, preview=preview))

    def _whole(self, request: Any) -> Generator[Step | Picture, None, None]:
        """Steps, and last the picture, which is held back until the stream has ended.

        Triton 2.51 never releases a stream that is cancelled between its picture and its end: its model then does not
        unload, and the server waits out its exit timeout.
        """
        picture: Picture | None = None
        for item in self._items(request):
            if isinstance(item, Picture):
                picture = item
            else:
                yield item
        if picture is None:
            raise self._target.no_picture()
        yield picture

    def _items(self, request: Any) -> Generator[Step | Picture, None, None]:
        try:
            call = self._stub.ModelStreamInfer(iter([request]), **self._target.options())
        except ValueError:
            raise self._target.closed() from None
        try:
            for response in call:
                yield self._target.item(response)
        except grpc.RpcError as error:
            raise self._target.error(error) from None
        finally:
            call.cancel()  # nothing where it is over

    def close(self) -> None:
        """Cancel what is under way, in any thread, and hang up."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """As Client, for asyncio: any number of pictures at once in one event loop."""

    def __init__(
        self, address: str = "127.0.0.1:8001", *, timeout: float | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._target = Target(address, timeout, headers)
        self._channel = self._target.channel(_aio)
        self._stub = _stubs.GRPCInferenceServiceStub(self._channel)
        self._limits: Limits | None = None
        self._is_closed = False

    async def limits(self) -> Limits:
        """As Client.limits."""
        if self._limits is None:
            try:
                answer = await self._stub.ModelConfig(self._target.config_request(), **self._target.options())
            except grpc.RpcError as error:
                raise self._target.error(error) from None
            except (grpc.aio.UsageError, asyncio.CancelledError) as error:
                self._refuse_closed(error)
                raise
            self._limits = self._target.limits(answer)
        return self._limits

    async def draw(self, prompt: str, **fields: Unpack[Fields]) -> Picture:
        """As Client.draw; cancelling the task cancels the picture."""
        request = request_for(prompt, fields, await self.limits(), steps=False)
        items = self._whole(request)
        try:
            found = [item async for item in items]
        finally:
            await items.aclose()
        assert isinstance(found[-1], Picture)
        return found[-1]

    async def stream(
        self, prompt: str, *, preview: bool = False, **fields: Unpack[Fields]
    ) -> AsyncGenerator[Step | Picture, None]:
        """As Client.stream. `contextlib.aclosing` closes it where a loop over it may end early."""
        request = request_for(prompt, fields, await self.limits(), steps=True, preview=preview)
        items = self._whole(request)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def _whole(self, request: Any) -> AsyncGenerator[Step | Picture, None]:
        """As Client's."""
        items = self._items(request)
        picture: Picture | None = None
        try:
            async for item in items:
                if isinstance(item, Picture):
                    picture = item
                else:
                    yield item
        finally:
            await items.aclose()
        if picture is None:
            raise self._target.no_picture()
        yield picture

    async def _items(self, request: Any) -> AsyncGenerator[Step | Picture, None]:
        try:
            call = self._stub.ModelStreamInfer(_once(request), **self._target.options())
        except grpc.aio.UsageError as error:
            self._refuse_closed(error)
            raise
        try:
            async for response in call:
                yield self._target.item(response)
        except grpc.RpcError as error:
            raise self._target.error(error) from None
        except asyncio.CancelledError as error:
            self._refuse_closed(error)
            raise
        finally:
            call.cancel()

    def _refuse_closed(self, error: BaseException) -> None:
        """Raises GoneError where the client is closed; a closed channel cancels its calls as a task's end does."""
        if self._is_closed and not _task_is_cancelled():
            raise self._target.closed() from error

    async def close(self) -> None:
        """Cancel what is under way, in any task, and hang up."""
        self._is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and sys.version_info >= (3, 11) and task.cancelling() > 0


async def _once(request: Any) -> AsyncIterator[Any]:
    yield request
