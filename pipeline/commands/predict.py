"""`predict`: what runs say of new images, as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.shared import (
    CONNECTIONS,
    MAX_PIXELS,
    AlsoOption,
    ConnectionsOption,
    ImageRootOption,
    JsonOption,
    MaxBadOption,
    MaxPixelsOption,
    QuietOption,
    RunArgument,
    RunWeightsOption,
    causes,
    exit_for_bad,
    finish,
    open_runs,
    opened,
)

if TYPE_CHECKING:
    from pipeline.deployment.predict import ImagePrediction
    from pipeline.extraction.planning import Quarantined

    Named = tuple[
        ImagePrediction, list[tuple[str, float]]
    ]  # an answer, and the likeliest classes with their probabilities

_SHOWN = ("runs", "images", "from_cache", "quarantined", "seconds", "labels")
_AT_ONCE = 256  # lines of the table
_IN_MEMORY = 2**24  # bytes of JSON; more wait on disk
_MOST_LABELS = 10  # counted for people


def predict(
    context: typer.Context,
    run: RunArgument,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATHS…", help="Images, addresses of such, folders, or .csv and .parquet manifests."),
    ],
    also: AlsoOption = None,
    top: Annotated[int, typer.Option(help="How many classes to name, the likeliest first.", min=1)] = 3,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV to stdout, a line each image.")] = False,
    image_root: ImageRootOption = None,
    weights: RunWeightsOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bad: MaxBadOption = 0.0,
    connections: ConnectionsOption = CONNECTIONS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say of new images what they show, by a trained run or several."""
    from pipeline.core.errors import UsageError
    from pipeline.dataset import open_images, remote
    from pipeline.deployment.predict import predict as answers_of
    from pipeline.deployment.predict import top_classes

    if as_csv and as_json:
        raise UsageError("--csv and --json both want stdout; leave one of them out")
    remote.limit_connections(connections)
    start, tally = time.perf_counter(), _Tally()
    with opened(context) as workspace, tempfile.SpooledTemporaryFile(_IN_MEMORY, "w+", encoding="ascii") as spool:
        trained = open_runs(workspace, run, also)
        classes = trained[0].classes
        images = open_images(paths, image_root)
        with workspace.progress("predicting", len(images)) as advance:
            said = answers_of(trained, images, workspace, max_pixels=max_pixels, weights=weights, advance=advance)
            answers = tally.counting(said)
            named = ((answer, top_classes(answer.probabilities, classes, top)) for answer in answers)
            if as_json:
                _write_json(named, spool)
            elif as_csv:
                _write_csv(named, min(top, len(classes)))
            else:
                _write_table(named)
        result = {
            "runs": [each.name for each in trained],
            "classes": classes,
            "images": len(images),
            "from_cache": tally.from_cache,
            "quarantined": len(tally.bad),
            "quarantined_images": [asdict(bad) for bad in tally.bad],
            "causes": causes(tally.bad),
            "seconds": round(time.perf_counter() - start, 3),
        }
        if as_json:
            _print_json(spool, result)
        else:
            counts = ", ".join(f"{classes[i]} {n:,}" for i, n in tally.labels.most_common(_MOST_LABELS))
            finish({**result, "runs": ", ".join(result["runs"]), "labels": counts}, False, _SHOWN)
    exit_for_bad(tally.bad, len(images), max_bad)


class _Tally:
    """Counts answers on their way."""

    def __init__(self) -> None:
        self.bad: list[Quarantined] = []
        self.from_cache = 0
        self.labels = Counter[int]()

    def counting(self, answers: Iterable[ImagePrediction]) -> Iterator[ImagePrediction]:
        from pipeline.extraction.planning import Quarantined

        for answer in answers:
            if answer.probabilities is None:
                self.bad.append(Quarantined(answer.name, answer.reason))
            else:
                self.labels[int(answer.probabilities.argmax())] += 1
            self.from_cache += answer.cached
            yield answer


def _write_table(answers: Iterable[Named]) -> None:
    """Print a line each image; those that cannot be decoded are listed at the end."""
    from pipeline.commands import terminal

    good = ((answer.name, top) for answer, top in answers if top)
    width = 0
    while lines := list(itertools.islice(good, _AT_ONCE)):
        width = max(width, *(terminal.width(name) for name, _ in lines))
        for name, ((label, share), *others) in lines:
            rest = ", ".join(f"{other} {p:.3f}" for other, p in others)
            terminal.say(f"{terminal.padded(name, width)}  {share:.3f}  {label}{f'   ({rest})' * bool(rest)}")


def _write_csv(answers: Iterable[Named], top: int) -> None:
    """Print a line each image to stdout; of one that cannot be decoded `error` says why."""
    further = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "probability")]
    # Names of files as they are, be they UTF-8 or not.
    stdout = io.TextIOWrapper(sys.stdout.buffer, "utf-8", "surrogateescape", newline="", write_through=True)
    try:
        writer = csv.writer(stdout, lineterminator="\n")
        writer.writerow(["path", "label", "probability", *further, "error"])
        for answer, found in answers:
            cells = [cell for label, share in found for cell in (label, f"{share:.6g}")] or [""] * 2 * top
            writer.writerow([answer.name, *cells, answer.reason])
    finally:
        stdout.detach()


def _write_json(answers: Iterable[Named], out: IO[str]) -> None:
    """Write the object's beginning, an entry each image: it cannot be printed before all is known to go well."""
    out.write('{"predictions": [')
    for number, (answer, found) in enumerate((answer, found) for answer, found in answers if found):
        listed = [{"label": label, "probability": share} for label, share in found]
        entry = {"path": answer.name, **listed[0], "top": listed, "from_cache": answer.cached}
        out.write(", " * bool(number) + json.dumps(entry))
    out.write("], ")


def _print_json(beginning: IO[str], rest: Mapping[str, Any]) -> None:
    beginning.seek(0)
    shutil.copyfileobj(beginning, sys.stdout)
    sys.stdout.write(json.dumps(rest)[1:] + "\n")
    sys.stdout.flush()
