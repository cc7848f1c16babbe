"""Feature extraction as it is written by hand in Keras: a folder, `model.predict`, one HDF5 file of float32.

    python benchmarks/peers/keras_features.py FOLDER --weights FILE --limit 500
    python benchmarks/peers/keras_features.py FOLDER --application MobileNetV2 --size 224
    python benchmarks/peers/keras_features.py FOLDER --model my.keras --scaling 127,128

Without --weights an application is as Keras draws it.
Prints one JSON object: the images, but for those of the first batch, which compiles, and the seconds from its end to
the file written.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import keras

BATCH = 32


class Clock(keras.callbacks.Callback):
    start = 0.0

    def on_predict_batch_end(self, batch: int, logs: object = None) -> None:
        if batch == 0:
            self.start = time.perf_counter()


def loaded(given: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model, and what scales its pixels."""
    models: Any = keras.models
    if given.model:
        mean, deviation = map(float, given.scaling.split(","))
        return models.load_model(given.model, compile=False), lambda x: (x - mean) / deviation
    builder = getattr(keras.applications, given.application)
    model = builder(include_top=False, weights=None, input_shape=(given.size, given.size, 3))
    if given.weights:
        model.load_weights(given.weights)
    return model, importlib.import_module(builder.__module__).preprocess_input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--application", default="InceptionV3", help="a builder of keras.applications")
    parser.add_argument("--size", type=int, default=299, help="of its images")
    parser.add_argument("--weights", help="a file of its weights")
    parser.add_argument("--model", help="a .keras file instead")
    parser.add_argument("--scaling", help="MEAN,STD in grey levels, of --model")
    parser.add_argument("--limit", type=int, default=500)
    given = parser.parse_args()
    model, scale = loaded(given)
    size = model.input_shape[1]
    data: Any = keras.utils.image_dataset_from_directory(
        given.folder,
        image_size=(size, size),
        batch_size=BATCH,
        labels=cast(Any, None),
        shuffle=True,
        seed=0,
        verbose=False,
    )
    data = data.take(given.limit // BATCH).map(scale).prefetch(2)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        features = model.predict(data, callbacks=[clock], verbose=0)
        with h5py.File(Path(folder) / "features.h5", "w") as file:
            file.create_dataset("features", data=features)
        seconds = time.perf_counter() - clock.start
    print(json.dumps({"images": len(features) - BATCH, "seconds": round(seconds, 2), "shape": list(features.shape)}))


if __name__ == "__main__":
    main()
