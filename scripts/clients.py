"""The README's examples for curl, LangChain and LiteLLM against a running gateway, each client in an environment of its own.

The environments are made once, under the data folder; none of these packages is ours. Asks the base model, unless MODEL says
otherwise.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from adapters.home import home
from gateway.client import gateway_url
from gateway.settings import Settings
from scripts.installation import LORIKEET, ROOT

PACKAGES = {"langchain": "langchain-openai==1.7.3", "litellm": "litellm==1.100.0"}
TIMEOUT_S = 300


def example(kind: str) -> str:
    """The README's block with this word behind its fence."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^```\w+ {kind}\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no example for {kind}.")
    return found[1]


def interpreter(kind: str) -> Path:
    """Python with the client's package."""
    folder = home().create().root / "clients" / PACKAGES[kind].replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", PACKAGES[kind]], check=True)
        stamp.touch()
    return python


def api_key() -> str:
    if key := os.environ.get("LORIKEET_API_KEY"):
        return key
    made = subprocess.run(
        [*LORIKEET, "keys", "create", "--tenant", "default", "--json"], stdout=subprocess.PIPE, check=True
    )
    return str(httpx.Response(200, content=made.stdout).json()["key"])


def main() -> int:
    """Exit code 1 when an example fails or says nothing."""
    url, key = gateway_url(Settings()), api_key()
    models = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).raise_for_status().json()["data"]
    model = os.environ.get("MODEL", models[0]["id"])
    table = Table("Client", "Package", "Took", "Said", box=None)
    failed = False
    for kind in ("curl", *PACKAGES):
        code = example(kind).replace("http://127.0.0.1:8080", url).replace("lk-…", key).replace("support", model)
        command = ["bash", "-c", code] if kind == "curl" else [str(interpreter(kind)), "-c", code]
        started_s = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        wrong = done.returncode != 0 or not done.stdout.strip() or '"error"' in done.stdout
        failed = failed or wrong
        said = (done.stderr or done.stdout)[-400:] if wrong else " ".join(done.stdout.split())[:100]
        table.add_row(kind, PACKAGES.get(kind, ""), f"{time.monotonic() - started_s:.1f} s", said)
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
