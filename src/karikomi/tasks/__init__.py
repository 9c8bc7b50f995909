"""Tasks: the protocol, loading by name, and the built-in tasks."""

from karikomi.tasks import cifar10 as _cifar10
from karikomi.tasks import digits as _digits
from karikomi.tasks import mnist as _mnist
from karikomi.tasks.loading import check_seed, configured, load, resolved
from karikomi.tasks.metrics import accuracy, is_share, mean_absolute_error, mean_squared_error
from karikomi.tasks.runner import (
    Arrays,
    Form,
    Framework,
    LearnedCodes,
    Phase,
    Runner,
    Training,
)
from karikomi.tasks.splits import Data, Inputs, Split
from karikomi.tasks.task import Recipe, Task, checked_data

del _cifar10, _digits, _mnist  # imported so that they register

__all__ = [
    "Arrays",
    "Data",
    "Form",
    "Framework",
    "Inputs",
    "LearnedCodes",
    "Phase",
    "Recipe",
    "Runner",
    "Split",
    "Task",
    "Training",
    "accuracy",
    "check_seed",
    "checked_data",
    "configured",
    "is_share",
    "load",
    "mean_absolute_error",
    "mean_squared_error",
    "resolved",
]
