"""The hub as a web service: the application, its errors, its one timer, and the server around it.

uvicorn ─► bounded body ─► FastAPI ─► api        every refusal: {"error", "message", "remedy"}
one thread: every `sweep_s` ─► parties that are silent, events that are old, mailboxes that are to go
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse

from gcref.errors import AuthError, ConfigError, GcrefError, HubUnavailableError, NotFoundError
from gcref.hub import api, parties, shelf
from gcref.hub.broker import Broker
from gcref.hub.config import HubConfig
from gcref.hub.database import Database
from gcref.hub.mailboxes import Mailboxes
from gcref.hub.rabbitmq import OwnRabbit

log: Final = logging.getLogger(__name__)

# The largest thing that is sent to a hub is a function, then a record.
MAX_BODY_BYTES: Final = shelf.MAX_FUNCTION_BYTES + 64 * 1024
# How long requests may take to end when the hub stops.
_STOP_S: Final = 5

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Hub:
    """All parts of a hub, put together.

    Args:
        config: its settings.

    Raises:
        ConfigError: the database cannot be opened.
    """

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self.database = Database(config.database)
        self.broker = None if config.broker is None else Broker(config.broker)
        self.mailboxes = Mailboxes(self.database, self.broker, config.lease_s)
        self._stop = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_on, name="gcref-hub-sweep", daemon=True)

    def start(self) -> None:
        """Begin to clear away what is over."""
        self._sweeper.start()

    def close(self) -> None:
        """End, and let go of database and broker. Idempotent."""
        self._stop.set()
        if self._sweeper.is_alive():
            # It may be waiting for a broker that does not answer, and there is no harm in leaving it.
            self._sweeper.join(_STOP_S)
        if self.broker is not None:
            self.broker.close()
        self.database.close()

    def sweep(self) -> None:
        """Clear away what is over, once."""
        gone = parties.expire(self.database, self.config.lease_s)
        if gone:
            log.info("parties expired: count=%d", len(gone))
        shelf.prune(self.database)
        self.mailboxes.sweep()

    def _sweep_on(self) -> None:
        while True:
            try:
                self.sweep()
            except HubUnavailableError as error:
                log.warning("cannot clear away now: %s", error)
            except Exception:
                # The next round may do better, and there must be one.
                log.exception("clearing away failed")
            if self._stop.wait(self.config.sweep_s):
                return


def application(hub: Hub) -> FastAPI:
    """The hub's web application; it starts the hub's timer, and closes the hub at its end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        hub.start()
        yield
        await asyncio.to_thread(hub.close)

    app = FastAPI(
        title="gcref hub",
        description="Who is where, whose keys are allowed, and mailboxes for those who cannot reach each other.",
        version="1",
        lifespan=lifespan,
    )
    app.state.hub = api.State(hub.database, hub.mailboxes, hub.config.heartbeat_s)
    app.include_router(api.router)
    app.add_middleware(BoundedBody)
    app.add_exception_handler(GcrefError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _no_such_path)
    app.add_exception_handler(404, _no_such_path)
    app.add_exception_handler(405, _no_such_path)
    app.add_exception_handler(Exception, _failed)
    return app


class BoundedBody:
    """Refuses requests whose body is larger than anything that is sent to a hub, before it is all here."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            await _send_too_large(send)
            return
        taken = 0
        answered = False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY_BYTES:
                raise _TooLargeError
            return message

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLargeError:
            if not answered:
                await _send_too_large(send)


def serve(config: HubConfig, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        config: the hub's settings.
        ready: called with the hub's URL once it can be reached.

    Raises:
        ConfigError: the database cannot be opened, or the address cannot be used; the broker is to be started, and is not
            installed.
        HubUnavailableError: the broker does not start.
    """
    if threading.current_thread() is threading.main_thread():
        # uvicorn stops at a signal and then raises it again: it is to end us in order, with what we have started.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)
    listening = _listen(config)
    own: OwnRabbit | None = None
    try:
        if config.own_broker is not None:
            own = OwnRabbit(config.own_broker, config.host, config.cert, config.key)
            log.info("starting the broker")
            config = config._replace(broker=own.start())
        hub = Hub(config)
        scheme = "http" if config.cert is None else "https"
        host, port = listening.getsockname()[:2]
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        settings = uvicorn.Config(
            application(hub),
            ssl_certfile=config.cert,
            ssl_keyfile=config.key,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_S,
        )
        try:
            _Server(settings, lambda: ready(url)).run(sockets=[listening])
        except KeyboardInterrupt:
            pass  # the server has ended in order, and hands the signal on
        finally:
            hub.close()
    finally:
        listening.close()
        if own is not None:
            own.stop()


def _end(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def _listen(config: HubConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"the hub cannot listen at {config.host}:{config.port}: {error.strerror}",
            key="port",
            remedy="choose another host or port in hub.toml",
        ) from error


class _TooLargeError(Exception):
    pass


def _answer(status: int, error: str, message: str, remedy: str | None = None) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": error, "message": message, "remedy": remedy}, status, headers)


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GcrefError)
    kinds: tuple[tuple[type[GcrefError], int, str], ...] = (
        (api.TokenError, 401, "AuthError"),
        (AuthError, 403, "AuthError"),
        (NotFoundError, 404, "NotFoundError"),
        (HubUnavailableError, 503, "HubUnavailableError"),
        (GcrefError, 400, "RejectedError"),
    )
    status, name = next((status, name) for kind, status, name in kinds if isinstance(error, kind))
    return _answer(status, name, str(error), getattr(error, "remedy", None))


async def _malformed(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    # Not the input itself: it comes back in logs, and may be a secret in the wrong place.
    where = ".".join(str(part) for part in problem["loc"])[:200]
    return _answer(
        422, "RejectedError", f"{where}: {str(problem['msg'])[:300]}", "see /docs for what is expected"
    )


async def _no_such_path(_request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else getattr(error, "status_code", 404)
    detail = getattr(error, "detail", "")
    return _answer(
        status, "RejectedError", f"the hub does not answer that: {detail}", "see /docs for what it answers"
    )


async def _failed(_request: Request, error: Exception) -> JSONResponse:
    return _answer(500, "HubError", "the hub failed; its log says why", "try again, or tell who runs it")


async def _send_too_large(send: Send) -> None:
    text = f"a request has at most {MAX_BODY_BYTES} bytes"
    body = json.dumps({"error": "RejectedError", "message": text, "remedy": None}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
