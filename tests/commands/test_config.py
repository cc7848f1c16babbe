"""Options from a file, and from a run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_picture
from deployed import KINDS, Deployed

import cli
from pipeline.cache.space import Cache
from pipeline.cache.workspace import Workspace
from pipeline.commands import config
from pipeline.core.errors import IceboxError
from pipeline.deployment.reproduce import options_like
from pipeline.runs.request import FinetuneRequest, TrainRequest, stopped_run

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Leave the test process's own way of being stopped as it was."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that says what a command line would have had trained, from a folder without any pyproject.toml."""

    def capture(dataset: Any, workspace: Any, wanted: Any, *others: Any, **more: Any) -> Any:
        found.append((workspace, wanted))
        raise IceboxError("nothing is trained here")

    def of(*arguments: str | Path) -> Any:
        found.clear()
        assert cli.main([str(each) for each in arguments]) == 1
        return found[0][1]

    found: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ICEBOX_DATA", raising=False)
    monkeypatch.setattr("pipeline.training.train_head.train_head", capture)
    monkeypatch.setattr("pipeline.training.finetune.finetune", capture)
    of.found = found  # type: ignore[attr-defined]
    return of


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


TEXT = """
data-dir = "there"
limit = 40
weights = "untrained"
views = 3
augment = { rotation = 15, horizontal_flip = false }
[train-head]
head = "flatten"
hidden = [32, 16]
learning_rate = 1e-2
normalize = false
memory = "1GB"
[cache.gc]
dataset = ["digits", "cifar10"]
"""


def test_options_of_a_file_are_as_if_typed_and_what_is_typed_wins(captured: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.toml", TEXT)
    by_file: TrainRequest = captured("--config", file, "train-head", "--epochs", "7", "--hidden", "8")
    assert captured.found[0][0].root == Path("there")
    given = (
        "--limit",
        "40",
        "--weights",
        "untrained",
        "--views",
        "3",
        "--augment",
        "rotation=15,horizontal_flip=false",
    )
    own = ("--head", "flatten", "--learning-rate", "0.01", "--no-normalize", "--memory", "1GB")
    typed: TrainRequest = captured("--data-dir", "there", "train-head", *given, *own, "--epochs", "7", "--hidden", "8")
    assert by_file == typed
    assert by_file.head.settings["hidden"] == (8,)
    assert by_file.head.settings["learning_rate"] == 0.01
    assert by_file.views.recipe.rotation == 15
    elsewhere: TrainRequest = captured("--data-dir", tmp_path / "here", "--config", file, "train-head")
    assert captured.found[0][0].root == tmp_path / "here"
    assert elsewhere.head.settings["hidden"] == (32, 16)


def test_pyproject_of_the_current_folder_is_read(captured: Any, tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", '[tool.icebox]\nlimit = 30\n[tool.icebox.train-head]\nhead = "logreg"\n')
    assert captured("train-head").images.limit == 30
    assert captured("train-head").head.head == "logreg"
    write(tmp_path / "mine.toml", "limit = 20")
    assert captured("--config", "mine.toml", "train-head").images.limit == 20
    assert captured("--config", "mine.toml", "train-head").head.head == "gap", "one file, not two"
    assert captured("--config", "pyproject.toml", "train-head").images.limit == 30
    assert captured("--config", os.devnull, "train-head").images.limit is None, "all files put aside"


def test_what_is_typed_wins_over_a_commands_table_and_that_over_keys_above_it(captured: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.toml", "limit = 40\n[train-head]\nlimit = 20\n")
    assert captured("--config", file, "train-head", "--limit", "10").images.limit == 10
    assert captured("--config", file, "train-head").images.limit == 20
    assert captured("--config", file, "freeze").images.limit == 40


IMPLIED = """
[tool.icebox]
data-dir = "theirs"
limit = 30
scheduler = "tcp://127.0.0.1:9"
image-root = "/etc"
weights = "theirs.h5"
[tool.icebox.train-head]
like = "theirs"
epochs = 3
[tool.icebox.cache.gc]
yes = true
unfinished = true
dataset = ["digits"]
[tool.icebox.serve]
host = "0.0.0.0"
top = 3
"""


def test_a_file_that_was_not_named_does_not_decide_what_reaches_beyond_the_folder(
    captured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "pyproject.toml", IMPLIED)
    found: TrainRequest = captured("train-head")
    assert (found.images.limit, found.head.settings["epochs"]) == (30, 3), "what is harmless is taken"
    assert (found.images.image_root, found.features.weights) == (None, "auto")
    assert captured.found[0][0].root != Path("theirs")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "notice: not taken from pyproject.toml, as it was not named on the command line: data-dir, image-root, like, "
        "weights; to take them, put --config pyproject.toml before the command"
    )
    assert len(said) == 2
    with pytest.raises(IceboxError, match="no run named 'theirs'"):
        cli._command()(["--config", "pyproject.toml", "train-head"], standalone_mode=False, obj=[])


def test_a_file_that_was_not_named_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("pipeline.api.cache._retention", lambda _, given: seen.append(given["dataset"] or []) or 1 / 0)
    write(tmp_path / "pyproject.toml", IMPLIED)
    with pytest.raises(ZeroDivisionError):
        cli.main(["--data-dir", "here", "cache", "gc"])
    assert "dataset, image-root, unfinished, weights, yes" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main(["--data-dir", "here", "--config", "pyproject.toml", "cache", "gc"])
    assert capsys.readouterr().err == ""
    assert seen == [[], ["digits"]]


def test_every_option_that_names_a_file_needs_a_file_that_was_named() -> None:
    """Also one that is added later."""
    for name, command in config._commands(cli._command()):
        for key, option in config._options(command).items():
            if "path" in str(option.bare_type).lower() or "file" in str(option.metavar).lower():
                assert config._is_barred(name, key, "a.keras"), f"{name} --{key}"


def test_a_file_that_was_not_named_may_name_a_backbone_of_the_table_but_no_file(
    captured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '[tool.icebox]\nbackbone = "{}"\ninput-size = 96\nscaling = "x/255"\n'
    write(tmp_path / "pyproject.toml", text.format("mobilenet_v2"))
    features = captured("train-head").features
    assert (features.backbone, features.input_size, features.scaling) == ("mobilenet_v2", 96, "x/255")
    assert "not taken" not in capsys.readouterr().err
    write(tmp_path / "pyproject.toml", text.format("theirs.keras"))
    assert captured("train-head").features.backbone is None
    assert "not taken from pyproject.toml, as it was not named on the command line: backbone" in capsys.readouterr().err
    named = captured("--config", "pyproject.toml", "train-head").features
    assert named.backbone == str(tmp_path / "theirs.keras")


def test_every_option_that_needs_a_file_that_was_named_stands_in_the_docs() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    section = page.partition("## Options from a file that was not named")[2].partition("\n## ")[0]
    for key in (*config._ONLY_IF_NAMED, "backbone"):
        assert f"`{key}`" in section, key


def test_keys_and_values_are_as_people_write_them(
    captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_picture(tmp_path / "photos" / "cats" / "1.png", 1)
    text = '\ufeffdata_dir = "~/mine"\ndataset = "~/photos"\nweights = "~/w.h5"\n[train_head]\nhidden = []\n'
    found: TrainRequest = captured("--config", write(tmp_path / "mine.toml", text), "train-head")
    assert captured.found[0][0].root == tmp_path / "mine"
    assert found.images.dataset == str(tmp_path / "photos")
    assert found.features.weights == str(tmp_path / "w.h5")
    assert found.head.settings["hidden"] == ()
    seen = []
    monkeypatch.setattr("pipeline.training.sweep.sweep.sweep", lambda *given, **more: seen.append(given[2]) or 1 / 0)
    table = '[sweep]\nhead = ["gap"]\n[sweep.set]\nlearning_rate = [1e-3, 1e-4]\nhidden = [64, [32, 16]]\n'
    with pytest.raises(ZeroDivisionError):
        cli.main(["--config", str(write(tmp_path / "mine.toml", table)), "sweep"])
    assert {spec.settings["hidden"] for spec in seen[0].specs} == {(64,), (32, 16)}
    assert len(seen[0].specs) == 4


def test_paths_mean_the_same_from_anywhere(captured: Any, tmp_path: Path) -> None:
    assert captured("train-head", "--weights", "w.h5").features.weights == str(tmp_path / "w.h5")
    assert captured("finetune", "--weights", "w.h5").features.weights == str(tmp_path / "w.h5")
    assert captured("train-head", "--weights", "../w.h5").features.weights == str(tmp_path / "../w.h5")
    assert captured("train-head", "--weights", "untrained:3").features.weights == "untrained:3"


def test_views_of_cached_rows_are_no_warps_of_a_full_model(captured: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.toml", "views = 3\naugment = { rotation = 10 }\n[finetune]\nfrom-cache = true\n")
    assert captured("--config", file, "train-head").views.recipe.rotation == 10
    assert captured("--config", file, "train-head", "--views", "1").views.count == 1
    assert captured("--config", file, "freeze").augment is None
    tuned: FinetuneRequest = captured("--config", file, "finetune")
    assert (tuned.from_cache, tuned.views.count) == (True, 1)
    images: FinetuneRequest = captured("--config", file, "finetune", "--no-from-cache", "--augment", "default")
    assert not images.from_cache
    assert images.augment is not None


def test_help_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pyproject.toml", "this is no TOML")
    assert cli.main(["train-head", "--help"]) == 0
    assert "Train a head from the cache" in capsys.readouterr().out
    assert cli.main(["cache", "ls"]) == 2


def test_settings_of_another_head_are_left_out_aloud(
    captured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mine.toml", "[train-head]\nepochs = 3\nC = [0.1, 1]\n")
    assert captured("--config", file, "train-head", "--head", "logreg").head.settings["C"] == (0.1, 1.0)
    assert "a logreg head has no epochs" in capsys.readouterr().err
    assert captured("--config", file, "train-head").head.settings["epochs"] == 3
    assert "a gap head has no C" in capsys.readouterr().err
    assert cli.main(["--config", str(file), "train-head", "--head", "logreg", "--patience", "3"]) == 2


def test_keys_above_all_tables_reach_no_command_that_means_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cache gc --dataset` removes what is not of that dataset."""
    seen = []
    monkeypatch.setattr("pipeline.api.cache._retention", lambda _, given: seen.append(given["dataset"] or []) or 1 / 0)
    file = write(tmp_path / "mine.toml", f'data-dir = "{tmp_path}"\ndataset = "digits"\n')
    with pytest.raises(ZeroDivisionError):
        cli.main(["--config", str(file), "cache", "gc"])
    with pytest.raises(ZeroDivisionError):
        cli.main(
            ["--config", str(write(file, f'data-dir = "{tmp_path}"\n{TEXT[TEXT.index("[cache") :]}')), "cache", "gc"]
        )
    assert seen == [[], ["digits", "cifar10"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "there is no option 'epoch'; did you mean epochs?"),
        ("[train-head]\nepochz = 3", "there is no option 'epochz' in [train-head]; did you mean epochs?"),
        ("[train-hed]\nepochs = 3", "did you mean train-head?"),
        ("[cache]\nyes = true", "there is no option 'yes' in [cache]"),
        ("[cache.gcc]\nyes = true", "did you mean gc?"),
        ("json = true", "there is no option 'json'"),
        ("train-head = 5", "train-head is a command, so it must be a table, found 5"),
        ("[[train_head]]\nepochs = 3", "train-head is a command, so it must be a table"),
        ('format = "onnx"', "there is no option 'format'; it belongs into [export]"),
        ('data_dir = ""', "data-dir must be a folder's name, found ''"),
        (f"x = {'[' * 3000}", "mine.toml: is no TOML"),
        ('precision = "float3"', "(in mine.toml)"),
        ('[train-head]\nepochs = "many"', "(in mine.toml)"),
        ("[train-head]\nepochs = true", "epochs takes a value, found true"),
        ("[train-head]\ntensorboard = 1", "tensorboard must be true or false, found 1"),
        ("data-dir = 3", "data-dir must be a folder's name"),
        ("x = ", "mine.toml: is no TOML"),
        ("x = '\udcff'", "mine.toml: is no TOML"),
    ],
)
def test_a_file_that_says_what_nobody_knows_is_refused(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert cli.main(["--config", "mine.toml", "train-head"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = write(tmp_path / "mine.toml", "#" + "x" * 2**20)
    assert cli.main(["--config", str(large), "train-head"]) == 1
    assert "mine.toml: cannot be read (larger than 1,048,576 bytes)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_like_a_run_is_what_it_was_asked_for(kind: str, captured: Any, deployed: Deployed) -> None:
    run = deployed.run(kind)
    assert run.request is not None
    command = run.request.stage if isinstance(run.request, FinetuneRequest) else "train-head"
    again = captured("--data-dir", deployed.data, command, "--like", run.name)
    named = ("layer", "precision", "fit", "weights", "input_size")
    features = {name: getattr(run.base, name) for name in named}
    stored = not isinstance(run.request, FinetuneRequest) or run.request.from_cache
    features["storage"] = run.base.storage if stored else "auto"
    expected = replace(run.request, features=replace(run.request.features, **features))
    other = captured("--data-dir", deployed.data, command, "--like", run.name, "--limit", "20")
    if command == "freeze":  # all is frozen, whatever else is said
        expected, again, other = (replace(each, freeze_until="none") for each in (expected, again, other))
    assert again == expected
    assert other == replace(again, images=replace(again.images, limit=20))


def test_like_a_run_on_inception_names_no_network(captured: Any, deployed_inception: Deployed) -> None:
    run = deployed_inception.run("gap")
    assert run.request is not None
    again = captured("--data-dir", deployed_inception.data, "train-head", "--like", run.name)
    features = {name: getattr(run.base, name) for name in ("layer", "precision", "fit", "storage")}
    assert again == replace(run.request, features=replace(run.request.features, **features))


def test_like_wins_over_a_file_and_another_head_keeps_what_it_has(
    captured: Any, tmp_path: Path, deployed: Deployed, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mine.toml", "[train-head]\nepochs = 9\npatience = 4\n")
    like = ("--data-dir", deployed.data, "--config", file, "train-head", "--like", deployed.name("gap"))
    assert captured(*like).head.settings["epochs"] == 2
    logreg = captured(*like, "--head", "logreg")
    assert logreg.head.settings["class_weight"] == "none"
    assert "a logreg head has no" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_like_leaves_nothing_of_a_file(kind: str, captured: Any, tmp_path: Path, deployed: Deployed) -> None:
    """Not even where the run was asked for the default, or for nothing."""
    run = deployed.run(kind)
    command = run.request.stage if isinstance(run.request, FinetuneRequest) else "train-head"
    text = 'limit = 50\nviews = 2\nmax-pixels = 9999\nspace = "other"\n[train-head]\nfolds = 3\n'
    file = write(tmp_path / "mine.toml", text + '[finetune]\nfrom-cache = true\ninit = "best"\n')
    like = ("--data-dir", deployed.data, command, "--like", run.name)
    assert captured("--config", file, *like) == captured(*like)


def test_like_takes_the_weights_by_their_digest(captured: Any, deployed: Deployed) -> None:
    """`auto`, and a path, may mean others by now."""
    digest = f"sha256:{'ab' * 32}"
    run = deployed.run("gap")
    assert run.request is not None
    for stated in ("auto", "/somewhere/w.h5", "w.h5"):
        wanted = replace(run.request, features=replace(run.request.features, weights=stated))
        again = replace(run, base=replace(run.base, weights=digest), request=wanted, weights="w.h5")
        assert options_like(again, "train-head")["weights"] == digest
        assert options_like(again, "features")["weights"] == digest


def test_like_a_run_of_an_own_network_means_that_network(deployed: Deployed) -> None:
    """Its file may hold another network by now, and where its space alone was named, nobody said which file."""
    digest, run = f"sha256:{'ab' * 32}", deployed.run("gap")
    assert run.request is not None
    base = replace(run.base, backbone=f"own:{'cd' * 32}", weights=digest, scaling="127,128")
    choice = replace(run.request.features, weights="auto")
    for command in ("features", "train-head"):
        by_file = replace(
            run, base=base, request=replace(run.request, features=replace(choice, backbone="/w/own.keras"))
        )
        said = options_like(by_file, command)
        assert (said["backbone"], said["weights"], said["scaling"]) == ("/w/own.keras", digest, "127,128")
        of_space = replace(choice, space=base.directory, backbone=None)
        said = options_like(replace(run, base=base, request=replace(run.request, features=of_space)), command)
        assert said["space"] == base.directory
        assert said["weights"] == "auto"
        assert not {"backbone", "scaling", "input-size"} & said.keys()


def test_latest_is_the_last_stopped_run_of_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, stage in (("20260101-a", None), ("20260102-b", "finetune"), ("20260103-c", "freeze")):
        folder = tmp_path / "runs" / f".partial-{name}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.npz").touch()
        (folder / "request.json").write_text(json.dumps({"asked": {"stage": stage}}))
    with closing(Cache(tmp_path / "cache")) as cache:
        workspace = Workspace(tmp_path, cache)
        assert stopped_run(workspace, "latest", "train-head")[0] == "20260101-a"
        assert stopped_run(workspace, "latest", "finetune")[0] == "20260102-b"
    assert cli.main(["--data-dir", str(tmp_path), "train-head", "--resume", "20260103-c"]) == 1
    said = f"was begun by freeze; go on by: python cli.py --data-dir {tmp_path} freeze --resume 20260103-c"
    assert said in capsys.readouterr().err
    assert cli.main(["--data-dir", str(tmp_path), "runs", "ls"]) == 0
    listed = f"stopped, go on by: python cli.py --data-dir {tmp_path} finetune --resume 20260102-b"
    assert listed in capsys.readouterr().err


def test_like_a_run_of_another_kind_is_refused(deployed: Deployed, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert cli.main(["--data-dir", str(deployed.data), *arguments]) != 0
        return capsys.readouterr().err

    assert "goes with finetune" in said("train-head", "--like", deployed.name("finetune"))
    assert "goes with features or train-head" in said("freeze", "--like", deployed.name("gap"))
    assert "no run named 'nothing'" in said("train-head", "--like", "nothing")
    assert "leave out --like" in said("train-head", "--like", deployed.name("gap"), "--resume", "some")
