"""Where other people's tools meet niwaki: used if they are installed, never installed by it.

Sinks for ``nw.record.Recorder(path, sinks=[...])``: `TensorBoard`, `WandB`, `MLflow`. Trainers:
`LightningCallback` for both packages of Lightning, `TransformersCallback` and `TransformersMixin` for the
Trainer of Hugging Face, `accelerate_clip_` for loops with accelerate. Nothing here imports a framework.
"""

from niwaki.plugins.accelerate import accelerate_clip_
from niwaki.plugins.lightning import LightningCallback
from niwaki.plugins.mlflow import MLflow
from niwaki.plugins.tensorboard import TensorBoard
from niwaki.plugins.transformers import TransformersCallback, TransformersMixin
from niwaki.plugins.wandb import WandB

__all__ = [
    "LightningCallback",
    "MLflow",
    "TensorBoard",
    "TransformersCallback",
    "TransformersMixin",
    "WandB",
    "accelerate_clip_",
]
