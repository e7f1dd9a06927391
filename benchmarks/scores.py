"""Tuned against prompted: trains the shipped configurations, uploads the adapters and scores them through the gateway.

    make up && python -m benchmarks.scores

About twenty minutes on two cores. What the models answered is left out of the results: the texts are not ours to ship.
"""

import argparse
import tempfile
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks.common import first_tenant, lorikeet, save, temporary_key

TASKS = ("reuters-topics", "finance-entities")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    tenant, console, results = first_tenant(), Console(), {}
    url = lorikeet("status")["url"]
    with tempfile.TemporaryDirectory() as folder, temporary_key("adapters:write") as key:
        for task in TASKS:
            model = f"benchmark-{task}"
            trained = lorikeet("train", task, "--out", str(Path(folder) / task))
            pushed = lorikeet("push", trained["adapter"], "--name", model, "--tenant", tenant)
            try:
                scored = lorikeet("eval", task, "--model", model, "--tenant", tenant, "--out", f"{folder}/{task}.json")
            finally:
                httpx.delete(f"{url}/v1/adapters/{model}", headers={"authorization": f"Bearer {key}"}, timeout=60)
            results[task] = {
                "training": {name: trained[name] for name in ("seconds", "metrics")},
                "probe": pushed["probe"],
                "evaluation": {name: scored[name] for name in ("rows", "metrics", "p_value", "config")},
            }
            console.print(task, results[task])
    path = save("scores", {"command": "python -m benchmarks.scores", "tasks": results})
    console.print(f"Raw figures: {path}")


if __name__ == "__main__":
    main()
