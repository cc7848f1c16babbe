"""Train a Keras classifier: epochs over batches, early stopping, best weights restored, resumable after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from pipeline.backbone.keras_start import KerasModel, import_keras
from pipeline.core.errors import CheckpointError, RunError
from pipeline.training.checkpoint import Checkpoint

Entry = dict[str, float]


class NotFiniteError(RunError):
    """The loss is NaN or infinite."""


class OtherCheckpointError(CheckpointError):
    """A checkpoint belongs to another model than the one to resume."""


class Batches(Protocol):
    """Batches of training data.

    The order must depend on the epoch's number alone, so that a resumed run sees the same batches.
    """

    def __len__(self) -> int: ...

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield inputs and labels (n,) int of epoch `number`, 1 being the first."""
        ...


@dataclass
class TrainingContext:
    """Callbacks of a training: progress in epochs, a recorder of history entries, and the checkpoint; all optional."""

    advance: Callable[[float], None] = lambda n: None
    note: Callable[[Entry], None] = lambda entry: None
    checkpoint: Checkpoint | None = None


@dataclass
class _State:
    """The state of a training, apart from the variables of model and optimizer."""

    epoch: int = 0
    waited: int = 0  # epochs since the best one
    best_loss: float = float("inf")
    history: list[Entry] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each epoch, without validation
    elapsed: float = 0.0  # seconds of all epochs, with validation


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training: one history entry per epoch, and times.

    `seconds_per_epoch` is the median without the first epoch, which compiles. `seconds_before` is the time of the
    epochs that an earlier process trained.
    """

    history: list[Entry]
    seconds_per_epoch: float
    seconds_before: float


def optimizer(settings: Mapping[str, Any], steps_per_epoch: int) -> Any:
    """Return the Keras optimizer for a spec's `settings`.

    With a schedule, "cosine" or "linear", the learning rate falls to 0 over all epochs. Weight decay is decoupled
    from the gradient (Loshchilov and Hutter 2019) and not applied to biases.
    """
    keras = import_keras()
    rate: Any = float(settings["learning_rate"])
    steps = settings["epochs"] * steps_per_epoch
    if settings["schedule"] == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    elif settings["schedule"] == "linear":
        rate = keras.optimizers.schedules.PolynomialDecay(rate, steps, end_learning_rate=0.0)
    kinds = {"adam": _adam(), "sgd": keras.optimizers.SGD, "adagrad": keras.optimizers.Adagrad}
    kinds["rmsprop"] = keras.optimizers.RMSprop
    momentum = {"momentum": 0.9} if settings["optimizer"] == "sgd" else {}
    made = kinds[settings["optimizer"]](rate, weight_decay=settings["weight_decay"] or None, **momentum)
    if settings["weight_decay"]:
        made.exclude_from_weight_decay(var_names=["bias"])
    return made


def _adam() -> Any:
    """Return Keras' Adam with the update in one TensorFlow kernel.

    For the 33 million weights of a `flatten` head, Keras' own update creates half a dozen arrays of that size per
    step. That takes most of the step's time and half a gigabyte.
    """
    keras = import_keras()
    import tensorflow as tf

    class Adam(keras.optimizers.Adam):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            at = self._get_variable_index(variable)
            step = tf.cast(self.iterations.value + 1, variable.dtype)
            rate, beta_1, beta_2 = (tf.cast(x, variable.dtype) for x in (learning_rate, self.beta_1, self.beta_2))
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=self._momentums[at].value.handle,
                v=self._velocities[at].value.handle,
                beta1_power=beta_1**step,
                beta2_power=beta_2**step,
                lr=rate,
                beta1=beta_1,
                beta2=beta_2,
                epsilon=tf.cast(self.epsilon, variable.dtype),
                grad=tf.cast(gradient, variable.dtype),
            )

    return Adam


def train(
    model: KerasModel,
    batches: Batches,
    measure: Callable[[], tuple[float, float]],
    settings: Mapping[str, Any],
    class_weights: np.ndarray,
    watch: TrainingContext,
    *,
    scale_loss: bool = False,
) -> TrainingResult:
    """Train `model`, a classifier ending in softmax, and leave it with the weights of least validation loss.

    Parameters
    ----------
    measure
        Function that returns loss and accuracy of the model on the validation split.
    class_weights
        (k,) float32, the weight of each class in the loss.
    scale_loss
        Scale the loss; needed in float16, where small gradients would vanish (Micikevicius et al. 2018).

    Raises
    ------
    NotFiniteError
        If the loss is NaN or infinite.
    OtherCheckpointError
        If the checkpoint does not fit the model.
    """
    keras = import_keras()
    steps = optimizer(settings, len(batches))
    model.compile(
        keras.optimizers.LossScaleOptimizer(steps) if scale_loss else steps,
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=settings["label_smoothing"]),
        metrics=["accuracy"],
        jit_compile=False,  # compiling takes longer than a small head trains
    )
    model.optimizer.build(model.trainable_variables)
    state, best = _restored(model, watch)
    seconds_before = state.elapsed
    while state.epoch < settings["epochs"] and not (settings["patience"] and state.waited >= settings["patience"]):
        state.epoch += 1
        start = time.perf_counter()
        loss, accuracy = _epoch(model, batches, state.epoch, class_weights, watch.advance)
        state.seconds.append(time.perf_counter() - start)
        val_loss, val_accuracy = measure()
        state.elapsed += time.perf_counter() - start
        if not np.isfinite([loss, val_loss]).all():
            if watch.checkpoint is not None:
                watch.checkpoint.remove()  # a run resumed from it would fail here again
            raise NotFiniteError(
                f"the loss is {loss:g}, on the validation split {val_loss:g}, after epoch {state.epoch}: "
                "lower --learning-rate"
            )
        names = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy")
        state.history.append(dict(zip(names, (state.epoch, loss, accuracy, val_loss, val_accuracy), strict=True)))
        state.waited += 1
        if val_loss < state.best_loss:
            state.best_loss, state.waited, best = val_loss, 0, _numbers(model.weights)
        watch.note(state.history[-1])
        if watch.checkpoint is not None:
            numbers = {"model": model.variables, "optimizer": model.optimizer.variables, "best": best}
            watch.checkpoint.save(numbers, asdict(state))
    _assign(model.weights, best)
    return TrainingResult(state.history, float(np.median(state.seconds[1:] or state.seconds)), seconds_before)


def _epoch(
    model: KerasModel, batches: Batches, epoch: int, class_weights: np.ndarray, advance: Callable[[float], None]
) -> tuple[float, float]:
    """Train one epoch; return the mean of the minimised loss, and the accuracy in training mode."""
    one_hot = np.eye(len(class_weights), dtype=np.float32)
    weighted = (class_weights != 1).any()
    sums, count = np.zeros(2), 0  # `train_on_batch` returns the means of one batch only
    for rows, labels in batches.epoch(epoch):
        weights = class_weights[labels] if weighted else None
        said = model.train_on_batch(rows, one_hot[labels], sample_weight=weights, return_dict=True)
        sums += len(labels) * np.array([said["loss"], said["accuracy"]])
        count += len(labels)
        advance(1 / len(batches))
    loss, accuracy = sums / count
    return float(loss), float(accuracy)


def _restored(model: KerasModel, watch: TrainingContext) -> tuple[_State, list[np.ndarray]]:
    found = watch.checkpoint.load() if watch.checkpoint is not None else None
    if found is None:
        return _State(), _numbers(model.weights)
    groups, saved = found
    try:
        state = _State(**saved)
        of = {"model": model.variables, "optimizer": model.optimizer.variables, "best": model.weights}
        for name, variables in of.items():
            if [each.shape for each in groups[name]] != [tuple(each.shape) for each in variables]:
                raise ValueError(f"{name} has other shapes")
    except (TypeError, KeyError, ValueError) as error:
        where = watch.checkpoint.path if watch.checkpoint else "the checkpoint"
        raise OtherCheckpointError(
            f"{where} is not of this head as it is trained here ({error}): another version may have written it, or a "
            "machine with a GPU where this one has none, or the other way round; go on there, or delete its folder and "
            "train anew"
        ) from error
    _assign(model.variables, groups["model"])
    rebuild_normalization(model)
    _assign(model.optimizer.variables, groups["optimizer"])
    for entry in state.history:
        watch.note(entry)
    watch.advance(state.epoch)
    return state, groups["best"]


def rebuild_normalization(model: KerasModel) -> None:
    """Update the normalisation layers of `model` after an assignment: they cache tensors derived from variables."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            rebuild_normalization(layer)
        elif hasattr(layer, "finalize_state"):
            layer.finalize_state()


def _numbers(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(variable.numpy()) for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
