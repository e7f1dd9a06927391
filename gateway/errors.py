"""Everything the gateway can refuse or fail at, and the one translation of every error to HTTP.

GatewayError
├── EngineError
│   ├── EngineUnavailableError   it broke off before or while answering
│   │   └── EngineUnreachableError   no connection: it has not seen the request
│   ├── EngineStalledError       nothing for longer than the idle limit
│   ├── EngineStartError         the process did not become ready
│   ├── AdapterLoadError         the engine refused an adapter
│   └── EngineAnswerError        the engine answered with an error of its own, carried on as it is
├── NoReplicaError               no engine is ready
├── AuthenticationError          no valid key
├── PermissionDeniedError        a valid key without the scope
├── UnknownProjectError          an operator named a tenant that does not exist
├── InvalidRequestError          a body the caller has to mend; names the parameter
├── BodyTooLargeError
├── UploadNotFoundError          no such resumable upload
├── RequestNotFoundError         no such generation request, or another tenant's
├── RateLimitError               too many requests or tokens in a minute; carries the wait and the state of the limits
├── RequestTooLargeError         one request of more tokens than its limit allows in a minute
├── BudgetSpentError             this month's budget is used up
├── TooManyRequestsError         the tenant, key or adapter has too many requests open
├── SharedLimitsError            Redis did not answer; local limits take its place, so callers never see it
├── TenantQueueFullError         too many requests of this tenant wait
├── ShuttingDownError            the gateway takes no new work, or cuts what outlasts its grace
└── OverloadedError              the queue is full, or a turn did not or will not come in time
    └── DeadlineUnmetError           in time for the caller's own deadline
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters import errors as adapter_errors


class GatewayError(Exception):
    """Root of the gateway's tree. The message is written for whoever made the request."""


class EngineError(GatewayError):
    pass


class EngineUnavailableError(EngineError):
    pass


class EngineUnreachableError(EngineUnavailableError):
    pass


class EngineStalledError(EngineError):
    def __init__(self, idle_s: float) -> None:
        super().__init__(f"The engine sent nothing for {idle_s:g} s; the request was given up.")


class EngineStartError(EngineError):
    pass


class AdapterLoadError(EngineError):
    pass


class EngineAnswerError(EngineError):
    """The engine's own refusal, such as a prompt that is too long."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        self.status = status
        self.param = param
        super().__init__(message)


class NoReplicaError(GatewayError):
    def __init__(self) -> None:
        self.retry_after_s = 5.0  # a restart takes from some seconds to a minute: early enough, and no crowd
        super().__init__("No engine is ready. Try again shortly.")


class AuthenticationError(GatewayError):
    pass


class PermissionDeniedError(GatewayError):
    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class UnknownProjectError(GatewayError):
    def __init__(self, name: str) -> None:
        super().__init__(f"There is no tenant '{name}' (OpenAI-Project header).")


class InvalidRequestError(GatewayError):
    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        self.param = param
        self.code = code
        super().__init__(message)


class BodyTooLargeError(GatewayError):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The body is larger than the {limit_bytes:,} bytes accepted here.")


class RequestNotFoundError(GatewayError):
    def __init__(self, request_id: str) -> None:
        super().__init__(f"There is no request '{request_id}'.")


class UploadNotFoundError(GatewayError):
    def __init__(self, upload_id: str) -> None:
        super().__init__(f"There is no open upload '{upload_id}'. It may have expired: start again.")


class RateLimitError(GatewayError):
    """headers: of the answer, beside the advice on when to come again. kind: `requests` or `tokens`."""

    def __init__(self, message: str, *, kind: str, retry_after_s: float, headers: Mapping[str, str]) -> None:
        self.type = kind
        self.retry_after_s = retry_after_s
        self.headers = headers
        super().__init__(f"{message} Please try again in {duration(retry_after_s)}.")


class RequestTooLargeError(GatewayError):
    def __init__(self, subject: str, limit: int, tokens: int) -> None:
        super().__init__(
            f"Request too large for {subject} on tokens per min (TPM): Limit {limit}, Requested {tokens} with the output cap. "
            "Shorten the prompt or lower the output cap."
        )


class BudgetSpentError(GatewayError):
    def __init__(self, subject: str) -> None:
        super().__init__(f"The budget of {subject} for this month is spent. It begins anew with the next month (UTC).")


class SharedLimitsError(GatewayError):
    pass


class TooManyRequestsError(GatewayError):
    def __init__(self, subject: str, limit: int) -> None:
        self.retry_after_s = 1.0
        super().__init__(f"The {subject} already has {limit} requests open. Wait for one to end.")


class OverloadedError(GatewayError):
    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeadlineUnmetError(OverloadedError):
    pass


class TenantQueueFullError(GatewayError):
    def __init__(self, limit: int, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{limit} requests of this tenant are waiting already. Send them more slowly.")


class ShuttingDownError(GatewayError):
    def __init__(self) -> None:
        self.retry_after_s = 1.0  # another gateway answers, or this one's successor soon
        super().__init__("The server is shutting down. Try again shortly.")


@dataclass(frozen=True)
class ErrorObject:
    """How one class of error looks over HTTP. `retry` False tells the official client not to repeat the request.

    said: instead of the error's own message, which names the operator's paths and machines and goes to the log.
    """

    status: int
    type: str
    code: str
    retry: bool | None = None
    said: str | None = None


INVALID, SERVER = "invalid_request_error", "server_error"

ERROR_OBJECTS: dict[type[Exception], ErrorObject] = {
    adapter_errors.InvalidAdapterError: ErrorObject(422, INVALID, "invalid_adapter"),
    adapter_errors.ArchiveError: ErrorObject(422, INVALID, "invalid_adapter"),
    adapter_errors.AdapterNotFoundError: ErrorObject(404, INVALID, "model_not_found"),
    adapter_errors.VersionNotFoundError: ErrorObject(404, INVALID, "model_not_found"),
    adapter_errors.TenantNotFoundError: ErrorObject(404, INVALID, "project_not_found"),
    adapter_errors.KeyNotFoundError: ErrorObject(404, INVALID, "key_not_found"),
    adapter_errors.DeploymentNotFoundError: ErrorObject(404, INVALID, "deployment_not_found"),
    adapter_errors.StoredFileNotFoundError: ErrorObject(404, INVALID, "file_not_found"),
    adapter_errors.JobNotFoundError: ErrorObject(404, INVALID, "fine_tuning_job_not_found"),
    adapter_errors.InvalidFileError: ErrorObject(400, INVALID, "invalid_file"),
    adapter_errors.JobQuotaError: ErrorObject(429, "insufficient_quota", "job_quota_exceeded", retry=False),
    adapter_errors.InvalidNameError: ErrorObject(400, INVALID, "invalid_name"),
    adapter_errors.InvalidLimitError: ErrorObject(400, INVALID, "invalid_limit"),
    adapter_errors.InvalidScopesError: ErrorObject(400, INVALID, "invalid_scopes"),
    adapter_errors.InvalidValueError: ErrorObject(400, INVALID, "invalid_value"),
    adapter_errors.ConflictError: ErrorObject(409, INVALID, "conflict", retry=False),
    adapter_errors.RoomError: ErrorObject(409, INVALID, "room_used_up", retry=False),
    adapter_errors.GateRefusedError: ErrorObject(409, INVALID, "gate_refused", retry=False),
    adapter_errors.BaseModelError: ErrorObject(
        500,
        SERVER,
        "base_model",
        retry=False,
        said="The server cannot use its base model. Its operator finds why in the log.",
    ),
    adapter_errors.BlobError: ErrorObject(
        500,
        SERVER,
        "storage",
        retry=False,
        said="The server could not read or keep files. Its operator finds why in the log.",
    ),
    adapter_errors.MergeError: ErrorObject(422, INVALID, "merge_failed"),
    adapter_errors.ParityError: ErrorObject(422, INVALID, "merge_parity"),
    adapter_errors.QuantizeError: ErrorObject(422, INVALID, "quantize_failed"),
    adapter_errors.ToolError: ErrorObject(500, SERVER, "tool_failed"),
    adapter_errors.DatabaseError: ErrorObject(
        503, SERVER, "database", said="The server cannot reach its database now."
    ),
    EngineUnavailableError: ErrorObject(503, SERVER, "engine_unavailable"),
    EngineUnreachableError: ErrorObject(503, SERVER, "engine_unavailable"),
    EngineStalledError: ErrorObject(504, SERVER, "engine_stalled"),
    EngineStartError: ErrorObject(503, SERVER, "engine_start", said="No engine is running. Try again later."),
    AdapterLoadError: ErrorObject(503, SERVER, "adapter_load_failed"),
    EngineAnswerError: ErrorObject(502, SERVER, "engine_error"),
    NoReplicaError: ErrorObject(503, SERVER, "no_replica"),
    AuthenticationError: ErrorObject(401, INVALID, "invalid_api_key"),
    PermissionDeniedError: ErrorObject(403, INVALID, "permission_denied"),
    UnknownProjectError: ErrorObject(404, INVALID, "project_not_found"),
    InvalidRequestError: ErrorObject(400, INVALID, "invalid_value"),
    BodyTooLargeError: ErrorObject(413, INVALID, "body_too_large"),
    RequestNotFoundError: ErrorObject(404, INVALID, "request_not_found"),
    UploadNotFoundError: ErrorObject(404, INVALID, "upload_not_found"),
    RateLimitError: ErrorObject(429, "requests", "rate_limit_exceeded"),
    RequestTooLargeError: ErrorObject(429, "tokens", "rate_limit_exceeded", retry=False),
    BudgetSpentError: ErrorObject(429, "insufficient_quota", "insufficient_quota", retry=False),
    SharedLimitsError: ErrorObject(503, SERVER, "limits_unavailable", said="The server cannot count requests now."),
    TooManyRequestsError: ErrorObject(429, "rate_limit_error", "concurrency_limit_exceeded"),
    TenantQueueFullError: ErrorObject(429, "rate_limit_error", "slow_down"),
    ShuttingDownError: ErrorObject(503, "service_unavailable_error", "shutting_down"),
    DeadlineUnmetError: ErrorObject(503, "service_unavailable_error", "server_is_overloaded"),
    OverloadedError: ErrorObject(503, "service_unavailable_error", "server_is_overloaded"),
}

PARAMS = {"model_not_found": "model", "invalid_file": "file"}  # what these codes always speak of

UNKNOWN = ErrorObject(
    500, SERVER, "internal_error", retry=False, said="The server had an error while processing your request."
)


def error_object_for(exc: BaseException) -> ErrorObject:
    """The nearest entry along the class's ancestry; UNKNOWN for a stranger."""
    found = next((ERROR_OBJECTS[cls] for cls in type(exc).__mro__ if cls in ERROR_OBJECTS), UNKNOWN)
    if isinstance(exc, EngineAnswerError) and 400 <= exc.status < 500:
        return ErrorObject(
            exc.status, INVALID, "context_length_exceeded" if "context length" in str(exc) else "invalid_value"
        )
    return found


def error_body(exc: BaseException) -> dict[str, Any]:
    """OpenAI's error envelope."""
    found = error_object_for(exc)
    error: dict[str, Any] = {
        "message": found.said or str(exc),
        "type": getattr(exc, "type", found.type),
        "param": PARAMS.get(found.code) or getattr(exc, "param", None),
        "code": getattr(exc, "code", found.code),
    }
    if isinstance(exc, adapter_errors.InvalidAdapterError):
        error["faults"] = [fault.as_dict() for fault in exc.faults]
    if isinstance(exc, adapter_errors.InvalidFileError) and exc.line:
        error["line"] = exc.line
    if isinstance(exc, adapter_errors.GateRefusedError):
        error["reasons"] = list(exc.reasons)
    return {"error": error}


def error_headers(exc: BaseException) -> Mapping[str, str]:
    """Retry advice, in the headers the official client reads; waits are hinted up to 60 s."""
    headers: dict[str, str] = dict(getattr(exc, "headers", {}))
    if error_object_for(exc).retry is False:
        headers["x-should-retry"] = "false"
    wait_s = getattr(exc, "retry_after_s", None)
    if wait_s is not None:
        wait_s = min(60.0, max(0.001, wait_s))
        headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
        headers["retry-after"] = str(math.ceil(wait_s))
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it, rounded up: `120ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
