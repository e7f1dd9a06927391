"""Everything the gateway can refuse or fail at, and the one translation of every error to HTTP.

GatewayError
├── EngineError
│   ├── EngineUnavailableError   no connection, or it broke before or while answering
│   ├── EngineStalledError       nothing for longer than the idle limit
│   ├── EngineStartError         the process did not become ready
│   └── AdapterLoadError         the engine refused an adapter
└── …                            request errors: see below
"""


class GatewayError(Exception):
    """Root of the gateway's tree. The message is written for whoever made the request."""


class EngineError(GatewayError):
    pass


class EngineUnavailableError(EngineError):
    pass


class EngineStalledError(EngineError):
    def __init__(self, idle_s: float) -> None:
        super().__init__(f"The engine sent nothing for {idle_s:g} s; the request was given up.")


class EngineStartError(EngineError):
    pass


class AdapterLoadError(EngineError):
    pass
