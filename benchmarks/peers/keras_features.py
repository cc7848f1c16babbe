"""Feature extraction as it is written by hand in Keras: a folder, `model.predict`, one HDF5 file of float32.

    python benchmarks/peers/keras_features.py FOLDER --weights FILE --limit 500

Prints one JSON object: the images, but for those of the first batch, which compiles, and the seconds from its end to
the file written.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--limit", type=int, default=500)
    given = parser.parse_args()
    data: Any = keras.utils.image_dataset_from_directory(
        given.folder,
        image_size=(299, 299),
        batch_size=BATCH,
        labels=cast(Any, None),
        shuffle=True,
        seed=0,
        verbose=False,
    )
    data = data.take(given.limit // BATCH).map(lambda x: x / 127.5 - 1).prefetch(2)
    application: Any = keras.applications
    model = application.InceptionV3(include_top=False, weights=None, input_shape=(299, 299, 3))
    model.load_weights(given.weights)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        features = model.predict(data, callbacks=[clock], verbose=0)
        with h5py.File(Path(folder) / "features.h5", "w") as file:
            file.create_dataset("features", data=features)
        seconds = time.perf_counter() - clock.start
    print(json.dumps({"images": len(features) - BATCH, "seconds": round(seconds, 2), "shape": list(features.shape)}))


if __name__ == "__main__":
    main()
