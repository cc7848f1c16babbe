"""The training loop by itself: what it says of an epoch, and training in float16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

from pipeline.core.spec import HeadSpec
from pipeline.training.loop import TrainingContext, train

ROWS = np.random.default_rng(0).normal(size=(70, 4)).astype(np.float32)
LABELS = (ROWS[:, 0] > 0).astype(int)


class InOrder:
    """Batches of 32, 32 and 6."""

    def __len__(self) -> int:
        return 3

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, 70, 32):
            yield ROWS[start : start + 32], LABELS[start : start + 32]


def model(policy: str = "float32") -> Any:
    dense: Any = keras.layers.Dense
    first, second = (keras.initializers.GlorotUniform(seed) for seed in (1, 2))
    layers = [dense(8, "relu", kernel_initializer=first, dtype=policy), dense(2, "softmax", kernel_initializer=second)]
    made = keras.Sequential([keras.Input((4,)), *layers])
    made.build((None, 4))
    return made


def trained(made: Any, watch: TrainingContext | None = None, *, scale_loss: bool = False, **settings: Any) -> Any:
    spec = HeadSpec.make("gap", **{"epochs": 4, "learning_rate": 0.02, **settings})
    weights = np.array([1.0, 3.0], np.float32)
    return train(
        made, InOrder(), lambda: (1.0, 0.5), spec.settings, weights, watch or TrainingContext(), scale_loss=scale_loss
    )


def test_an_epochs_loss_and_accuracy_are_the_means_over_all_its_images() -> None:
    """With steps of no size every batch meets the same model, whose numbers are easily had."""
    made = model()
    said = np.asarray(made(ROWS))
    losses = -np.log(said[np.arange(70), LABELS]) * np.where(LABELS, 3, 1)
    history = trained(made, optimizer="sgd", learning_rate=1e-12, epochs=1).history
    assert history[0]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert history[0]["accuracy"] == pytest.approx((said.argmax(axis=1) == LABELS).mean())


def test_progress_goes_on_with_every_batch() -> None:
    steps: list[float] = []
    trained(model(), TrainingContext(steps.append))
    assert steps == [1 / 3] * 12


def test_small_gradients_survive_float16() -> None:
    exact, scaled = trained(model()), trained(model("mixed_float16"), scale_loss=True)
    for one, other in zip(exact.history, scaled.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
    assert scaled.history[-1]["loss"] < 0.9 * scaled.history[0]["loss"]
