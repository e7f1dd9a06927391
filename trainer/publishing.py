"""A trained adapter's way to the gateway: over HTTP, with an operator's key, on behalf of its tenant."""

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from adapters.names import TunedName
from adapters.peft_format import FILES
from trainer.errors import TrainerError

TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # the answer comes when the adapter was probed, behind other loads
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class GatewayAwayError(TrainerError):
    """No gateway answers, or not now: to be tried again."""


class RefusedError(TrainerError):
    """The gateway will not have it, and would not later. reasons: of the gate, where it was that."""

    def __init__(self, message: str, *, code: str = "", reasons: tuple[str, ...] = ()) -> None:
        self.code = code
        self.reasons = reasons
        super().__init__(message)


@dataclass(frozen=True)
class Published:
    version: int
    production: bool  # whether it answers to the adapter's plain name


class Publisher:
    """One gateway. key: looked up for each push, for a gateway writes its operator's key when it starts."""

    def __init__(self, url: str, key: Callable[[], str | None], transport: httpx.BaseTransport | None = None) -> None:
        """transport: a stand-in for the network, for tests."""
        self.url = url.rstrip("/")
        self._key = key
        self._transport = transport

    def push(self, folder: Path, name: TunedName) -> Published:
        """Upload the adapter as a version that answers as `name`, once however often. Raises GatewayAwayError, RefusedError."""
        found = self._send(
            name.tenant,
            "POST",
            "/v1/adapters",
            params={"wait": "true"},
            data={"name": name.adapter, "model_name": str(name)},
            files={"file": ("adapter.zip", zipped(folder), "application/zip")},
        )
        if found["status"] != "ready":
            raise GatewayAwayError(f"{self.url} has not probed {name} yet: it is {found['status']}.")
        return Published(found["version"], found["production"])

    def promote(self, name: TunedName, version: int) -> None:
        """Ask the gate. Raises GatewayAwayError, RefusedError with its reasons."""
        self._send(name.tenant, "POST", f"/v1/adapters/{name.adapter}/promote", json={"version": version})

    def _send(self, tenant: str, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        key = self._key()
        if key is None:
            raise GatewayAwayError(
                "There is no operator's key: neither LORIKEET_API_KEY nor a gateway's on this machine."
            )
        headers = {"authorization": f"Bearer {key}", "openai-project": tenant}
        with self._reached(), httpx.Client(base_url=self.url, timeout=TIMEOUT, transport=self._transport) as http:
            response = http.request(method, path, headers=headers, **arguments)
        if response.is_success:
            return dict(response.json())
        error = error_of(response)
        message = f"{response.status_code} {error.get('message') or response.text[:300]}"
        if response.status_code in RETRIED:
            raise GatewayAwayError(f"{self.url} answered {message}")
        raise RefusedError(message, code=str(error.get("code") or ""), reasons=tuple(error.get("reasons") or ()))

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as exc:
            raise GatewayAwayError(f"No gateway answers at {self.url}: {exc or type(exc).__name__}") from exc


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of an answer, empty where something else stands between us and the gateway."""
    try:
        return dict(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return {}


def zipped(folder: Path) -> io.BytesIO:
    """The same bytes for the same files."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in sorted(FILES):
            if (folder / name).is_file():
                archive.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes())
    target.seek(0)
    return target
