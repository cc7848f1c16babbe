"""The methods of `Icebox` that compute features and train on them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from pipeline.api import options as groups
from pipeline.api import requests, training_options
from pipeline.api.deployment import Deployment
from pipeline.api.options import Text, complete

if TYPE_CHECKING:
    from pipeline.api.results import FeaturesResult, SweepResult
    from pipeline.api.run import Run


class Training(Deployment):
    """Stage one, stage two, and the full model."""

    def features(self, dataset: Text = "digits", **options: Unpack[training_options.FeaturesOptions]) -> FeaturesResult:
        """Compute the features of a dataset that are missing, and keep them.

        Raises
        ------
        IceboxError
            If the weights, the layer or the space cannot be had, or the cache cannot be written.
        DecodeError
            With `on_error="fail"`, at the first image that cannot be read or decoded.
        """
        from pipeline.api.results import FeaturesResult
        from pipeline.core import machine
        from pipeline.dataset import remote
        from pipeline.extraction.compute import ComputeOptions
        from pipeline.extraction.extract import extract

        start, given = time.perf_counter(), complete(training_options.FeaturesOptions, options)
        views, cluster = requests.views_choice(given), requests.cluster_choice(given)
        remote.limit_connections(given["connections"])
        compute = ComputeOptions(
            given["shard_rows"],
            given["batch_size"],
            given["max_pixels"],
            given["on_error"] == "fail",
            machine.usable_cores(),
        )
        with self._open() as workspace:
            images = requests.dataset_choice(dataset, given).open(workspace)
            done = extract(
                images, workspace, requests.feature_choice(given), compute,
                views=views, retry_failed=given["retry_failed"], cluster=cluster,
            )  # fmt: skip
            return FeaturesResult.of(done, views.count, round(time.perf_counter() - start, 3))

    def train_head(
        self, dataset: Text = "digits", head: str = "gap", **options: Unpack[training_options.TrainHeadOptions]
    ) -> Run:
        """Train a head on cached rows, measure it, and publish it as a run. Computes no feature.

        Parameters
        ----------
        dataset
            Which images, as for `features`.
        head
            "flatten", "gap" or "logreg".

        Raises
        ------
        MissingRowsError
            If an image that can be decoded has no row: `features` with the same options computes it.
        UsageError
            If the head does not have a setting, or a value is out of range.

        Examples
        --------
        >>> Icebox("data").train_head("photos", "logreg", C="0.01,0.1").accuracy
        """
        from pipeline.api.run import Run
        from pipeline.runs.request import TrainRequest, stopped_run
        from pipeline.training.train_head import train_head

        given, resume = complete(training_options.TrainHeadOptions, options), options.get("resume")
        if resume is not None:
            requests.refuse_beside_resume(options)
        with self._open() as workspace:
            if resume is None:
                images, choice = requests.dataset_choice(dataset, given), requests.feature_choice(given)
                request = requests.train_request(images, choice, head, given)
            else:
                resume, stored = stopped_run(workspace, resume, "train-head")
                request = TrainRequest.of_request(stored)
                images, choice = request.images, request.features
            opened = images.open(workspace)
            with requests.naming_features(images, [choice], request.max_pixels, request.views):
                done = train_head(opened, workspace, request, resume=resume)
        return Run(self, done.path, done.summary, done.quarantined, images=len(opened))

    def freeze(self, dataset: Text = "digits", **options: Unpack[training_options.FreezeOptions]) -> Run:
        """Train a `gap` head on the whole, frozen backbone, from images; publish the full model as a run.

        Raises
        ------
        UsageError
            If a value is out of range.
        DatasetError
            If a split has no image, or there is only one class to learn.

        Examples
        --------
        >>> Icebox("data").freeze("photos", augment="default", epochs=5).accuracy
        """
        return self._full("freeze", dataset, training_options.FreezeOptions, options)

    def finetune(self, dataset: Text = "digits", **options: Unpack[training_options.FinetuneOptions]) -> Run:
        """Train the backbone's last layers and the head, from images or cached rows; publish the model as a run.

        Raises
        ------
        UsageError
            If options do not go together, or a value is out of range.
        SpecError
            If the run to begin with does not fit.

        Examples
        --------
        >>> box = Icebox("data")
        >>> box.finetune("photos", init="latest", from_cache=True).accuracy
        """
        return self._full("finetune", dataset, training_options.FinetuneOptions, options)

    def _full(self, stage: str, dataset: Text, group: type, options: Mapping[str, Any]) -> Run:
        from pipeline.api.run import Run
        from pipeline.runs.request import FinetuneRequest, stopped_run, with_network
        from pipeline.training.finetune import finetune

        given, resume = complete(group, options), options.get("resume")
        if resume is None:
            requests.refuse_what_does_not_go_together(given)
        else:
            requests.refuse_beside_resume(options, "backbone")
        with self._open() as workspace:
            if resume is None:
                images = requests.dataset_choice(dataset, given)
                request = requests.finetune_request(stage, images, given, workspace.runs)
            else:
                resume, stored = stopped_run(workspace, resume, stage)
                file = given["backbone"] and str(given["backbone"])
                request = with_network(FinetuneRequest.from_dict(stored.get("asked", {})), stored, file, workspace)
            opened = request.images.open(workspace)
            done = finetune(opened, workspace, request, resume=resume)
        return Run(self, done.path, done.summary, done.quarantined, images=len(opened))

    def sweep(self, dataset: Text = "digits", **options: Unpack[training_options.SweepOptions]) -> SweepResult:
        """Try heads and settings on cached rows of one backbone or several; publish the best as a run.

        No feature is computed, unless with `compute`.

        Raises
        ------
        MissingRowsError
            If an image that can be decoded has no row in one of the feature spaces.
        UsageError
            If options do not go together, or a value is out of range.

        Examples
        --------
        >>> box = Icebox("data")
        >>> box.sweep("photos", head=["gap", "logreg"], settings=["gap.hidden=64,128"]).best["accuracy"]
        """
        from pipeline.api import sweeps
        from pipeline.api.results import SweepResult
        from pipeline.training.sweep.sweep import sweep

        start, resume = time.perf_counter(), options.get("resume")
        given = complete(training_options.SweepOptions, options)
        cluster = requests.cluster_choice(given)
        if resume is not None:
            requests.refuse_beside_resume(options, *groups.declared(groups.ClusterOptions))
        with self._open() as workspace:
            if resume is None:
                images = requests.dataset_choice(dataset, given)
                choices = sweeps.with_scaling(sweeps.feature_choices(given), workspace)
                request = sweeps.sweep_request(images, choices, given)
            else:
                resume, request = sweeps.stopped_sweep(workspace, resume)
                images, choices = request.images, request.features
            opened = images.open(workspace)
            with requests.naming_features(images, choices, request.max_pixels, request.views):
                done = sweep(opened, workspace, request, resume=resume, cluster=cluster, compute=given["compute"])
        return SweepResult.of(done, len(opened), round(time.perf_counter() - start, 3))
