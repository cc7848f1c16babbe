"""Write the HTML report that compares several runs, or the settings of a sweep, by accuracy and cost.

`report_comparison` writes the page of runs, `report_sweep` the page of a sweep.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import RunError, did_you_mean
from pipeline.core.units import counted, size_text
from pipeline.report import page
from pipeline.report.run_report import publish, require_target, trained_on
from pipeline.runs import store
from pipeline.runs.run_dataset import RunDataset, distinct, distinct_names
from pipeline.training.sweep import sweep
from pipeline.training.sweep.leaderboard import (
    best_of_each,
    cost_points,
    fastest_sentence,
    has_several_backbones,
    pareto_front,
    unmeasured_sentence,
    varied,
)

_MOST_DRAWN = 60  # points in a plot
_NO_BACKBONES: dict[str, Any] = {"cost": "", "backbone_columns": [], "backbone_rows": []}  # no comparison of backbones
_NO_IMAGES = {"classes": [], "images": None, "confusion": None}  # for the page's script


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard."""

    name: str
    number: bool = False
    decimals: int = 3


_OF_RUNS = (
    Column("run"), Column("means"), Column("backbone"), Column("weights"), Column("accuracy", True),
    Column("95% interval"), Column("val accuracy", True), Column("minutes", True), Column("parameters", True),
    Column("test images", True),
)  # fmt: skip
_BACKBONE = Column("backbone")
_OF_SWEEP = (
    Column("rank", True), Column("head"), Column("settings"), Column("val accuracy", True), Column("95% interval"),
    Column("within noise"), Column("minutes", True), Column("parameters", True), Column("error"),
)  # fmt: skip
_OF_BACKBONES = (
    _BACKBONE, Column("best head"), Column("val accuracy", True), Column("95% interval"), Column("p"),
    Column("within noise"), Column("images/s", True, 1), Column("a row"), Column("Pareto front"),
    Column("weights"),
)  # fmt: skip


def report_comparison(names: Sequence[str], workspace: Workspace, out: Path) -> dict[str, Any]:
    """Write a page that compares the named runs on their test splits; return a summary of it.

    Without `names`, all runs on the dataset of the latest run are compared.

    Raises
    ------
    RunError
        If there are no runs, a run cannot be read, or the page cannot be written.
    """
    chosen = _chosen(names, workspace)
    try:
        chosen.sort(key=lambda each: -each.about["summary"]["accuracy"])
        text = _page_of_runs(chosen)
        best = chosen[0].about["summary"]["run"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"a run does not say what it should ({error!r}); `runs ls` lists them") from error
    require_target(out)
    publish(out, text)
    return {"page": str(out), "bytes": out.stat().st_size, "runs": len(chosen), "best": best}


def _chosen(names: Sequence[str], workspace: Workspace) -> list[RunDataset]:
    if names:
        folders = dict.fromkeys(store.find_run(workspace.runs, name).resolve() for name in names)
        return [RunDataset(folder, store.read_run(folder)) for folder in folders]
    folder = store.find_run(workspace.runs, "latest")
    latest = RunDataset(folder, store.read_run(folder))
    return [each for each in store.list_datasets(workspace.runs) if each.is_same(latest)]


def notes_of(chosen: Sequence[RunDataset]) -> list[str]:
    """Return notes on what the accuracies were measured on: other datasets, changed images, images trained on."""
    notes, datasets = list[str](), distinct(chosen)
    if len(datasets) > 1:
        paths = distinct_names(sorted({each.path or each.name for each in datasets}))
        notes.append(f"These runs are of several datasets: {', '.join(paths)}.")
    elif len({each.about["dataset"].get("content") for each in chosen}) > 1:
        notes.append("The dataset changed between these runs: they were tested on different images.")
    return [*notes, *(f"{each.about['summary']['run']}: {note}" for each in chosen for note in trained_on(each.about))]


def _page_of_runs(chosen: Sequence[RunDataset]) -> str:
    about = [each.about for each in chosen]
    names = sorted({each.name for each in chosen})
    note = (
        "Accuracies are of the test split, with 95% intervals; minutes are those of the run, without cached features."
    )
    untrained, notes = _untrained((store.backbone_of(each), each["features"].get("weights")) for each in about)
    drawn = [each["summary"] for each in about[:_MOST_DRAWN]]
    return page.render(
        "comparison.html",
        _NO_IMAGES,
        title=counted(len(about), "run compared", "runs compared"),
        subtitle=", ".join(names),
        untrained=untrained,
        notes=[*notes, *notes_of(chosen), note],
        caption="Accuracy on the test split.",
        scatter=page.scatter(
            _labels(about[:_MOST_DRAWN]),
            [summary["seconds"] / 60 for summary in drawn],
            [_span(summary["accuracy_interval"], summary["accuracy"]) for summary in drawn],
            "accuracy",
        ),
        columns=list(_OF_RUNS),
        rows=[_run_row(each) for each in about],
        **_NO_BACKBONES,
    )


def _untrained(weights: Iterable[tuple[str, Any]]) -> tuple[bool, list[str]]:
    """Return whether all pairs (backbone, weights) are untrained, and a note that names them if only some are."""
    is_untrained = {(backbone, str(identity).startswith("untrained")) for backbone, identity in weights}
    names = sorted(backbone for backbone, untrained in is_untrained if untrained)
    if all(untrained for _, untrained in is_untrained):
        return True, []
    note = f"Untrained weights: {', '.join(names)}. Such accuracies say nothing of what a backbone can do."
    return False, [note] if names else []


def _labels(about: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each run in the plot: its head and stage, and its backbone if there are several."""
    means, backbones = [_means(each["summary"]) for each in about], list(map(store.backbone_of, about))
    return means if len(set(backbones)) < 2 else [" ".join(both) for both in zip(means, backbones, strict=True)]


def _means(summary: Mapping[str, Any]) -> str:
    stage = summary.get("stage", "head")
    return str(summary["head"]) if stage == "head" else f"{summary['head']}, {stage}"


def _span(interval: Sequence[float | None], value: float) -> tuple[float, float, float]:
    low, high = (value if bound is None else bound for bound in interval)
    return min(low, value), value, max(high, value)


def _run_row(about: Mapping[str, Any]) -> list[Any]:
    summary = about["summary"]
    return [
        summary["run"], _means(summary), store.backbone_of(about), str(summary["weights"]), float(summary["accuracy"]),
        _interval(*summary["accuracy_interval"]), float(summary["val_accuracy"]), float(summary["seconds"]) / 60,
        summary.get("parameters"), summary.get("test_rows"),
    ]  # fmt: skip


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def report_sweep(folder: Path, out: Path) -> dict[str, Any]:
    """Write a page about the sweep in a folder, with all its settings ranked; return a summary. Raises RunError."""
    try:
        about = json.loads(files.read_small(folder / "sweep.json", files.MOST_JSON_BYTES))
        if (about["format"], about["version"]) != (sweep.FORMAT, sweep.VERSION):
            raise ValueError("another format")
        text = _page_of_sweep(about)
        told = {"sweep": str(about["sweep"]), "runs": len(about["runs"]), "best": str(about["best"]["run"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{folder / 'sweep.json'} cannot be read ({error!r}); sweep anew") from error
    require_target(out)
    publish(out, text)
    return {"page": str(out), "bytes": out.stat().st_size, **told}


def _page_of_sweep(about: Mapping[str, Any]) -> str:
    rows, several = about["runs"], has_several_backbones(about["runs"])
    names = varied(rows)
    tried = [row for row in rows if row["error"] is None][:_MOST_DRAWN]
    trials = [_trial_row(row, names[row["trial"]]) for row in rows]
    spaces = about["backbones"] if several else [{"backbone": "", "features": about["features"]}]
    untrained, notes = _untrained((each["backbone"], each["features"]["weights"]) for each in spaces)
    return page.render(
        "comparison.html",
        _NO_IMAGES,
        title=counted(len(rows), "setting tried", "settings tried"),
        subtitle=f"{about['sweep']}, {about['dataset']['name']}",
        untrained=untrained,
        notes=[*notes, *_notes_of_sweep(about, several)],
        caption="Accuracy on the validation split.",
        scatter=""  # for several backbones, the plot of extraction cost replaces this one
        if several
        else page.scatter(
            [f"{row['rank']}" for row in tried],
            [row["seconds"] / 60 for row in tried],
            [_span((row["low"], row["high"]), row["val_accuracy"]) for row in tried],
            "validation accuracy",
        ),
        columns=[_OF_SWEEP[0], _BACKBONE, *_OF_SWEEP[1:]] if several else list(_OF_SWEEP),
        rows=[[row[0], each["backbone"], *row[1:]] if several else row for row, each in zip(trials, rows, strict=True)],
        **(_backbones(about, names) if several else _NO_BACKBONES),
    )


def _notes_of_sweep(about: Mapping[str, Any], several: bool) -> list[str]:
    what = "Heads on the features of several backbones" if several else "Settings"
    notes = [
        f"{what} are ranked by the validation split. Those within noise of the best may be no worse than it.",
        f"The best, measured on the test split: {about['best']['accuracy']:.3f} ({about['best']['run']}).",
    ]
    if not several:
        return notes
    sentences = fastest_sentence(about["runs"]), unmeasured_sentence(about["runs"])
    return [*notes, *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences if sentence)]


def _backbones(about: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the plot and the table of each backbone: the accuracy of its best head and the cost of its features."""
    best = best_of_each(about["runs"])
    weights = {each["space"]: str(each["weights"]) for each in about["backbones"]}
    points = cost_points(about["runs"])
    return {
        "cost": page.cost(points) if points else "",
        "backbone_columns": list(_OF_BACKBONES),
        "backbone_rows": [
            _backbone_row(row, names[row["trial"]], on_front, weights[row["space"]])
            for row, on_front in zip(best, pareto_front(best), strict=True)
        ],
    }


def _backbone_row(row: Mapping[str, Any], settings: str, on_front: bool, weights: str) -> list[Any]:
    rate, size = row["images_per_second"], row["bytes_per_row"]
    return [
        row["backbone"], f"{row['head']} {settings}".strip(), row["val_accuracy"], _interval(row["low"], row["high"]),
        "best" if row["rank"] == 1 else f"{row['p_value']:.2g}", "yes" if row["within_noise"] else "no",
        rate, "" if size is None else size_text(size),
        "" if rate is None else "yes" if on_front else "no", weights,
    ]  # fmt: skip


def _trial_row(row: Mapping[str, Any], settings: str) -> list[Any]:
    noise = "" if row["error"] else ("yes" if row["within_noise"] else "no")
    return [
        row["rank"], row["head"], settings, row["val_accuracy"], _interval(row.get("low"), row.get("high")), noise,
        row["seconds"] / 60 if row["seconds"] is not None else None, row.get("parameters"), row["error"] or "",
    ]  # fmt: skip


def find_sweep(name: str, root: Path) -> Path:
    """Return the folder of a sweep: a name, a path, or "latest". Raises RunError."""
    names = store.published_names(root, "sweep.json")
    if name == "latest":
        if not names:
            raise RunError(f"there are no sweeps in {root}; `sweep` makes them")
        return root / names[-1]
    for folder in (root / name, Path(name).resolve()):
        if name and (folder / "sweep.json").exists():
            return folder
    raise RunError(f"no sweep named {name!r} in {root}{did_you_mean(name, ('latest', *names))}")
