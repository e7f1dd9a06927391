"""`lorikeet choose`: the same load on both forms of a version, in turns, and the advice that follows from it."""

import contextlib
import json as jsonlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from adapters.records import Scope
from gateway.choice import FORMS, LATENCIES, Advice, FormFigures, Memory, advise, figures_of, scenario
from gateway.cli.common import (
    JsonOption,
    OperatorKeyOption,
    command,
    err,
    let_the_gateway_notice,
    operator_for,
    out,
    print_json,
)
from gateway.cli.deployments import (
    MIB,
    Place,
    ReferenceArgument,
    chosen_form,
    current,
    find_place,
    take_down,
    wait_until_ready,
)
from gateway.client import CommandError, GatewayClient, gateway_url, operator_client
from gateway.engines.footprint import Footprint, footprint
from gateway.resolve import ADAPTER, MERGED

USABLE = (0, 3)  # exit codes of a load test without objectives whose figures are sound: passed, undecided
KEY_S = 6 * 3600.0  # life of the key that the load is sent with, should nobody be left to revoke it


def choose(
    reference: ReferenceArgument,
    concurrency: Annotated[int, typer.Option(min=1, help="Callers that are never idle.")] = 4,
    seconds: Annotated[float, typer.Option(min=1, help="Measured seconds of each form.")] = 40.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each form's seconds are divided into.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Length of every answer.")] = 32,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of one shared engine (its machine or GPU), for the cost of tokens.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the engine running that this command started.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Its owner, where several own the name.")] = None,
    key: OperatorKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Hot-swapped or on an engine of its own? Measures both forms of a version and says from which traffic the latter pays.

    Needs a running gateway on this machine. Where the version has no engine of its own yet it gets one, without traffic but
    this, and loses it afterwards.
    """
    place = find_place(reference, tenant)
    with closing(operator_for(place.settings, key, place.version.tenant)) as client:
        before = current(client, place)
        if before is None:
            form = chosen_form(place, None, source=None, parity="full", forced=None)
            wanted = {"adapter": place.version.adapter, "version": place.version.version, "digest": form.digest}
            client.post("/v1/deployments", wanted | {"share": 0.0})
        try:
            wait_until_ready(client, place, timeout_s=900, new=False)
            with tempfile.TemporaryDirectory(prefix="lorikeet-choose-") as temporary:
                plan = scenario(
                    place.reference,
                    concurrency=concurrency,
                    round_s=seconds / rounds,
                    rounds=rounds,
                    max_tokens=max_tokens,
                )
                summary = run_load(place, plan, Path(temporary), json=json)
            memory = measured_memory(place, client, key)
        finally:
            if before is None and not keep:
                take_down(client, place)
    figures = {form: figures_of(summary, place.reference, form) for form in FORMS}
    advice = advise(figures[ADAPTER], figures[MERGED], memory, price_per_hour=price_per_hour)
    if json:
        print_json(document(place, figures, memory, advice, concurrency))
    else:
        show(place, figures, memory, advice, concurrency)


def run_load(place: Place, plan: Mapping[str, Any], folder: Path, *, json: bool) -> dict[str, Any]:
    """The summary of a load test of the plan, which runs as a command of its own. Raises CommandError."""
    file, result = folder / "choose.yaml", folder / "result"
    file.write_text(yaml.safe_dump(dict(plan)), encoding="utf-8")
    arguments = ["loadtest", "run", str(file), "--url", gateway_url(place.settings), "--out", str(result), "--json"]
    with load_key(place) as plaintext:
        done = subprocess.run(
            [sys.executable, "-m", "lorikeet", *arguments],
            env=os.environ | {"LORIKEET_API_KEY": plaintext, "LORIKEET_HOME": str(place.settings.home.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if json else None,  # its progress
            text=True,
            check=False,
        )
    if done.returncode not in USABLE:
        why = done.stderr or "" if json else "its messages are above"
        if (result / "summary.json").is_file():
            why = "; ".join(jsonlib.loads((result / "summary.json").read_text(encoding="utf-8"))["reasons"])
        raise CommandError(f"The load test of both forms cannot be used (exit code {done.returncode}): {why}")
    found: dict[str, Any] = jsonlib.loads((result / "summary.json").read_text(encoding="utf-8"))
    return found


@contextlib.contextmanager
def load_key(place: Place) -> Iterator[str]:
    """A key of the version's owner for the length of the block."""
    tenant = place.version.tenant
    made, plaintext = place.registry.create_key(
        tenant, {Scope.INFERENCE}, name="lorikeet choose", expires_at=time.time() + KEY_S
    )
    try:
        let_the_gateway_notice(place.settings)
        yield plaintext
    finally:
        place.registry.revoke_key(made.id)


def measured_memory(place: Place, client: GatewayClient, key: str | None) -> Memory | None:
    """Of both engines after the load; None where this machine cannot see them."""
    with operator_client(place.settings, key) as operator:
        engines = operator.get("/lorikeet/status")["engines"]
    run = place.settings.home.run
    shared = next((found for one in engines if "serves" not in one and (found := footprint(run, one["id"]))), None)
    dedicated = footprint(run, client.get(place.path)["engine"])
    if shared is None or dedicated is None:
        return None
    return Memory(_counted(shared), _counted(dedicated), place.version.size_bytes)


def _counted(found: Footprint) -> int:
    return found.gpu_bytes or found.pss_bytes


def document(
    place: Place, figures: Mapping[str, FormFigures], memory: Memory | None, advice: Advice, concurrency: int
) -> dict[str, Any]:
    return {
        "version": f"{place.version.tenant}/{place.reference}",
        "concurrency": concurrency,
        "forms": {form: asdict(found) for form, found in figures.items()},
        "memory_bytes": asdict(memory) if memory is not None else None,
        "advice": asdict(advice),
    }


def show(
    place: Place, figures: Mapping[str, FormFigures], memory: Memory | None, advice: Advice, concurrency: int
) -> None:
    one, other = figures[ADAPTER], figures[MERGED]
    table = Table("", "hot-swapped", "merged", title=f"{place.reference}, {concurrency} callers", box=None)
    for name, words in LATENCIES.items():
        table.add_row(f"{words}, P50", *(f"{found.p50_s[name] * 1000:,.1f} ms" for found in (one, other)))
        table.add_row(f"{words}, P95", *(f"{found.p95_s[name] * 1000:,.1f} ms" for found in (one, other)))
    table.add_row("output tokens a second", f"{one.tokens_per_s:,.1f}", f"{other.tokens_per_s:,.1f}")
    table.add_row("answers a second", f"{one.answers_per_s:,.2f}", f"{other.answers_per_s:,.2f}")
    table.add_row("requests (answered)", *(f"{found.requests} ({found.success_rate:.1%})" for found in (one, other)))
    if memory is not None:
        table.add_row(
            "memory of the engine", f"{memory.shared / MIB:,.0f} MiB, shared", f"{memory.dedicated / MIB:,.0f} MiB"
        )
        table.add_row("memory of the version", f"{memory.adapter / MIB:,.1f} MiB", "the engine's")
    if advice.cost_per_million_tokens is not None:
        costs = advice.cost_per_million_tokens
        table.add_row("a million tokens, at full use", f"{costs[ADAPTER]:,.2f}", f"{costs[MERGED]:,.2f}")
    out.print(table)
    if advice.form == ADAPTER:
        head = "Keep it hot-swapped"
    else:
        head = f"An engine of its own pays from {advice.pays_from:.0%} of a shared engine's traffic on"
    out.print(f"\n[bold]{head}:[/bold]", highlight=False)
    for reason in advice.reasons:
        out.print(f"  - {reason}", highlight=False, soft_wrap=True)
    err.print("The load was closed-loop: latencies hold for this many callers, not for a rate.", highlight=False)


choose_app = command(choose)
