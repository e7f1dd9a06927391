"""The gateway's ASGI application."""

import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import AdapterError
from gateway.api import adapters, deployments, files, fine_tuning, health, metrics, models, organization, uploads, usage
from gateway.api.generation import ENDPOINTS, GenerationEndpoint
from gateway.deployments import MakeDedicated
from gateway.drain import Drain, NoNewWork
from gateway.errors import GatewayError, InvalidRequestError, error_body, error_headers, error_object_for
from gateway.idempotency import Idempotency
from gateway.services import MakeHost, open_services, services_of
from gateway.settings import Settings

logger = logging.getLogger(__name__)

IDEMPOTENT = ("/v1/adapters", "/v1/uploads", "/v1/files", "/v1/fine_tuning", "/v1/organization")


class RequestId:
    """Pure ASGI middleware: every answer carries an `x-request-id` that is ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["request_id"] = f"req_{uuid.uuid4().hex}"
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self._app(scope, receive, send_with_id)


async def on_error(request: Request, exc: Exception) -> JSONResponse:
    """The one translation of errors, for endpoints that answer with JSON."""
    found = error_object_for(exc)
    if found.said:
        logger.error("request failed", extra={"request_id": request.scope.get("request_id")}, exc_info=exc)
    return JSONResponse(error_body(exc), status_code=found.status, headers=dict(error_headers(exc)))


async def on_validation(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)  # noqa: S101 - registered for this class alone
    first = exc.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return await on_error(request, InvalidRequestError(f"{param or 'body'}: {first['msg']}", param=param))


async def on_http(request: Request, exc: Exception) -> JSONResponse:
    """Unknown paths and methods, in the same shape as every other error."""
    assert isinstance(exc, HTTPException)  # noqa: S101 - registered for this class alone
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(exc.status_code, "invalid_request")
    message = f"{exc.detail}: {request.method} {request.url.path}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, status_code=exc.status_code, headers=exc.headers)


def create_app(
    settings: Settings | None = None, make_host: MakeHost | None = None, *, make_dedicated: MakeDedicated | None = None
) -> FastAPI:
    """make_host, make_dedicated: what keeps an engine, a shared one or one of a merged version; a supervised vLLM unless a test
    says otherwise.
    """
    settings = settings or Settings()
    drain = Drain()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opening = open_services(settings, make_host, make_dedicated=make_dedicated, drain=drain)
        async with opening as app.state.services:
            yield

    app = FastAPI(title="Lorikeet", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.state.drain = drain  # for the server, which is told to stop
    for path, endpoint in ENDPOINTS.items():
        app.router.routes.append(
            Route(
                path,
                GenerationEndpoint(endpoint, services_of, route=path.removeprefix("/v1").strip("/")),
                methods=["POST"],
            )
        )
    for router in (
        health.router,
        metrics.router,
        models.router,
        adapters.router,
        deployments.router,
        uploads.router,
        files.router,
        fine_tuning.router,
        usage.router,
        organization.router,
    ):
        app.router.routes += router.routes  # include_router would analyse each endpoint anew
    for known in (AdapterError, GatewayError):
        app.add_exception_handler(known, on_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)
    app.add_middleware(Idempotency, prefixes=IDEMPOTENT)
    app.add_middleware(NoNewWork, drain=drain)
    app.add_middleware(RequestId)
    return app
