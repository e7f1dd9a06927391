"""Do an engine harm, as load tests want it done: python -m scripts.chaos kill | freeze SECONDS | unload

kill ends its processes and with them every connection to it, freeze stops them for a while, unload makes it forget every
adapter. Works on the engine of the installation that LORIKEET_HOME names; the gateway is told nothing.
"""

import argparse
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
    match arguments.what:
        case "kill":
            os.killpg(record.engine_pid, signal.SIGKILL)
        case "freeze":
            freeze(record.engine_pid, arguments.seconds)
        case _:
            unload(run / f"{arguments.engine}.sock")


def freeze(group: int, seconds: float) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it is thawed even when this is ended early
    os.killpg(group, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.killpg(group, signal.SIGCONT)


def unload(socket: Path) -> None:
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport, base_url="http://engine", timeout=30) as engine:
        for model in engine.get("/v1/models").raise_for_status().json()["data"]:
            if model.get("parent"):  # an adapter
                engine.post("/v1/unload_lora_adapter", json={"lora_name": model["id"]}).raise_for_status()


if __name__ == "__main__":
    main()
