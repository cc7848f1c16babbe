"""Keras and skops are loaded without what only other programs use of them, and nobody else is kept from that."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT, environment

HAS = "[name for name in ('matplotlib', 'pandas', 'sklearn') if name in sys.modules]"


def python(script: str) -> str:
    command = [sys.executable, "-c", f"import gc, sys\nfrom pipeline.keras_start import import_keras\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


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
        "while not any(type(finder).__module__ == 'pipeline.imports' for finder in sys.meta_path):\n"
        "    pass\n"
        "import matplotlib\n"
        "print('keras.src.wrappers' in sys.modules)\n"
        "loading.join()\n"
        "print('keras' in sys.modules)"
    )
    assert python(script) == "False\nTrue"


def test_skops_takes_no_other_frameworks_along() -> None:
    script = "from pipeline.heads import logreg\nlogreg._skops()\n"
    script += (
        "print([name for name in ('dask', 'torch', 'tensorflow') if name in sys.modules], 'sklearn' in sys.modules)"
    )
    assert python(script) == "[] True"
