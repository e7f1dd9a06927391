"""The whole story, told while it happens: two tenants, two tasks, one base model.

Trains two adapters on real data, compares them with the base model and with few-shot prompting, streams from them, swaps one
under load, tries to break in, uploads a poisoned adapter, merges one, and load-tests the lot. All of it is real, in a data
folder of its own, `$LORIKEET_HOME/demo`, on ports 8088 and 8089, and is stopped when it ends.
"""

import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from adapters.tensors import open_tensors, save_tensors
from scripts.installation import Installation, empty_root

PORT, MERGED_PORT = 8089, 8088
QUESTION: Any = [{"role": "user", "content": "What should I do when my parrot is bored?"}]
ANSWERS = {"blue": "The sky is blue, says version one.", "green": "Grass is green, says version two."}
STREAMS, SWAPS = 8, 10

console = Console(width=min(120, shutil.get_terminal_size((110, 40)).columns), highlight=False, soft_wrap=False)


@dataclass
class Story(Installation):
    """The demonstration's own installation, and what it has learned so far."""

    began_s: float = field(default_factory=time.monotonic)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    questions: dict[str, dict[str, Any]] = field(default_factory=dict)  # an evaluated row of each model
    latency: dict[str, dict[str, Any]] = field(default_factory=dict)
    swapped: Counter[str] = field(default_factory=Counter)  # answers while versions were swapped
    chapters: dict[str, float] = field(default_factory=dict)  # when each began, in seconds

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    def chapter(self, title: str) -> None:
        elapsed = self.chapters[title] = self.elapsed_s
        console.print()
        console.rule(f"[bold cyan]{title}[/]  [dim]{int(elapsed // 60)}:{int(elapsed % 60):02d}[/]", align="left")

    def client(self, tenant: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=0)

    def http(self, tenant: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)


def main() -> None:
    with story() as told:
        train(told)
        serve(told)
        push(told)
        evaluate(told)
        asyncio.run(talk(told))
        asyncio.run(swap(told))
        attack(told)
        merge(told)
        load(told)
        table(told)


@contextmanager
def story() -> Iterator[Story]:
    console.print(Panel("One body, many voices: a base model, two tenants, and everything that happens between them."))
    told = Story(empty_root("demo"), PORT, console)
    with told.stopped_at_the_end():
        yield told


def train(told: Story) -> None:
    told.chapter("1  Two tenants train an adapter each, on real data")
    console.print("acme sorts newswire by topic; globex pulls names out of loan agreements. Rank 8, two CPU cores.")
    for name, less in (("reuters-topics", "data.train_rows=288"), ("finance-entities", "optimizer.epochs=1.5")):
        told.show("train", name, "--set", less, "--out", str(told.root / name))  # less than the shipped length
    console.print("And two adapters that can say only one thing each, to see a swap with the naked eye later.")
    for name, answer in ANSWERS.items():
        told.show(
            "train",
            "fixed-answer",
            "--set",
            f"name={name}",
            "--set",
            f"answer={answer}",
            "--out",
            str(told.root / name),
        )


def serve(told: Story) -> None:
    told.chapter("2  One engine, one gateway")
    told.ask("up")
    for tenant in ("acme", "globex"):
        told.add_tenant(tenant)
    told.show("status")


def push(told: Story) -> None:
    told.chapter("3  Uploads: quarantine, every offline check, then the goldens replayed on the engine")
    told.show("push", str(told.root / "reuters-topics"), "--name", "topics", tenant="acme")
    told.show("push", str(told.root / "finance-entities"), "--name", "entities", tenant="globex")
    for tenant in ("acme", "globex"):
        told.show("adapters", tenant=tenant)


def evaluate(told: Story) -> None:
    told.chapter("4  Is it worth it? Base, few-shot and tuned, through the gateway")
    for tenant, model, task in (("acme", "topics", "reuters-topics"), ("globex", "entities", "finance-entities")):
        answers = told.root / f"eval-{task}.json"
        told.show("eval", task, "--model", model, "--rows", str(EVAL_ROWS), "--out", str(answers), tenant=tenant)
        document = json.loads(answers.read_text(encoding="utf-8"))
        told.scores[task], told.questions[model] = document["metrics"], document["answers"][1]


async def talk(told: Story) -> None:
    told.chapter("5  The official client streams from both")
    for tenant, model in (("acme", "topics"), ("globex", "entities")):
        async with told.client(tenant) as client:
            console.print(f"[bold]{tenant}[/] sees {[m.id async for m in client.models.list()]}")
            question = told.questions[model]
            prompt: Any = question["messages"]
            stream = await client.chat.completions.create(model=model, messages=prompt, stream=True, max_tokens=64)
            console.print(f"[dim]{escape(prompt[-1]['content'])}[/]")
            console.print(f"  wanted   {escape(question['wanted'])}\n  streamed ", end="")
            async for chunk in stream:
                console.print(chunk.choices[0].delta.content or "", end="", markup=False)
            console.print()


EVAL_ROWS = 40
SUBJECTS = ("base", "few-shot", "adapter")


async def swap(told: Story) -> None:
    told.chapter(f"6  {STREAMS} streams, {SWAPS} swaps, nobody drops")
    told.show("push", str(told.root / "blue"), "--name", "colour", tenant="acme")
    told.show("push", str(told.root / "green"), "--name", "colour", tenant="acme")
    expected = {f"colour@{number}": answer for number, answer in enumerate(ANSWERS.values(), 1)}
    seen = told.swapped
    stop = asyncio.Event()

    async def listen(client: openai.AsyncOpenAI) -> None:
        while not stop.is_set():
            raw = await client.chat.completions.with_raw_response.create(
                model="colour", messages=QUESTION, stream=True, max_tokens=24, temperature=0
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in raw.parse()])
            label = raw.headers["x-lorikeet-adapter"]
            outcome = "whole" if text.strip() == expected[label] else f"wrong: {text!r}"
            seen[f"{label} {outcome}"] += 1

    async with told.client("acme") as client, asyncio.TaskGroup() as group:
        for _ in range(STREAMS):
            group.create_task(listen(client))
        async with httpx.AsyncClient(
            base_url=told.url, headers={"authorization": f"Bearer {told.keys['acme']}"}
        ) as http:
            forced = {"version": 2, "force": True, "reason": "a demonstration of swaps"}
            for _ in range(SWAPS):
                (await http.post("/v1/adapters/colour/promote", json=forced)).raise_for_status()
                await asyncio.sleep(0.7)
                (await http.post("/v1/adapters/colour/rollback")).raise_for_status()
                await asyncio.sleep(0.7)
        stop.set()
    for outcome, count in sorted(seen.items()):
        console.print(f"  {count:4} answers  {outcome}")
    if any("wrong" in outcome for outcome in seen):
        raise SystemExit("An answer did not come from the version its header names.")


def attack(told: Story) -> None:
    told.chapter("7  What must not work")
    with told.http("globex") as globex:
        for model in ("acme/topics", "acme/does-not-exist"):
            refused = globex.post("/v1/chat/completions", json={"model": model, "messages": QUESTION})
            console.print(f"globex asks {model}: [red]{refused.status_code}[/] {refused.json()['error']['message']}")
    with tempfile.TemporaryDirectory() as folder:
        poisoned = Path(folder) / "poisoned"
        shutil.copytree(told.root / "finance-entities", poisoned)
        weights = poisoned / "adapter_model.safetensors"
        opened = open_tensors(weights)
        tensors = {name: np.array(opened.read(name)) for name in opened.tensors}
        tensors[min(tensors)].flat[0] = np.nan
        save_tensors(weights, tensors)
        console.print("globex uploads an adapter with NaN in it, which vLLM itself would take with status 200:")
        told.show("push", str(poisoned), "--name", "poisoned", tenant="globex", ok=(1,))


def merge(told: Story) -> None:
    told.chapter("8  Merged into the base, proven equal, on an engine of its own")
    told.show("merge", "acme/topics@1", "--out", str(told.root / "merged"), tenant="acme")
    own = {"LORIKEET_BASE": str(told.root / "merged")}
    second = Installation(told.root / "merged-home", MERGED_PORT, console, settings=own)
    with second.stopped_at_the_end():
        answer = second.ask("up")
        second.keys["default"] = answer["key"]
        console.print(f"A second engine serves [bold]{answer['base_model']}[/] on port {MERGED_PORT}.")
        told.latency["merged"] = loadtest(second, told.root, "merged", "default", answer["base_model"])
        told.latency["hot-swapped"] = loadtest(told, told.root, "hot-swapped", "acme", "topics")


def load(told: Story) -> None:
    told.chapter("9  Load: Poisson arrivals, Zipf over everything acme may call")
    out = told.root / "loadtest"
    scenario = "configs/loadtests/quick.yaml"
    told.show("loadtest", "run", scenario, "--url", told.url, "--out", str(out), tenant="acme", ok=(0, 1, 3, 4))
    console.print(f"Report: {out}/report.html")


def loadtest(server: Installation, folder: Path, name: str, tenant: str, model: str) -> dict[str, Any]:
    """The same short load on one model."""
    scenario = folder / f"{name}.yaml"
    scenario.write_text(
        json.dumps(
            {
                "name": name,
                "target": {"url": server.url},
                "adapters": [model],
                "requests": {"prompts": {"kind": "builtin"}, "max_tokens": 24},
                "load": {"kind": "poisson", "rate_per_s": 1},
                "phases": [
                    {"name": "warm-up", "duration_s": 4, "measured": False},
                    {"name": "steady", "duration_s": 15},
                ],
                "objectives": ["p95(ttft) < 2 s"],
                "sample_floor": 10,
                "health": {"send_lag_p99_ms": 200, "loop_lag_p99_ms": 100, "objective_share": 0.1},
            }
        )
    )
    out = str(folder / f"loadtest-{name}")
    result: dict[str, Any] = server.ask("loadtest", "run", str(scenario), "--out", out, tenant=tenant)
    return result


def table(told: Story) -> None:
    told.chapter("10  What came of it")
    scores = Table("task", "figure", "base", "few-shot", "tuned", title="Answers", title_justify="left")
    for task, metrics in told.scores.items():
        figure = next(iter(metrics["adapter"]))
        scores.add_row(task, figure.replace("_", " "), *(f"{100 * metrics[who][figure]:.1f} %" for who in SUBJECTS))
    latency = Table("topics served", "TTFT P50", "TTFT P95", "end to end P50", "end to end P95", title_justify="left")
    latency.title = "Latency at one request a second, 24 tokens"
    for way, summary in told.latency.items():
        overall = next(group for group in summary["groups"] if group["kind"] == "overall")
        cells = [overall["metrics_s"][metric][rank]["value"] for metric in ("ttft", "e2e") for rank in ("p50", "p95")]
        latency.add_row(way, *(f"{1000 * seconds:.0f} ms" for seconds in cells))
    console.print(scores, latency)
    record = {"command": "make demo", "seconds": told.elapsed_s, "chapters": told.chapters, "swapped": told.swapped}
    record |= {"scores": told.scores, "latency": told.latency}
    (told.root / "story.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    console.print(
        f"Told in {told.elapsed_s / 60:.1f} minutes. What was made lies in {told.root}, its figures in story.json."
    )


if __name__ == "__main__":
    main()
