"""Keras and skops are loaded without what only other programs use of them; what cannot be loaded is said."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, icebox, python, write_picture

from pipeline.core.lazy_imports import failed_import
from pipeline.core.native_stderr import hold_back

HAS = "[name for name in ('matplotlib', 'pandas', 'sklearn') if name in sys.modules]"


def test_what_keras_takes_up_for_others_is_not_loaded_and_can_be_afterwards() -> None:
    script = f"keras = import_keras()\nprint({HAS}, gc.isenabled())\nimport sklearn, pandas, matplotlib.pyplot\n"
    script += "print(int(keras.ops.sum(keras.layers.Dense(2)(keras.ops.zeros((3, 4))))))"
    assert python(script) == "[] True\n0"


def test_a_program_of_ones_own_gets_the_whole_of_keras() -> None:
    assert python(f"import_keras(whole=True)\nprint({HAS})") == "['matplotlib', 'pandas', 'sklearn']"


def test_other_threads_import_meanwhile_what_they_need() -> None:
    """The finder that hides it is in place while TensorFlow is loaded; another thread must not notice."""
    script = (
        "import threading\n"
        "loading = threading.Thread(target=import_keras)\n"
        "loading.start()\n"
        "while not any(type(finder).__module__ == 'pipeline.core.lazy_imports' for finder in sys.meta_path):\n"
        "    pass\n"
        "import matplotlib\n"
        "print('keras.src.wrappers' in sys.modules)\n"
        "loading.join()\n"
        "print('keras' in sys.modules)"
    )
    assert python(script) == "False\nTrue"


def test_skops_takes_no_other_frameworks_along() -> None:
    script = "from pipeline.training.heads import logreg\nlogreg._skops()\n"
    script += (
        "print([name for name in ('dask', 'torch', 'tensorflow') if name in sys.modules], 'sklearn' in sys.modules)"
    )
    assert python(script) == "[] True"


def fake(folder: Path, package: str, code: str) -> Path:
    """Lay a package of this name on the way of whoever has the folder on its path."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    return folder


ABORTS = """
import os
os.write(2, b"F0000 this library was compiled to use AVX instructions, but these aren't available\\n")
os.abort()
"""


@pytest.mark.parametrize(
    ("code", "ended_by", "words"),
    [
        (ABORTS, signal.SIGABRT, ["F0000 this library was compiled to use AVX", "what it printed stands above"]),
        ("import os\nos.kill(os.getpid(), 4)", signal.SIGILL, ["it printed nothing, as where the processor lacks"]),
        (
            "import os\nos.write(2, b'no libcuda\\n')\nraise ImportError('bad')",
            None,
            ["no libcuda\n", "ImportError: bad"],
        ),
    ],
)
def test_a_library_that_ends_the_process_while_it_is_loaded_is_heard(
    code: str, ended_by: int | None, words: list[str], tmp_path: Path
) -> None:
    env = environment(PYTHONPATH=f"{fake(tmp_path, 'tensorflow', code)}:{ROOT}")
    script = "from pipeline.backbone.keras_start import import_keras; import_keras()"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == (1 if ended_by is None else -ended_by)
    for each in words:
        assert each in done.stderr
    ended = "error: the process was ended while TensorFlow was being loaded; "
    assert (ended in done.stderr) == (ended_by is not None)


def test_a_library_that_ends_the_process_is_heard_before_its_children_end(tmp_path: Path) -> None:
    """As where it is the first process of a container, with which all others end."""
    child = tmp_path / "child"
    starts = f"""
import pathlib, subprocess
helper = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
pathlib.Path({str(child)!r}).write_text(str(helper.pid))
"""
    env = environment(PYTHONPATH=f"{fake(tmp_path, 'tensorflow', starts + ABORTS)}:{ROOT}")
    script = "from pipeline.backbone.keras_start import import_keras; import_keras()"
    try:
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)
    assert done.returncode == -signal.SIGABRT
    assert "F0000 this library was" in done.stderr and "what it printed stands above" in done.stderr


def test_what_is_printed_while_all_goes_well_is_not_seen(capfd: pytest.CaptureFixture[str]) -> None:
    with hold_back("something"):
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'hello')"], check=True)
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt), hold_back("something"):
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'hello')"], check=True)
        raise KeyboardInterrupt
    assert capfd.readouterr().err == "", "a person who stops it knows why"


NUMPYS = "IMPORTANT: PLEASE READ THIS\n\nand pages of advice"
TENSORFLOWS = "Traceback (most recent call last):\n  File x\nImportError: libcublas.so.12: {}\n\nFailed to load."
LACKS = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            f"raise ImportError({TENSORFLOWS.format(LACKS)!r})",
            f"(libcublas.so.12: {LACKS}); install libcublas.so.12, or",
        ),
        (f"raise ImportError({NUMPYS!r}) from ImportError('libblas.so: {LACKS}')", f"(libblas.so: {LACKS}); install"),
        ("raise RuntimeError('baseline:\\n(X86_V2)')", "(baseline: (X86_V2)); install the package anew"),
        (f"raise OSError('libnot.so.3: {LACKS}')", f"(libnot.so.3: {LACKS}); install libnot.so.3, or the package anew"),
    ],
)
def test_why_a_library_cannot_be_loaded(
    code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(fake(tmp_path, "surely_broken", code))
    monkeypatch.syspath_prepend(fake(tmp_path, "its_user", "import surely_broken"))
    with pytest.raises(Exception, match=r"\w") as caught:
        importlib.import_module("its_user")
    said = failed_import(caught.value)
    assert said is not None
    assert said.startswith("surely_broken cannot be loaded on this machine (")
    assert expected in said


def test_faults_of_our_own_are_no_failed_imports() -> None:
    def lacking_name() -> None:
        from pipeline.core.machine import nothing  # pyright: ignore  # noqa: F401

    for faulty in (lacking_name, lambda: importlib.import_module("pipeline.nothing"), lambda: 1 / 0):
        with pytest.raises(Exception, match=r"\w") as caught:
            faulty()
        assert failed_import(caught.value) is None


def test_a_machine_without_a_library_or_a_system_without_locks_is_told_in_one_line(tmp_path: Path) -> None:
    photo = write_picture(tmp_path / "photos" / "cats" / "1.png", 1)
    gl = fake(tmp_path / "gl", "cv2", f"def bootstrap():\n    raise ImportError('libGL.so.1: {LACKS}')\nbootstrap()\n")
    done = icebox(tmp_path / "data", "features", "--dataset", photo.parent.parent, "--json", PYTHONPATH=str(gl))
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"error: cv2 cannot be loaded on this machine (libGL.so.1: {LACKS}); install libGL.so.1 (" in done.err
    assert done.json["error"] == done.err.removeprefix("error: ").strip()
    for name, said in {"fcntl": "this system has no fcntl", "h5py": "the package h5py is not installed"}.items():
        (site := tmp_path / name).mkdir()
        (site / "sitecustomize.py").write_text(f"import sys\nsys.modules[{name!r}] = None\n")
        done = icebox(tmp_path / "data", "cache", "ls", PYTHONPATH=str(site))
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert said in done.err
