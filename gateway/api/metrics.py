"""What Prometheus reads: the gateway's own page and the engines'."""

import asyncio
import hmac
import ipaddress
import time

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.errors import AuthenticationError, GatewayError
from gateway.expositions import merged
from gateway.fleet import Replica
from gateway.services import ServicesDep, identify_caller, services_of
from gateway.settings import Settings

BREAKER_STATES = {"closed": 0.0, "half-open": 0.5, "open": 1.0}


def may_read(request: Request) -> None:
    """Raises AuthenticationError or PermissionDeniedError for who may not."""
    services = services_of(request)
    wanted = services.settings.metrics.key
    given = request.headers.get("authorization", "").partition(" ")[2].strip()
    if wanted is not None and hmac.compare_digest(given.encode(), wanted.get_secret_value().encode()):
        return
    if wanted is None and listens_here_only(services.settings):
        return
    if not given:
        raise AuthenticationError("Metrics need the bearer token of the setting metrics.key, or an operator's API key.")
    identify_caller(request, services).require_operator()


def listens_here_only(settings: Settings) -> bool:
    """Whether nobody beyond this machine can connect."""
    try:
        return ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return settings.host == "localhost"


router = APIRouter(tags=["metrics"], dependencies=[Depends(may_read)])


@router.get("/metrics")
async def metrics(services: ServicesDep) -> Response:
    """The gateway's own, and each engine's state as the gateway sees it."""
    for replica in services.replicas:
        services.metrics.note_engine(replica.id, engine_values(replica))
    return page(await asyncio.to_thread(services.metrics.exposition))


@router.get("/metrics/engines")
async def engine_metrics(services: ServicesDep) -> Response:
    """Every engine's own page, with a label `engine`. One that does not answer in time is left out, and said to be."""
    replicas = services.replicas
    found = await asyncio.gather(*(engine_page(replica, services.settings.metrics.engine_s) for replica in replicas))
    pages = dict(zip((replica.id for replica in replicas), found, strict=True))
    return page((await asyncio.to_thread(merged, pages)).encode())


async def engine_page(replica: Replica, wait_s: float) -> str | None:
    try:
        async with asyncio.timeout(wait_s):
            return await replica.engine.metrics()
    except (GatewayError, TimeoutError):
        return None


def engine_values(replica: Replica) -> dict[str, float]:
    return {
        "ready": float(replica.ready),
        "in_flight_requests": replica.admission.in_flight,
        "waiting_requests": replica.admission.waiting,
        "resident_adapters": len(replica.residency.resident),
        "slots": replica.slots,
        "leased_adapters": replica.residency.claimed,
        "breaker_open": BREAKER_STATES[replica.breaker.state(time.monotonic())],
        "drain_rate": replica.admission.drain_per_s() or 0.0,
    }


def page(text: bytes) -> Response:
    return Response(text, media_type=CONTENT_TYPE_LATEST)
