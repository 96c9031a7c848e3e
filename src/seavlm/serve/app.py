"""The server: OpenAI's HTTP interface in front of one model or several.

    app = create_app([EngineBackend(vlm)], Settings(keys=Keys.one("...")))    # an ASGI application
    seavlm serve nano                                                         # or with uvicorn around it

The straight way of a request: `requests.py` reads it; in a thread beside the event loop `server.py` makes a
prompt of pictures and text and hands it to a `backend.py`; what comes back is written by `replies.py`, whole
or as it comes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from seavlm import __version__
from seavlm.serve.backend import Backend
from seavlm.serve.errors import Refused
from seavlm.serve.replies import Chat, Plain, answer, respond
from seavlm.serve.requests import ChatRequest, CompletionRequest
from seavlm.serve.responses import ResponsesRequest
from seavlm.serve.server import Server, Settings

log = logging.getLogger("seavlm.serve")
REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
MAX_OBJECTS, MAX_COMMAS = 100_000, 1_000_000  # of a request's JSON: the loop stands still while it is read
BODY_PAUSE = 30.0  # seconds that a client may stop in the midst of a body
AWAY = re.compile(rb"(?is)null|https?://(?!(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$).*")  # an origin
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
OPEN = re.compile(r"/|/health/(live|ready)|/page/[^/]+")  # answered without a key


def create_app(backends: Sequence[Backend], settings: Settings | None = None) -> FastAPI:
    server = Server(backends, settings or Settings())

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await server.start()
        yield
        await server.stop()

    app = FastAPI(
        title="seavlm",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses={
            status: {"description": "error", "content": {"application/json": {}}}
            for status in (400, 401, 429)
        },
    )
    app.state.server = server

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.answer()

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> Response:
        return Refused.unfit(error.errors()).answer()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, str(error.detail), **dict(error.headers or {})).answer()

    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """The process answers, and nothing in it has ended for good."""
        if any(backend.fatal for backend in server.backends.values()):
            raise Refused.unserved("An engine does not run.")
        return {"status": "ok"}

    @app.get("/health/ready", tags=["health"])
    async def ready() -> dict[str, str]:
        """Requests are taken."""
        if server.draining or not server.alive:
            raise Refused.unserved("The server is shutting down.")
        return {"status": "ok"}

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(), media_type=server.metrics.media_type)

    def about(backend: Backend) -> dict[str, Any]:
        return {
            "id": backend.name,
            "object": "model",
            "created": server.created,
            "owned_by": "seavlm",
            "max_model_len": backend.max_tokens,
        }

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about(one) for one in server.backends.values()]}

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def model(model: str) -> dict[str, Any]:
        return about(server.backend(model))

    @app.post("/v1/chat/completions", tags=["completions"])
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """The reply to a conversation, pictures and all."""
        told = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.max_completion_tokens or asked.max_tokens
        names = [tool.name for tool in asked.offered]
        return await answer(server, Chat(names), request, asked, told, most)

    @app.post("/v1/completions", tags=["completions"])
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """What follows a text."""
        return await answer(server, Plain(), request, asked, asked.logprobs, asked.max_tokens)

    @app.post("/v1/responses", tags=["completions"])
    async def respond_to(request: Request, asked: ResponsesRequest) -> Response:
        """The reply to a conversation, in OpenAI's newer form; nothing is stored."""
        return await respond(server, request, asked)

    parts = {part.name: part for part in Path(__file__).with_name("page").iterdir()}

    @app.get("/", include_in_schema=False)
    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        """The chat page; a browser asks each time whether it has changed."""
        if name not in parts:
            raise HTTPException(404)
        return FileResponse(parts[name], headers=PAGE_HEADERS)

    app.add_middleware(Gate, server=server)
    return app


class Gate:
    """The door, before anything is read: request id, key, size of the body, counting and the log line."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        began, read, objects, commas = time.perf_counter(), 0, 0, 0
        status: int | None = None
        whole = False  # nothing more of the body is to come
        most = self.server.settings.max_body

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        async def receive_some() -> Any:
            nonlocal read, objects, commas, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else BODY_PAUSE)
            except TimeoutError:
                raise HTTPException(408, "The rest of the request did not come.") from None
            body, whole = message.get("body", b""), whole or not message.get("more_body", False)
            read, objects, commas = read + len(body), objects + body.count(b"{"), commas + body.count(b",")
            if read > most:
                raise HTTPException(413, f"The request has more than {most:,} bytes.")
            if objects > MAX_OBJECTS or commas > MAX_COMMAS:
                raise HTTPException(413, "The request's JSON has too many parts.")
            return message

        with self.server.settings.tracing.request(headers) as note:
            try:
                if (refusal := self._refusal(scope, headers)) is None:
                    await self.app(scope, receive_some, send_with_id)
                else:
                    await refusal.answer()(scope, receive, send_with_id)
            except Exception as error:
                log.exception("unexpected, in request %s", request_id, exc_info=error)
                if status is None:
                    refusal = Refused(500, "Something went wrong in the server.")
                    await refusal.answer()(scope, receive, send_with_id)
            finally:
                route = scope.get("route")
                path = getattr(route, "path", "other")
                took = time.perf_counter() - began
                self.server.metrics.answered(path, status or 500, took)
                note(scope["method"], path, status or 500, request_id)
                log.info(
                    json.dumps(
                        {
                            "request_id": request_id,
                            "method": scope["method"],
                            "path": path,
                            "status": status or 500,
                            "seconds": round(took, 4),
                        }
                    )
                )

    def _refusal(self, scope: Any, headers: dict[bytes, bytes]) -> Refused | None:
        """Before the body: where it comes from, whose key it is, and how much is to come."""
        keys, most = self.server.settings.keys, self.server.settings.max_body
        scope["key"] = keys.find(headers.get(b"authorization", b""))
        if not keys.keys and AWAY.fullmatch(headers.get(b"origin", b"")):
            return Refused(403, "A page of another site may not ask here. Set an API key to allow it.")
        if keys.keys and scope["key"] is None and not OPEN.fullmatch(scope["path"]):
            return Refused(401, "Give the API key: Authorization: Bearer KEY.", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            return Refused(413, f"The request has more than {most:,} bytes.")
        return None
