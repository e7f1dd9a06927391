"""How much one tenant may have open at once."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.registry import Tenant
from gateway.errors import TooManyRequestsError


class OpenRequests:
    """Counts each tenant's open requests against its limit."""

    def __init__(self, default_limit: int) -> None:
        self._default_limit = default_limit
        self._open: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        return self._open[tenant]

    @contextmanager
    def enter(self, tenant: Tenant) -> Iterator[None]:
        """Raises TooManyRequestsError at the limit."""
        limit = tenant.max_in_flight if tenant.max_in_flight is not None else self._default_limit
        if self._open[tenant.name] >= limit:
            raise TooManyRequestsError(limit)
        self._open[tenant.name] += 1
        try:
            yield
        finally:
            self._open[tenant.name] -= 1
            if not self._open[tenant.name]:
                del self._open[tenant.name]
