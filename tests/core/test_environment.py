"""What the libraries below are told from outside decides no number."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import ROOT, Finished, icebox, python, write_picture
from own_networks import tiny_options

from pipeline.core import environment

DECIDING = {
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_SET_ONEDNN_FPMATH_MODE": "BF16",
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2",
    "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_LEVEL": "UNSAFE_FORCE_ALL",
    "TF_DETERMINISTIC_OPS": "1",
    "TF_CUDNN_DETERMINISTIC": "1",
    "TF_FP16_CONV_USE_FP32_COMPUTE": "0",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "KERAS_MAX_EPOCHS": "1",
    "OPENCV_IO_MAX_IMAGE_PIXELS": "100",
    "OPENCV_CPU_DISABLE": "AVX2",
    "NPY_DISABLE_CPU_FEATURES": "AVX2",
    "SKLEARN_ASSUME_FINITE": "1",
    "SCIPY_ARRAY_API": "1",
    "HDF5_DRIVER": "core",
    "HDF5_VDS_PREFIX": "/elsewhere",
    "BLOSC_CLEVEL": "0",
}
HARMLESS = {
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "TF_GPU_ALLOCATOR": "cuda_malloc_async",
    "TF_NUM_INTRAOP_THREADS": "2",
    "TF2_BEHAVIOR": "1",  # as TensorFlow sets it for what is started after its import
    "TF_VAR_region": "of Terraform",
    "TF_CLI_CONFIG_FILE": "of Terraform",
    "CUDA_VISIBLE_DEVICES": "0",
    "KERAS_HOME": "/keras",
    "OMP_NUM_THREADS": "2",
    "OPENBLAS_CORETYPE": "Haswell",
    "OPENCV_LOG_LEVEL": "ERROR",
    "HDF5_USE_FILE_LOCKING": "FALSE",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {**DECIDING, **HARMLESS}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_what_decides_numbers_goes_and_nothing_else(
    variables: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    environment.isolate()
    assert {name: value for name, value in variables.items() if not name.startswith("PYTEST_")} == HARMLESS
    with caplog.at_level(logging.WARNING):
        environment.tell()
        assert all(f"{name}={value}" in caplog.text for name, value in DECIDING.items())
        caplog.clear()
        environment.tell()
    assert caplog.text == "", "once is enough"


def test_other_programs_keep_what_is_theirs(variables: dict[str, str]) -> None:
    """In a program of one's own nothing goes but what TensorFlow would read, which is only imported then."""
    environment.disregard("tensorflow")
    environment._taken.clear()
    assert {name for name in DECIDING if name in variables} == {
        "OPENCV_IO_MAX_IMAGE_PIXELS", "OPENCV_CPU_DISABLE", "NPY_DISABLE_CPU_FEATURES", "SKLEARN_ASSUME_FINITE",
        "SCIPY_ARRAY_API", "HDF5_DRIVER", "HDF5_VDS_PREFIX", "BLOSC_CLEVEL",
    }  # fmt: skip


def test_xla_is_still_told_where_cuda_lies(variables: dict[str, str]) -> None:
    variables["XLA_FLAGS"] = "--xla_cpu_enable_fast_math=true --xla_gpu_cuda_data_dir=/opt/cuda"
    environment.disregard("tensorflow")
    environment._taken.clear()
    assert variables["XLA_FLAGS"] == "--xla_gpu_cuda_data_dir=/opt/cuda"


@pytest.mark.parametrize(("most", "limit"), [(1000, 2**30), (2**40, 2**40)])
def test_opencv_decodes_what_max_pixels_allows(variables: dict[str, str], most: int, limit: int) -> None:
    environment.allow_pixels(most)
    assert int(variables["OPENCV_IO_MAX_IMAGE_PIXELS"]) == limit


def test_warnings_that_somebody_made_errors_are_warnings(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables["PYTHONWARNINGS"] = "error"
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        environment.isolate()
        environment._taken.clear()
        warnings.warn("of a library", UserWarning, stacklevel=1)
        warnings.warn("of a library", DeprecationWarning, stacklevel=1)
    assert [each.category for each in shown] == [UserWarning]
    assert sys.warnoptions == []
    assert "PYTHONWARNINGS" not in variables, "processes started from here"


def test_a_keras_json_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    settings = {"epsilon": 0.1, "floatx": "float16", "image_data_format": "channels_first", "backend": "jax"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    script = (
        "keras = import_keras()\n"
        "print(keras.config.epsilon(), keras.config.floatx(), keras.config.image_data_format(),"
        " keras.config.backend(), keras.config.dtype_policy().name, keras.layers.Dense(1).dtype_policy.name)\n"
        # The program around may have its own; that it has no longer is said.
        "import tensorflow as tf\n"
        "keras.config.set_dtype_policy('mixed_float16')\n"
        "tf.config.experimental.enable_tensor_float_32_execution(False)\n"
        "import logging; logging.disable()\n"
        "import_keras()\n"
        "print(keras.config.dtype_policy().name, tf.config.experimental.tensor_float_32_execution_enabled())"
    )
    assert python(script) == "1e-07 float32 channels_last tensorflow float32 float32\nfloat32 True"


def test_a_keras_json_that_makes_no_sense_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "keras.json").write_text('{"floatx": "float99"}')
    script = (
        "from pipeline.core.errors import IceboxError\n"
        "try:\n"
        "    import_keras()\n"
        "except IceboxError as error:\n"
        "    print(error)"
    )
    said = python(script)
    assert said.startswith("Keras does not start (Invalid `floatx`")
    assert said.endswith(f"correct or remove its settings in {tmp_path / 'keras.json'}")


def test_rows_heads_and_pictures_are_the_same_in_odd_surroundings(tmp_path: Path) -> None:
    """With a notebook's variables, another seed of Python's hashes, and matplotlib's settings in the current folder."""
    for i, split in enumerate(("train", "train", "val", "test") * 2):
        write_picture(tmp_path / "photos" / split / ("cats" if i < 4 else "dogs") / f"{i}.png", seed=i)
    (odd := tmp_path / "odd").mkdir()
    settings = "text.usetex: True\nfigure.dpi: 30\nsavefig.format: pdf\naxes.facecolor: red\nbackend: qtagg\n"
    (odd / "matplotlibrc").write_text(settings)
    names = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "OPENCV_IO_MAX_IMAGE_PIXELS", "MPLBACKEND")
    told = {name: {**DECIDING, **HARMLESS}[name] for name in names} | {"PYTHONWARNINGS": "error"}
    here, there = outputs(tmp_path, tmp_path / "one"), outputs(tmp_path, tmp_path / "other", cwd=odd, **told)
    for name in here:
        assert there[name] == here[name], name
    assert here["plots of the report"]


def outputs(root: Path, data: Path, cwd: Path = ROOT, **env: str) -> dict[str, Any]:
    """Return the rows of the photos, and the predictions and plots of heads trained on them, by commands so started."""

    def run(*command: str | Path) -> Finished:
        done = icebox(data, *command, cwd=cwd, **env)
        assert done.code == 0, done.err
        assert ("not heeded, as no variable decides numbers here" in done.err) == bool(env)
        return done

    asked = ("--dataset", root / "photos", *tiny_options(), "--storage", "float32")
    run("features", *asked)
    found: dict[str, Any] = {"rows": stored(data)}
    for head in (("logreg",), ("gap", "--epochs", "3", "--batch-size", "2")):
        folder = data / "runs" / run("train-head", *asked, "--head", *head, "--json").json["run"]
        found |= {f"{head[0]} {name}": (folder / name).read_bytes() for name in ("predictions.csv", "curves.png")}
    run("report", "latest")
    (page,) = (data / "reports").glob("*.html")
    return found | {"plots of the report": page.read_text("utf-8").count("<svg ")}


def stored(data: Path) -> dict[bytes, bytes]:
    rows = {}
    for path in data.glob("cache/*/shards/*.h5"):
        with h5py.File(path) as file:
            columns = (file[name][:] for name in ("key", "features", "pooled"))  # type: ignore[index]
            rows |= {key.tobytes(): row.tobytes() + mean.tobytes() for key, row, mean in zip(*columns, strict=True)}
    return rows
