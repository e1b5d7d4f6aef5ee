"""The report of an evaluation: results.json for programs, report.md and a self-contained report.html for people."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..images import write_text
from .scoring import RULES

OUTSIDE = "leaves the ball"  # how the flag of an attack begins whose figure does not count
READS = {
    "T0": "the attacker knows the classifier alone: oblivious, never robustness",
    "T1": "transfer from another classifier",
    "T2": "BPDA: the defence forward, the identity backward; an upper bound",
    "T3": "exact gradients, the draws frozen and known",
    "T4": "exact gradients over fresh draws: the number to quote",
    "T5": "queries alone (Square)",
    "authors": "the authors' nine attacks, on the classifier alone",
    "standard": "the same by today's libraries, cut to the ball",
    "AA": "AutoAttack standard on the deterministic mode, as RobustBench runs it",
    "sanity": "sweeps for the checks",
}


def write(folder: Path, results: dict[str, Any], pictures: dict[str, Any]) -> None:
    """pictures: {name: uint8 [k, S, S, 3]}, the grid's columns."""
    texts = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "report.md": markdown(results),
        "report.html": html(results, pictures),
    }
    for name, text in texts.items():
        write_text(folder / name, text)


def cell(figure: dict[str, float] | None) -> str:
    """ "61.2 [55.1, 67.0]"."""
    return "-" if figure is None else f"{figure['value']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


HEAD = (
    ("level", "defence", "attack", "eps", "steps", "EOT", "draws", "n")
    + tuple(f"clean {rule}" for rule in RULES)
    + tuple(f"attacked {rule}" for rule in RULES)
    + ("attacked mean, all images", "flags")
)


def line(row: dict[str, Any]) -> list[str]:
    """One row of the main table, over the images that the bare classifier gets right; the last figure over all."""
    attack = " ".join([row["attack"], *([row["loss"]] if row["attack"] == "eot-pgd" else [])])
    start = [row["level"], row["defence"], attack, f"{row['eps']:g}", row.get("steps"), row.get("eot"), row["draws"]]
    start.append(row["clean"]["right"]["n"])
    clean = [cell(row["clean"]["right"][rule]) for rule in RULES]
    if row["adversarial"] is None:
        end = [row["verdict"], "", "", ""]
    else:
        attacked = row["adversarial"]
        end = [*(cell(attacked["right"][rule]) for rule in RULES), cell(attacked["all"]["mean"])]
    return ["" if v is None else str(v) for v in (*start, *clean, *end, "; ".join(row["flags"]))]


def summary(results: dict[str, Any]) -> list[str]:
    """The sentences a reader wants first."""
    s, right = results["settings"], results["right"]
    failed = [c for c in results["checks"] if c["status"] == "failed"]
    out = [
        f"Suite {s['suite']} on {results['classifier']['name']} ({results['classifier']['hash']}), "
        f"{results['data']['images']} pictures of {results['data']['name']} ({results['data']['hash']}), seed "
        f"{s['seed']}. The bare classifier gets {right['n']} of {right['of']} right; figures are accuracies in percent "
        "over those with 95 % Wilson intervals, unless they say all images.",
        "mean: average over fresh draws; worst: right in every draw; majority: the true label outvotes all others.",
    ]
    widths = []
    for level in _levels(results):
        figures = [
            row["adversarial"]["right"] for row in results["rows"] if row["level"] == level and row["adversarial"]
        ]
        if figures:
            width, n = max((f["mean"]["high"] - f["mean"]["low"], f["n"]) for f in figures)
            widths.append(f"{level} {width:.1f} (n {n})")
    out.append(f"Widest interval of each level, in points: {', '.join(widths)}.")
    if s["suite"] == "ladder" and "T1" in s["levels"] and not s["surrogates"]:
        out.append("T1 was left out: no classifier was named to transfer from (--surrogate lite1).")
    if failed:
        blamed = ", ".join(dict.fromkeys(c["defence"] for c in failed))
        out.append(f"Sanity checks that failed: {len(failed)} ({blamed}). Do not quote their figures as robustness.")
    return out


def _levels(results: dict[str, Any]) -> list[str]:
    return sorted({row["level"] for row in results["rows"]}, key=list(READS).index)


def overview(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): what the strongest attack of each level leaves of each defence at each eps."""
    levels = [level for level in _levels(results) if level != "sanity"]
    groups: dict[tuple[str, float], dict[str, list[Any]]] = {}
    for row in results["rows"]:
        if row["level"] != "sanity":
            groups.setdefault((row["defence"], row["eps"]), {}).setdefault(row["level"], []).append(row)

    def strongest(rows: list[Any]) -> str:
        measured = [row for row in rows if row["adversarial"]]
        inside = [row for row in measured if not any(flag.startswith(OUTSIDE) for flag in row["flags"])]
        figures = [row["adversarial"]["right"]["mean"] for row in inside or measured]
        return cell(min(figures, key=lambda figure: figure["value"])) if figures else rows[0]["verdict"] if rows else ""

    body = []
    for (defence, eps), found in groups.items():
        clean = max((row for rows in found.values() for row in rows), key=lambda row: row["images"])["clean"]
        left = [strongest(found.get(level, [])) for level in levels]
        body.append([defence, f"{eps:g}", cell(clean["right"]["mean"]), *left])
    return ["defence", "eps", "clean", *levels], body


def table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(v).replace("|", "/") for v in row) + " |" for row in lines)


def sections(results: dict[str, Any]) -> list[tuple[str, str, Sequence[str], list[list[Any]]]]:
    """(title, sentence, head, rows) of every table."""
    says = "the strongest attack of each level, mean over the draws; a level without an attack on a defence is empty"
    out: list[tuple[str, str, Sequence[str], list[list[Any]]]] = [("Overview", says, *overview(results))]
    for level in _levels(results):
        body = [line(row) for row in results["rows"] if row["level"] == level]
        out.append((level, READS[level], HEAD, body))
    if results["paired"]:
        says = "gain in points over all images, each under the level's strongest attack, with its 95 % interval"
        head = ("from", "to", "level", "eps", "attacks", "images", "gain")
        body = [[*(row[name] for name in head[:-1]), cell(row["gain"])] for row in results["paired"]]
        out.append(("Paired differences", says, head, body))
    fields = ("defence", "check", "status", "says")
    says = "what would make the figures above worthless"
    out.append(("Checks", says, fields, [[check[name] for name in fields] for check in results["checks"]]))
    if analysis := results["analysis"]:
        notes = " ".join([f"{analysis['images']} pictures, oblivious PGD-20.", *analysis["notes"]])
        scales = [[name, *(f"{p['accuracy']:.1f}" for p in points)] for name, points in analysis["scale"].items()]
        steps = [f"x {p['scale']:g}" for p in next(iter(analysis["scale"].values()), [])]
        out.append(("Scale of the perturbation", f"accuracy by its scale; {notes}", ("defence", *steps), scales))
        place = "one patch perturbed: squared residue in it, in similar ones, in the rest"
        quality = "distance of purified pictures from the clean ones"
        for title, says, part in (("Place of the residue", place, "place"), ("Picture quality", quality, "quality")):
            found = analysis[part]
            names = list(dict.fromkeys(key for values in found.values() for key in values))
            out.append((title, says, ("defence", *names), [[d, *(v.get(k) for k in names)] for d, v in found.items()]))
        for name, points in analysis["strength"].items():
            keys = list(points[0])
            out.append((f"Strength of {name}", "the trade-off", keys, [[p[k] for k in keys] for p in points]))
    return out


def markdown(results: dict[str, Any]) -> str:
    """report.md."""
    parts = ["# Evaluation", *summary(results)]
    for title, says, head, body in sections(results):
        parts += [f"## {title}", says, table(head, body)]
    return "\n\n".join(part for part in parts if part) + "\n"


TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1f2328 }
div { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #d0d7de; text-align: left; white-space: nowrap }
td:last-child { white-space: normal } .failed { color: #b42318; font-weight: 600 } .warning { color: #9a6700 }
img { max-width: 100% }
</style>
<h1>Evaluation</h1>
{% for sentence in summary %}<p>{{ sentence }}</p>{% endfor %}
{% for title, says, head, body in sections %}<h2>{{ title }}</h2><p>{{ says }}</p><div><table>
<tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in body %}<tr>{% for value in row %}
<td{% if value in ("failed", "warning") %} class="{{ value }}"{% endif %}>{{ "" if value is none else value }}</td>
{%- endfor %}</tr>{% endfor %}
</table></div>
{% if loop.first %}{% for title, image in figures %}<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">{% endfor %}{% endif %}{% endfor %}
<h2>Settings</h2><pre>{{ settings }}</pre></html>
"""


def html(results: dict[str, Any], pictures: dict[str, Any]) -> str:
    """report.html: nothing in it is loaded from elsewhere."""
    from jinja2 import Environment

    figures = [("Pictures", _grid(pictures)), *_curves(results)]
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        summary=summary(results),
        sections=sections(results),
        figures=figures,
        settings=json.dumps(results["settings"], indent=1),
    )


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _grid(pictures: dict[str, Any]) -> str:
    """Columns by name, one more with the perturbation times ten; one row a picture."""
    from matplotlib.figure import Figure

    names = list(pictures)
    clean, attacked = (pictures[name].astype(float) for name in names[:2])
    columns = {**pictures, "perturbation x 10": np.clip((attacked - clean) * 10 + 128, 0, 255).astype(np.uint8)}
    count = len(clean)
    figure = Figure(figsize=(1.8 * len(columns), 1.9 * count), layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for c, (name, images) in enumerate(columns.items()):
        for r in range(count):
            axes[r][c].imshow(images[r])
            axes[r][c].set_axis_off()
        axes[0][c].set_title(name, fontsize=8)
    return _png(figure)


def _curves(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Accuracy against eps, scale and strength, where the run has them."""
    white: dict[str, dict[float, float]] = {}  # by defence and eps: the strongest of the sanity set's attacks
    for row in results["rows"]:
        if row["level"] == "sanity" and row["adversarial"] and row["eps"] <= 32 and row["steps"] > 1:
            curve, value = white.setdefault(row["defence"], {}), row["adversarial"]["all"]["mean"]["value"]
            curve[row["eps"]] = min(value, curve.get(row["eps"], value))
    analysis = results["analysis"]
    found = {
        "White-box attack: accuracy against eps (1/255), sanity set": {d: sorted(c.items()) for d, c in white.items()},
        "Oblivious attack: accuracy against the perturbation's scale": {
            defence: [(p["scale"], p["accuracy"]) for p in points]
            for defence, points in analysis.get("scale", {}).items()
        },
        "Trade-off: clean (x) against attacked accuracy (y) by strength": {
            f"{defence}, {swept}": [(p["clean"], p["attacked"]) for p in points if p["swept"] == swept]
            for defence, points in analysis.get("strength", {}).items()
            for swept in ("image_step", "feature_step")
        },
    }
    return [(title, _plot(curves)) for title, curves in found.items() if curves]


def _plot(curves: dict[str, list[tuple[float, float]]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set_ylim(-2, 102)
    axis.set_ylabel("accuracy in %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _png(figure)
