"""The methods of `Icebox` that use trained runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pipeline.api import deployment_options as groups
from pipeline.api import requests
from pipeline.api.base import DataDirectory
from pipeline.api.deployment_options import RunName
from pipeline.api.options import Text, complete

if TYPE_CHECKING:
    from pipeline.api.deployment_results import (
        EvaluateResult,
        ExportResult,
        PredictResult,
        ReportResult,
        RunsResult,
        ServeResult,
    )
    from pipeline.api.prediction_stream import PredictionStream
    from pipeline.api.run import Run
    from pipeline.cache.workspace import Workspace
    from pipeline.dataset import Dataset
    from pipeline.runs.request import DatasetChoice
    from pipeline.training.open_run import TrainedRun

logger = logging.getLogger(__name__)


class Deployment(DataDirectory):
    """Measure, predict, export, serve and report.

    A run is given by its name, its path, "latest", "best", or as a `Run`.
    """

    def runs(self) -> RunsResult:
        """List the trained runs, the oldest first, and what was stopped.

        Examples
        --------
        >>> box.runs().to_frame()[["run", "dataset", "accuracy"]]
        """
        from pipeline.api.deployment_results import RunsResult
        from pipeline.runs import store
        from pipeline.runs.request import resume_commands

        with self._open() as workspace:
            found, stopped = store.list_datasets(workspace.runs), store.unfinished(workspace.runs)
            commands = resume_commands(workspace.runs, stopped)
            sweeps = store.unfinished(workspace.sweeps)
        listed = [
            {
                "dataset": each.name,
                "dataset_path": each.path,
                "backbone": store.backbone_of(each.about),
                **each.about["summary"],
                "created": each.created,
            }
            for each in found
        ]
        return RunsResult(listed, stopped, sweeps, commands)

    def run(self, name: RunName = "latest") -> Run:
        """Open a trained run.

        Raises
        ------
        RunError
            If there is no such run, or it cannot be read.

        Examples
        --------
        >>> box.run("best").accuracy
        """
        from pipeline.api.run import Run
        from pipeline.runs.store import find_run

        with self._open() as workspace:
            return Run.open(self, find_run(workspace.runs, self._name(name)))

    def evaluate(self, run: RunName, **options: Unpack[groups.EvaluateOptions]) -> EvaluateResult:
        """Measure a trained run, and keep metrics, predictions and plots.

        A head is measured on cached rows, a full model on images. Images it was trained on are left out.

        Raises
        ------
        UsageError
            If options do not go together, or `out` holds something else.
        DatasetError
            If the run does not know a class, or no image is left to measure.
        MissingRowsError
            If an image that can be decoded has no row.

        Examples
        --------
        >>> box.evaluate("latest", split="val").accuracy
        >>> box.evaluate("latest", dataset="other-photos").per_class
        """
        from pipeline.api.deployment_results import EvaluateResult
        from pipeline.core.spec import PLAIN_VIEW
        from pipeline.deployment.evaluate_run import evaluate_run
        from pipeline.extraction.feature_choice import FeatureChoice
        from pipeline.training.open_run import open_run

        given = complete(groups.EvaluateOptions, options)
        memory = requests.memory_bytes(given["memory"])
        with self._open() as workspace:
            trained = open_run(workspace.runs, self._name(run))
            chosen, own = _evaluated_images(trained, given)
            images = chosen.open(workspace)
            in_space = FeatureChoice(space=trained.spec.directory)
            same = {name: given[name] for name in ("max_pixels", "split", "space", "include_trained")}
            with requests.naming_features(chosen, [in_space], given["max_pixels"], PLAIN_VIEW):
                done = evaluate_run(
                    trained, images, workspace,
                    own=own, memory=memory, out=requests.path_or_none(given["out"]), **same,
                )  # fmt: skip
            return EvaluateResult.of(done, len(images))

    def predict(
        self, run: RunName, paths: Text | Sequence[Text], **options: Unpack[groups.PredictOptions]
    ) -> PredictResult:
        """Classify new images with one or more trained runs.

        Parameters
        ----------
        run
            The run; with `also`, probabilities of all runs are averaged.
        paths
            Images, addresses of images, folders, or .csv and .parquet manifests.

        Raises
        ------
        DatasetError
            If there is no image at a path, or the runs know different classes.
        WeightsError
            If the weights of a backbone that has to compute are not on this machine.

        Examples
        --------
        >>> found = box.predict("latest", ["new-photos", "one.jpg"])
        >>> found.labels, found.probabilities.max(axis=1)
        """
        from pipeline.api.deployment_results import PredictResult

        with self.iter_predictions(run, paths, **options) as stream:
            predictions = [each for each in stream if each.label is not None]
        return PredictResult(**vars(stream.summary()), predictions=predictions)

    def iter_predictions(
        self, run: RunName, paths: Text | Sequence[Text], **options: Unpack[groups.PredictOptions]
    ) -> PredictionStream:
        """Classify new images as `predict` does, and give the predictions one at a time: millions are fine.

        Examples
        --------
        >>> with box.iter_predictions("latest", "s3://bucket/images.csv") as predictions:
        ...     for each in predictions:
        ...         print(each.path, each.label or each.reason)
        """
        from pipeline.api.prediction_stream import PredictionStream

        given = complete(groups.PredictOptions, options)
        runs = [self._name(name) for name in (run, *(given["also"] or ()))]
        return PredictionStream(self._open(), runs, requests.texts(paths), given)

    def export(self, run: RunName, **options: Unpack[groups.ExportOptions]) -> ExportResult:
        """Write a run as one deployable model: pixels in, probabilities out.

        The model is loaded again in its own runtime and compared with the run on some images.

        Raises
        ------
        UsageError
            If the format's package is missing, or `out` holds something else.
        RunError
            If the exported model predicts something else, or cannot be converted or written.

        Examples
        --------
        >>> box.export("latest", format="onnx").path
        """
        from pipeline.api.deployment_results import ExportResult
        from pipeline.deployment.export import export_run
        from pipeline.training.open_run import open_run

        given = complete(groups.ExportOptions, options)
        with self._open() as workspace:
            trained = open_run(workspace.runs, self._name(run))
            done = export_run(
                trained,
                given["format"],
                _compared_images(trained, workspace, given),
                workspace,
                max_pixels=given["max_pixels"],
                out=requests.path_or_none(given["out"]),
                weights=given["weights"] and str(given["weights"]),
            )
            return ExportResult.of(done)

    def serve(
        self,
        run: RunName,
        *,
        on_ready: Callable[[ServeResult], None] = lambda served: None,
        **options: Unpack[groups.ServeOptions],
    ) -> None:
        """Serve a run over HTTP, an upload page and a JSON endpoint, until that is interrupted.

        With `also`, probabilities of all runs are averaged. `on_ready` is called once, when images can be uploaded.

        Raises
        ------
        UsageError
            If packages are missing, or an option cannot be meant.
        IceboxError
            If the port is taken or the address is not of this machine.

        Examples
        --------
        >>> box.serve("latest", port=0, on_ready=lambda served: print(served.url))
        """
        from pipeline.api.deployment_results import ServeResult
        from pipeline.deployment.serve import serve
        from pipeline.training.open_run import open_run

        given = complete(groups.ServeOptions, options)
        most = _most_bytes(given)
        same = {name: given[name] for name in ("host", "port", "top", "max_pixels")}
        weights = given["weights"] and str(given["weights"])
        with self._open() as workspace:
            runs = [open_run(workspace.runs, self._name(name)) for name in (run, *(given["also"] or ()))]

            def ready(url: str) -> None:
                on_ready(ServeResult(url, [each.name for each in runs], runs[0].classes))
                logger.info("answering at %s (Ctrl-C ends it)", url)

            allowed = given["allow_host"] or ()
            serve(runs, workspace, allowed=allowed, max_bytes=most, weights=weights, on_ready=ready, **same)

    def report(
        self, names: RunName | Sequence[RunName] | None = None, **options: Unpack[groups.ReportOptions]
    ) -> ReportResult:
        """Write a page about a run, several runs, or a sweep: one HTML file that opens offline.

        Parameters
        ----------
        names
            The run, with `sweep` the sweep; by default the latest. With `compare` several runs, by default all on
            the dataset of the latest.

        Raises
        ------
        UsageError
            If options do not go together.
        RunError
            If a run cannot be read, or the page cannot be written.

        Examples
        --------
        >>> box.report("latest").page
        >>> box.report(compare=True).best
        """
        from pipeline.api.deployment_results import ReportResult

        start, given = time.perf_counter(), complete(groups.ReportOptions, options)
        several = [names] if isinstance(names, str | os.PathLike) else names or []
        chosen = [self._name(name) for name in several]
        _require_one_page(chosen, options)
        with self._open() as workspace:
            if given["compare"]:
                told = _compare(chosen, workspace, given)
            else:
                write = _report_sweep if given["sweep"] else _report_run
                told = write(chosen[0] if chosen else "latest", workspace, given)
        seconds = round(time.perf_counter() - start, 3)
        return ReportResult(**{**told, "page": Path(told["page"]), "seconds": seconds})

    def _name(self, run: RunName) -> str:
        """Return what a run is found by: its name, if it is a path in this data directory."""
        if isinstance(run, str):
            return run
        path = Path(run)
        return path.name if path.parent == self.data_dir / "runs" else str(path)


def _evaluated_images(run: TrainedRun, given: Mapping[str, Any]) -> tuple[DatasetChoice, bool]:
    """Return which images were named, and whether they are the run's own."""
    from pipeline.core.errors import UsageError

    if given["dataset"] is None:
        if alone := [name for name in ("archive", "image_root", "limit") if given[name] is not None]:
            raise UsageError(f"--{alone[0].replace('_', '-')} goes with --dataset only")
        if run.request is None:
            raise UsageError(f"the run {run.name} does not say what it was trained on; name the images by --dataset")
        return run.request.images, True
    chosen = requests.dataset_choice(given["dataset"], given).anchored()
    return chosen, run.request is not None and chosen == run.request.images


def _compared_images(run: TrainedRun, workspace: Workspace, given: Mapping[str, Any]) -> Dataset:
    """Open the images that an export is compared on. Raises RunError if the run's own cannot be had."""
    from pipeline.core.errors import IceboxError, RunError, UsageError
    from pipeline.dataset import open_images

    if given["images"]:
        return open_images(requests.texts(given["images"]), requests.path_or_none(given["image_root"]))
    if given["image_root"] is not None:
        raise UsageError("--image-root goes with a manifest given by --images")
    if run.request is None:
        raise RunError(f"the run {run.name} does not say what it was trained on; name some images by --images")
    try:
        return run.request.images.open(workspace)
    except IceboxError as error:
        raise RunError(f"the images of {run.name} are not to be had ({error}); name some by --images") from error


def _most_bytes(given: Mapping[str, Any]) -> int:
    """Return the size of the largest upload. Raises UsageError."""
    from pipeline.core.errors import UsageError

    if (most := requests.size_in_bytes("--max-bytes", given["max_bytes"])) < 1:
        raise UsageError(f"--max-bytes must be at least 1, found {given['max_bytes']!r}")
    return most


_OF_IMAGES = {"max_pixels": "--max-pixels", "map": "--map"}


def _require_one_page(names: Sequence[str], options: groups.ReportOptions) -> None:
    """Raise UsageError if the options of `report`, without defaults, do not mean one page."""
    from pipeline.core.errors import UsageError

    compare, sweep = options.get("compare"), options.get("sweep")
    if compare and sweep:
        raise UsageError("--compare is of runs, --sweep of a sweep; leave one of them out")
    if len(names) > 1 and not compare:
        raise UsageError("several runs make one page with --compare only")
    others = [text for name, text in _OF_IMAGES.items() if options.get(name) is not None]
    if (compare or sweep) and others:
        raise UsageError(f"{others[0]} is of one run's images; it goes with neither --compare nor --sweep")


def _page(workspace: Workspace, name: str, given: Mapping[str, Any]) -> Path:
    return requests.path_or_none(given["out"]) or workspace.root / "reports" / f"{name}.html"


def _compare(names: Sequence[str], workspace: Workspace, given: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline.report.comparison import report_comparison

    return report_comparison(names, workspace, _page(workspace, "compare", given))


def _report_sweep(name: str, workspace: Workspace, given: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline.report.comparison import find_sweep, report_sweep

    folder = find_sweep(name, workspace.sweeps)
    return report_sweep(folder, _page(workspace, folder.name, given))


def _report_run(name: str, workspace: Workspace, given: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline.report.run_report import require_target, write_report
    from pipeline.training.open_run import open_run

    run = open_run(workspace.runs, name)
    page = _page(workspace, run.name, given)
    require_target(page)
    return write_report(run, workspace, page, workspace.program, max_pixels=given["max_pixels"], method=given["map"])
