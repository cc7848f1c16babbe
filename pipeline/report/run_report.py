"""Write the HTML report of one run: results, mistakes, dataset issues, and commands that reproduce the run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cache.workspace import Workspace
from pipeline.core import files
from pipeline.core.errors import RunError
from pipeline.report import loaded, page
from pipeline.report.selection import MOST_LISTED, ImageSelection, crossing, named, script_data, select_images
from pipeline.runs.store import read_run
from pipeline.training.open_run import TrainedRun

_METHODS = {"tsne": "t-SNE", "pca": "principal components"}


def write_report(
    run: TrainedRun, workspace: Workspace, out: Path, program: Sequence[str], *, max_pixels: int, method: str | None
) -> dict[str, Any]:
    """Write the report of a run to `out`; return a summary of it for the command's output.

    The command lines on the page begin with `program`. Results stored in the run's folder are always shown. Thumbnails
    need the run's images. The map, doubtful labels and near-duplicates need the backbone's features in the cache. The
    page names the parts that are missing.

    Raises
    ------
    RunError
        If the run's own files cannot be read, or `out` cannot be written.
    """
    told, notes = loaded.load_run(run, program), trained_on(read_run(run.path))
    shown = select_images(run, told.said, workspace, max_pixels, method, notes)
    data = {"classes": page.printable(run.classes), "confusion": told.confusion, "images": None}
    sheets = shown.tiles.sheets if shown else []
    looked = _looked(shown)
    publish(
        out,
        page.render(
            "run.html",
            {**data, **(script_data(shown) if shown else {})},
            sheets,
            notes=notes,
            **looked,
            **told.values,
        ),
    )
    return {
        "run": run.name,
        "page": str(out),
        "bytes": out.stat().st_size,
        "images": looked["looked_at"],
        "images_shown": len(shown.selected) if shown else 0,
        "likely_wrong_labels": looked["suspects"],
        "near_copies": looked["near"],
        "near_copies_across_splits": looked["crossing"],
        "map": shown.method if shown else None,
        **(named(shown, shown.found) if shown and shown.found else {}),
        "left_out": notes,
    }


def trained_on(about: Mapping[str, Any]) -> list[str]:
    """Return notes on a run's test images that the run was trained on; `about` is its run.json."""
    summary = about["summary"]
    left_out, measured, crossing = (
        value if isinstance(value := summary.get(name), int) else 0
        for name in ("test_rows_left_out", "test_rows_trained_on", "copies_across_splits")
    )
    if "test_rows_left_out" not in summary and (crossing or summary.get("init") is not None):
        initial = " or were in its initial model's training" * (summary.get("init") is not None)
        return [
            f"It was made before test images that were trained on were left out: {crossing:,} images have a copy in "
            f"another split{initial}; `evaluate` leaves out what was trained on."
        ]
    if measured:
        return [f"{measured:,} of these {summary['test_rows']} test images were trained on: there are no others."]
    return [f"{left_out:,} test images were trained on and are left out of the accuracy."] if left_out else []


def _looked(shown: ImageSelection | None) -> dict[str, Any]:
    """Return the template's values about the images: their number, and counts of issues (None without features)."""
    found = shown.found if shown else None
    if shown is None or found is None:
        none = dict.fromkeys(("method", "suspects", "near", "crossing", "told_apart"))
        return {"looked_at": len(shown.positions) if shown else 0, "listed": MOST_LISTED, **none}
    return {
        "looked_at": len(shown.positions),
        "listed": MOST_LISTED,
        "method": _METHODS[shown.method or ""],
        "suspects": len(found.likely_wrong),
        "near": len(found.near),
        "crossing": int(crossing(shown).sum()),
        "told_apart": found.accuracy,
    }


def require_target(out: Path) -> None:
    """Raise RunError if no page can be written to `out`; call it before rendering, which may take a minute."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {out}: {error.strerror or error}; name a file elsewhere by --out"
        ) from error
    if out.is_dir():
        raise RunError(f"the report cannot be written to {out}: that is a folder; name a file in it")
    if out.exists() and not out.is_file():  # publishing would replace a device or a pipe
        raise RunError(f"the report cannot be written to {out}: that is no regular file")
    if not os.access(out.parent, os.W_OK):
        raise RunError(f"the report cannot be written to {out}: its folder is read-only; name another by --out")


def publish(out: Path, text: str) -> None:
    """Write a page, either completely or not at all; a symbolic link is followed. Raises RunError."""
    try:
        files.write_whole(out.resolve(), text.encode("utf-8"))
    except OSError as error:
        raise RunError(f"the report cannot be written to {out}: {error.strerror or error}") from error
