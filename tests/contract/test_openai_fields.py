"""Each field of the official client's schema and of vLLM's own classes has a place in ours: a new version that brings one
fails here, and somebody decides.
"""

import ast
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from gateway.body import CHAT, COMPLETIONS, RESERVED, RESPONSES, TOKENIZE, Endpoint

OPENAI: Mapping[str, tuple[Endpoint, type]] = {
    "chat": (CHAT, chat_create_params.CompletionCreateParamsNonStreaming),
    "completions": (COMPLETIONS, completion_create_params.CompletionCreateParamsNonStreaming),
    "responses": (RESPONSES, response_create_params.ResponseCreateParamsNonStreaming),
}
VLLM: Mapping[str, tuple[Endpoint, str, str]] = {
    "chat": (CHAT, "openai/chat_completion/protocol.py", "ChatCompletionRequest"),
    "completions": (COMPLETIONS, "openai/completion/protocol.py", "CompletionRequest"),
    "responses": (RESPONSES, "openai/responses/protocol.py", "ResponsesRequest"),
    "tokenize a prompt": (TOKENIZE, "serve/tokenize/protocol.py", "TokenizeCompletionRequest"),
    "tokenize messages": (TOKENIZE, "serve/tokenize/protocol.py", "TokenizeChatRequest"),
}


@pytest.mark.parametrize("name", OPENAI)
def test_every_field_of_openais_schema_is_known(name: str) -> None:
    endpoint, params = OPENAI[name]
    fields = get_type_hints(params).keys()
    assert len(fields) > 10
    assert not fields - endpoint.known


@pytest.mark.parametrize("name", OPENAI)
def test_no_field_of_openais_schema_is_the_gateways_alone(name: str) -> None:
    assert not get_type_hints(OPENAI[name][1]).keys() & RESERVED


@pytest.mark.parametrize("name", VLLM)
def test_every_field_the_engine_reads_is_known(name: str) -> None:
    endpoint, file, cls = VLLM[name]
    assert not engine_fields(file, cls) - endpoint.known


@pytest.mark.parametrize("path", sorted({endpoint.path for endpoint, _, _ in VLLM.values()}))
def test_nothing_is_passed_on_that_the_engine_does_not_read(path: str) -> None:
    """It ignores what it does not know, without a word."""
    read = frozenset().union(
        *(engine_fields(file, cls) for endpoint, file, cls in VLLM.values() if endpoint.path == path)
    )
    (endpoint,) = {endpoint.path: endpoint for endpoint, _, _ in VLLM.values() if endpoint.path == path}.values()
    passed = endpoint.fields | endpoint.templates | ({endpoint.cap} - {""})
    # what the gateway itself turns into another field or drops
    assert passed - read <= ({"stream_options", "chat_template"} if endpoint is RESPONSES else set())


def engine_fields(file: str, cls: str) -> frozenset[str]:
    """Of one of vLLM's request classes, from its source: importing it takes ten seconds."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "entrypoints" / file).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    names = {
        statement.target.id
        for statement in found.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    return frozenset(name for name in names if not name.startswith("_"))
