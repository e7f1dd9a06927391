"""Hot-swapped or merged? The load that both forms of a version are measured with, and what the figures advise. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.client import CommandError
from gateway.resolve import ADAPTER, MERGED

FORMS = (ADAPTER, MERGED)
LATENCIES = {"ttft": "first token", "tpot": "between tokens", "e2e": "whole answer"}  # figures of a load test
NOTICEABLE = 0.05  # gains below this are within what two runs of the same form differ by
ENOUGH = 100  # requests of a form: its P95 is then among its five slowest, and no longer the slowest alone
SETTLE_S = 2.0  # before each measured round, of the same form: the other one's last answers end, connections open
WARM_UP_S = 5.0


@dataclass(frozen=True)
class FormFigures:
    """One form under the load. Latencies in seconds."""

    p50_s: Mapping[str, float]  # by figure of LATENCIES
    p95_s: Mapping[str, float]
    tokens_per_s: float  # of output
    answers_per_s: float
    requests: int
    success_rate: float


@dataclass(frozen=True)
class Memory:
    """What the engines take, in bytes: on the GPU where they are on one, else their share of the host's memory."""

    shared: int
    dedicated: int
    adapter: int  # what the version takes hot-swapped


@dataclass(frozen=True)
class Advice:
    """pays_from: least share of what one shared engine can do, from which an engine of its own is cheaper; None: never."""

    form: str
    pays_from: float | None
    pays_from_tokens_per_s: float | None
    faster: float  # output tokens a second, merged over hot-swapped
    cost_ratio: float  # of the dedicated engine to a shared one
    reasons: tuple[str, ...]
    cost_per_million_tokens: Mapping[str, float] | None  # by form, at full use; where a price is known


def scenario(reference: str, *, concurrency: int, round_s: float, rounds: int, max_tokens: int) -> dict[str, Any]:
    """A load test's scenario: both forms in turns, A B B A …, each round after some unmeasured seconds of the same form."""
    names = {form: f"{reference}#{form}" for form in FORMS}
    phases: list[dict[str, Any]] = [{"name": "warm-up", "duration_s": WARM_UP_S, "measured": False}]
    for number in range(rounds):
        for form in FORMS if number % 2 == 0 else FORMS[::-1]:
            only = {"adapters": [names[form]]}
            phases += [
                {"name": f"settle-{form}-{number}", "duration_s": SETTLE_S, "measured": False, **only},
                {"name": f"{form}-{number}", "duration_s": round_s, **only},
            ]
    return {
        "name": "choose",
        "description": f"Both forms of {reference}, in turns",
        "adapters": list(names.values()),
        "requests": {"prompts": {"kind": "builtin"}, "max_tokens": max_tokens, "extra": {"ignore_eos": True}},
        "load": {"kind": "closed", "concurrency": concurrency},
        "phases": phases,
        "sample_floor": 1,
        # Engines and generator share this machine's cores: what matters is the same for both forms.
        "health": {"send_lag_p99_ms": 500, "loop_lag_p99_ms": 500, "objective_share": 1.0, "offered_share": 0.5},
    }


def figures_of(summary: Mapping[str, Any], reference: str, form: str) -> FormFigures:
    """One form's, from a load test's summary.json. Raises CommandError where nothing of it was answered."""
    groups = summary["groups"]
    own = next((one for one in groups if one["kind"] == "adapter" and one["name"] == f"{reference}#{form}"), None)
    rounds = [one for one in groups if one["kind"] == "phase" and one["name"].startswith(f"{form}-")]
    if own is None or not rounds or not own["metrics_s"].keys() >= LATENCIES.keys():
        errors = ", ".join(f"{one['error']} ({one['count']})" for one in summary.get("errors", [])[:3])
        raise CommandError(f"Nothing was answered by {reference}#{form}. Errors: {errors or 'none'}.")
    latencies = {name: own["metrics_s"][name] for name in LATENCIES}
    return FormFigures(
        p50_s={name: figure["p50"]["value"] for name, figure in latencies.items()},
        p95_s={name: figure["p95"]["value"] for name, figure in latencies.items()},
        tokens_per_s=sum(one["output_tokens_per_s"] for one in rounds) / len(rounds),
        answers_per_s=sum(one["answers_per_s"] for one in rounds) / len(rounds),
        requests=own["requests"],
        success_rate=own["success_rate"],
    )


def advise(
    adapter: FormFigures, merged: FormFigures, memory: Memory | None, *, price_per_hour: float | None = None
) -> Advice:
    """Which form, and from which traffic on.

    A shared engine that gives T tokens a second costs C. Serving the share s of that hot-swapped uses s · C of it. An engine
    of its own costs r · C whatever the traffic, where r is its memory over the shared engine's, and gives T' tokens a
    second. So it pays where s ≥ r, as long as r · T ≤ T'. Without figures of memory r is 1: a machine or GPU of its own.
    price_per_hour: of one shared engine, for the cost of a million tokens at full use.
    """
    faster = merged.tokens_per_s / adapter.tokens_per_s if adapter.tokens_per_s else 0.0
    ratio = memory.dedicated / memory.shared if memory is not None and memory.shared else 1.0
    gains = {name: 1 - merged.p95_s[name] / adapter.p95_s[name] for name in LATENCIES if adapter.p95_s[name]}
    reasons = [f"P95 of the {LATENCIES[name]}: {_moved(gain)}" for name, gain in gains.items()]
    reasons.append(f"output tokens a second: {faster - 1:+.0%}")
    fewest = min(adapter.requests, merged.requests)
    if fewest < ENOUGH:
        reasons.append(f"{fewest} requests only: too few to trust a P95, measure longer (--seconds)")
    pays = ratio if 0 < ratio <= faster and faster > 0 else None
    tokens_per_s = pays * adapter.tokens_per_s if pays is not None else None
    better = faster - 1 >= NOTICEABLE or max(gains.values(), default=0.0) >= NOTICEABLE
    if not better:
        reasons.append(f"no figure is better by {NOTICEABLE:.0%} or more: an engine of its own buys nothing")
    elif pays is None:
        reasons.append(
            f"it takes {ratio:.2f} of a shared engine and gives {faster:.2f} of one: only its latency can pay it"
        )
    else:
        reasons.append(
            f"it takes {ratio:.2f} of a shared engine's memory, so it is cheaper once the version needs {pays:.0%} of what "
            f"one can do ({tokens_per_s:.0f} tokens/s of {adapter.tokens_per_s:.0f})"
        )
    costs = None
    if price_per_hour is not None and adapter.tokens_per_s and merged.tokens_per_s:
        rates = {ADAPTER: (1.0, adapter.tokens_per_s), MERGED: (ratio, merged.tokens_per_s)}
        costs = {form: price_per_hour * part / (rate * 3600) * 1e6 for form, (part, rate) in rates.items()}
    form = MERGED if better and pays is not None else ADAPTER
    return Advice(
        form=form,
        pays_from=pays if better else None,
        pays_from_tokens_per_s=tokens_per_s if better else None,
        faster=faster,
        cost_ratio=ratio,
        reasons=tuple(reasons),
        cost_per_million_tokens=costs,
    )


def _moved(gain: float) -> str:
    return f"{abs(gain):.0%} {'shorter' if gain >= 0 else 'longer'} merged"
