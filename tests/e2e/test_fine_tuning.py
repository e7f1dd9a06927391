"""The fine-tuning API on the real engine: the script of the README, with a worker beside it."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from adapters.registry import Scope
from gateway.services import Services
from tests.gateway.conftest import listening

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]


async def test_the_readmes_script_ends_with_an_answer_of_the_tuned_model(app: FastAPI, base_model: Path) -> None:
    services: Services = app.state.services
    services.registry.create_tenant("acme")
    _, key = services.registry.create_key("acme", [Scope.INFERENCE, Scope.JOBS])
    await services.directory.refresh()
    environment = os.environ | {
        "LORIKEET_HOME": str(services.settings.home.root),
        "LORIKEET_API_KEY": key,
        "LORIKEET_BASE": str(base_model),
        "LORIKEET_ENGINE": "test",
    }
    async with listening(app) as url:
        command = [sys.executable, "-m", "lorikeet", "worker", "--gateway", url, "--poll-s", "0.5"]
        worker = await asyncio.to_thread(subprocess.Popen, command, env=environment)
        try:
            script = [sys.executable, "-m", "scripts.fine_tune", "--url", f"{url}/v1"]
            done = await asyncio.to_thread(
                subprocess.run, script, env=environment, capture_output=True, text=True, timeout=500, check=False
            )
        finally:
            worker.terminate()
            code = await asyncio.to_thread(worker.wait, 60)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)  # noqa: T201
    first, *_, last = done.stdout.strip().splitlines()
    assert last.startswith("ft:smollm2-135m-instruct:acme:desk:")
    assert last.endswith(": 'shipping'")
    assert not first.endswith(": 'shipping'")
    assert "Checkpoint created at step" in done.stdout
    assert code == 0
