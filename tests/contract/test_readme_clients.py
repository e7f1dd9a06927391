"""The README's examples for other clients: curl asks here; `make clients` runs the others in environments of their own."""

import ast
import asyncio

import orjson
import pytest

from scripts.clients import PACKAGES, example
from tests.contract.conftest import Served


async def test_the_curl_example_is_answered(served: Served) -> None:
    line = example("curl").replace("http://127.0.0.1:8080/v1", served.url)
    line = line.replace("lk-…", await served.gateway.key())
    process = await asyncio.create_subprocess_exec("bash", "-c", line, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    answer = orjson.loads(said)
    assert answer["model"] == "support"
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("kind", PACKAGES)
def test_the_other_examples_are_python(kind: str) -> None:
    assert "http://127.0.0.1:8080/v1" in example(kind)
    ast.parse(example(kind))
