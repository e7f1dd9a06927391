"""Who is calling: API key -> tenant and scopes."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.registry import Registry, Scope, Snapshot, Tenant
from gateway.errors import AuthenticationError, PermissionDeniedError, UnknownProjectError

PROJECT_HEADER = "openai-project"  # the official client's `project=`; lets an operator's key act for one tenant


@dataclass(frozen=True)
class Caller:
    """The tenant a request acts for, and what its key allows. An operator's key without a project has no tenant."""

    key_id: str
    tenant: Tenant | None
    scopes: frozenset[Scope]

    @property
    def actor(self) -> str:
        """Who the audit log names."""
        return f"key:{self.key_id}"

    @property
    def is_operator(self) -> bool:
        return Scope.ADMIN in self.scopes

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or self.is_operator

    def require(self, scope: Scope) -> Tenant:
        """The tenant, when the key may do `scope` for it. Raises PermissionDeniedError."""
        if not self.allows(scope):
            raise PermissionDeniedError(f"This API key lacks the scope '{scope}'.")
        if self.tenant is None:
            raise PermissionDeniedError("This key has no tenant. An operator names one in the OpenAI-Project header.")
        return self.tenant

    def require_operator(self) -> None:
        """Raises PermissionDeniedError for anybody but an operator."""
        if not self.is_operator or self.tenant is not None:
            raise PermissionDeniedError("This needs an operator's API key.")


def identify(headers: Mapping[str, str], snapshot: Snapshot, registry: Registry, *, now: float) -> Caller:
    """The caller behind `Authorization: Bearer …`.

    Raises AuthenticationError for a key that is missing, unknown, expired or revoked (all alike), UnknownProjectError when an
    operator names a tenant that does not exist. A tenant's own key ignores the project header: it is bound already.
    """
    scheme, _, plaintext = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not plaintext.strip():
        raise AuthenticationError("You didn't provide an API key. Send it as: Authorization: Bearer YOUR_KEY")
    key = snapshot.keys.get(registry.hash_key(plaintext.strip()))
    if key is None or not key.valid_at(now):
        raise AuthenticationError("Incorrect API key provided, or it has expired or was revoked.")
    name = key.tenant
    if name is None and Scope.ADMIN in key.scopes:
        name = headers.get(PROJECT_HEADER) or None
        if name is not None and name not in snapshot.tenants:
            raise UnknownProjectError(name)
    return Caller(key.id, snapshot.tenants[name] if name is not None else None, key.scopes)
