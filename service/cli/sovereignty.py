"""The report on sovereignty for people: lines for a terminal, and one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .75rem .25rem 0;vertical-align:top;"
    "border-bottom:1px solid #ddd}h2{margin-top:2.5rem}.q{color:#555;font-size:.85rem}.big{font-size:2rem}"
)


def seconds(value: float | None) -> str:
    """A time, or that there is none."""
    return "no figure" if value is None else f"{value:,.3g} s"


def share(value: float | None) -> str:
    """A part of a whole, or that there is no whole."""
    return "no figure" if value is None else f"{value:.0%}"


def lines(told: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, value, what to count again) of each line of the report."""
    systems, suppliers, contained = told["critical_systems"], told["suppliers"], told["containment"]
    found = [
        (
            "critical systems under sovereign control",
            f"{systems['sovereign']} of {systems['total']} ({share(systems['share'])})",
            systems["query"],
        )
    ]
    found += [
        (
            f"  {s['name']} ({s['tenant']})",
            "lacks " + ", ".join(s["gaps"]) if s["gaps"] else "meets every criterion",
            "",
        )
        for s in systems["systems"]
    ]
    for e in told["exit"]["vendors"]:
        ran = f"mean {seconds(e['mean_s'])}, longest {seconds(e['max_s'])}; {e['succeeded']} succeeded, {e['failed']} failed"
        found.append((f"time to exit {e['vendor']}", ran if e["succeeded"] else "never shown", told["exit"]["query"]))
    index = suppliers["diversity"]
    found.append(("supplier diversity", "no figure" if index is None else f"{index:.2f}", suppliers["query"]))
    found += [
        (f"  {s['supplier']}", f"{share(s['share'])} of keys by tier; without it {share(s['loss'])} are lost", "")
        for s in suppliers["suppliers"]
    ]
    for name, kind in (
        ("time to detect", "detected"),
        ("time to contain", "real"),
        ("time to contain, drills", "drills"),
    ):
        t = contained[kind]
        text = (
            f"median {seconds(t['median_s'])}, p90 {seconds(t['p90_s'])}, longest {seconds(t['max_s'])} of {t['count']}"
        )
        found.append((name, text if t["count"] else "no figure", contained["query"]))
    found.append(("containment drilled within 90 days", "yes" if contained["drilled"] else "NO", ""))
    d = told["deployments"]
    found.append(
        ("deployments", f"{d['active']} active, {d['attested']} attested, {d['tested']} tested by others", d["query"])
    )
    return found


def page(told: Mapping[str, Any]) -> str:
    """The report as one HTML file: no script, nothing from elsewhere, every text escaped."""
    checkpoint = told["checkpoint"]
    under = "no checkpoint yet" if checkpoint is None else f"{checkpoint['size']} entries, root {checkpoint['root']}"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td class=q>{escape(query)}</td></tr>"
        for name, value, query in lines(told)
    )
    criteria = "".join(
        f"<tr><td>{escape(c['criterion'])}</td><td>{escape(c['meaning'])}</td><td>{c['unmet']:d}</td></tr>"
        for c in told["critical_systems"]["criteria"]
    )
    spread = told["suppliers"]["suppliers"]
    plots = "<h2>Suppliers</h2><p>Keys by tier on each, and (dark) keys lost without it.</p>" + _bars(
        (s["supplier"], s["share"], s["loss"]) for s in spread
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Sovereignty</title><style>{_STYLE}</style>'
        f"<h1>Sovereignty</h1><p>At {escape(told['at'])}, under policy {escape(told['policy'])}; the log: {escape(under)}.</p>"
        f"<p class=big>{escape(share(told['critical_systems']['share']))}</p>"
        "<p>of critical systems are under sovereign control.</p>"
        f"<table><tr><th>figure</th><th></th><th>count it again by</th></tr>{rows}</table>"
        f"<h2>Criteria</h2><table><tr><th>criterion</th><th>meaning</th><th>systems without</th></tr>{criteria}</table>"
        f"{plots}</html>\n"
    )


def _bars(found: Iterable[tuple[str, float, float]]) -> str:
    drawn, height = [], 0
    for name, whole, part in found:
        drawn.append(
            f'<text x="0" y="{height + 14}">{escape(name)}</text>'
            f'<rect x="200" y="{height + 2}" width="{400 * whole:.1f}" height="14" fill="#9db8d9"/>'
            f'<rect x="200" y="{height + 18}" width="{400 * part:.1f}" height="6" fill="#27476e"/>'
        )
        height += 32
    return f'<svg role="img" width="620" height="{max(height, 1)}" font-size="13">{"".join(drawn)}</svg>'
