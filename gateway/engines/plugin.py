"""Routes we add inside vLLM: what it holds, free an adapter for real, pin one, what a running request has come to.

Loaded by vLLM (entry point `vllm.endpoint_plugins`, allowed by VLLM_PLUGINS), never by the gateway. vLLM's own unload
only forgets the name; the weights stay until something else pushes them out.

  GET  /lorikeet/adapters          -> {"adapters": [{"name", "id", "resident"}], "unnamed": n}
  POST /lorikeet/remove {"name"}   -> {"removed": bool}   409 while requests for it run; the name is gone at once
  POST /lorikeet/pin    {"name"}   -> {"pinned": true}    404, 409
  GET  /lorikeet/produced/ID       -> {"prompt_tokens", "cached_tokens", "output_tokens"}   404 when it does not run
"""

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State

router = APIRouter(prefix="/lorikeet")


class LorikeetPlugin:
    """What vLLM asks of a plugin (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "lorikeet"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        state.lorikeet_engine = engine_client
        state.lorikeet_leaving = {}  # name -> LoRARequest: no longer answered to, weights not yet freed


@router.get("/adapters")
async def list_adapters(request: Request) -> JSONResponse:
    state = request.app.state
    named = state.openai_serving_models.lora_requests | state.lorikeet_leaving
    resident = await resident_ids(state.lorikeet_engine)
    registered = state.openai_serving_models.lora_requests
    adapters = [
        {
            "name": name,
            "id": lora.lora_int_id,
            "registered": name in registered,
            "resident": lora.lora_int_id in resident,
        }
        for name, lora in named.items()
    ]
    # A load that failed half way leaves an id without a name; the engine's own eviction takes it.
    unnamed = len(resident - {lora.lora_int_id for lora in named.values()})
    return JSONResponse({"adapters": adapters, "unnamed": unnamed})


@router.post("/remove")
async def remove_adapter(request: Request) -> JSONResponse:
    name = (await request.json())["name"]
    state = request.app.state
    models = state.openai_serving_models
    async with models.lora_resolver_lock[name]:
        if name in models.lora_requests:
            state.lorikeet_leaving[name] = models.lora_requests.pop(name)
        lora = state.lorikeet_leaving.get(name)
        if lora is None:
            return JSONResponse({"removed": False})
        # Taken out under a running request it would be read from disk again by the next step, and stay.
        running = running_requests(state.lorikeet_engine, name)
        if running:
            return error(409, f"'{name}' still has {running} running request(s); its weights are kept.")
        await state.lorikeet_engine.remove_lora(lora.lora_int_id)
        del state.lorikeet_leaving[name]
    models.lora_resolver_lock.pop(name, None)  # vLLM keeps one lock a name for ever
    return JSONResponse({"removed": True})


@router.post("/pin")
async def pin_adapter(request: Request) -> JSONResponse:
    name = (await request.json())["name"]
    state = request.app.state
    lora = state.openai_serving_models.lora_requests.get(name)
    if lora is None:
        return error(404, f"'{name}' is not loaded.")
    engine = state.lorikeet_engine
    if lora.lora_int_id not in await resident_ids(engine):
        await engine.add_lora(lora)  # evicted meanwhile, and only what is resident can be pinned
    try:
        await engine.pin_lora(lora.lora_int_id)
    except Exception as exc:  # noqa: BLE001  whatever the worker raised arrives as a plain Exception
        return error(409, f"'{name}' cannot be pinned: {exc}")
    return JSONResponse({"pinned": True})


@router.get("/produced/{request_id}")
async def produced(request_id: str, request: Request) -> JSONResponse:
    """Of the choices that are still running: a caller that leaves is charged what was made for it."""
    states = request.app.state.lorikeet_engine.output_processor.request_states.values()
    running = [state for state in states if request_id in state.external_req_id]  # chatcmpl-ID, cmpl-ID-0, 1_cmpl-ID-0
    if not running:
        return error(404, f"'{request_id}' is not running.")
    prompts = {(state.parent_req or state).external_req_id: state for state in running}.values()
    return JSONResponse(
        {
            "prompt_tokens": sum(state.prompt_len for state in prompts),
            "cached_tokens": sum(state.num_cached_tokens for state in prompts),
            "output_tokens": sum(state.detokenizer.num_output_tokens() for state in running if state.detokenizer),
        }
    )


async def resident_ids(engine: Any) -> set[int]:
    return set(await engine.list_loras())  # said to be a set, but arrives as a list from an engine core of its own


def running_requests(engine: Any, name: str) -> int:
    """Requests of an adapter the engine has not finished, queued ones too."""
    return sum(state.lora_name == name for state in engine.output_processor.request_states.values())


def error(status: int, message: str) -> JSONResponse:
    kind = "NotFoundError" if status == 404 else "ConflictError"
    return JSONResponse({"error": {"message": message, "type": kind, "param": "name", "code": status}}, status)
