"""niwaki for PyTorch: measure and apply on modules, optimizers and their gradients."""

from niwaki.torch.arrays import fill_, to_arrays, to_stored
from niwaki.torch.attachment import attach
from niwaki.torch.attention import declare_attention
from niwaki.torch.bound import bound_
from niwaki.torch.clip import clip_
from niwaki.torch.handle import Handle
from niwaki.torch.logits import note_logits, watch_logits
from niwaki.torch.masks import Masks
from niwaki.torch.penalties import penalty
from niwaki.torch.prune import prune_
from niwaki.torch.quantize import quantize_
from niwaki.torch.recalibration import recalibrate_
from niwaki.torch.reconstruction import reconstruct_
from niwaki.torch.recovery import recover_
from niwaki.torch.resizing import resize_
from niwaki.torch.runner import runner_for
from niwaki.torch.sensitivity_curves import sensitivity
from niwaki.torch.shrinking import shrink

__all__ = [
    "Handle",
    "Masks",
    "attach",
    "bound_",
    "clip_",
    "declare_attention",
    "fill_",
    "note_logits",
    "penalty",
    "prune_",
    "quantize_",
    "recover_",
    "recalibrate_",
    "reconstruct_",
    "resize_",
    "runner_for",
    "sensitivity",
    "shrink",
    "to_arrays",
    "to_stored",
    "watch_logits",
]
