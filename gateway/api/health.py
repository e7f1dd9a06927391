"""Is the process alive, can it answer, and what does the operator's eye see?"""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.client import gateway_url
from gateway.services import CallerDep, ServicesDep

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(services: ServicesDep, response: Response) -> dict[str, Any]:
    """At least one engine takes requests; 503 until then."""
    response.status_code = 200 if services.fleet.ready else 503
    return {
        "ready": services.fleet.ready,
        "engines": {replica.id: replica.state for replica in services.fleet.replicas},
    }


@router.get("/metrics")
async def metrics(services: ServicesDep) -> Response:
    for replica in services.fleet.replicas:
        values = {
            "ready": float(replica.ready),
            "in_flight_requests": replica.admission.in_flight,
            "waiting_requests": replica.admission.waiting,
            "resident_adapters": len(replica.residency.resident),
            "slots": replica.slots,
        }
        services.metrics.note_engine(replica.id, values)
    return Response(services.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@router.get("/lorikeet/status")
async def status(caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """What `lorikeet status` and `lorikeet engine` show. Operators only."""
    caller.require_operator()
    return {
        "url": gateway_url(services.settings, ignore_environment=True),
        "ready": services.fleet.ready,
        "base_model": services.base.name,
        "engines": [
            {
                "id": replica.id,
                "state": replica.state,
                "slots": replica.slots,
                "resident": replica.residency.resident,
                "in_flight": replica.admission.in_flight,
                "waiting": replica.admission.waiting,
            }
            for replica in services.fleet.replicas
        ],
    }
