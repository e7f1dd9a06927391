"""An evaluation as one HTML file that needs no network: the verdict, every figure with its interval, and examples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN = 20  # examples of each kind
ORDER = ("base", "few-shot", "predecessor", "adapter")


def render_page(document: Mapping[str, Any], *, verdict: str, gate: Mapping[str, Any] | None = None) -> str:
    """document: as `report.document` makes it. gate: what the promotion gate says, where it was asked."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(percent=lambda share: f"{100 * share:.1f} %", plain=lambda name: name.replace("_", " "))
    names = [name for name in ORDER if name in document["metrics"]]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        doc=document,
        verdict=verdict,
        gate=gate,
        names=names,
        rival=next((name for name in ("few-shot", "base", "predecessor") if name in names), None),
        metrics=list(document["metrics"]["adapter"]),
        changed=changed(document),
    )


def changed(document: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows on which the adapter and its strongest rival differ, the adapter's losses first."""
    names = [name for name in ("few-shot", "base", "predecessor") if name in document["metrics"]]
    if not names:
        return []
    rival = names[0]
    lost, gained = [], []
    for row in document["answers"]:
        if row[rival]["correct"] and not row["adapter"]["correct"]:
            lost.append(row)
        elif row["adapter"]["correct"] and not row[rival]["correct"]:
            gained.append(row)
    wrong = [row for row in document["answers"] if not row["adapter"]["correct"] and not row[rival]["correct"]]
    return [
        (f"Right with {rival}, wrong with the adapter: {len(lost)}", lost[:SHOWN]),
        (f"Wrong with both: {len(wrong)}", wrong[:SHOWN]),
        (f"Wrong with {rival}, right with the adapter: {len(gained)}", gained[:SHOWN]),
    ]
