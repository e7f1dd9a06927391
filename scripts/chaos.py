"""Do an engine harm, as load tests want it done: python -m scripts.chaos kill | freeze SECONDS | unload

Works on the engine of the installation that LORIKEET_HOME names, from outside the gateway, which is told nothing.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import httpx

from adapters.home import home
from gateway.engines.leftovers import read_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "freeze", "unload"))
    parser.add_argument("seconds", nargs="?", type=float, default=3.0, help="how long it is frozen")
    parser.add_argument("--engine", default="engine-0")
    arguments = parser.parse_args()
    run: Path = home().run
    record = read_record(run / f"{arguments.engine}.json")
    if record is None or record.engine_pid is None:
        sys.exit(f"No engine '{arguments.engine}' runs under {run}.")
    if arguments.what == "kill":
        os.killpg(record.engine_pid, signal.SIGKILL)
    elif arguments.what == "freeze":
        os.killpg(record.engine_pid, signal.SIGSTOP)
        try:
            time.sleep(arguments.seconds)
        finally:
            os.killpg(record.engine_pid, signal.SIGCONT)
    else:
        transport = httpx.HTTPTransport(uds=str(run / f"{arguments.engine}.sock"))
        with httpx.Client(transport=transport, base_url="http://engine", timeout=30) as engine:
            for model in engine.get("/v1/models").json()["data"]:
                if model.get("parent"):  # an adapter
                    body = json.dumps({"lora_name": model["id"]})
                    engine.post("/v1/unload_lora_adapter", content=body, headers={"content-type": "application/json"})


if __name__ == "__main__":
    main()
