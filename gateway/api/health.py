"""Is the process alive, can it answer, and what does the operator's eye see?"""

import time
from typing import Any

from fastapi import APIRouter, Response

from gateway.client import gateway_url
from gateway.fleet import Replica
from gateway.services import CallerDep, Services, ServicesDep

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(services: ServicesDep, response: Response) -> dict[str, Any]:
    """200 when at least one engine takes requests and has really generated lately, and the gateway is not draining; else 503.

    ready_since: Unix seconds. answered_s_ago: how long ago each engine's last whole answer was, a caller's or the canary's.
    """
    ready = services.ready
    response.status_code = 200 if ready else 503
    return {
        "ready": ready,
        "ready_since": ready_since(services) if ready else None,
        "draining": services.drain.began,
        "engines": {replica.id: replica.state for replica in services.fleet.replicas},
        "breakers": {replica.id: breaker_state(replica) for replica in services.fleet.replicas},
        "answered_s_ago": {replica.id: answered_s_ago(replica) for replica in services.fleet.replicas},
    }


def ready_since(services: Services) -> int | None:
    """Unix seconds; None while a breaker that has been open is yet to be closed by an answer."""
    since_s = [replica.breaker.well_since_s for replica in services.fleet.replicas if replica.available]
    first_s = min(filter(None, since_s), default=None)
    return None if first_s is None else round(time.time() - time.monotonic() + first_s)


def breaker_state(replica: Replica) -> str:
    return replica.breaker.state(time.monotonic())


def answered_s_ago(replica: Replica) -> float | None:
    answered_s = replica.breaker.answered_s
    return None if answered_s is None else round(time.monotonic() - answered_s, 1)


@router.get("/lorikeet/status")
async def status(caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """What `lorikeet status` and `lorikeet engine` show. Operators only."""
    caller.require_operator()
    serves = {
        one.replica.id: f"{one.deployment.tenant}/{one.deployment.adapter}@{one.deployment.version}"
        for one in services.deployments.running
    }
    return {
        "url": gateway_url(services.settings, ignore_environment=True),
        "ready": services.ready,
        "base_model": services.base.name,
        "engines": [
            {
                "id": replica.id,
                "state": replica.state,
                "slots": replica.slots,
                "resident": replica.residency.resident,
                "in_flight": replica.admission.in_flight,
                "waiting": replica.admission.waiting,
                "breaker": breaker_state(replica),
                "answered_s_ago": answered_s_ago(replica),
                **(
                    {"serves": serves[replica.id]} if replica.id in serves else {}
                ),  # a merged version, and nothing else
            }
            for replica in services.replicas
        ],
    }
