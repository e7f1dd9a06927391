"""One page of a list, in OpenAI's shape. Pure."""

from collections.abc import Sequence
from typing import Any


def page(found: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """found: up to one more than `limit`, by which a next page is known."""
    shown = list(found[:limit])
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(found) > limit,
    }
