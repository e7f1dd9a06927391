"""How long a caller will wait for the first byte of its answer. Pure."""

import math
from collections.abc import Mapping

from gateway.errors import InvalidRequestError

OWN_HEADER = "x-lorikeet-deadline-ms"
CLIENT_HEADER = "x-stainless-read-timeout"  # seconds; sent by the official client with every request


def patience_of(headers: Mapping[str, str]) -> float:
    """Seconds the caller will wait; infinite when it does not say.

    Raises InvalidRequestError for an own header that is no positive number. What a client library sends is taken or left.
    """
    own = headers.get(OWN_HEADER)
    patience_s = math.inf
    if own is not None:
        patience_s = _positive(own) / 1000
        if math.isnan(patience_s):
            raise InvalidRequestError(f"'{OWN_HEADER}' must be a positive number of milliseconds.", param=OWN_HEADER)
    client_s = _positive(headers.get(CLIENT_HEADER) or "")
    return patience_s if math.isnan(client_s) else min(patience_s, client_s)


def _positive(text: str) -> float:
    """NaN for what is none."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if value > 0 else math.nan
