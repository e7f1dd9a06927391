"""The commands' side of the gateway's HTTP interface: which address, which key, which tenant, and what a refusal looks like."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

import httpx

from adapters.errors import Fault
from gateway.settings import Settings

UPLOAD_TIMEOUT = httpx.Timeout(600.0, connect=10.0)  # an upload is answered when its probe is done, behind other loads
DEFAULT_TIMEOUT = httpx.Timeout(30.0, connect=5.0)


class CommandError(Exception):
    """What a command could not do, told to the person at the terminal. It never travels over HTTP."""


class RefusedError(CommandError):
    """The gateway's answer was an error."""

    def __init__(self, status: int, message: str, *, code: str = "", faults: tuple[Fault, ...] = ()) -> None:
        self.status = status
        self.code = code
        self.faults = faults
        super().__init__(message)


def gateway_url(settings: Settings, *, ignore_environment: bool = False) -> str:
    """Where the commands look for the gateway: LORIKEET_URL, else the settings' own address."""
    remote = "" if ignore_environment else os.environ.get("LORIKEET_URL", "").rstrip("/")
    host = settings.host if settings.host not in {"0.0.0.0", "::", ""} else "127.0.0.1"  # noqa: S104 - compared, not bound
    host = f"[{host}]" if ":" in host else host
    return remote or f"http://{host}:{settings.port}"


def read_operator_key(settings: Settings) -> str | None:
    """The key of this machine's operator, as long as the commands speak to this machine."""
    return settings.home.operator_key_for(gateway_url(settings))


def refusal(response: httpx.Response) -> RefusedError:
    """The error object of an answer, whatever stands between us and the gateway."""
    try:
        error: dict[str, Any] = response.json()["error"]
        faults = tuple(
            Fault(str(f.get("code", "")), str(f.get("message", "")), str(f.get("where", "")), str(f.get("fix", "")))
            for f in error.get("faults") or ()
        )
        return RefusedError(
            response.status_code, str(error["message"]), code=str(error.get("code") or ""), faults=faults
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return RefusedError(response.status_code, f"HTTP {response.status_code}: {response.text[:300]}")


class GatewayClient:
    """JSON in, JSON out. Every failure is a CommandError that says what to do."""

    def __init__(
        self, url: str, key: str, *, tenant: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        if not key.isascii():
            raise CommandError("That is no API key: keys hold letters, digits, '-' and '_' only.")
        headers = {"authorization": f"Bearer {key}"} | ({"openai-project": tenant} if tenant else {})
        self.url = url
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=DEFAULT_TIMEOUT, transport=transport)
        except httpx.InvalidURL as exc:
            raise CommandError(f"{url} is no address: {exc}. Look at LORIKEET_URL.") from exc

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        return self._send("GET", path)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        timeout = httpx.Timeout(timeout_s, connect=5.0) if timeout_s else DEFAULT_TIMEOUT
        return self._send("POST", path, json=body or {}, timeout=timeout)

    def delete(self, path: str) -> Any:
        return self._send("DELETE", path)

    def upload(self, name: str, archive: IO[bytes], *, wait: bool) -> Any:
        """Send an archive as a new version of `name`; with `wait`, the answer comes when it is ready or refused."""
        return self._send(
            "POST",
            "/v1/adapters",
            params={"wait": str(wait).lower()},
            data={"name": name},
            files={"file": (f"{name}.zip", archive, "application/zip")},
            timeout=UPLOAD_TIMEOUT,
        )

    def _send(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.ConnectError as exc:
            raise CommandError(f"No gateway answers at {self.url}. Start one with: lorikeet up") from exc
        except httpx.HTTPError as exc:
            raise CommandError(f"{self.url} did not answer {method} {path}: {exc or type(exc).__name__}") from exc
        if response.is_error:
            raise refusal(response)
        try:
            return response.json()
        except ValueError as exc:
            raise CommandError(f"{self.url} is not a Lorikeet gateway: {path} did not answer in JSON.") from exc


@contextlib.contextmanager
def operator_client(settings: Settings, key: str | None) -> Iterator[GatewayClient]:
    """A client that asks about the whole machine: --key, else the operator key, else LORIKEET_API_KEY."""
    chosen = key or read_operator_key(settings) or os.environ.get("LORIKEET_API_KEY")
    if not chosen:
        raise CommandError(no_key_message(settings))
    with contextlib.closing(GatewayClient(gateway_url(settings), chosen)) as client:
        yield client


def no_key_message(settings: Settings) -> str:
    return (
        f"No API key. Set LORIKEET_API_KEY or pass --key; on the gateway's own machine `lorikeet up` writes the "
        f"operator's key to {settings.home.operator_key}."
    )
