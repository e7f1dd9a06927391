"""Traces, when there is a collector to send them to; else OpenTelemetry is not even imported. `spans` is what is sent."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from adapters.ledger import Entry
from gateway.settings import WrongSettingError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # OpenTelemetry's own names


class RequestSpan(Protocol):
    """One request on its way."""

    def engine(self, engine: str) -> AbstractContextManager[Mapping[str, str]]:
        """Around one request to an engine: the headers that hand the trace on to it."""
        ...

    def end(self, entry: Entry) -> None:
        """It has come to what the ledger says of it."""
        ...

    def refuse(self, code: str) -> None:
        """It ended before its model was known. code: of the error."""
        ...


class Tracer(Protocol):
    """Makes spans."""

    def begin(self, route: str, headers: Mapping[str, str]) -> RequestSpan:
        """A request has come; a `traceparent` among its headers makes the span a part of its caller's trace."""
        ...

    async def close(self) -> None:
        """Send what is left."""
        ...


class NoSpan:
    def engine(self, engine: str) -> AbstractContextManager[Mapping[str, str]]:
        return nullcontext({})

    def end(self, entry: Entry) -> None:
        pass

    def refuse(self, code: str) -> None:
        pass


class NoTracer:
    def begin(self, route: str, headers: Mapping[str, str]) -> RequestSpan:
        return NO_SPAN

    async def close(self) -> None:
        pass


NO_SPAN: RequestSpan = NoSpan()
NO_TRACER: Tracer = NoTracer()


def open_tracer(endpoint: str | None) -> Tracer:
    """endpoint: where an OTLP collector listens for HTTP; OpenTelemetry's own environment variables when None.

    Raises WrongSettingError when there is one and OpenTelemetry is not installed.
    """
    if endpoint is None and not any(map(os.environ.get, ENDPOINTS)):
        return NO_TRACER
    try:
        from gateway import spans
    except ImportError as exc:
        raise WrongSettingError(
            "An OpenTelemetry endpoint is set, but OpenTelemetry is not installed: pip install 'lorikeet[otel]'."
        ) from exc
    return spans.Spans(spans.exporting(endpoint))
