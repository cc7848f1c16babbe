"""Draw plots of training histories and predictions with matplotlib; independent of models.

A user's `matplotlibrc` and the environment do not change the plots. If matplotlib cannot draw a plot, the plot is left
out with a warning: its numbers are stored beside it.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec

import numpy as np

from pipeline.core.lazy_imports import import_matplotlib
from pipeline.core.utf8 import to_utf8
from pipeline.runs.metrics import MOST_DENSE

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Target = Path | IO[str]
INK = "#010203"  # placeholder colour that pages replace by the colour of their text
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_CLEAR = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
_OF_PAGES = {
    **dict.fromkeys(_INKED, INK),
    **dict.fromkeys(_CLEAR, "none"),
    **{"svg.fonttype": "none", "svg.hashsalt": "icebox", "font.family": "sans-serif"},
}
_MOST_NUMBERS = 20  # classes up to which a confusion matrix shows its counts
_MOST_NAMES = 60  # classes up to which a confusion matrix shows their names
_MOST_MISTAKES = 30  # most frequent mistakes drawn instead of a matrix of too many classes


@dataclass(frozen=True)
class CostPoint:
    """An accuracy with its interval and the speed of extraction; `on_front`: no other point is better in both."""

    name: str  # may have a second line with details
    images_per_second: float
    span: tuple[float, float, float]  # low, value, high
    on_front: bool


def save_figure(build: Callable[P, Any]) -> Callable[Concatenate[Target, P], None]:
    """Decorate a function that returns a figure: it then takes a target as first argument and writes the figure there.

    A path gets a PNG; a text stream gets an SVG for pages. If matplotlib cannot draw the figure, a warning is logged
    and nothing is written. Exceptions that `build` raises, and OSError if the file cannot be written, are passed on.
    """

    @functools.wraps(build)
    def draw(target: Target, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _style({} if isinstance(target, Path) else _OF_PAGES):
                content = _rendered(build(*args, **kwargs), isinstance(target, Path))
        except _UndrawnError as error:
            named = target.name if isinstance(target, Path) else "a picture of the page"
            logger.warning("%s is left out, matplotlib cannot draw it (%s)", named, error)
            return
        if isinstance(target, Path):
            target.write_bytes(content)
        else:
            target.write(content.decode())

    return draw


class _UndrawnError(Exception):
    """Raised with matplotlib's message if matplotlib cannot be imported or cannot render a figure."""


@contextmanager
def _style(more: Mapping[Any, Any]) -> Iterator[None]:
    """Set matplotlib's settings to its defaults and `more`; restore the former settings on exit."""
    matplotlib, why_not = _matplotlib()
    if matplotlib is None:
        raise _UndrawnError(why_not)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(more)
        yield


@functools.cache
def _matplotlib() -> tuple[Any, str]:
    """Return matplotlib and "", or None and the reason why it cannot be imported.

    The result is cached, because each failed import searches for fonts again.
    """
    try:
        matplotlib = import_matplotlib()
        import_module("matplotlib.figure")
    except Exception as error:
        return None, str(error) or type(error).__name__
    return matplotlib, ""


def _rendered(figure: Any, as_png: bool) -> bytes:
    options = {"format": "png", "dpi": 120} if as_png else {"format": "svg", "metadata": {"Date": None}}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the plot shows a box for the glyph
        try:
            figure.savefig(buffer, **options)
        except Exception as error:
            raise _UndrawnError(str(error) or type(error).__name__) from error
    return buffer.getvalue()


@save_figure
def draw_curves(history: Sequence[Mapping[str, float]], x: str, title: str) -> Any:
    """Draw loss and accuracy of training and validation over `x`, a key of each entry of `history`."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    kinds = [kind for kind in ("loss", "accuracy") if kind in history[0] or f"val_{kind}" in history[0]]
    figure = Figure(figsize=(5 * len(kinds), 3.6), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for key, label in ((kind, "training"), (f"val_{kind}", "validation")):
            if key in history[0]:
                values = [entry[key] for entry in history]
                axis.plot([entry[x] for entry in history], values, marker="." if len(values) < 30 else "", label=label)
        axis.set(xlabel=x.replace("_", " "), ylabel=kind)
        if x == "C":
            axis.set_xscale("log")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(to_utf8(title), parse_math=False)
    return figure


@save_figure
def draw_confusion(cells: np.ndarray, classes: Sequence[str], title: str) -> Any:
    """Draw a confusion matrix from its cells (m, 3): true class, predicted class, number of images.

    Colours show the share of the true class. For more than 200 classes the cells would be too small to see, so the 30
    most frequent mistakes are drawn instead.
    """
    from matplotlib.figure import Figure

    if len(classes) > MOST_DENSE:
        return _draw_mistakes(cells, classes, title)
    k = len(classes)
    confusion = np.zeros((k, k), np.int64)
    confusion[cells[:, 0], cells[:, 1]] = cells[:, 2]
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    size = 3.4 + 0.32 * min(k, _MOST_NAMES)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    if k <= _MOST_NUMBERS:
        for row, column, count in cells.tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
    if k <= _MOST_NAMES:
        names = [_shortened(name) for name in classes]
        axis.set_xticks(range(k), names, rotation=90, parse_math=False)
        axis.set_yticks(range(k), names, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(to_utf8(title), parse_math=False, fontsize=10)
    return figure


def _draw_mistakes(cells: np.ndarray, classes: Sequence[str], title: str) -> Any:
    from matplotlib.figure import Figure

    wrong = cells[cells[:, 0] != cells[:, 1]]
    largest = wrong[np.argsort(-wrong[:, 2], kind="stable")][:_MOST_MISTAKES]
    figure = Figure(figsize=(9, 1.8 + 0.26 * len(largest)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(largest)), largest[:, 2])
    names = [f"{_shortened(classes[int(true)])}: {_shortened(classes[int(said)])}" for true, said in largest[:, :2]]
    axis.set_yticks(range(len(largest)), names, fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.set(xlabel="images", ylabel="true: predicted")
    told = f"{len(largest):,} of {len(wrong):,} kinds of mistakes, of {len(classes):,} classes"
    axis.set_title(f"{to_utf8(title)}\n{told}, the most frequent", parse_math=False, fontsize=10)
    return figure


@save_figure
def draw_calibration(bins: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Draw a reliability diagram, accuracy over confidence, from the bins "calibration" of `compute_metrics`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfectly calibrated")
    filled = [each for each in bins if each["images"]]
    confidence = [each["confidence"] for each in filled]
    upper.plot(confidence, [each["accuracy"] for each in filled], marker="o", label="this classifier")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.grid(alpha=0.3)
    upper.legend(loc="upper left")
    middles = [(each["from"] + each["to"]) / 2 for each in bins]
    lower.bar(middles, [each["images"] for each in bins], width=0.9 / len(bins))
    lower.set(xlabel="probability of the predicted class", ylabel="images")
    lower.grid(alpha=0.3)
    figure.suptitle(to_utf8(title), parse_math=False, fontsize=10)
    return figure


def _shortened(name: str) -> str:
    return to_utf8(name) if len(name) <= 24 else to_utf8(name[:23]) + "…"


@save_figure
def draw_ranking(
    names: Sequence[str], spans: Sequence[tuple[float, float, float]], alike: Sequence[bool], title: str
) -> Any:
    """Draw a value with its interval (low, value, high) for each name, the first on top; those in `alike` are blue."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.26 * len(names)), layout="constrained")
    axis = figure.subplots()
    for place, ((low, value, high), near) in enumerate(zip(spans, alike, strict=True)):
        colour = "tab:blue" if near else "tab:grey"
        axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
    axis.set_yticks(range(len(names)), [to_utf8(name) for name in names], fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.set(xlabel="validation accuracy, 95% interval; blue: within noise of the best")
    axis.grid(alpha=0.3, axis="x")
    figure.suptitle(to_utf8(title), parse_math=False, fontsize=10)
    return figure


@save_figure
def draw_cost(points: Sequence[CostPoint], title: str) -> Any:
    """Draw accuracies over the images/s of extraction, on a logarithmic scale; the Pareto front is joined by a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(points, key=lambda point: point.images_per_second)
    for place, point in enumerate(ordered):
        low, value, high = point.span
        colour, bars = "tab:blue" if point.on_front else "tab:grey", [[value - low], [high - value]]
        axis.errorbar(point.images_per_second, value, yerr=bars, fmt="o", color=colour, capsize=3)
        to_left = place == len(ordered) - 1 and place > 0  # the last one has no room to its right
        axis.annotate(
            to_utf8(point.name),
            (point.images_per_second, value),
            textcoords="offset points",
            xytext=(-8 if to_left else 8, 3),
            ha="right" if to_left else "left",
            fontsize=8,
            parse_math=False,
        )
    front = [point for point in ordered if point.on_front]
    axis.plot([each.images_per_second for each in front], [each.span[1] for each in front], "--", linewidth=1, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.2, y=0.12)  # room for names
    axis.set(xlabel="images/s of extraction; blue: Pareto front", ylabel="validation accuracy")
    axis.grid(alpha=0.3)
    figure.suptitle(to_utf8(title), parse_math=False, fontsize=10)
    return figure
