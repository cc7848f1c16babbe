"""The methods of `Icebox.cache`: list the feature cache, check it, clean it, export it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pipeline.api import inspection_options as groups
from pipeline.api import requests
from pipeline.api.options import Text, complete

if TYPE_CHECKING:
    from pipeline.api.base import DataDirectory
    from pipeline.api.cache_results import (
        CacheExplainResult,
        CacheExportResult,
        CacheGcResult,
        CacheListResult,
        CacheQuarantineResult,
        CacheVerifyResult,
    )
    from pipeline.cache.gc import Retention
    from pipeline.cache.verify import Verification
    from pipeline.cache.workspace import Workspace
    from pipeline.extraction.decode_check import DecodeCheck
    from pipeline.extraction.recompute_check import RecomputeResult


class CacheMethods:
    """The feature cache of a data directory."""

    def __init__(self, box: DataDirectory) -> None:
        self._box = box

    def __repr__(self) -> str:
        return f"{self._box!r}.cache"

    def ls(self) -> CacheListResult:
        """List the feature spaces on disk: rows, bytes, how far they are compressed, how old they are.

        Examples
        --------
        >>> [space.space for space in Icebox().cache.ls().spaces]
        """
        from pipeline.api.cache_results import CacheListResult
        from pipeline.cache.listing import describe

        with self._box._open() as workspace:
            cache = workspace.cache
            spaces = [describe(space) for space in cache.spaces()]
            quarantined = len(cache.index.all_quarantined()) if cache.index_path.exists() else 0
        return CacheListResult(
            spaces,
            shards=sum(space.shards for space in spaces),
            rows=sum(space.rows for space in spaces),
            bytes=sum(space.bytes for space in spaces),
            quarantined=quarantined,
        )

    def explain(
        self, dataset: Text = "digits", images: Sequence[Text] = (), **options: Unpack[groups.ExplainOptions]
    ) -> CacheExplainResult:
        """Say for each image of a dataset whether it has features, and if not, why. Change nothing.

        With `images`, only these are listed: by their names in the dataset or their paths on disk.

        Raises
        ------
        UsageError
            If one of `images` is not in the dataset.
        IceboxError
            If the weights or the space that are named cannot be had.

        Examples
        --------
        >>> Icebox().cache.explain("photos").counts
        {'cached': 120, 'new': 3}
        """
        from pipeline.api.cache_results import CacheExplainResult
        from pipeline.extraction.explain import explain, select_images

        given = complete(groups.ExplainOptions, options)
        wanted = [str(image) for image in requests.listed(images)]
        views, features = requests.views_choice(given), requests.feature_choice(given)
        with self._box._open() as workspace:
            opened = requests.dataset_choice(dataset, given).open(workspace)
            found = explain(opened, workspace, features, given["max_pixels"], views)
            chosen = select_images(found.images, opened, wanted) if wanted else found.images
        return CacheExplainResult(found.space, found.backbone, found.counts, found.spaces, chosen)

    def verify(self, **options: Unpack[groups.VerifyOptions]) -> CacheVerifyResult:
        """Check the cache: names, sizes, row counts, the index against the shards.

        Whatever is wrong is in the result, in `problems` and, as one line, in `error`. Images are decoded and rows
        recomputed only if no problem is left.

        Raises
        ------
        UsageError
            If the options do not go together.
        SpecError
            If there is no such space.
        MissingRowsError
            With `recompute`, if no image of any space can be found.

        Examples
        --------
        >>> done = Icebox().cache.verify(read_data=True)
        >>> done.error or "nothing is wrong"
        """
        from pipeline.api.cache_results import CacheVerifyResult
        from pipeline.cache.verify import verify
        from pipeline.core.errors import UsageError

        start, given = time.perf_counter(), complete(groups.VerifyOptions, options)
        if given["read_data"] and given["sample"] is not None:
            raise UsageError("--read-data reads all, --sample a share: give one of the two")
        of_images = ("dataset",) if given["images"] is not None else ("dataset", "archive", "image_root")
        if not given["recompute"] and any(given[name] is not None for name in of_images):
            raise UsageError(
                "--dataset, --archive and --image-root go with --recompute N only, or the latter with --images"
            )
        sample = 1.0 if given["read_data"] else given["sample"] or 0.0
        with self._box._open() as workspace:
            done = verify(workspace.cache, space=given["space"], sample=sample, repair=given["repair"])
            recomputed = _recompute(workspace, given) if given["recompute"] and done.sound else []
            decoded = _decode_again(workspace, given) if given["images"] is not None and done.sound else None
        return CacheVerifyResult(
            done.spaces,
            done.shards,
            done.rows,
            done.bytes,
            done.bytes_read,
            done.problems,
            recomputed,
            decoded,
            seconds=round(time.perf_counter() - start, 3),
            error=_damage(done, given["repair"]) or _drift(recomputed) or _undecodable(decoded),
        )

    def quarantine(self) -> CacheQuarantineResult:
        """List the image contents that could not be decoded: why, since when, and where they were seen.

        Examples
        --------
        >>> for content in Icebox().cache.quarantine().contents:
        ...     print(content.reason, content.paths)
        """
        from pipeline.api.cache_results import CacheQuarantineResult, QuarantinedContent

        with self._box._open() as workspace:
            cache = workspace.cache
            found = [
                QuarantinedContent(
                    bad.key.hex(),
                    bad.reason,
                    bad.since,
                    bad.decoder,
                    bad.max_pixels or None,  # 0 where rows are no longer used
                    [str(path) for path in cache.index.files_with_digest(bad.key)],
                )
                for bad in (cache.index.all_quarantined() if cache.index_path.exists() else ())
            ]
        return CacheQuarantineResult(len(found), found)

    def gc(self, **options: Unpack[groups.GcOptions]) -> CacheGcResult:
        """Make room: remove leftovers of killed commands and merge small shards.

        With `dataset` or `space`, every row that belongs to none of those named is removed as well, without asking:
        `dry_run=True` reports first what would go.

        Raises
        ------
        UsageError
            If `archive` or `image_root` is given without a dataset.
        IceboxError
            If a dataset cannot be read, or there is no such space; nothing is removed then.

        Examples
        --------
        >>> Icebox().cache.gc(dataset="photos", dry_run=True).rows_removed
        """
        from pipeline.api.cache_results import CacheGcResult
        from pipeline.cache.gc import collect
        from pipeline.core.errors import UsageError
        from pipeline.runs.store import remove_leftovers

        start, given = time.perf_counter(), complete(groups.GcOptions, options)
        if not given["dataset"] and (given["archive"] or given["image_root"]):
            raise UsageError("--archive and --image-root go with --dataset only")
        dry_run = given["dry_run"]
        with self._box._open() as workspace:
            done = collect(workspace.cache, _retention(workspace, given), damaged=given["damaged"], dry_run=dry_run)
            stopped = [
                remove_leftovers(root, resumable=given["unfinished"], dry_run=dry_run)
                for root in (workspace.runs, workspace.sweeps)
            ]
        folders = [folder for some, _ in stopped for folder in some]
        return CacheGcResult(
            done.rows_removed,
            done.shards_removed,
            done.shards_repacked,
            done.shards_written,
            leftovers=done.leftovers + len(folders),
            bytes_freed=done.bytes_freed + sum(size for _, size in stopped),
            removed=[*done.removed, *folders],
            dry_run=dry_run,
            seconds=round(time.perf_counter() - start, 3),
        )

    def export(
        self, out: Text, dataset: Text = "digits", **options: Unpack[groups.CacheExportOptions]
    ) -> CacheExportResult:
        """Write the features of a dataset to one HDF5 file, with labels, paths, splits and class names.

        Raises
        ------
        UsageError
            If `out` is there already, or lies in the cache or in no folder.
        MissingRowsError
            If an image that can be decoded has no features, and the file is not virtual.
        CacheError
            If a shard is damaged, or there is no room.

        Examples
        --------
        >>> Icebox().cache.export("photos.h5", "photos", what="pooled").rows
        """
        from pipeline.api.cache_results import CacheExportResult
        from pipeline.core.spec import PLAIN_VIEW
        from pipeline.training.export_rows import export_dataset

        start, given = time.perf_counter(), complete(groups.CacheExportOptions, options)
        path, what, virtual = Path(out), given["what"], given["virtual"]
        _check_output(path, self._box.data_dir / "cache", force=given["force"])
        with self._box._open() as workspace:
            images, choice, most = (
                requests.dataset_choice(dataset, given),
                requests.feature_choice(given),
                given["max_pixels"],
            )
            opened = images.open(workspace)
            with requests.naming_features(images, [choice], most, PLAIN_VIEW):
                done = export_dataset(opened, workspace, choice, most, path.absolute(), what, virtual=virtual)
        return CacheExportResult(
            path,
            done.rows,
            done.missing,
            done.shards,
            done.bytes,
            done.space,
            what,
            virtual,
            quarantined=len(done.quarantined),
            quarantined_images=done.quarantined,
            seconds=round(time.perf_counter() - start, 3),
        )


def _recompute(workspace: Workspace, given: Mapping[str, Any]) -> list[RecomputeResult]:
    """Recompute some rows of each space; spaces whose images are not at hand are passed over, unless all are."""
    import logging

    from pipeline.core.errors import MissingRowsError
    from pipeline.extraction.recompute_check import recompute

    named, space = given["dataset"], given["space"]
    dataset = None if named is None else requests.dataset_choice(named, given).open(workspace)
    spaces = [workspace.cache.open(space)] if space else workspace.cache.spaces()
    found, skipped = [], []
    for each in spaces:
        try:
            found.append(recompute(each, given["recompute"], workspace, dataset))
        except MissingRowsError as error:
            skipped.append(error)
    compared = [each for each in found if each is not None]
    if skipped and not compared:
        raise skipped[0]
    for error in skipped:
        logging.getLogger(__name__).warning("%s", error)
    return compared


def _decode_again(workspace: Workspace, given: Mapping[str, Any]) -> DecodeCheck:
    from pipeline.extraction.decode_check import check_decoding

    dataset = requests.dataset_choice(given["images"], given).open(workspace)
    return check_decoding(dataset, workspace, given["space"])


def _damage(done: Verification, repair: bool) -> str | None:
    """Return which problems of the shards are left, on one line, or None."""
    left = [problem for problem in done.problems if not problem.repaired]
    if not left:
        return None
    again = "move it out of the cache by hand" if repair else "run `cache verify --read-data --repair`, then `features`"
    count = "1 problem:" if len(left) == 1 else f"{len(left):,} problems, the first:"
    return f"{count} {left[0].path} {left[0].problem}; {again}"


def _drift(recomputed: Sequence[RecomputeResult]) -> str | None:
    """Return which space has features that this machine does not compute, on one line, or None."""
    drifted = next((each for each in recomputed if not each.same), None)
    if drifted is None:
        return None
    return (
        f"the features of {drifted.space} are not what this machine computes now (relative difference "
        f"{drifted.max_relative:.2g}); add nothing to it here, or compute it anew"
    )


def _undecodable(decoded: DecodeCheck | None) -> str | None:
    """Return how many images cannot be decoded any more, on one line, or None."""
    if decoded is None or not decoded.quarantined:
        return None
    first, count = decoded.quarantined[0], len(decoded.quarantined)
    return (
        f"{count:,} of {decoded.images:,} images that have rows cannot be decoded whole, the first: {first.path}: "
        f"{first.reason}; they are quarantined now, and their rows not used"
    )


def _retention(workspace: Workspace, given: Mapping[str, Any]) -> Retention:
    """Return which rows stay: those of the named datasets and spaces, or all. Raises IceboxError."""
    from pipeline.cache.digests import identify
    from pipeline.cache.gc import Retention
    from pipeline.core.errors import DatasetError
    from pipeline.core.units import counted

    datasets, spaces = requests.listed(given["dataset"]), [str(name) for name in requests.listed(given["space"])]
    for name in spaces:
        workspace.cache.open(name, sync=False)  # a name mistyped must not cost a space
    keys: set[bytes] = set()
    for name in datasets:
        images = requests.dataset_choice(name, given).open(workspace)
        with workspace.progress(f"identifying images of {images.name}", len(images)) as advance:
            found = identify(images, workspace.cache.index, advance)
        if found.unread:
            first, reason = next(iter(found.unread.items()))
            raise DatasetError(
                f"{counted(len(found.unread), 'image')} of {name} cannot be read now, so it is not known which rows "
                f"are theirs (the first: {images.names[first]} {reason}); nothing was removed"
            )
        keys.update(key for key in found.keys if key is not None)
    return Retention(keys if datasets else None, spaces)


def _check_output(out: Path, cache: Path, *, force: bool) -> None:
    """Raise UsageError if a file must not be written there."""
    from pipeline.core.errors import UsageError

    if out.exists() and not out.is_file():
        raise UsageError(f"{out} is no regular file, and is not replaced by one")
    if out.exists() and not force:
        raise UsageError(f"{out} is there already; --force replaces it")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent} to write {out.name} to")
    if cache.resolve() in out.resolve().parents:
        raise UsageError(f"{out} lies in the cache itself; name a file elsewhere")
