"""Render an HTML page that opens offline: template, style, script and plots are embedded in it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import IO, Any

from pipeline.core.utf8 import to_utf8
from pipeline.runs.plots import INK, CostPoint, draw_calibration, draw_cost, draw_curves, save_figure

_PAGES = resources.files("pipeline.report") / "pages"


def render(template: str, data: Mapping[str, Any], sheets: Sequence[str] = (), **values: Any) -> str:
    """Return the HTML of a template in `pages`, filled with `values`, which are escaped; `data` is for the script.

    `sheets` are pictures of thumbnails as data URLs.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.report", "pages"), autoescape=True, undefined=StrictUndefined
    )
    script = _read("report.js")
    return environment.get_template(template).render(
        style=_read("report.css"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=embedded(data),
        sheets=sheets,
        number=number,
        zip=zip,
        **{name: printable(value) for name, value in values.items()},
    )


def embedded(data: Mapping[str, Any]) -> str:
    """Return JSON that is safe inside a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def printable(value: Any) -> Any:
    """Return the same value with every text in it made encodable as UTF-8."""
    if isinstance(value, str):
        return to_utf8(value)
    if isinstance(value, Mapping):
        return {key: printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list | tuple) else value


def number(value: Any, decimals: int = 3) -> str:
    """Return a number as text, with thousands separators; floats have `decimals` decimals, None is a dash."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}"


def curves(history: Sequence[Mapping[str, float]], x: str) -> str:
    """Return the learning curves as SVG."""
    return _svg(lambda path: draw_curves(path, history, x, ""))


def reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Return the reliability diagram as SVG."""
    return _svg(lambda path: draw_calibration(path, bins, ""))


def scatter(names: Sequence[str], minutes: Sequence[float], spans: Sequence[tuple[float, float, float]], y: str) -> str:
    """Return accuracies with their intervals (low, value, high) over minutes as SVG, each point named."""
    return _svg(lambda path: _draw_scatter(path, names, minutes, spans, y))


def cost(points: Sequence[CostPoint]) -> str:
    """Return accuracies over the cost of extraction as SVG."""
    return _svg(lambda path: draw_cost(path, points, ""))


@save_figure
def _draw_scatter(
    names: Sequence[str], minutes: Sequence[float], spans: Sequence[tuple[float, float, float]], y: str
) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for name, minute, (low, value, high) in zip(names, minutes, spans, strict=True):
        axis.errorbar(minute, value, yerr=[[value - low], [high - value]], fmt="o", capsize=3)
        axis.annotate(name, (minute, value), textcoords="offset points", xytext=(6, 4), fontsize=8, parse_math=False)
    if len(minutes) > 1 and max(minutes) > 20 * max(1e-9, min(minutes)):
        axis.set_xscale("log")
    axis.set(xlabel="minutes", ylabel=y)
    axis.grid(alpha=0.3)
    return figure


def _svg(draw: Callable[[IO[str]], None]) -> str:
    """Return the SVG that `draw` writes, without XML prologue, in the page's text colour; "" if nothing is drawn."""
    buffer = io.StringIO()
    draw(buffer)
    text = buffer.getvalue()
    text = text[max(0, text.find("<svg")) :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', text, count=1
    )


def _read(name: str) -> str:
    return (_PAGES / name).read_text("utf-8")
