"""Where a page of metrics lies: at an address, or on a Unix socket. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template

from loadtests.errors import TargetError

_ON_SOCKET = re.compile(r"unix:(?P<socket>[^:\s][^:]*):(?P<path>/\S*)")


@dataclass(frozen=True)
class Page:
    url: str
    socket: str = ""  # over which it is asked for; empty: over the network. May begin with a $VARIABLE

    def socket_path(self, environment: Mapping[str, str]) -> str:
        """With its variables replaced. Raises TargetError where one is not set."""
        try:
            return Template(self.socket).substitute(environment)
        except KeyError as exc:
            raise TargetError(f"{self.socket} cannot be scraped: the variable {exc.args[0]} is not set.") from exc


def parse_page(text: str) -> Page:
    """`http://host:port/path`, https, or `unix:/path/of.sock:/path`. Raises ValueError."""
    if text.startswith(("http://", "https://")):
        return Page(text)
    match = _ON_SOCKET.fullmatch(text)
    if match is None:
        raise ValueError(f"{text}: write http://host/metrics, or unix:/path/of.sock:/metrics")
    if not Template(match["socket"]).is_valid():
        raise ValueError(f"{text}: write a variable as $NAME or ${{NAME}}")
    return Page(f"http://socket{match['path']}", match["socket"])
