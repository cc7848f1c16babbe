"""The methods of `Icebox` that look at the machine, the networks, the datasets and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from pipeline.api import inspection_options as groups
from pipeline.api import requests
from pipeline.api.base import DataDirectory
from pipeline.api.cache import CacheMethods
from pipeline.api.options import Text, complete

if TYPE_CHECKING:
    from pipeline.api.inspection_results import (
        BackbonesResult,
        DatasetCheckResult,
        MachineResult,
        SummaryResult,
        WeightSourcesResult,
        WeightsResult,
    )


class Inspection(DataDirectory):
    """Check a machine or a dataset, list networks and their weights, look after the feature cache."""

    @property
    def cache(self) -> CacheMethods:
        """The feature cache: list it, check it, clean it, export it."""
        return CacheMethods(self)

    @overload
    def doctor(self, dataset: None = None) -> MachineResult: ...
    @overload
    def doctor(self, dataset: Text, **options: Unpack[groups.DoctorOptions]) -> DatasetCheckResult: ...
    @overload
    def doctor(
        self, dataset: Text | None, **options: Unpack[groups.DoctorOptions]
    ) -> MachineResult | DatasetCheckResult: ...
    def doctor(
        self, dataset: Text | None = None, **options: Unpack[groups.DoctorOptions]
    ) -> MachineResult | DatasetCheckResult:
        """Check this machine, or check a dataset before computing its features.

        With a dataset, every image is decoded once, and the network runs for some seconds to measure what computing
        the missing features takes. No features are stored. Options go with a dataset only.

        Raises
        ------
        UsageError
            If options are given without a dataset.
        IceboxError
            If the dataset cannot be read, or the weights, the layer or the space cannot be had.

        Examples
        --------
        >>> Icebox().doctor().precision_auto
        'float32'
        >>> for sentence in Icebox().doctor("photos").advice:
        ...     print(sentence)
        """
        from pipeline.core.errors import UsageError

        if dataset is not None:
            return self._check_dataset(dataset, options)
        if options:
            spelt = (f"--{name.replace('_', '-')}" for name in options)
            raise UsageError(f"{', '.join(spelt)}: say of which DATASET")
        from pipeline.api.inspection_results import MachineResult
        from pipeline.report.doctor.machine import examine

        with self._open() as workspace:
            return MachineResult.of(examine(workspace))

    def _check_dataset(self, dataset: Text, options: groups.DoctorOptions) -> DatasetCheckResult:
        from pipeline.api.inspection_results import DatasetCheckResult
        from pipeline.dataset import remote
        from pipeline.report.doctor.checks import check_dataset

        given = complete(groups.DoctorOptions, options)
        views, features = requests.views_choice(given), requests.feature_choice(given)
        remote.limit_connections(given["connections"])
        with self._open() as workspace:
            images = requests.dataset_choice(dataset, given).open(workspace)
            found = check_dataset(images, workspace, features, given["max_pixels"], views)
            return DatasetCheckResult.of(found)

    def backbones(self, names: Sequence[Text] = (), **options: Unpack[groups.BackbonesOptions]) -> BackbonesResult:
        """List networks: input size, parameters, bytes a row, and images/s on this machine.

        Without `names`, all networks are listed, your own ones as far as they have features.

        Raises
        ------
        UsageError
            If there is no such network.
        SpecError
            If a .keras file is refused.

        Examples
        --------
        >>> for network in Icebox().backbones(["mobilenet_v2", "resnet50"]).backbones:
        ...     print(network.name, network.parameters)
        """
        from pipeline.api.inspection_results import BackbonesResult
        from pipeline.core import machine
        from pipeline.extraction.backbone_list import list_backbones

        given, wanted = complete(groups.BackbonesOptions, options), [str(name) for name in requests.listed(names)]
        precision = machine.best_precision() if given["precision"] == "auto" else given["precision"]
        with self._open() as workspace:
            if given["measure"]:
                from pipeline.extraction.measure_backbone import measure

                measure(wanted, workspace, precision)
            return BackbonesResult(precision, list_backbones(wanted, workspace, precision))

    def weights(self, **options: Unpack[groups.WeightsOptions]) -> WeightsResult | WeightSourcesResult:
        """Say where the weights of a network can be had; with `weights`, make those ready for use.

        Your own network has its weights in its file.

        Raises
        ------
        UsageError
            If there is no such network, or other weights are named for your own.
        WeightsError
            If the weights cannot be had.

        Examples
        --------
        >>> Icebox().weights(weights="untrained:3").identity
        """
        from pipeline.api.inspection_results import WeightSourcesResult, WeightsResult
        from pipeline.backbone.source import describe

        given = complete(groups.WeightsOptions, options)
        backbone, weights = (None if given[name] is None else str(given[name]) for name in ("backbone", "weights"))
        with self._open() as workspace:
            found: dict[str, Any] = describe(backbone, weights, workspace)
        return WeightSourcesResult(**found) if "imagenet" in found else WeightsResult(**found)

    def summary(self, **options: Unpack[groups.SummaryOptions]) -> SummaryResult:
        """List the layers of a network, and count the parameters that train with a head on top.

        Raises
        ------
        UsageError
            If there is no such network.
        SpecError
            If the network cannot be cut at that layer.

        Examples
        --------
        >>> Icebox().summary(backbone="mobilenet_v2", classes=5).head_parameters
        """
        from pipeline.api.inspection_results import SummaryResult
        from pipeline.core import console
        from pipeline.training.summary import summarize

        given = complete(groups.SummaryOptions, options)
        backbone = None if given["backbone"] is None else str(given["backbone"])
        console.begin(quiet=self.quiet)
        found = summarize(given["head"], given["classes"], given["layer"], backbone, given["input_size"])
        return SummaryResult.of(found)
