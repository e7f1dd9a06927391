"""report.html: one self-contained page that tells how a data set came about."""

import itertools
import re
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from trainer.data.account import LENGTH_EDGES, Account
from trainer.data.card import ReceiptSample

_ENVIRONMENT = Environment(
    loader=PackageLoader("trainer.data", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def render_page(account: Account) -> str:
    return _ENVIRONMENT.get_template("report.html.jinja").render(account=account, length_names=length_names())


def length_names() -> list[str]:
    """Of the parts of a histogram of lengths."""
    pairs = itertools.pairwise(LENGTH_EDGES)
    return [*(f"{low:,}–{high - 1:,}" for low, high in pairs), f"{LENGTH_EDGES[-1]:,} and more"]


def highlight(sample: ReceiptSample) -> Markup:
    """The row with its trained spans marked; they come in order, so each is looked for behind the one before."""
    parts: list[Markup] = []
    at = 0
    for span in sample.trained:
        start = sample.text.find(span, at)
        if start < 0:
            continue
        parts += [escape(sample.text[at:start]), Markup("<mark>"), escape(span), Markup("</mark>")]
        at = start + len(span)
    parts.append(escape(sample.text[at:]))
    return Markup("").join(parts)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def number(count: float | None) -> str:
    return "–" if count is None else f"{count:,.0f}"


def classes_of(*distributions: dict[str, float] | None, most: int = 30) -> Sequence[str]:
    """Names in any of them, the commonest first."""
    highest: dict[str, float] = {}
    for distribution in distributions:
        for name, share in (distribution or {}).items():
            highest[name] = max(share, highest.get(name, 0.0))
    return sorted(highest, key=lambda name: (-highest[name], name))[:most]


def words(text: str) -> str:
    """EMAIL_ADDRESS as people write it."""
    return re.sub("_", " ", text).lower()


_ENVIRONMENT.filters |= {"percent": percent, "number": number, "highlight": highlight, "words": words}
_ENVIRONMENT.globals |= {"classes_of": classes_of}
