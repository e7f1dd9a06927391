"""A version merged, deployed on a real vLLM of its own beside the shared one, killed, back, and taken down."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.engines.leftovers import processes_of, read_record
from tests.e2e.installed.machine import Machine
from tests.factories import make_adapter

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = (
    "What is the capital of France?",
    "List three primary colours.",
    "Say hello in German.",
    "What is two plus two?",
    "Name a large river in Africa.",
    "Which animal gives milk?",
)
TOKENS = 12


NEAR_TIE = 0.5  # nats: where greedy texts part, both tokens must have been nearly as likely

Scores = list[dict[str, float]]  # of each position the likeliest tokens, the chosen one first


def answer(client: httpx.Client, model: str, prompt: str) -> tuple[Scores, str | None]:
    """A greedy answer, and which form gave it."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0}
    found = client.post("/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 5})
    assert found.status_code == 200, found.text
    content = found.json()["choices"][0]["logprobs"]["content"]
    scores = [
        {entry["token"]: entry["logprob"]} | {other["token"]: other["logprob"] for other in entry["top_logprobs"]}
        for entry in content
    ]
    return scores, found.headers.get("x-lorikeet-form")


def tokens(scores: Scores) -> list[str]:
    return [next(iter(position)) for position in scores]


def common(one: Scores, other: Scores) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(tokens(one), tokens(other), strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def assert_alike(adapter: Scores, merged: Scores) -> float:
    """Log-probabilities are near each other as long as the texts are equal; where they part, it was nearly a tie.

    Returns the mean difference in nats.
    """
    same = common(adapter, merged)
    if same < min(len(adapter), len(merged)):
        chosen, other = tokens(adapter)[same], tokens(merged)[same]
        assert adapter[same][chosen] - adapter[same].get(other, -100.0) < NEAR_TIE
    pairs = list(zip(tokens(adapter), adapter, merged, strict=False))[:same]
    apart = [abs(a[token] - b[token]) for token, a, b in pairs]
    return sum(apart) / max(len(apart), 1)


def state(machine: Machine) -> str:
    (found,) = machine.json("deployments")["data"]
    return str(found["state"])


@pytest.fixture(scope="module")
def served(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, str]]:
    """An installation that serves support@1, and its operator's key."""
    folder = tmp_path_factory.mktemp("deployments")
    machine = Machine(folder / "home", base_model)
    key = str(machine.json("up")["key"])
    machine.run("push", str(make_adapter(folder / "support", base_model, rank=8, scale=0.003)), "--name", "support")
    yield machine, key
    stopped = machine.json("down")
    assert (stopped["killed"], stopped["left"]) == (0, [])


def test_both_forms_of_a_version_answer_alike_and_its_engine_comes_and_goes(served: tuple[Machine, str]) -> None:
    machine, key = served
    deployed = machine.json("deploy", "support@1", "--merged", "--parity", "weights")
    assert (deployed["state"], deployed["scheme"]) == ("ready", "bfloat16")
    assert deployed["memory"]["pss_bytes"] > 300 << 20
    url, base_name = (machine.json("status")[field] for field in ("url", "base_model"))
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120) as client:
        pairs = [[answer(client, f"support#{form}", prompt)[0] for form in ("adapter", "merged")] for prompt in PROMPTS]
        base = [answer(client, base_name, prompt)[0] for prompt in PROMPTS]
        apart = [assert_alike(adapter, merged) for adapter, merged in pairs]
        equal = [common(adapter, merged) for adapter, merged in pairs]
        print("tokens alike:", equal, "mean differences:", [f"{one:.3f}" for one in apart])  # noqa: T201
        assert max(apart) < 0.25
        assert [tokens(merged) for _, merged in pairs] != [tokens(one) for one in base]
        assert answer(client, "support", PROMPTS[0])[1] == "merged"

        record = read_record(machine.home / "run" / f"{deployed['engine']}.json")
        assert record is not None
        assert record.engine_pid is not None
        os.killpg(record.engine_pid, signal.SIGKILL)
        assert answer(client, "support", PROMPTS[0])[1] == "adapter"
        ends_s = time.monotonic() + 180
        while state(machine) != "ready":
            assert time.monotonic() < ends_s
            time.sleep(4)  # asking takes half a second of the processor that the engine starts on
        assert answer(client, "support", PROMPTS[0])[1] == "merged"

        machine.run("undeploy", "support@1")
        assert processes_of(machine.home / "run" / f"{deployed['engine']}.sock") == []
        assert {path.stem for path in (machine.home / "run").glob("*.sock")} == {"engine-0"}
        assert answer(client, "support", PROMPTS[0])[1] is None


def test_a_model_that_its_engine_cannot_run_says_why_and_leaves_nothing(
    served: tuple[Machine, str], tmp_path: Path
) -> None:
    machine, _ = served
    profile = tmp_path / "wrong.yaml"
    text = (Path(__file__).parents[3] / "configs/engines/test.yaml").read_text(encoding="utf-8")
    profile.write_text(text.replace("eager: true", "eager: true\nlora: false").replace("args: [", "args: [--no-such, "))
    machine.run("deploy", "support@1", "--merged", "--parity", "weights", "--profile", str(profile), expect=1)
    assert machine.json("deployments")["data"] == []
    assert {path.stem for path in (machine.home / "run").glob("*.sock")} == {"engine-0"}
    form = next((machine.home / "merged").glob("*/support@1-*"))
    assert (form / "merge-report.json").is_file()
