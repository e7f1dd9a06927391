"""The engines' own Prometheus pages, made one: each series says which engine it is from. Pure."""

import re
from collections.abc import Mapping

UNBOUNDED = frozenset(["vllm:lora_requests_info"])  # a new series for each combination of adapters that ever ran
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?( .+)$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)(="(?:[^"\\]|\\.)*")')
_TAKEN = {"engine": "exported_engine"}  # vLLM's number of the process within one engine


def merged(pages: Mapping[str, str | None]) -> str:
    """pages: text exposition by engine id; None where the engine did not answer, which `gateway_engine_page` tells.

    A label `engine` of a page's own becomes `exported_engine`, as Prometheus itself would name it.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for engine, page in pages.items():
        _add(comments, samples, engine, page or "")
    lines = ["# HELP gateway_engine_page 1 when the engine gave its metrics.", "# TYPE gateway_engine_page gauge"]
    lines += [f'gateway_engine_page{{engine="{engine}"}} {float(page is not None)}' for engine, page in pages.items()]
    for family, found in samples.items():
        lines += comments.get(family, []) + found
    return "\n".join(lines) + "\n"


def _add(comments: dict[str, list[str]], samples: dict[str, list[str]], engine: str, page: str) -> None:
    family, told = "", set(comments)
    for line in page.split("\n"):
        if line.startswith("#"):
            words = line.split(" ", 3)
            if len(words) > 2 and words[1] in ("HELP", "TYPE"):
                family = words[2]
                if family not in told:
                    comments.setdefault(family, []).append(line)
        elif (match := _SAMPLE.match(line)) and family not in UNBOUNDED:
            name, labels, value = match.groups()
            rest = _LABEL.sub(lambda found: _TAKEN.get(found[1], found[1]) + found[2], labels or "")
            own = f'engine="{engine}"'
            samples.setdefault(family or name, []).append(
                f"{name}{{{own},{rest}}}{value}" if rest else f"{name}{{{own}}}{value}"
            )
