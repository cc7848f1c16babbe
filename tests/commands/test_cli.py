"""What the command line promises: exit codes, one JSON object, one line of error, speed of --help."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import warm
from cached import fill, listed, write_images
from conftest import ROOT, Finished, command_line, environment, icebox, picture, wait_until, write_picture
from deployed import Deployed
from own_networks import tiny_options
from PIL import Image

import cli
from pipeline.cache.workspace import Workspace
from pipeline.commands.shared import called
from pipeline.core import console
from pipeline.core.utf8 import to_utf8

FEATURE_KEYS = {
    "rows", "computed", "reused", "duplicates", "quarantined", "seconds", "images_per_second", "space",
    "bytes_per_row", "weights", "precision",
}  # fmt: skip
HEAD_KEYS = {
    "run", "head", "stage", "accuracy", "val_accuracy", "train_rows", "test_rows", "classes", "seconds",
    "features_computed",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the features of 300 digits, by the tiny network."""
    data = tmp_path_factory.mktemp("data")
    done = icebox(data, "features", "--limit", "300", "--shard-rows", "96", *tiny_options(), "--json")
    assert done.code == 0, done.err
    assert done.json.keys() >= FEATURE_KEYS
    assert (done.json["rows"], done.json["computed"], done.json["precision"]) == (300, 300, "float32")
    assert done.json["images_per_second"] > 0
    assert re.search(r"300 images to compute: about \d+ s, [\d.,]+ [kGM]B on disk", done.err)
    return data


def tiny_head(data: Path, *options: str) -> Finished:
    """Train a head from the rows in `data`."""
    return icebox(data, "train-head", "--limit", "300", *tiny_options(), *options)


def test_without_any_option_the_features_are_inception_v3s(tmp_path: Path) -> None:
    """The real network, untrained as there is no net to fetch weights from; a head learns from its rows."""
    limited = ("--limit", "32", "--json")
    done = icebox(tmp_path, "features", *limited)
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["computed"], done.json["weights"]) == (32, 32, "untrained")
    assert "inception_v3-mixed10-" in done.json["space"]
    assert "UNTRAINED" in done.err
    trained = icebox(tmp_path, "train-head", "--head", "logreg", *limited)
    assert (trained.code, trained.json["features_computed"]) == (0, 0), trained.err


def assert_one_line(done: Finished, code: int, *words: str) -> None:
    assert done.code == code, done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in last


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("logreg", ("--C", "0.5")),
        ("gap", ("--epochs", "30")),
        ("flatten", ("--epochs", "8", "--hidden", "64", "--dropout", "0")),
    ],
)
def test_each_head_trains_from_the_cache(data: Path, head: str, options: tuple[str, ...]) -> None:
    done = tiny_head(data, "--head", head, *options, "--json")
    assert done.code == 0, done.err
    assert done.json.keys() >= HEAD_KEYS
    assert (done.json["head"], done.json["stage"], done.json["features_computed"]) == (head, "head", 0)
    assert done.json["accuracy"] > 0.5, "ten classes, so far above chance"
    run = data / "runs" / done.json["run"]
    assert json.loads((run / "run.json").read_text())["head"]["head"] == head
    listed = icebox(data, "runs", "ls", "--json").json["runs"]
    assert done.json["run"] in [each["run"] for each in listed]


@pytest.fixture(scope="module")
def own(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A data directory with rows and runs that may be changed."""
    return replace(deployed, data=shutil.copytree(deployed.data, tmp_path_factory.mktemp("own") / "data"))


SHORT = ("--epochs", "1", "--batch-size", "8")


@pytest.mark.parametrize(
    "command",
    [
        ("train-head", "--head", "gap", *SHORT),
        pytest.param(("train-head", "--head", "flatten", "--hidden", "4", *SHORT), marks=pytest.mark.long),
        ("finetune", "--from-cache", "--freeze-until", "middle", *SHORT),
        pytest.param(("freeze", *SHORT), marks=pytest.mark.long),
        ("sweep", "--head", "logreg", "--set", "C=0.01,1"),
        ("evaluate", "finetune"),
        ("export", "gap", "--format", "keras"),
    ],
    ids=lambda command: "-".join(command[:3]),
)
def test_a_command_starts_from_nothing(own: Deployed, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Most tests fork a process in which all is imported; what a command imports, and in which order, this shows."""
    name, *options = command
    if name in ("evaluate", "export"):
        options = [own.name(options[0]), *options[1:]]
        options += ["--out", str(tmp_path / "out.keras")] if name == "export" else []
    else:
        options += ["--dataset", str(own.photos), *tiny_options()]
    done = icebox(own.data, name, *options, "--json", COLUMNS="200")
    assert done.code == 0, done.err
    assert done.json
    assert not re.search(r"oneDNN|cuda|TF-TRT|cpu_feature_guard|Traceback|Warning", done.err), done.err


def test_settings_a_head_does_not_have_are_wrong_usage(data: Path) -> None:
    assert_one_line(icebox(data, "train-head", "--head", "logreg", "--epochs", "3"), 2, "logreg", "epochs")
    assert_one_line(icebox(data, "train-head", "--head", "gap", "--C", "3"), 2, "gap head has no C")
    assert_one_line(icebox(data, "train-head", "--dropout", "1.5"), 2, "--dropout", "1.5")


def test_missing_rows_name_the_command_that_makes_them(data: Path) -> None:
    done = icebox(data, "train-head", "--head", "logreg", *tiny_options(), "--json")
    assert_one_line(done, 1, "1,497 of 1,797 images", f"cli.py --data-dir {data} features --dataset digits")
    assert "1,497 of 1,797" in done.json["error"]
    other = tiny_head(data, "--head", "logreg", "--layer", "middle", "--fit", "pad")
    assert_one_line(other, 1, "300 of 300", "features --dataset digits --limit 300", "--layer middle", "--fit pad")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("features", "--dataset", "digit"), 1, ("did you mean digits",)),
        (("features", "--dataset", "no/such/folder"), 1, ("no/such/folder",)),
        (("features", "--limit", "0"), 2, ("--limit",)),
        (("features", "--limt", "3"), 2, ("--limit",)),
        (("featurs",), 2, ("features",)),
        (("features", "--precision", "int8"), 2, ("bfloat16",)),
        (("features", "--weights", "nothing.h5", "--limit", "310"), 1, ("nothing.h5", "untrained")),
        (("features", "--weights", "untrained:x"), 2, ("untrained:SEED",)),
        (("features", "--layer", "mixed11", "--limit", "5"), 1, ("mixed11", "mixed10")),
        (("features", "--space", "none-such"), 1, ("none-such", "own_")),
        (("features", "--archive", "README.md"), 2, ("--archive",)),
        (("features", "--max-bad", "2"), 2, ("--max-bad",)),
        (("train-head", "--head", "forest"), 2, ("logreg",)),
        (("cache",), 2, ("command",)),
    ],
)
def test_mistakes_get_one_line_and_their_exit_code(
    data: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    done = icebox(data, *arguments, "--json") if arguments != ("cache",) else icebox(data, *arguments)
    assert_one_line(done, code, *words)
    if arguments != ("cache",):
        assert done.json.keys() == {"error"}


def write_mixture(folder: Path) -> dict[str, str]:
    """Write ten files, good and bad, and return the names of the bad ones with a word of the reason."""
    photo, good = folder / "photo", write_picture(folder / "photo" / "good.jpg", 1, height=300, width=400)
    data = good.read_bytes()
    (photo / "half.jpg").write_bytes(data[: len(data) // 2])
    (photo / "empty.jpg").write_bytes(b"")
    (photo / "text.png").write_text("this is no picture")
    drawn = folder / "drawn"
    drawn.mkdir()
    cv2.imwrite(str(drawn / "deep.png"), picture(2).astype(np.uint16) * 257)
    cv2.imwrite(str(drawn / "grey.png"), picture(3, channels=1))
    cv2.imwrite(str(drawn / "alpha.png"), picture(4, channels=4))
    Image.fromarray(picture(5)).convert("CMYK").save(drawn / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture(6)).save(drawn / "turned.jpg", exif=turned)
    (drawn / "bomb.png").write_bytes(small_bomb())
    return {
        "photo/half.jpg": "cut short",
        "photo/empty.jpg": "empty",
        "photo/text.png": "not an image",
        "drawn/bomb.png": "20000 x 20000",
    }


def small_bomb() -> bytes:
    """A PNG whose header claims 20,000 x 20,000 pixels, in a few kilobytes."""
    packer, packed = zlib.compressobj(9), b""
    for _ in range(20_000):
        packed += packer.compress(bytes(2501))
    body = packed + packer.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", body), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts
    )


def test_bad_images_are_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    bad = write_mixture(tmp_path / "mixture")
    command = ("features", "--dataset", tmp_path / "mixture", *tiny_options())
    done = icebox(tmp_path / "data", *command, "--json")
    assert done.code == 3
    assert (done.json["rows"], done.json["quarantined"], done.json["images"]) == (6, 4, 10)
    reasons = {each["path"]: each["reason"] for each in done.json["quarantined_images"]}
    assert reasons.keys() == bad.keys()
    for name, word in bad.items():
        assert word in reasons[name]
        assert f"quarantined {name}: {reasons[name]}" in done.err
    assert icebox(tmp_path / "data", *command, "--max-bad", "0.39").code == 3
    assert icebox(tmp_path / "data", *command, "--max-bad", "0.4").code == 0


def test_files_passed_over_are_said(tmp_path: Path) -> None:
    write_picture(tmp_path / "mixed" / "a" / "1.png", 1)
    write_picture(tmp_path / "mixed" / "b" / "2.png", 2)
    (tmp_path / "mixed" / "a" / "notes.txt").write_text("hello")
    done = icebox(tmp_path / "data", "features", "--dataset", tmp_path / "mixed", *tiny_options())
    assert done.code == 0
    assert "passed over" in done.err
    assert ".txt 1" in done.err


NEITHER = (
    ("features",), ("train-head", "--head", "logreg"), ("freeze",), ("finetune",), ("sweep",), ("doctor",),
    ("cache", "explain"), ("cache", "export", "a.h5"), ("cache", "gc", "--dry-run"),
)  # fmt: skip


@pytest.mark.parametrize("command", NEITHER, ids=" ".join)
def test_splits_beside_classes_are_refused_by_every_command(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png", "more/5.png"):
        write_picture(tmp_path / "mixed" / name, seed=1)
    monkeypatch.chdir(tmp_path)
    dataset = ["mixed"] if command == ("doctor",) else ["--dataset", "mixed"]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert cli.main(["--data-dir", "data", *command, *dataset]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "found both: test/, train/ with class folders, beside more/ with" in line
    assert "manifest" in line and not (tmp_path / "data" / "runs").exists()


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = ("tensorflow", "keras", "sklearn", "cv2", "h5py", "numpy", "matplotlib", "dask")
    script = f"import sys, cli; cli.main(['--help']); print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "train-head" in done.stdout


def test_logreg_and_listing_start_no_tensorflow(data: Path) -> None:
    logreg = ("train-head", "--head", "logreg", "--limit", "300", *tiny_options())
    lines = [command_line(data, *arguments)[2:] for arguments in (logreg, ("cache", "ls"), ("weights",))]
    script = (
        "import json, sys, cli\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    if cli.main(line) or 'tensorflow' in sys.modules:\n"
        "        sys.exit(' '.join(line))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_summaries_are_for_people(data: Path) -> None:
    assert tiny_head(data, "--head", "logreg", "--C", "0.5").code == 0
    shown = icebox(data, "evaluate", "latest").err
    assert re.search(r"^accuracy interval +0\.\d{3} … [01]\.\d{3}$", shown, re.MULTILINE)
    explained = icebox(data, "cache", "explain", "--limit", "300", *tiny_options()).err.splitlines()
    assert explained[-1].split() == ["cached", "300"], "no empty table of images that lack rows"


def test_what_only_lists_makes_no_cache(tmp_path: Path) -> None:
    for arguments in (("runs", "ls"), ("cache", "ls"), ("cache", "quarantine"), ("report", "--compare")):
        icebox(tmp_path, *arguments)
        assert list(tmp_path.iterdir()) == [], arguments


def test_runs_of_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for number, (folder, classes) in enumerate((("pets", ("cat", "dog")), ("pond", ("frog", "toad")))):
        for label in classes:
            for i in range(20):
                write_picture(tmp_path / folder / "images" / label / f"{i}.png", seed=1000 * number + i)
    data, names = tmp_path / "data", list[str]()
    for folder in ("pond", "pets"):
        images = tmp_path / folder / "images"
        assert icebox(data, "features", "--dataset", images, *tiny_options()).code == 0
        trained = icebox(data, "train-head", "--dataset", images, "--head", "logreg", *tiny_options(), "--json")
        names.append(trained.json["run"])
    table = icebox(data, "runs", "ls").err.splitlines()
    assert [line.split()[2] for line in table] == ["dataset", "pond/images", "pets/images"]
    listed = icebox(data, "runs", "ls", "--json").json["runs"]
    assert [(each["run"], each["dataset"]) for each in listed] == [(name, "images") for name in names]
    assert [each["dataset_path"] for each in listed] == [str(tmp_path / f / "images") for f in ("pond", "pets")]
    told = icebox(data, "predict", "best", tmp_path / "pets" / "images" / "cat" / "0.png", "--json").json
    assert (told["runs"], told["classes"]) == ([names[1]], ["cat", "dog"])
    assert icebox(data, "report", "--compare", "--json").json["runs"] == 1
    (tmp_path / "link").symlink_to("pets")
    out = tmp_path / "kept" / "here"
    again = icebox(data, "evaluate", "latest", "--dataset", tmp_path / "link" / "images", "--out", out, "--json")
    own = icebox(data, "evaluate", "latest", "--json").json
    assert (again.json["split"], again.json["images"], again.json["path"]) == ("test", own["images"], str(out))
    assert again.json["left_out"] == 40 - own["images"]
    assert f"{again.json['left_out']} of these 40 images were trained on and are left out" in again.err


def test_wrong_usage_is_told_with_what_was_found(tmp_path: Path) -> None:
    assert_one_line(icebox(tmp_path, "features", "--data-dir", "x"), 2, "--data-dir stands before the command")
    assert_one_line(icebox(tmp_path, "--limit", "3", "features"), 2, "options of a command stand behind it")
    assert_one_line(icebox(tmp_path, "train-head", "--epochs", "3x"), 2, "'--epochs': ", ", found '3x'")
    assert_one_line(icebox(tmp_path, "train-head", "--limit=-5"), 2, "'--limit': ", "'-5'")
    assert_one_line(icebox(tmp_path, "train-head", "--memory", "1e400"), 2, "--memory must be a size", "'1e400'")
    assert_one_line(icebox(tmp_path, "features", "--weights", f"untrained:{'9' * 19}"), 2, "at most 18 digits")
    assert_one_line(icebox(tmp_path, "train-head", "--epochs"), 2, "'--epochs' requires an argument")
    assert_one_line(icebox(tmp_path, "cache"), 2, "There are: ls, explain, verify")
    assert_one_line(icebox(tmp_path, "train-head", "--head", "gpa"), 2, "'--head': 'gpa' is not one of 'flatten'")


@pytest.mark.parametrize(("target", "code"), [(">/dev/full", 1), (">&-", 0)])
def test_an_output_that_takes_nothing_is_one_line(tmp_path: Path, target: str, code: int) -> None:
    line = f"{shlex.join(command_line(tmp_path, 'cache', 'ls', '--json'))} {target}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == ("error: [Errno 28] No space left on device\n" if code else "")


# Each is a program from its start; the second, which the third contains, is left to --all.
@pytest.mark.parametrize("closed", ["2>&-", pytest.param("<&- 2>&-", marks=pytest.mark.long), "<&- 2>&- >out"])
def test_streams_that_are_closed_hinder_nobody(tmp_path: Path, photos: Path, closed: str) -> None:
    """Not even while Keras is loaded, which works on what native libraries see of stderr."""
    command = command_line(tmp_path / "data", "features", "--dataset", photos, *tiny_options(), "--json")
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(command)} {closed}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
    )
    out = (tmp_path / "out").read_text() if ">out" in closed else done.stdout
    assert (done.returncode, done.stderr, json.loads(out)["computed"]) == (0, "", 12)


def test_it_is_named_as_it_can_be_called_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "cli.py"), "features"])
    monkeypatch.chdir(ROOT)
    assert called("cli.py") == ["python", "cli.py"]
    monkeypatch.chdir(tmp_path)
    assert called("cli.py") == ["python", str(ROOT / "cli.py")]
    assert called("icebox") == ["icebox"]


def test_ctrl_c_before_the_command_has_begun_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(cli, "_command", lambda: signal.raise_signal(signal.SIGINT))
    try:
        assert cli.main(["runs", "ls"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "error: stopped; to go on, run the same command again\n"


def test_without_the_packages_one_line_says_where_they_come_from() -> None:
    bare = [sys.executable, "-S", str(ROOT / "cli.py"), "features"]
    done = subprocess.run(bare, capture_output=True, text=True, env=environment(PYTHONPATH=""))
    assert_one_line(Finished(done.returncode, done.stdout, done.stderr), 1, "make setup", "activate")


def test_cache_ls_counts(data: Path) -> None:
    listed = icebox(data, "cache", "ls", "--json").json
    assert [(space["spec"]["layer"], space["rows"]) for space in listed["spaces"]] == [("top", 300)]
    shards = list(data.glob("cache/*/shards/*.h5"))
    assert listed["bytes"] == sum(path.stat().st_size for path in shards)
    assert listed["shards"] == len(shards)


def test_doctor_tells_the_truth(data: Path) -> None:
    import importlib.metadata
    import os
    import platform

    told = icebox(data, "doctor", "--json").json
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert told["python"] == platform.python_version()
    assert told["tensorflow"] == importlib.metadata.version("tensorflow")
    assert 1 <= told["cores"] <= len(os.sched_getaffinity(0)) <= told["machine_cores"] == os.cpu_count()
    assert told["bfloat16"] == any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    assert told["cache_rows"] == 300
    assert told["machine_memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert told["available_memory"] <= told["memory"] <= told["machine_memory"]
    if told["tensorflow_gpus"] == 0:
        assert told["precision_auto"] == ("bfloat16" if told["bfloat16"] else "float32")


def test_weights_and_summary_answer(data: Path) -> None:
    assert icebox(data, "weights", "--weights", "untrained:3", "--json").json["identity"].endswith(":3")
    unknown = icebox(data, "weights", "--backbone", "mobilenet_2")
    assert (unknown.code, unknown.err) == (
        2,
        "error: no backbone 'mobilenet_2' (`backbones` lists them, your own is a .keras file); "
        "did you mean mobilenet_v2?\n",
    )
    told = icebox(data, "summary", "--head", "flatten", "--classes", "10", "--json").json
    assert told["head_parameters"] == 33_557_258
    assert [each["name"] for each in told["layers"] if each["cut"]][-11:] == [f"mixed{i}" for i in range(11)]


def test_the_data_directory_may_come_from_the_environment(data: Path) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "cache", "ls", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(ICEBOX_DATA=str(data)), check=True)
    assert json.loads(done.stdout)["rows"] >= 300


def test_the_constant_in_the_command_line_is_the_librarys() -> None:
    from pipeline.api import options
    from pipeline.dataset import remote
    from pipeline.extraction import compute
    from pipeline.images import decoding

    assert options.MAX_PIXELS == decoding.DEFAULT_MAX_PIXELS
    assert options.CONNECTIONS == remote.DEFAULT_CONNECTIONS
    assert (compute.DEFAULT_SHARD_ROWS, compute.DEFAULT_BATCH_SIZE) == (256, 32)


def test_one_broken_run_or_space_does_not_hide_the_others(tmp_path: Path) -> None:
    write_picture(tmp_path / "two" / "a" / "1.png", 1)
    write_picture(tmp_path / "two" / "b" / "2.png", 2)
    assert icebox(tmp_path, "features", "--dataset", tmp_path / "two", *tiny_options()).code == 0
    (good,) = (tmp_path / "cache").glob("*/space.json")
    for name, text in (("bad", "{"), ("moved", good.read_text()), ("worse", '{"spec": {}, "made_by": []}')):
        (tmp_path / "cache" / name).mkdir()
        (tmp_path / "cache" / name / "space.json").write_text(text)
    listed = icebox(tmp_path, "cache", "ls", "--json")
    assert [space["space"] for space in listed.json["spaces"]] == [good.parent.name]
    assert all(f"the space {name} is passed over" in listed.err for name in ("bad", "moved", "worse"))
    for name, text in (("cut", "{"), ("empty", '{"format": "icebox-run", "version": 1}')):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(text)
    runs = icebox(tmp_path, "runs", "ls", "--json")
    assert runs.json["runs"] == []
    assert all(str(tmp_path / "runs" / name) in runs.err for name in ("cut", "empty"))


def test_a_batch_systems_stop_is_as_clean_as_ctrl_c(data: Path, tmp_path: Path) -> None:
    command = ("train-head", "--head", "gap", "--limit", "300", "--epochs", "100000", *tiny_options(), "--json")
    out, err = tmp_path / "out", tmp_path / "err"
    with warm.Process(command_line(data, *command)[2:], env=environment(), stdout=out, stderr=err) as process:
        kept = wait_until(lambda: list((data / "runs").glob(".partial-*/checkpoint.npz")), 300, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 1
    said, told = out.read_text(), err.read_text()
    (partial,) = (each.parent for each in kept)
    assert "Traceback" not in told, told
    line = f"python cli.py --data-dir {data} train-head --resume {partial.name.removeprefix('.partial-')}"
    assert json.loads(said) == {"error": f"stopped; what was trained so far is kept; go on by: {line}"}, told
    assert (partial / "checkpoint.npz").exists()


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    with console.progress("training gap", 100, "epochs") as advance:
        for _ in range(29):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "training gap: 10 of 100 epochs, 1.0/s, 90 s left",
        "training gap: 20 of 100 epochs, 1.0/s, 80 s left",
    ]


def test_a_stop_that_native_code_turns_into_an_error_is_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error
        return 0

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(cli, "_run", interrupted)
    try:
        assert cli.main(["train-head"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "error: stopped; to go on, run the same command again\n"


ANY_NAMES = (
    "odd\udcff", "odd\\udcff", "two\nlines", "tab\t", "quo\"te's", "a,b", "=1+1", "Case", "case", "x" * 251,
    "-dash", " lead",
)  # fmt: skip


def test_any_name_that_a_file_system_takes_goes_through_every_command(workspace: Workspace, tmp_path: Path) -> None:
    """Of folder, classes and files; by rows that are in the cache."""
    photos = tmp_path / "odd\udcfe, 'photos'\n"
    write_images(photos, 9, ANY_NAMES[:8])
    for label in ANY_NAMES[:8]:
        for name, path in zip(ANY_NAMES, sorted((photos / label).iterdir()), strict=False):
            path.rename(path.with_name(f"{name}.png"))
    fill(workspace, listed(photos))
    data = workspace.root
    trained = icebox(data, "train-head", "--dataset", photos, "--head", "logreg", "--C", "0.1", "--json")
    assert trained.code == 0, trained.err
    for command in (
        ("evaluate", "latest", "--dataset", photos, "--split", "all", "--json"),
        ("sweep", "--dataset", photos, "--head", "logreg", "--set", "C=0.01,0.1"),
        ("report", trained.json["run"]),
        ("doctor", photos),
    ):
        done = icebox(data, *command)
        assert done.code == 0, (command, done.err)
        assert "Traceback" not in done.err
    paths = {os.fsencode(path) for path in photos.rglob("*.png")}
    said = icebox(data, "predict", trained.json["run"], photos, "--csv").out
    rows = list(csv.DictReader(io.StringIO(said, newline="")))
    assert {os.fsencode(row["path"]) for row in rows} == paths
    assert {row["label"] for row in rows} <= set(ANY_NAMES[:8])
    exported = icebox(data, "cache", "export", tmp_path / "rows.h5", "--dataset", photos)
    assert exported.code == 0, exported.err
    with h5py.File(tmp_path / "rows.h5") as file:
        names: Any = file["class_names"]
        assert names.asstr()[:].tolist() == [to_utf8(name) for name in sorted(ANY_NAMES[:8])]
