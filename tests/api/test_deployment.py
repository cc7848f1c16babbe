"""Trained runs from Python: what the methods return is what the commands print, and runs are objects to work with."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import finished, icebox, unseal
from deployed import KINDS, Deployed

from pipeline.api.deployment_results import Prediction, RunsResult, ServeResult
from pipeline.api.icebox import Icebox
from pipeline.api.run import Run
from pipeline.api.run_tables import history_array, predictions_array, predictions_frame
from pipeline.core.errors import RunError, UsageError
from pipeline.extraction.planning import Quarantined
from pipeline.runs.predictions import Predictions, write_predictions


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give back the library's logger as it was: a method of `Icebox` leads it to the console."""
    logger = logging.getLogger("pipeline")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "propagate", logger.propagate)


@pytest.fixture
def box(deployed: Deployed) -> Icebox:
    return Icebox(deployed.data, quiet=True)


def without_time(told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name not in ("seconds", "created")}


def test_evaluate(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    name, out = deployed.name("gap"), tmp_path / "out"
    printed = icebox(deployed.data, "evaluate", name, "--split", "val", "--out", out, "--json").json
    done = box.evaluate(name, split="val", out=out)
    assert done.to_dict() == printed
    assert list(done.to_dict()) == list(printed)
    assert (done.images, done.dataset_images, done.quarantined_images) == (6, 32, [])
    assert done.path == out
    assert "<th>accuracy</th>" in done._repr_html_()
    assert box.run(name).evaluate(split="val", out=str(out)).to_dict() == printed


def test_evaluate_refuses_what_does_not_go_together(deployed: Deployed, box: Icebox) -> None:
    with pytest.raises(UsageError, match="--limit goes with --dataset only"):
        box.evaluate(deployed.name("gap"), limit=3)
    with pytest.raises(UsageError, match="--memory must be a size such as 2GB"):
        box.evaluate(deployed.name("gap"), memory="much")
    with pytest.raises(TypeError, match="unexpected keyword argument 'splits'"):
        box.evaluate(deployed.name("gap"), splits="val")  # type: ignore[call-arg]


def test_predict(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    (bad := tmp_path / "x.png").write_text("no image")
    names, files = [deployed.name("logreg"), deployed.name("gap")], [*deployed.files[:3], bad]
    printed = icebox(
        deployed.data, "predict", names[0], *files, "--also", names[1], "--top", "1", "--max-bad", "1", "--json"
    ).json
    done = box.predict(names[0], files, also=[box.run(names[1])], top=1)
    assert without_time(done.to_dict()) == without_time(printed)
    assert list(done.to_dict()) == list(printed)
    assert done.probabilities.shape == (3, 2)
    assert done.probabilities.dtype == np.float32
    assert done.labels.tolist() == [each["label"] for each in printed["predictions"]]
    assert done.paths.tolist() == list(map(str, files[:3]))
    assert done.lines()["runs"] == ", ".join(names)
    frame = done.to_frame()
    assert frame.columns.tolist() == ["path", "label", "probability", "from_cache", "p:cats", "p:dogs"]
    assert np.array_equal(frame[["p:cats", "p:dogs"]].to_numpy(), done.probabilities)


def test_predictions_one_at_a_time(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    (bad := tmp_path / "x.png").write_text("no image")
    with box.run(deployed.name("logreg")).iter_predictions([bad, deployed.files[0]]) as stream:
        assert (stream.images, stream.classes, stream.runs) == (2, ["cats", "dogs"], [deployed.name("logreg")])
        first, second = stream
        assert next(stream, None) is None
    assert isinstance(first, Prediction)
    assert (first.label, first.probabilities, first.top) == (None, None, [])
    assert first.reason
    assert second.probabilities is not None
    assert second.probabilities.shape == (2,)
    assert second.label == second.top[0][0]
    counted = stream.summary()
    assert (counted.quarantined_images, counted.from_cache) == ([Quarantined(str(bad), first.reason)], 1)
    assert counted.label_counts == {second.label: 1}


def test_a_stream_that_is_left_early_closes_the_data_directory(deployed: Deployed, box: Icebox) -> None:
    stream = box.iter_predictions(deployed.name("logreg"), deployed.photos)
    next(stream)
    stream.close()
    assert next(stream, None) is None
    assert stream.summary().label_counts.keys() <= {"cats", "dogs"}
    with pytest.raises(RunError, match="no run named 'none'"):
        box.iter_predictions("none", deployed.photos)


def test_a_single_path_is_a_path(deployed: Deployed, box: Icebox) -> None:
    one = deployed.files[0]
    assert box.predict(deployed.name("logreg"), one).paths.tolist() == [str(one)]
    assert box.predict(deployed.name("logreg"), str(one)).paths.tolist() == [str(one)]


def test_export(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    name, out = deployed.name("gap"), tmp_path / "out"
    done = box.export(name, out=out, images=deployed.files[:2])
    printed = icebox(deployed.data, "export", name, "--out", out, "--images", deployed.files[0].parent, "--json").json
    assert list(done.to_dict()) == list(printed)
    assert (done.path, done.compared_images) == (out / "model.keras", 2)
    assert done.max_difference <= 1e-4
    about = json.loads((out / "export.json").read_text())
    assert printed == {"path": str(done.path), **{k: v for k, v in about.items() if k not in ("format", "version")}}


def test_serve(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options reach the library as typed values, and `on_ready` is given what is served."""
    from pipeline.deployment import serve

    def answered(runs: Any, workspace: Any, *, on_ready: Any, **given: Any) -> None:
        on_ready("http://127.0.0.1:1")
        told.append(given)

    told: list[Any] = []
    monkeypatch.setattr(serve, "serve", answered)
    run = Icebox(deployed.data, quiet=True).run(deployed.name("gap"))
    run.serve(port=0, max_bytes=1000, on_ready=told.append)
    assert told[0].to_dict() == {"url": "http://127.0.0.1:1", "runs": [run.name], "classes": ["cats", "dogs"]}
    assert (told[1]["port"], told[1]["max_bytes"], told[1]["top"]) == (0, 1000, 5)
    with pytest.raises(UsageError, match="--max-bytes must be at least 1"):
        run.serve(max_bytes=0)


def test_a_run_is_served_until_that_is_interrupted(deployed: Deployed, box: Icebox) -> None:
    answers: list[Any] = []

    def look(served: ServeResult) -> None:
        try:
            answers.append(httpx.get(f"{served.url}/about", timeout=60, trust_env=False).json())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    def on_ready(served: ServeResult) -> None:
        threading.Thread(target=look, args=[served]).start()

    box.serve(deployed.name("logreg"), port=0, on_ready=on_ready)
    assert answers[0]["classes"] == ["cats", "dogs"]


def test_report_of_one_run(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    name, out = deployed.name("logreg"), tmp_path / "page.html"
    printed = icebox(deployed.data, "report", name, "--out", out, "--map", "pca", "--json").json
    done = box.run(name).report(out=out, map="pca")
    told = {**done.to_dict(), "bytes": printed["bytes"]}  # commands on the page name the data directory, or do not
    assert without_time(told) == without_time(printed)
    assert list(done.to_dict()) == list(printed)
    assert (done.page, done.images, done.best) == (out, printed["images"], None)


def test_report_of_several_runs(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    printed = icebox(deployed.data, "report", "--compare", "--out", out, "--json").json
    done = box.report(compare=True, out=out)
    assert without_time(done.to_dict()) == without_time(printed)
    assert list(done.to_dict()) == list(printed)
    assert (done.runs, done.run) == (len(KINDS), None)
    assert box.report([box.run("latest"), deployed.name("gap")], compare=True, out=out).runs == 2


def test_a_report_is_one_page(deployed: Deployed, box: Icebox) -> None:
    with pytest.raises(UsageError, match="leave one of them out"):
        box.report(compare=True, sweep=True)
    with pytest.raises(UsageError, match="several runs make one page with --compare only"):
        box.report(["latest", "best"])
    with pytest.raises(UsageError, match="--map is of one run's images"):
        box.report(compare=True, map="pca")
    with pytest.raises(RunError, match="no sweep"):
        box.report(sweep=True)


def test_what_a_file_says_of_maps_leaves_comparisons_alone(deployed: Deployed, tmp_path: Path) -> None:
    (tmp_path / "icebox.toml").write_text('[report]\nmap = "pca"\nmax-pixels = 5000\n')
    out = tmp_path / "page.html"
    arguments = ["--data-dir", str(deployed.data), "--config", str(tmp_path / "icebox.toml"), "report", "--compare"]
    assert finished([*arguments, "--out", str(out)]).code == 0
    typed = finished([*arguments, "--map", "pca"])
    assert (typed.code, "--map is of one run's images" in typed.err) == (2, True)


def test_runs(deployed: Deployed, box: Icebox) -> None:
    printed = icebox(deployed.data, "runs", "ls", "--json").json
    found = box.runs()
    assert isinstance(found, RunsResult)
    assert found.to_dict() == printed
    assert (len(found), [each["run"] for each in found]) == (len(KINDS), [deployed.name(kind) for kind in KINDS])
    assert found.to_frame()["accuracy"].tolist() == [each["accuracy"] for each in printed["runs"]]
    assert deployed.name("gap") in found._repr_html_()


def test_a_run_is_an_object(deployed: Deployed, box: Icebox) -> None:
    run = box.run(deployed.name("freeze"))
    about = json.loads((deployed.data / "runs" / run.name / "run.json").read_text())
    assert run.to_dict() == run.summary == about["summary"]
    assert (run.accuracy, run.val_accuracy) == (about["summary"]["accuracy"], about["summary"]["val_accuracy"])
    assert (run.classes, list(run.quarantined)) == (["cats", "dogs"], [])
    assert run == box.run(run) == box.run(Path(run)) == box.run(os.path.relpath(run))
    assert run != box.run(deployed.name("gap"))
    assert len({run, box.run(run)}) == 1
    assert run.name in repr(run)
    assert f"<td>{run.name}</td>" in run._repr_html_()
    assert box.run().name == deployed.name("finetune")
    with pytest.raises(RunError, match="no run named 'none'"):
        box.run("none")


def test_what_was_quarantined_is_known_of_a_run(deployed: Deployed, box: Icebox, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(deployed.data / "runs" / deployed.name("logreg"), folder)
    unseal(folder)
    bad = Quarantined("x.png", "empty file", "2026-01-01T00:00:00+00:00")
    (folder / "quarantined.json").write_text(json.dumps([asdict(bad)]))
    assert list(box.run(folder).quarantined) == [bad]
    (folder / "quarantined.json").write_text('[{"name": "x.png"}]')
    with pytest.raises(RunError, match="cannot be read"):
        box.run(folder)
    (folder / "quarantined.json").unlink()
    assert list(box.run(folder).quarantined) == []


@pytest.mark.parametrize(("kind", "x"), [("gap", "epoch"), ("logreg", "C"), ("folds", "fold")])
def test_history(deployed: Deployed, box: Icebox, kind: str, x: str) -> None:
    run = box.run(deployed.name(kind))
    entries = json.loads((run.path / "history.json").read_text())
    found, frame = run.history(), run.history(frame=True)
    assert found.dtype.names == tuple(entries[0])
    assert [dict(zip(entries[0], row, strict=True)) for row in found.tolist()] == entries
    assert frame.to_dict("records") == entries
    assert next(iter(entries[0])) == x


def test_predictions_that_a_run_keeps(deployed: Deployed, box: Icebox) -> None:
    run = box.run(deployed.name("gap"))
    found, frame = run.predictions(), run.predictions(frame=True)
    assert found.dtype.names == ("image", "split", "label", "predicted", "probability", "probabilities")
    assert found["probabilities"].shape == (12, 2)
    assert found["split"].tolist() == ["val"] * 6 + ["test"] * 6
    tested = found[found["split"] == "test"]
    assert (tested["label"] == tested["predicted"]).mean() == run.accuracy
    assert frame.columns.tolist() == ["image", "split", "label", "predicted", "probability", "p:cats", "p:dogs"]
    assert np.array_equal(frame[["p:cats", "p:dogs"]].to_numpy(), found["probabilities"])
    assert frame["image"].tolist() == found["image"].tolist()


def test_predictions_of_many_classes_and_odd_names(tmp_path: Path) -> None:
    classes = ["NA", *(f"class {i}" for i in range(300))]
    shares = np.random.default_rng(0).dirichlet(np.ones(301), 3).astype(np.float32)
    part = Predictions("test", ["001", "nan", "a,\nb"], np.array([0, 1, 2]), shares)
    write_predictions(tmp_path / "predictions.csv", [part], classes)
    found, frame = predictions_array(tmp_path), predictions_frame(tmp_path)
    assert found["image"].tolist() == frame["image"].tolist() == ["001", "nan", "a,\nb"]
    assert found["label"].tolist() == frame["label"].tolist() == ["NA", "class 0", "class 1"]
    assert found["probability_10"].dtype == np.float32
    assert found["label_10"].tolist() == frame["label_10"].tolist()


@pytest.mark.parametrize(
    "text", ["", "image,split\n1\n", "image,probability\na,b\n", "[]", "{}", '[{"loss": "x"}]', "["]
)
def test_damaged_tables_are_named(tmp_path: Path, text: str) -> None:
    for name, read in (("history.json", history_array), ("predictions.csv", predictions_array)):
        (tmp_path / name).write_text(text)
        if name == "history.json" or "[" not in text:
            with pytest.raises(RunError, match=f"{name} cannot be read"):
                read(tmp_path)
    with pytest.raises(RunError, match="cannot be read"):
        history_array(tmp_path / "none")


def test_missing_values_are_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text('[{"epoch": 1, "loss": null}, {"epoch": 2, "loss": 0.5}]')
    found = history_array(tmp_path)
    assert found["epoch"].dtype == np.int64
    assert np.array_equal(found["loss"], [np.nan, 0.5], equal_nan=True)


def test_frames_need_pandas(deployed: Deployed, box: Icebox, monkeypatch: pytest.MonkeyPatch) -> None:
    run = box.run(deployed.name("gap"))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="a DataFrame needs pandas"):
        run.history(frame=True)
    with pytest.raises(UsageError, match="a DataFrame needs pandas"):
        box.predict(run, deployed.files[:1]).to_frame()
    assert len(run.history()) == 2


def test_a_run_of_another_data_directory_is_found_by_its_path(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(deployed.data.parent)
    relative = Icebox("data", quiet=True).run(deployed.name("logreg"))
    assert isinstance(relative, Run)
    assert relative.predict(deployed.files[:1]).runs == [relative.name]
    assert Icebox(tmp_path, quiet=True).run(relative).name == relative.name
