"""Small JSON bodies: read once the caller is known, never more than a little, refused with the field that is wrong.

FastAPI's own body parameters read a body of any length into memory before they look at the key.
"""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from gateway.errors import BodyTooLargeError, InvalidRequestError

MAX_JSON_BYTES = 64 * 1024

Shape = TypeVar("Shape", bound=BaseModel)


async def read_json(request: Request, shape: type[Shape]) -> Shape:
    """Raises BodyTooLargeError, InvalidRequestError."""
    raw = bytearray()
    try:
        async for piece in request.stream():
            raw += piece
            if len(raw) > MAX_JSON_BYTES:
                raise BodyTooLargeError(MAX_JSON_BYTES)
    except ClientDisconnect as exc:
        raise InvalidRequestError("The request was broken off before its end.", code="incomplete_body") from exc
    try:
        return shape.model_validate_json(bytes(raw))
    except ValidationError as exc:
        first = exc.errors()[0]
        if first["type"] == "json_invalid":
            raise InvalidRequestError(f"The body is not valid JSON: {first['msg']}", code="invalid_json") from exc
        param = ".".join(str(part) for part in first["loc"]) or None
        code = "missing_value" if first["type"] == "missing" else "invalid_value"
        raise InvalidRequestError(f"{param or 'body'}: {first['msg']}", param=param, code=code) from exc
