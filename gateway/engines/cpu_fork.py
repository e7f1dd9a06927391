"""A start in half the time on vLLM's CPU backend: its second process as a fork of the first, which has imported everything.

vLLM forks by default, but its CPU platform (0.32) sets VLLM_WORKER_MULTIPROC_METHOD to `spawn` for OpenMP's sake: a fork has
lost the threads of its parent's pool. With one thread there is no pool. So a profile of one thread may ask for `fork`.
"""

import os
from typing import Any

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def mend() -> None:
    """Let the environment's start method stand on the CPU backend with one thread. Does nothing elsewhere."""
    from vllm.platforms import current_platform

    asked = os.environ.get(METHOD)
    if not current_platform.is_cpu() or asked is None or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_keep_method(config: Any) -> None:
        check(config)
        os.environ[METHOD] = asked

    platform.check_and_update_config = staticmethod(check_and_keep_method)
