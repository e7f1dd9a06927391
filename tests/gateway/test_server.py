"""The server of a gateway process, apart from how it drains."""

import gc
import socket

import uvicorn
from fastapi import FastAPI

from gateway.drain import Drain
from gateway.server import DrainingServer


async def test_what_stands_after_the_start_is_never_searched_for_garbage_again() -> None:
    config = uvicorn.Config(FastAPI(), lifespan="off", log_config=None)
    config.load()
    server = DrainingServer(config, Drain(), grace_s=0)
    server.lifespan = config.lifespan_class(config)
    assert gc.get_freeze_count() == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup([listener])
        try:
            assert gc.get_freeze_count() > 10_000
        finally:
            gc.unfreeze()
            await server.shutdown([listener])
