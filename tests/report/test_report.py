"""`report`: the page of a run, opened in a real browser; what is in it, and what names from outside cannot do to it."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from cached import CLASSES as CACHED_CLASSES
from cached import SPEC, fill, listed, spec_of, write_images
from conftest import Finished, icebox, picture, render_nothing, unseal, write_picture
from looked import Looked
from own_networks import tiny_options
from PIL import Image

from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.core.progress import silent
from pipeline.core.spec import HeadSpec
from pipeline.dataset import Dataset
from pipeline.deployment import reproduce
from pipeline.deployment.evaluate_run import evaluate_run
from pipeline.extraction import measured_rates
from pipeline.extraction.feature_choice import FeatureChoice
from pipeline.images import near_duplicates
from pipeline.images.decoding import DEFAULT_MAX_PIXELS
from pipeline.report import comparison, issues, page, run_report, selection
from pipeline.report.comparison import notes_of, report_sweep
from pipeline.report.run_report import trained_on
from pipeline.report.thumbnails import ImageLooks
from pipeline.runs.metrics import confusion_cells
from pipeline.runs.request import DatasetChoice, FinetuneRequest, SweepRequest, TrainRequest
from pipeline.runs.run_dataset import RunDataset
from pipeline.training.open_run import TrainedRun, open_run
from pipeline.training.sweep.sweep import sweep
from pipeline.training.train_head import train_head

if TYPE_CHECKING:
    from deployed import Deployed

STRANGE = "<script>window.broken=1<\N{DIVISION SLASH}script>"
CLASSES = (STRANGE, "\"quotes\" & 'more'", "😀 الفئة ‮right-to-left")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The report of a head on images whose names and classes are hostile, one of which is a copy and one is broken."""
    root = tmp_path_factory.mktemp("made")
    photos, data = root / 'strange "photos"', root / "data"
    for number, (side, count) in enumerate((("train", 12), ("val", 4), ("test", 8))):
        for at, name in enumerate(CLASSES):
            for i in range(count):
                seed = 1000 * at + 100 * number + i
                write_picture(photos / side / name / f"<img src=x onerror=window.broken=2>{i}.png", seed=seed)
    first = photos / "train" / CLASSES[0] / "<img src=x onerror=window.broken=2>0.png"
    (photos / "test" / CLASSES[1] / "copy'.png").write_bytes(first.read_bytes() + b"more")
    (photos / "test" / CLASSES[1] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    allowed = ("--max-bad", "0.1")
    assert icebox(data, "features", "--dataset", photos, *tiny_options(), *allowed).code == 0
    head = ("--head", "gap", "--epochs", "3")
    trained = icebox(data, "train-head", "--dataset", photos, *tiny_options(), *head, *allowed, "--json")
    assert trained.code == 0, trained.err
    done = icebox(data, "report", trained.json["run"], "--json")
    assert done.code == 0, done.err
    return Path(done.json["page"]), done


def test_what_is_told_of_it(made: tuple[Path, Finished]) -> None:
    path, done = made
    told = done.json
    assert told["bytes"] == path.stat().st_size < 2_000_000
    assert (told["images"], told["map"], told["left_out"]) == (73, "tsne", [])
    assert told["near_copies_across_splits"] >= 1
    text = path.read_text(encoding="utf-8")
    assert "<script>window.broken" not in text
    assert re.search(r'(src|href)="(?!data:|#)', text) is None, "nothing is fetched"


def test_names_from_outside_are_text(made: tuple[Path, Finished], browser: Any) -> None:
    look = Looked(browser, made[0].as_uri())
    assert look.page.evaluate("window.broken") is None
    assert look.page.locator("#classes tbody th").all_inner_texts() == sorted(CLASSES)
    look.page.locator("#mistakes .tile, #uncertain .tile").first.wait_for()
    assert look.page.locator(".warn").count() == 0
    look.check_quiet()


def test_a_cell_of_the_matrix_shows_its_images(made: tuple[Path, Finished], browser: Any) -> None:
    look = Looked(browser, made[0].as_uri())
    buttons = look.page.locator("#confusion button")
    assert sum(map(int, buttons.all_inner_texts())) == 25
    for at in (0, buttons.count() - 1):
        buttons.nth(at).click()
        assert buttons.nth(at).get_attribute("aria-pressed") == "true"
        count = int(buttons.nth(at).inner_text())
        assert look.page.locator("#cell h3").inner_text().endswith(f": {count}")
        assert look.page.locator("#cell .gallery li").count() == min(count, 24)
    assert look.page.locator("#confusion [aria-pressed=true]").count() == 1
    look.check_quiet()


def test_tables_sort(made: tuple[Path, Finished], browser: Any) -> None:
    look = Looked(browser, made[0].as_uri())
    head = look.page.locator("#classes th", has_text="recall")
    for expected in ("descending", "ascending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == expected
        values = [float(text) for text in look.page.locator("#classes tbody tr td:nth-child(3)").all_inner_texts()]
        assert values == sorted(values, reverse=expected == "descending")
    look.check_quiet()


def test_the_map_is_pointed_at_and_walked_over(made: tuple[Path, Finished], browser: Any) -> None:
    look = Looked(browser, made[0].as_uri())
    canvas, tip = look.page.locator("#map"), look.page.locator("#tip")
    canvas.scroll_into_view_if_needed()
    place = look.page.evaluate(
        "() => { const c = document.getElementById('map');"
        " const d = JSON.parse(document.getElementById('data').textContent).images;"
        " return [12 + d.x[0] / 1000 * (c.clientWidth - 24), 12 + d.y[0] / 1000 * (c.clientHeight - 24), d.name[0]]; }"
    )
    canvas.hover(position={"x": place[0], "y": place[1]})
    assert tip.is_visible()
    assert place[2] in tip.inner_text()
    canvas.focus()
    look.page.keyboard.press("Escape")
    assert not tip.is_visible()
    look.page.keyboard.press("ArrowRight")
    assert tip.is_visible()
    before = look.page.evaluate("document.getElementById('map').toDataURL()")
    look.page.locator("#colour").select_option("split")
    assert look.page.evaluate("document.getElementById('map').toDataURL()") != before
    assert look.page.locator("#legend li").all_inner_texts() == ["train", "val", "test"]
    look.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_by_everybody(scheme: Any, width: int, made: tuple[Path, Finished], browser: Any) -> None:
    """At phone and desktop width, in light and dark: no violation that axe-core knows, nothing sticks out."""
    look = Looked(browser, made[0].as_uri(), color_scheme=scheme, viewport={"width": width, "height": 800})
    background = "getComputedStyle(document.body).backgroundColor"
    was = look.page.evaluate(background)
    assert (sum(map(int, re.findall(r"\d+", was)[:3])) < 200) == (scheme == "dark")
    assert look.page.evaluate("document.documentElement.scrollWidth") <= width
    look.page.locator("#confusion button").first.click()
    assert look.violations() == []
    look.page.locator("#theme").click()
    assert look.page.evaluate(background) != was
    assert look.violations() == []
    look.check_quiet()


@pytest.mark.parametrize("kind", ["logreg", "flatten", "folds", "freeze", "finetune"])
def test_every_kind_of_run_has_one(kind: str, deployed: Deployed, tmp_path: Path, browser: Any) -> None:
    check_page(deployed, kind, tmp_path / "page.html", browser).check_quiet()


def test_a_run_on_untrained_weights_has_a_page_that_says_so(
    deployed_inception: Deployed, tmp_path: Path, browser: Any
) -> None:
    look = check_page(deployed_inception, "gap", tmp_path / "page.html", browser)
    assert "UNTRAINED" in look.page.locator(".warn").inner_text()
    look.check_quiet()


def check_page(place: Deployed, kind: str, out: Path, browser: Any) -> Looked:
    done = icebox(place.data, "report", place.name(kind), "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["left_out"] == []
    look = Looked(browser, out.as_uri())
    assert look.page.locator("#mistakes .tile").count() + look.page.locator("#uncertain .tile").count() > 0
    assert (
        f" {'train-head' if kind not in ('freeze', 'finetune') else kind} --dataset "
        in look.page.locator("pre").inner_text()
    )
    return look


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("kind", ["logreg", "folds", "finetune"])
def test_its_commands_make_the_run_again(kind: str, deployed: Deployed, tmp_path: Path) -> None:
    check_made_again(deployed.run(kind), kind, tmp_path)


@pytest.mark.usefixtures("no_plots")
def test_its_commands_make_a_run_on_inception_again(deployed_inception: Deployed, tmp_path: Path) -> None:
    check_made_again(deployed_inception.run("gap"), "gap", tmp_path)


def check_made_again(run: TrainedRun, kind: str, tmp_path: Path) -> None:
    """Typed into an empty data directory, they lead to a run that was asked for the same, with the same answers."""
    lines = reproduce.reproduction_commands(run, ["python", "cli.py"], 0)
    assert lines[0].startswith("python cli.py features" if kind != "finetune" else "python cli.py finetune")
    for line in lines:
        done = icebox(tmp_path, *shlex.split(line)[2:])
        assert done.code == 0, done.err
    again = open_run(tmp_path / "runs", "latest")
    assert again.request is not None
    assert run.request is not None
    assert again.request.head == run.request.head
    assert again.spec == run.spec
    assert again.request.images == run.request.images
    if isinstance(again.request, FinetuneRequest) and isinstance(run.request, FinetuneRequest):
        assert again.request.freeze_until == run.request.freeze_until
        assert again.request.from_cache == run.request.from_cache
    answers = [(each.path / "predictions.csv").read_text() for each in (run, again)]
    assert answers[0] == answers[1]


def test_more_classes_than_a_matrix_can_show(tmp_path: Path, browser: Any) -> None:
    """The largest mistakes are listed instead, also where there are no pictures."""
    count = 120
    confusion = np.eye(count, dtype=int) * 5
    confusion[3, 4], confusion[7, 9] = 2, 3
    classes = [f"class {i}" for i in range(count)]
    rows = dict.fromkeys(("precision", "recall", "f1", "roc_auc", "support"), 0.5)
    out = tmp_path / "page.html"
    told = {
        "title": "many", "subtitle": "", "untrained": False, "notes": [], "cards": [], "curves": [], "reliability": "",
        "calibration_error": 0.1, "measures": tuple(rows), "per_class": [{"class": name, **rows} for name in classes],
        "quarantined": [], "provenance": {}, "commands": [], "looked_at": 0, "method": None, "suspects": None,
        "near": None, "crossing": None, "told_apart": None, "classes": count, "listed": 200,
    }  # fmt: skip
    data = {"classes": classes, "confusion": confusion_cells(confusion, count).tolist(), "images": None}
    out.write_text(page.render("run.html", data, **told))
    look = Looked(browser, out.as_uri())
    body = look.page.locator("#confusion tbody tr")
    assert [line.split("\t") for line in body.all_inner_texts()] == [
        ["class 7", "class 9", "3", "37.5%"],
        ["class 3", "class 4", "2", "28.6%"],
    ]
    look.page.locator("#confusion th", has_text="images").locator("button").click()
    look.page.locator("#confusion th", has_text="images").locator("button").click()
    assert body.first.inner_text().startswith("class 3")
    assert look.violations() == []
    look.check_quiet()


def test_without_the_images_it_still_tells_what_the_run_knows(deployed: Deployed, tmp_path: Path, browser: Any) -> None:
    copied(deployed, tmp_path, tmp_path / "gone")
    done = icebox(tmp_path, "report", "alone", "--json")
    assert done.code == 0, done.err
    assert "gone" in done.json["left_out"][0]
    look = Looked(browser, Path(done.json["page"]).as_uri())
    assert look.page.locator("#classes tbody tr").count() == 2
    look.check_quiet()


def test_several_runs_are_compared(deployed: Deployed, tmp_path: Path, browser: Any) -> None:
    out = tmp_path / "page.html"
    names = [deployed.name(kind) for kind in ("logreg", "gap", "finetune")]
    done = icebox(deployed.data, "report", *names, "--compare", "--out", out, "--json")
    assert done.code == 0, done.err
    look = Looked(browser, out.as_uri())
    assert set(look.page.locator("#leaderboard tbody tr td:first-child").all_inner_texts()) == set(names)
    assert look.violations() == []
    look.check_quiet()


def test_runs_of_several_backbones_are_told_apart() -> None:
    def about(backbone: str, weights: str) -> dict[str, Any]:
        return {"summary": {"backbone": backbone, "head": "gap"}, "features": {"weights": weights}}

    runs = [about("vgg16", "untrained:unit_variance_1:0"), about("xception", "sha256:0")]
    assert comparison._labels(runs) == ["gap vgg16", "gap xception"]
    assert comparison._labels(runs[:1]) == ["gap"]


def test_a_sweep_has_a_page(tmp_path: Path, browser: Any) -> None:
    data, photos = tmp_path / "data", tmp_path / "photos"
    for i in range(24):
        side = ("train", "train", "val", "test")[i % 4]
        write_picture(photos / side / ("cats" if i % 8 < 4 else "dogs") / f"{i}.png", seed=i)
    assert icebox(data, "features", "--dataset", photos, *tiny_options()).code == 0
    heads = ("--head", "logreg", "--set", "C=0.01,0.1")
    swept = icebox(data, "sweep", "--dataset", photos, *tiny_options(), *heads, "--json")
    assert swept.code == 0, swept.err
    done = icebox(data, "report", "latest", "--sweep", "--json")
    assert done.code == 0, done.err
    look = Looked(browser, Path(done.json["page"]).as_uri())
    assert look.page.locator("#leaderboard tbody tr").count() == done.json["runs"]
    assert look.violations() == []
    look.check_quiet()


def test_a_sweep_over_backbones_shows_accuracy_against_cost(workspace: Workspace, tmp_path: Path, browser: Any) -> None:
    write_images(tmp_path / "photos", 20)
    names = ("inception_v3", "mobilenet_v2", "xception")
    for name, rate in zip(names, (10.0, 200.0, None), strict=True):
        weights = "untrained:unit_variance_1:0" if name == "mobilenet_v2" else SPEC.weights
        fill(workspace, listed(tmp_path / "photos"), spec=replace(spec_of(name), weights=weights))
        if rate is not None:
            measured_rates.remember(workspace, spec_of(name), rate, 60)
    choices = tuple(FeatureChoice(backbone=name) for name in names)
    specs = tuple(HeadSpec.make("logreg", C=value) for value in (0.01, 1.0))
    request = SweepRequest(DatasetChoice(str(tmp_path / "photos")), choices, specs, DEFAULT_MAX_PIXELS)
    done = sweep(listed(tmp_path / "photos"), workspace, request)
    report_sweep(done.path, tmp_path / "page.html")
    look = Looked(browser, (tmp_path / "page.html").as_uri())
    assert set(look.page.locator("#backbones tbody tr td:first-child").all_inner_texts()) == set(names)
    assert look.page.locator("#leaderboard tbody tr").count() == 6
    drawn = look.page.locator("figure").first.inner_text()
    assert [name in drawn for name in names] == [True, True, False], "of the last one no rate is known"
    text = look.page.locator("body").inner_text()
    assert "Not in the plot, as no images/s are known here: xception" in text
    assert "Untrained weights: mobilenet_v2." in text
    assert "UNTRAINED" not in text
    assert look.violations() == []
    look.check_quiet()


def copied(deployed: Deployed, root: Path, photos: Path | None = None) -> Path:
    """Copy a run, without checksums, as of a time when there were none; it is of `photos` if they are given."""
    folder = root / "runs" / "alone"
    shutil.copytree(deployed.data / "runs" / deployed.name("logreg"), folder)
    unseal(folder)
    if photos is not None:
        about = json.loads((folder / "run.json").read_text())
        about["asked"]["images"]["dataset"] = str(photos)
        (folder / "run.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("predictions.csv", r",0\.\d+,", ",nan,"),
        ("predictions.csv", r"^image,", "image," + "x" * 200_000),
        ("predictions.csv", r"(?s)\A(.*?\n.*?\n).*", r"\1"),
        ("metrics.json", r'"precision": [0-9.]+', '"precision": "<b>"'),
        ("metrics.json", r'"confusion": \[[^\]]*\],?', '"confusion": [1, 2, 3, 4], "x": ['),
        ("metrics.json", r'"confusion"', '"confused"'),
        ("metrics.json", r"^\{", "[" * 100_000),
        ("history.json", r'"C"', '"D"'),
        ("quarantined.json", r"^\[", "[1"),
    ],
)
def test_files_that_are_no_runs_are_said_to_be_none(
    name: str, before: str, after: str, deployed: Deployed, tmp_path: Path
) -> None:
    path = copied(deployed, tmp_path) / name
    text, count = re.subn(before, after, path.read_text())
    assert count
    path.write_text(text)
    done = icebox(tmp_path, "report", "alone", "--json")
    assert done.code == 1
    assert done.json["error"].startswith("the files of the run alone cannot be read")
    assert "Traceback" not in done.err


def test_a_page_that_cannot_be_written_is_refused_at_once(deployed: Deployed, tmp_path: Path) -> None:
    done = icebox(deployed.data, "report", deployed.name("logreg"), "--out", tmp_path, "--json")
    assert done.code == 1
    assert "that is a folder" in done.json["error"]
    assert "thumbnails" not in done.err
    os.mkfifo(tmp_path / "pipe")
    piped = icebox(deployed.data, "report", deployed.name("logreg"), "--out", tmp_path / "pipe", "--json")
    assert piped.code == 1
    assert "no regular file" in piped.json["error"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.usefixtures("no_plots")
def test_pictures_that_cannot_be_made_are_counted(deployed: Deployed, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    request = ("--out", tmp_path / "link.html", "--max-pixels", "1", "--json")
    done = icebox(deployed.data, "report", deployed.name("logreg"), *request)
    assert done.code == 0, done.err
    assert "32 of 32 images cannot be read now" in " ".join(done.json["left_out"])
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").is_file()


def copied_with_photos(deployed: Deployed, root: Path) -> Path:
    """A run of one's own on images of one's own, in the folder that is returned."""
    shutil.copytree(deployed.photos, root / "photos")
    copied(deployed, root, root / "photos")
    return root / "photos"


@pytest.mark.usefixtures("no_plots")
def test_images_that_are_others_by_now_are_noticed(deployed: Deployed, tmp_path: Path) -> None:
    photos = copied_with_photos(deployed, tmp_path)
    before = icebox(tmp_path, "report", "alone", "--json").json["left_out"]
    assert not any("changed since" in note for note in before)
    write_picture(next((photos / "test" / "cats").iterdir()), seed=99)
    done = icebox(tmp_path, "report", "alone", "--json")
    assert done.code == 0, done.err
    assert any("The dataset changed since" in note for note in done.json["left_out"])


@pytest.mark.usefixtures("no_plots")
def test_images_that_are_gone_are_counted(deployed: Deployed, tmp_path: Path) -> None:
    photos = copied_with_photos(deployed, tmp_path)
    next((photos / "test" / "cats").iterdir()).unlink()
    done = icebox(tmp_path, "report", "alone", "--json")
    assert done.code == 0, done.err
    assert "1 of 6 tested images are gone" in " ".join(done.json["left_out"])
    assert done.json["images"] == 31
    assert done.json["map"] is None, "there is no cache here"


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("nothing",), 1, "no run named 'nothing'"),
        (("a", "b"), 2, "--compare"),
        (("--compare", "--sweep"), 2, "leave one of them out"),
        (("--compare", "--map", "pca"), 2, "--map is of one run's images"),
        (("--compare",), 1, "there are no runs"),
        (("nothing", "--sweep"), 1, "no sweep named"),
        (("--sweep",), 1, "there are no sweeps"),
        ((), 1, "there are no runs"),
    ],
)
def test_what_cannot_be_told(arguments: tuple[str, ...], code: int, part: str, tmp_path: Path) -> None:
    done = icebox(tmp_path, "report", *arguments, "--json")
    assert done.code == code
    assert part in done.json["error"]


# What stands behind it


def test_data_cannot_end_its_script() -> None:
    text = page.embedded({"name": "</script><!--<script>&\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"name": "</script><!--<script>&\u2028"}


def test_planted_labels_are_found() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    pooled = rng.normal(size=(240, 64)).astype(np.float32)
    pooled[np.arange(240), labels] += 8
    wrong = rng.choice(240, 8, replace=False)
    given = labels.copy()
    given[wrong] = (labels[wrong] + 1) % 4
    found = issues.find_issues(pooled, given, np.arange(240), pictures(240), 4, silent)
    assert len(set(found.likely_wrong) & set(wrong)) >= 6
    assert len(set(found.likely_wrong) - set(wrong)) <= 1
    assert (found.suggested[wrong] == labels[wrong]).mean() > 0.8
    places, _ = issues.project(found.components, "pca")
    assert (places.min(), places.max()) == (0, 1)
    assert found.accuracy > 0.9
    assert len(found.near) == 0


@functools.cache
def pictures(count: int) -> ImageLooks:
    """What so many different pictures look like."""
    made = [near_duplicates.fingerprint(picture(seed, 299, 299)) for seed in range(count)]
    marks, thumbs = zip(*made, strict=True)
    empty = np.zeros((count, 0, 0, 3), np.uint8)
    return ImageLooks(empty, np.array(marks, np.uint64), np.array(thumbs), np.ones(count, bool), np.arange(count))


@pytest.mark.parametrize("each", [1, 2, 4])
def test_few_images_of_each_class_are_looked_at_all_the_same(each: int) -> None:
    pooled = np.random.default_rng(0).normal(size=(3 * each, 64)).astype(np.float32)
    labels = np.repeat(np.arange(3), each)
    found = issues.find_issues(pooled, labels, np.arange(3 * each), pictures(3 * each), 3, silent)
    places, _ = issues.project(found.components, None)
    assert places.shape == (3 * each, 2)
    assert np.isfinite(places).all()


def test_hard_images_are_not_doubted() -> None:
    """A label about which features say nothing is not called wrong."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    found = issues.find_issues(
        rng.normal(size=(240, 64)).astype(np.float32), labels, np.arange(240), pictures(240), 4, silent
    )
    assert found.accuracy < 0.5
    assert len(found.likely_wrong) < 24


def test_near_copies_are_found_by_picture_or_by_features() -> None:
    """A brighter copy by its picture, a mirrored one among those with the closest features; another image is none."""
    rng = np.random.default_rng(0)
    some = pictures(40)
    marks, thumbs = some.fingerprints.copy(), some.thumbs.copy()
    marks[30], thumbs[30] = near_duplicates.fingerprint(cv2.convertScaleAbs(picture(3, 299, 299), alpha=0.9, beta=20))
    marks[31], thumbs[31] = near_duplicates.fingerprint(picture(4, 299, 299)[:, ::-1].copy())
    components = rng.normal(size=(40, 16)).astype(np.float32)
    components[31] = components[4] + 0.1
    components[20] = components[5]
    pairs = issues.near_pairs(components, replace(some, fingerprints=marks, thumbs=thumbs))
    assert pairs.tolist() == [[3, 30], [4, 31]]


# What the accuracies were measured on


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({"test_rows_left_out": 0, "test_rows_trained_on": 0, "copies_across_splits": 0}, None),
        ({"test_rows_left_out": 3, "test_rows_trained_on": 0}, "3 test images were trained on and are left out"),
        ({"test_rows_left_out": 0, "test_rows_trained_on": 5, "test_rows": 5}, "5 of these 5 test images were trained"),
        ({"copies_across_splits": 0, "init": None}, None),
        ({"copies_across_splits": 2}, "2 images have a copy in another split; `evaluate` leaves out"),
        ({"copies_across_splits": 0, "init": "a"}, "in another split or were in its initial model's training"),
    ],
)
def test_test_images_that_were_trained_on_are_told(summary: dict[str, Any], expected: str | None) -> None:
    notes = trained_on({"summary": summary})
    assert [expected in note for note in notes if expected] == ([True] if expected else [])
    assert bool(notes) == bool(expected)


def test_runs_side_by_side_say_what_they_were_measured_on(tmp_path: Path) -> None:
    def of(path: str, content: str, left_out: int = 0) -> RunDataset:
        summary = {"run": f"run on {path}", "test_rows_left_out": left_out, "test_rows_trained_on": 0}
        request = {"images": {"dataset": path}}
        return RunDataset(
            tmp_path, {"dataset": {"name": "images", "content": content}, "asked": request, "summary": summary}
        )

    assert notes_of([of("/a/images", "1"), of("/a/images", "1")]) == []
    (changed,) = notes_of([of("/a/images", "1"), of("/a/images", "2")])
    assert changed == "The dataset changed between these runs: they were tested on different images."
    several, left_out = notes_of([of("/a/images", "1"), of("/b/images", "2", left_out=3)])
    assert several == "These runs are of several datasets: a/images, b/images."
    assert left_out == "run on /b/images: 3 test images were trained on and are left out of the accuracy."


# What is found is about every image, what is shown about some


def published(
    workspace: Workspace, photos: Path, labels: Callable[[Dataset], Dataset] = lambda dataset: dataset
) -> str:
    """A logistic regression on rows that were made up; `labels` may give them other classes than their folders."""
    fill(workspace, labels(listed(photos)))
    request = TrainRequest(
        DatasetChoice(str(photos)), FeatureChoice(), HeadSpec.make("logreg", C="0.1"), DEFAULT_MAX_PIXELS
    )
    return train_head(listed(photos), workspace, request).name


def reported(workspace: Workspace, name: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of a report, and what its page has for its script."""
    run = open_run(workspace.runs, name)
    told = run_report.write_report(run, workspace, out, ["icebox"], max_pixels=DEFAULT_MAX_PIXELS, method="pca")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', out.read_text())
    assert found
    return told, json.loads(found[1])


def seen_at(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    return image


@pytest.mark.usefixtures("no_plots")
def test_what_is_found_is_about_all_images_whatever_is_shown(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near copies, copies and doubtful labels of the training split, where 12 of 84 images are on the page."""
    photos = tmp_path / "photos"
    for side, count in (("train", 20), ("val", 4), ("test", 4)):
        for number, name in enumerate(CACHED_CLASSES):
            for i in range(count):
                write_picture(photos / side / name / f"{i}.png", seed=1000 * number + 100 * len(side) + i)
    shutil.copy(photos / "train/ant/3.png", photos / "train/ant/4.png")
    cv2.imwrite(str(photos / "train/bee/5.png"), cv2.flip(seen_at(photos / "test/bee/1.png"), 1))
    near = cv2.convertScaleAbs(seen_at(photos / "train/cow/6.png"), alpha=0.9, beta=12)
    cv2.imwrite(str(photos / "val/cow/2.png"), near)
    wrong = [listed(photos).names.index(f"train/cow/{i}.png") for i in (7, 8, 9, 10)]

    def relabelled(dataset: Dataset) -> Dataset:
        labels = dataset.labels.copy()
        labels[wrong] = 0
        return replace(dataset, labels=labels)

    def alike(i: int, row: np.ndarray) -> np.ndarray:
        return rows_of_first.setdefault(pairs.get(names[i], names[i]), row)

    names, rows_of_first = listed(photos).names, dict[str, np.ndarray]()
    pairs = {"train/bee/5.png": "test/bee/1.png"}
    fill(workspace, relabelled(listed(photos)), rewrite=alike)
    request = TrainRequest(
        DatasetChoice(str(photos)), FeatureChoice(), HeadSpec.make("logreg", C="0.1"), DEFAULT_MAX_PIXELS
    )
    name = train_head(listed(photos), workspace, request).name
    whole, _ = reported(workspace, name, tmp_path / "whole.html")
    monkeypatch.setattr(selection, "MOST_IMAGES", 12)
    told, data = reported(workspace, name, tmp_path / "some.html")
    assert {tuple(each["images"]): each["crossing"] for each in told["near"]} == {
        ("test/bee/1.png", "train/bee/5.png"): True,
        ("val/cow/2.png", "train/cow/6.png"): True,
        ("train/ant/3.png", "train/ant/4.png"): False,
    }
    doubted = [each["image"] for each in told["likely_wrong"]]
    assert doubted
    assert set(doubted) <= {names[i] for i in wrong}
    differing = {key for key in told if told[key] != whole[key]}
    assert differing <= {"page", "bytes", "images_shown", "left_out"}
    assert (told["images"], told["images_shown"], whole["images_shown"]) == (84, 12, 84)
    assert "12 of 84 images are on this page" in told["left_out"][0]
    on_page = data["images"]["name"]
    assert [[on_page[i] for i in pair] for pair in data["near"]] == [each["images"] for each in told["near"]]
    assert [on_page[each["i"]] for each in data["suspects"]] == doubted
    assert len(data["images"]["x"]) == len(on_page) == 12


def test_a_class_with_one_image_is_not_doubted_and_nothing_is_said_by_others(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    rng = np.random.default_rng(0)
    labels = np.append(np.repeat(np.arange(3), 20), [3, 4])
    rows = rng.normal(size=(62, 16)).astype(np.float32)
    rows[np.arange(62), labels] += 8
    found = issues.find_issues(rows, labels, np.arange(62), pictures(62), 5, silent)
    assert not {60, 61} & set(found.likely_wrong)
    assert found.suggested[[60, 61]].tolist() == [-1, -1]
    assert [str(warning.message) for warning in recwarn] == []
    assert "".join(capfd.readouterr()) == ""


def test_too_many_classes_for_a_regression_are_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same way as few: what was planted is found."""
    monkeypatch.setattr(issues, "_MOST_ITERATED", 0)
    test_planted_labels_are_found()
    test_hard_images_are_not_doubted()


def test_copies_do_not_hide_what_is_nearly_the_same() -> None:
    """Of one picture there are five copies, whose features are closest to each other, and a mirrored one."""
    some, rng = pictures(12), np.random.default_rng(0)
    marks, thumbs = some.fingerprints.copy(), some.thumbs.copy()
    marks[1:5], thumbs[1:5] = marks[0], thumbs[0]
    marks[9], thumbs[9] = near_duplicates.fingerprint(picture(0, 299, 299)[:, ::-1].copy())
    components = rng.normal(size=(12, 16)).astype(np.float32)
    components[1:5], components[9] = components[0], components[0] + 0.1
    copy_of = np.array([0, 0, 0, 0, 0, *range(5, 12)])
    looks = replace(some, fingerprints=marks, thumbs=thumbs, copy_of=copy_of)
    pairs = issues.near_pairs(components, looks)
    assert near_duplicates.clusters(pairs, 12) == [[0, 1, 2, 3, 4, 9]]


# Many classes, and names of every kind


MANY = tuple(f"class {i:03}" for i in range(201))


def by_eight(dataset: Dataset) -> Dataset:
    """The same with labels that `fill` has channels for."""
    return replace(dataset, labels=dataset.labels % 8)


@dataclass(frozen=True)
class Many:
    """A run of more classes than are kept whole, the folder of its images, and what `reported` says of it."""

    workspace: Workspace
    name: str
    photos: Path
    told: dict[str, Any]
    data: dict[str, Any]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    root = tmp_path_factory.mktemp("many")
    write_images(root / "photos", 5, MANY)
    with closing(Cache(root / "data" / "cache")) as cache:
        workspace = Workspace(root / "data", cache)
        with pytest.MonkeyPatch.context() as patch:
            render_nothing(patch)
            name = published(workspace, root / "photos", by_eight)
            told, data = reported(workspace, name, root / "page.html")
        yield Many(workspace, name, root / "photos", told, data)


def test_a_run_of_many_classes_is_kept_small_and_read_again(many: Many) -> None:
    folder = many.workspace.runs / many.name
    test = json.loads((folder / "metrics.json").read_text())["test"]
    assert {len(cell) for cell in test["confusion"]} == {3}
    assert sum(count for _, _, count in test["confusion"]) == test["images"]
    assert sum(count for truth, said, count in test["confusion"] if truth == said) == round(
        test["accuracy"] * test["images"]
    )
    with (folder / "predictions.csv").open(newline="") as file:
        header, first, *_ = csv.reader(file)
    assert header[:7] == ["image", "split", "label", "predicted", "probability", "label_2", "probability_2"]
    assert len(header) == len(first) == 5 + 2 * 9
    shares = list(map(float, first[4::2]))
    assert shares == sorted(shares, reverse=True)
    assert many.data["confusion"] == test["confusion"]
    assert many.told["left_out"] == []
    run = open_run(many.workspace.runs, many.name)
    done = evaluate_run(run, listed(many.photos), many.workspace, max_pixels=2**30)
    assert done.metrics["confusion"] == test["confusion"]
    with Image.open(done.path / "confusion.png") as plot:
        assert plot.width > 500


@pytest.mark.usefixtures("no_plots")
def test_a_run_of_many_classes_made_before_is_read(many: Many, tmp_path: Path) -> None:
    """Its confusion matrix is whole, and each image has a probability of every class."""
    folder = many.workspace.runs / "before"
    shutil.copytree(many.workspace.runs / many.name, folder)
    unseal(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    for measured in metrics.values():
        whole = np.zeros((201, 201), int)
        for truth, said, count in measured["confusion"]:
            whole[truth, said] = count
        measured["confusion"] = whole.tolist()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = list(csv.reader((folder / "predictions.csv").read_text().splitlines()))
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*lines[0][:5], *(f"p:{each}" for each in MANY)])
        writer.writerows([*line[:5], *["0.1"] * 201] for line in lines[1:])
    _, again = reported(many.workspace, "before", tmp_path / "again.html")
    assert again == many.data


def test_names_that_are_not_utf8_are_not_taken_for_others(workspace: Workspace, tmp_path: Path) -> None:
    r"""An odd byte is written as \udcff, which another class and another image are called."""
    classes = ("odd\udcff", "odd\\udcff", "odd\\x5cudcff", "two\nlines", '=1+"1",\t')
    photos = tmp_path / "photos"
    write_images(photos, 12, classes)
    for name in classes:
        for side in ("train", "val", "test"):
            for at, path in enumerate(sorted((photos / name).glob("0*.png"))[:4]):
                names = ("a\udcff.png", "a\\udcff.png", "a\\x5cudcff.png", "b\n\t',\".png")
                (photos / side / name).mkdir(parents=True, exist_ok=True)
                path.rename(photos / side / name / names[at])
        (photos / name).rmdir()
    run = published(workspace, photos)
    told, data = reported(workspace, run, tmp_path / "page.html")
    assert told["left_out"] == []
    test = json.loads((workspace.runs / run / "metrics.json").read_text())["test"]
    at = [i for i, side in enumerate(data["images"]["split"]) if side == 2]
    cells = Counter((data["images"]["label"][i], data["images"]["predicted"][i]) for i in at)
    assert cells == {(truth, said): n for truth, row in enumerate(test["confusion"]) for said, n in enumerate(row) if n}
