"""What was used and what it cost, after OpenAI's usage and costs endpoints, and where one request's time went.

A tenant is a project. An operator's key sees every tenant's usage, or one's with the OpenAI-Project header; a tenant's own key,
whatever its scopes, sees its tenant's.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.datastructures import QueryParams
from starlette.requests import Request

from adapters.ledger import Sums, UsageFilter
from gateway.errors import InvalidRequestError, RequestNotFoundError
from gateway.services import CallerDep, ServicesDep
from gateway.tenants import Caller
from gateway.timeline import request_object

router = APIRouter(prefix="/v1", tags=["usage"])

DAY_S = 86_400
LAST_S = 253_402_300_800  # the year 10000, in Unix seconds
WIDTHS_S = {"1m": 60, "1h": 3600, "1d": DAY_S}
BUCKETS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}  # how many are given, and at most
COST_BUCKETS = (7, 180)
GROUPS = {"project_id": "tenant", "api_key_id": "key_id", "model": "model"}
# Dimensions of OpenAI's that are the same for every request here -> their value.
FIXED = {"user_id": None, "batch": False, "service_tier": None}
LINE_ITEMS = {"input": "input_cost", "cached input": "cached_cost", "output": "output_cost"}


@dataclass(frozen=True)
class Query:
    """What both endpoints are asked."""

    buckets: tuple[int, ...]  # their beginnings, in Unix seconds
    width_s: int
    more: bool  # there are later ones
    group_by: tuple[str, ...]  # OpenAI's names
    only: UsageFilter

    @property
    def dimensions(self) -> list[str]:
        return [GROUPS[name] for name in self.group_by if name in GROUPS]


class Parameters:
    """A query string in which a list is `name=a&name=b` or, as the official client writes it, `name[]=a&name[]=b`."""

    def __init__(self, query: QueryParams, known: Iterable[str]) -> None:
        """Raises InvalidRequestError for a parameter that is not known."""
        self._query = query
        unknown = {name.removesuffix("[]") for name in query} - set(known)
        if unknown:
            raise _wrong(min(unknown), "is not a parameter of this endpoint", code="unknown_parameter")

    def several(self, name: str) -> list[str] | None:
        """None when it was not sent."""
        found = [*self._query.getlist(name), *self._query.getlist(f"{name}[]")]
        return found or None

    def one(self, name: str, default: str) -> str:
        return self._query.get(name, default)

    def number(self, name: str, default: int | None, *, at_least: int, at_most: int) -> int:
        raw = self._query.get(name)
        if raw is None:
            if default is None:
                raise _wrong(name, "must be given", code="missing_value")
            return default
        if not raw.isascii() or not raw.isdigit() or len(raw) > 15 or not at_least <= int(raw) <= at_most:
            raise _wrong(name, f"must be a whole number from {at_least} to {at_most}")
        return int(raw)


def usage_query(request: Request, caller: CallerDep) -> Query:
    known = "start_time end_time bucket_width group_by limit page project_ids api_key_ids models batch".split()
    parameters = Parameters(request.query_params, known)
    width = parameters.one("bucket_width", "1d")
    if width not in WIDTHS_S:
        raise _wrong("bucket_width", f"must be one of {', '.join(WIDTHS_S)}")
    if parameters.one("batch", "false") != "false":
        raise _wrong("batch", "can only be false: there are no batches here")
    return _query(parameters, caller, WIDTHS_S[width], BUCKETS[width], {*GROUPS, *FIXED})


def costs_query(request: Request, caller: CallerDep) -> Query:
    known = "start_time end_time bucket_width group_by limit page project_ids api_key_ids".split()
    parameters = Parameters(request.query_params, known)
    if parameters.one("bucket_width", "1d") != "1d":
        raise _wrong("bucket_width", "can only be 1d")
    return _query(parameters, caller, DAY_S, COST_BUCKETS, {"project_id", "api_key_id", "line_item", "user_id"})


@router.get("/organization/usage/completions")
async def usage(query: Annotated[Query, Depends(usage_query)], services: ServicesDep) -> dict[str, Any]:
    """Tokens and requests by minute, hour or day (UTC). Times are rounded to the edges of the buckets they lie in."""
    found = await _sums(query, services, query.dimensions)
    currency = services.settings.usage.currency
    return _page(
        query, {start: [_usage_result(sums, query, currency) for sums in rows] for start, rows in found.items()}
    )


@router.get("/organization/costs")
async def costs(query: Annotated[Query, Depends(costs_query)], services: ServicesDep) -> dict[str, Any]:
    """What the tokens of each day (UTC) cost, at the prices of their time."""
    by_item = "line_item" in query.group_by
    found = await _sums(query, services, [*query.dimensions, "model"] if by_item else query.dimensions)
    currency = services.settings.usage.currency
    results = {
        start: [
            _cost_result(sums, query, currency, amount, item)
            for sums in rows
            for item, amount in (_line_items(sums) if by_item else [(None, sums.cost)])
        ]
        for start, rows in found.items()
    }
    return _page(query, results)


@router.get("/requests/{request_id}")
async def get_request(request_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """One request's timeline: where its time went, and what it was charged. Others' requests do not exist."""
    tenant = _only(caller)
    entry = await services.usage.find(request_id)
    if entry is None or tenant not in (None, entry.tenant):
        raise RequestNotFoundError(request_id)
    return request_object(entry, now_s=time.time(), currency=services.settings.usage.currency)


def _only(caller: Caller) -> str | None:
    """The one tenant the caller may look at; None for an operator, who sees all. Raises PermissionDeniedError."""
    if caller.tenant is None:
        caller.require_operator()
        return None
    return caller.tenant.name


def _query(
    parameters: Parameters, caller: Caller, width_s: int, buckets: tuple[int, int], groups: Iterable[str]
) -> Query:
    group_by = tuple(parameters.several("group_by") or ())
    for name in group_by:
        if name not in groups:
            raise _wrong("group_by", f"can hold {', '.join(sorted(groups))}, not '{name}'")
    usual, most = buckets
    limit = parameters.number("limit", usual, at_least=1, at_most=most)
    start = parameters.number("start_time", None, at_least=0, at_most=LAST_S) // width_s * width_s
    end = parameters.number("end_time", int(time.time()) + 1, at_least=1, at_most=LAST_S)
    start = max(start, parameters.number("page", start, at_least=0, at_most=LAST_S) // width_s * width_s)
    beginnings = range(start, end, width_s)
    tenants = parameters.several("project_ids")
    tenant = _only(caller)
    if tenant is not None:
        tenants = [name for name in tenants or [tenant] if name == tenant]
    only = UsageFilter(tenants, parameters.several("api_key_ids"), parameters.several("models"))
    return Query(tuple(beginnings[:limit]), width_s, len(beginnings) > limit, group_by, only)


async def _sums(query: Query, services: ServicesDep, dimensions: Sequence[str]) -> dict[int, list[Sums]]:
    """By bucket."""
    by_bucket: dict[int, list[Sums]] = {start: [] for start in query.buckets}
    if query.buckets:
        start, end = query.buckets[0], query.buckets[-1] + query.width_s
        for sums in await asyncio.to_thread(
            services.ledger.sums, start, end, query.width_s, group_by=dimensions, only=query.only
        ):
            by_bucket[sums.start].append(sums)
    return by_bucket


def _page(query: Query, results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    data = [
        {"object": "bucket", "start_time": start, "end_time": start + query.width_s, "results": found}
        for start, found in results.items()
    ]
    return {
        "object": "page",
        "data": data,
        "has_more": query.more,
        "next_page": str(query.buckets[-1] + query.width_s) if query.more else None,
    }


def _usage_result(sums: Sums, query: Query, currency: str) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": sums.prompt_tokens,
        "input_cached_tokens": sums.cached_tokens,
        "input_uncached_tokens": sums.prompt_tokens - sums.cached_tokens,
        "output_tokens": sums.output_tokens,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": sums.requests,
        "project_id": sums.tenant,
        "api_key_id": sums.key_id,
        "model": sums.model,
        **{name: value if name in query.group_by else None for name, value in FIXED.items()},
        "amount": {"value": sums.cost, "currency": currency},  # ours: OpenAI tells costs by the day only
    }


def _cost_result(sums: Sums, query: Query, currency: str, amount: float, item: str | None) -> dict[str, Any]:
    return {
        "object": "organization.costs.result",
        "amount": {"value": amount, "currency": currency},
        "line_item": item,
        "project_id": sums.tenant,
        "api_key_id": sums.key_id,
    }


def _line_items(sums: Sums) -> list[tuple[str, float]]:
    return [(f"{sums.model}, {item}", getattr(sums, cost)) for item, cost in LINE_ITEMS.items() if getattr(sums, cost)]


def _wrong(param: str, what: str, *, code: str = "invalid_value") -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' {what}.", param=param, code=code)
