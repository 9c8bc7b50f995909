"""Built-in metrics, and the one definition of a prediction and of targets that do not count."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument

CLASS_AXIS = 1
"""The axis of the classes in outputs (n, classes, ...), as in torch's ``cross_entropy``."""

IGNORED = -100
"""The target that counts in neither loss nor metric, as in torch's ``cross_entropy``."""

_THRESHOLD = 0.5

GOALS = {"accuracy": "max", "mean_squared_error": "min", "mean_absolute_error": "min"}
"""Built-in metric -> whether its higher (``"max"``) or its lower values (``"min"``) are better."""


def predictions(
    outputs: np.ndarray,
    targets: np.ndarray,
    *,
    class_axis: int = CLASS_AXIS,
    ignore_index: int = IGNORED,
    where: str = "accuracy",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the class with the largest output for each target, and which targets count.

    `outputs`: (n, classes, ...), the classes on `class_axis`; `targets`: classes 0..classes - 1 in
    the shape of the outputs without that axis. A target that equals `ignore_index` does not count.
    Where an output is NaN the prediction is -1, which is no class.

    Raises `InvalidArgument` for shapes that do not fit, and for a target that is no class.

    >>> found, counts = predictions(np.array([[1.0, 3.0], [5.0, 2.0]]), np.array([1, -100]))
    >>> found.tolist(), counts.tolist()
    ([1, 0], [True, False])
    """
    rank = np.ndim(outputs)
    known = isinstance(class_axis, int) and -rank <= class_axis < rank and class_axis % rank > 0
    shape = np.delete(outputs.shape, class_axis).tolist() if known else None
    if targets.dtype.kind not in "biu" or shape != list(targets.shape):
        raise InvalidArgument(
            "accuracy needs integer classes, and one output per class on the class axis",
            where=where,
            got=f"outputs {outputs.shape}, class axis {class_axis}, targets {targets.dtype} {targets.shape}",
            hint=_hint(outputs.shape, targets),
        )
    classes = outputs.shape[class_axis]
    counts = targets != ignore_index
    if classes < 2:
        raise InvalidArgument(
            "accuracy needs one output for each of two or more classes",
            where=where,
            got=f"outputs {outputs.shape}, class axis {class_axis}",
            hint="give the task a metric of its own: metric=function",
        )
    check_labels(targets, classes, ignore_index=ignore_index, where=where)
    found = np.argmax(outputs, axis=class_axis)
    # NumPy takes a NaN for the largest.
    return np.where(np.isnan(outputs).any(axis=class_axis), -1, found), counts


def check_labels(
    targets: np.ndarray, classes: int, *, ignore_index: int = IGNORED, where: str
) -> None:
    """Raise `InvalidArgument` for a target that is neither ignored nor one of so many classes."""
    strange = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if strange.any():
        raise InvalidArgument(
            "a target is no class of the outputs",
            where=where,
            got=targets[strange].flat[0],
            allowed=f"0..{classes - 1}, or the ignore_index {ignore_index}",
            hint=_label_hint(targets[targets != ignore_index], classes),
        )


def _label_hint(labels: np.ndarray, classes: int) -> str:
    if labels.min() == 1 and labels.max() == classes:
        return "the labels begin at 1: targets - 1 would fit"
    return "a label that does not count is the task's ignore_index="


def accuracy(
    outputs: np.ndarray,
    targets: np.ndarray,
    *,
    class_axis: int = CLASS_AXIS,
    ignore_index: int = IGNORED,
    where: str = "accuracy",
) -> float:
    """Return the share of targets that count whose class has the largest output; see `predictions`.

    Raises `InvalidArgument` where no target counts.

    >>> accuracy(np.array([[1.0, 3.0], [5.0, 2.0]]), np.array([1, 1]))
    0.5
    """
    found, counts = predictions(
        outputs, targets, class_axis=class_axis, ignore_index=ignore_index, where=where
    )
    if not counts.any():
        raise InvalidArgument(
            "no target counts: all equal the ignore_index", where=where, got=ignore_index
        )
    return float(np.mean(found[counts] == targets[counts]))


def mean_squared_error(
    outputs: np.ndarray, targets: np.ndarray, *, where: str = "mean_squared_error"
) -> float:
    """Return the mean of the squared differences; lower is better.

    Raises `InvalidArgument` for outputs and targets of different shapes, which would be broadcast.

    >>> mean_squared_error(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    2.0
    """
    return float(np.mean(np.square(_differences(outputs, targets, where))))


def mean_absolute_error(
    outputs: np.ndarray, targets: np.ndarray, *, where: str = "mean_absolute_error"
) -> float:
    """Return the mean of the absolute differences; lower is better.

    Raises `InvalidArgument` for outputs and targets of different shapes, which would be broadcast.

    >>> mean_absolute_error(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    1.0
    """
    return float(np.mean(np.abs(_differences(outputs, targets, where))))


def error_of_each(name: str, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return (n,) errors of the examples, whose mean is the built-in error of this name.

    >>> error_of_each("mean_absolute_error", np.array([[1.0], [3.0]]), np.array([[1.0], [1.0]]))
    array([0., 2.])
    """
    apart = _differences(outputs, targets, name)
    each = np.square(apart) if name == "mean_squared_error" else np.abs(apart)
    return each.reshape(len(targets), -1).mean(axis=1)


def _differences(outputs: np.ndarray, targets: np.ndarray, where: str) -> np.ndarray:
    if outputs.shape != targets.shape:
        raise InvalidArgument(
            "outputs and targets differ in shape",
            where=where,
            got=f"{outputs.shape} and {targets.shape}",
        )
    return outputs.astype(np.float64) - targets


def cosine(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean cosine between the outputs of examples and those of the dense network.

    >>> cosine(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 1.0]]))
    1.0
    """
    first, second = (a.reshape(len(a), -1).astype(np.float64) for a in (outputs, targets))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = np.sum(first * second, axis=1)
    # Two zeros are the same output.
    same = (norms == 0) & ~np.any(first != second, axis=1)
    return float(np.mean(np.where(same, 1.0, products / np.where(norms == 0, 1.0, norms))))


def categorical_accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of rows whose largest output is at the largest target, on the last axis (one-hot targets).

    >>> categorical_accuracy(np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([[0, 1], [0, 1]]))
    0.5
    """
    return float(np.mean(outputs.argmax(-1) == targets.argmax(-1)))


def binary_accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of outputs that are above 0.5 where the target is, as Keras has it.

    >>> binary_accuracy(np.array([[0.2], [0.8]]), np.array([1, 1]))
    0.5
    """
    found = outputs.reshape(-1) > _THRESHOLD
    return float(np.mean(found == (targets.reshape(-1) > _THRESHOLD)))


def sign_of(goal: str, *, where: str) -> int:
    """Return 1 for the goal ``"max"`` and -1 for ``"min"``: a metric times its sign is better when it is higher.

    >>> sign_of("min", where="here")
    -1
    """
    signs = {"max": 1, "min": -1}
    if goal not in signs:
        raise InvalidArgument("unknown goal", where=where, got=repr(goal), allowed="max, or min")
    return signs[goal]


def is_share(metric: object) -> bool:
    """Return whether a metric is a kind of accuracy by its name, which reports show in per cent."""
    return "accuracy" in str(metric).lower()


def _hint(shape: tuple[int, ...], targets: np.ndarray) -> str:
    fitting: list[Any] = [
        place
        for place in range(1, np.size(shape))
        if np.delete(shape, place).tolist() == list(targets.shape)
    ]
    if len(shape) > CLASS_AXIS and targets.shape == shape:
        return "give class numbers: targets.argmax(1)"
    if len(shape) > CLASS_AXIS and targets.shape == (shape[0], *shape[2:], 1):
        return "targets[..., 0] would fit"
    if targets.dtype.kind not in "biu" or not fitting:
        return "give the task a metric of its own: metric=function"
    return f"the task's class_axis={fitting[-1]} would fit"
