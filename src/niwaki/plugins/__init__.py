"""Where other people's tools meet niwaki: used if they are installed, never installed by it.

Sinks for ``nw.record.Recorder(path, sinks=[...])``: `TensorBoard`, `WandB`, `MLflow`.
"""

from niwaki.plugins.mlflow import MLflow
from niwaki.plugins.tensorboard import TensorBoard
from niwaki.plugins.wandb import WandB

__all__ = ["MLflow", "TensorBoard", "WandB"]
