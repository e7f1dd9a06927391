"""`lorikeet usage` and `lorikeet requests`: what was used, and where one request's time went. Over HTTP."""

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from gateway.cli.common import JsonOption, OperatorKeyOption, command, out, print_json, print_table
from gateway.client import GatewayClient, operator_client
from gateway.settings import Settings

DAY_S = 86_400
_UNITS_S = {"m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}


class By(StrEnum):
    """What a row of the table is."""

    DAY = "day"
    ADAPTER = "adapter"
    TENANT = "tenant"


def usage(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's. A tenant's own key sees no other.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="TENANT/NAME", help="Only this adapter, or the base model's name.")
    ] = None,
    since: Annotated[
        str, typer.Option(help="A date (2026-11-01) or an age (36h, 7d, 4w); days begin at midnight, UTC.")
    ] = "30d",
    by: Annotated[By, typer.Option(help="What to add up by.")] = By.DAY,
    key: OperatorKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Requests, tokens and their cost.

    lorikeet usage --by tenant --since 2026-11-01
    """
    start = since_s(since, time.time())
    asked: list[tuple[str, Any]] = [("start_time", start), ("limit", 31)]
    asked += [("project_ids", tenant)] if tenant else []
    asked += [("models", adapter)] if adapter else []
    asked += {By.DAY: [], By.ADAPTER: [("group_by", "model")], By.TENANT: [("group_by", "project_id")]}[by]
    with operator_client(Settings(), key) as client:
        rows = totals(buckets(client, asked), by)
    if json:
        print_json({"object": "list", "data": rows, "by": by.value, "since": start})
        return
    print_table(
        (by.value.capitalize(), "Requests", "Prompt tokens", "Cached", "Output tokens", "Cost"),
        [
            (
                row[by.value],
                f"{row['requests']:,}",
                f"{row['input_tokens']:,}",
                f"{row['input_cached_tokens']:,}",
                f"{row['output_tokens']:,}",
                f"{row['cost']['value']:.4f} {row['cost']['currency']}",
            )
            for row in rows
        ],
        empty="Nothing was used in that time.",
    )


def request(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="The x-request-id of an answer.")],
    key: OperatorKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Where one request's time went, and what it was charged."""
    with operator_client(Settings(), key) as client:
        found = client.get(f"/v1/requests/{quote(request_id, safe='')}")
    if json:
        print_json(found)
        return
    used = found["usage"]
    print_table(
        ("Event", "After", "At (UTC)"),
        [(moment["event"], f"{moment['after_ms']:,.1f} ms", clock(moment["at"])) for moment in found["timeline"]],
        empty="",
    )
    out.print(
        f"\n{found['adapter']} for {found['project_id']} on {found['replica'] or 'no engine'}: {found['status']}. "
        f"{used['prompt_tokens']} prompt tokens ({used['cached_tokens']} cached), {used['completion_tokens']} output tokens"
        f"{', estimated' if used['estimated'] else ''}.",
        highlight=False,
        soft_wrap=True,
    )
    slowest = found["slowest"]
    out.print(
        f"Slowest: {slowest['part']}, {slowest['ms']:,.1f} ms: {slowest['reason']}.", highlight=False, soft_wrap=True
    )


def buckets(client: GatewayClient, asked: Iterable[tuple[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Every bucket, page after page."""
    page: str | None = None
    while True:
        query = urlencode([*asked, *([("page", page)] if page else [])])
        answer = client.get(f"/v1/organization/usage/completions?{query}")
        yield from answer["data"]
        page = answer["next_page"]
        if not page:
            return


def totals(found: Iterable[Mapping[str, Any]], by: By) -> list[dict[str, Any]]:
    """One row for each day, adapter or tenant that used anything."""
    rows: dict[str, dict[str, Any]] = {}
    for bucket in found:
        for result in bucket["results"]:
            day = datetime.fromtimestamp(bucket["start_time"], UTC).date().isoformat()
            name = {By.DAY: day, By.ADAPTER: result["model"], By.TENANT: result["project_id"]}[by]
            row = rows.setdefault(
                name,
                {by.value: name, "requests": 0, "input_tokens": 0, "input_cached_tokens": 0, "output_tokens": 0}
                | {"cost": {"value": 0.0, "currency": result["amount"]["currency"]}},
            )
            row["requests"] += result["num_model_requests"]
            for kind in ("input_tokens", "input_cached_tokens", "output_tokens"):
                row[kind] += result[kind]
            row["cost"]["value"] += result["amount"]["value"]
    return [rows[name] for name in sorted(rows)]


def since_s(text: str, now: float) -> int:
    """Unix seconds of a date or an age. Raises typer.BadParameter."""
    number, unit = text[:-1], text[-1:]
    if unit in _UNITS_S and number.isascii() and number.isdigit() and len(number) < 7:
        return max(0, int(now) - int(number) * _UNITS_S[unit])
    try:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
    except ValueError as exc:
        raise typer.BadParameter(
            f"'{text}' is neither a date (2026-11-01) nor an age (36h, 7d, 4w)", param_hint="--since"
        ) from exc


def clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%H:%M:%S.%f")[:-3]


usage_app = command(usage)
requests_app = command(request)
