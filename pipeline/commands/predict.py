"""`predict`: the classes of new images, by one or more trained runs, as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import IO, TYPE_CHECKING, Annotated, Any, Unpack

import typer

from pipeline.api.deployment_options import PredictOptions
from pipeline.commands.parsing import takes
from pipeline.commands.shared import JsonOption, MaxBadOption, QuietOption, RunArgument, exit_for_bad, icebox, show

if TYPE_CHECKING:
    from pipeline.api.deployment_results import Prediction
    from pipeline.api.prediction_stream import PredictionStream

_AT_ONCE = 256  # lines of the table
_IN_MEMORY = 2**24  # bytes of JSON; more wait on disk


@takes(PredictOptions)
def predict(
    context: typer.Context,
    run: RunArgument,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATHS…", help="Images, addresses of images, folders, or .csv and .parquet manifests."),
    ],
    *,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV to stdout, a line each image.")] = False,
    max_bad: MaxBadOption = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Unpack[PredictOptions],
) -> None:
    """Classify new images with one or more trained runs."""
    from pipeline.core.errors import UsageError

    if as_csv and as_json:
        raise UsageError("--csv and --json both want stdout; leave one of them out")
    with (
        icebox(context, quiet=quiet) as box,
        box.iter_predictions(run, paths, **options) as predictions,
        tempfile.SpooledTemporaryFile(_IN_MEMORY, "w+", encoding="ascii") as spool,
    ):
        if as_json:
            _write_json(predictions, spool)
        elif as_csv:
            _write_csv(predictions, options.get("top", 1))
        else:
            _write_table(predictions)
        done = predictions.summary()
        if as_json:
            _print_json(spool, done.to_dict())
        else:
            show(done, False)
    exit_for_bad(done.quarantined_images, done.images, max_bad)


def _write_table(predictions: Iterable[Prediction]) -> None:
    """Print a line each image; those that cannot be decoded are listed at the end."""
    from pipeline.core import console

    good = ((each.path, each.top) for each in predictions if each.top)
    width = 0
    while lines := list(itertools.islice(good, _AT_ONCE)):
        width = max(width, *(console.width(name) for name, _ in lines))
        for name, ((label, share), *others) in lines:
            rest = ", ".join(f"{other} {p:.3f}" for other, p in others)
            console.say(f"{console.padded(name, width)}  {share:.3f}  {label}{f'   ({rest})' * bool(rest)}")


def _write_csv(predictions: PredictionStream, top: int) -> None:
    """Print a line each image to stdout; of one that cannot be decoded `error` says why."""
    top = min(top, len(predictions.classes))
    further = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "probability")]
    # Names of files as they are, be they UTF-8 or not.
    stdout = io.TextIOWrapper(sys.stdout.buffer, "utf-8", "surrogateescape", newline="", write_through=True)
    try:
        writer = csv.writer(stdout, lineterminator="\n")
        writer.writerow(["path", "label", "probability", *further, "error"])
        for each in predictions:
            cells = [cell for label, share in each.top for cell in (label, f"{share:.6g}")] or [""] * 2 * top
            writer.writerow([each.path, *cells, each.reason])
    finally:
        stdout.detach()


def _write_json(predictions: Iterable[Prediction], out: IO[str]) -> None:
    """Write the object's beginning, an entry each image: it cannot be printed before all is known to go well."""
    out.write('{"predictions": [')
    for number, each in enumerate(each for each in predictions if each.top):
        out.write(", " * bool(number) + json.dumps(each.to_dict()))
    out.write("], ")


def _print_json(beginning: IO[str], rest: Mapping[str, Any]) -> None:
    beginning.seek(0)
    shutil.copyfileobj(beginning, sys.stdout)
    sys.stdout.write(json.dumps(rest)[1:] + "\n")
    sys.stdout.flush()
