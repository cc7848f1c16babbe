"""Fine-tuning as it is written in plain Keras: the whole model, `fit`, images from a folder.

    python benchmarks/peers/keras_finetune.py TRAIN_FOLDER mixed8 --weights FILE

Freezes the layers up to the one named and trains what follows with Adagrad 1e-4 in batches of 64, as Keras' own
guide to fine-tuning does. Prints one JSON object: the seconds of the last epoch, the first having compiled the graph.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any, cast

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras


class Clock(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.seconds = time.perf_counter() - self.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("layer")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    data: Any = keras.utils.image_dataset_from_directory(
        given.folder, image_size=(299, 299), batch_size=64, label_mode="categorical", verbose=False
    )
    images, classes = len(data.file_paths), len(data.class_names)
    data = data.map(lambda x, y: (x / 127.5 - 1, y)).prefetch(2)
    application: Any = keras.applications
    base = application.InceptionV3(include_top=False, weights=None, input_shape=(299, 299, 3))
    base.load_weights(given.weights)
    output = keras.layers.GlobalAveragePooling2D()(base.output)
    output = keras.layers.Dense(64, activation="relu")(output)
    model = keras.Model(base.input, keras.layers.Dense(classes, activation="softmax")(output))
    last = [layer.name for layer in base.layers].index(given.layer)
    for layer in base.layers[: last + 1]:
        layer.trainable = False
    model.compile(keras.optimizers.Adagrad(1e-4), loss="categorical_crossentropy", metrics=["accuracy"])
    clock = Clock()
    model.fit(data, epochs=given.epochs, callbacks=[clock], verbose=cast(Any, 0))
    print(json.dumps({"images": images, "seconds": round(clock.seconds, 2)}))


if __name__ == "__main__":
    main()
