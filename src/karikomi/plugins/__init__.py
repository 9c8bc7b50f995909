"""Integrations with trainers and trackers, used if they are installed, never installed by karikomi.

Sinks for ``kk.record.Recorder(path, sinks=[...])``: `TensorBoard`, `WandB`, `MLflow`. Trainers:
`LightningCallback` for both packages of Lightning, `TransformersCallback` and `TransformersMixin` for the
Trainer of Hugging Face, `accelerate_clip_` for loops with accelerate. `encoder_task`: a folder of transformers
with text as a task of `kk.compress`. Nothing here imports a framework.
"""

from karikomi.plugins.accelerate import accelerate_clip_
from karikomi.plugins.encoder_folder import encoder_task
from karikomi.plugins.lightning import LightningCallback
from karikomi.plugins.mlflow import MLflow
from karikomi.plugins.tensorboard import TensorBoard
from karikomi.plugins.transformers import TransformersCallback, TransformersMixin
from karikomi.plugins.wandb import WandB

__all__ = [
    "LightningCallback",
    "MLflow",
    "TensorBoard",
    "TransformersCallback",
    "TransformersMixin",
    "WandB",
    "accelerate_clip_",
    "encoder_task",
]
