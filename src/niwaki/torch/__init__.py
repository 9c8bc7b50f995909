"""niwaki for PyTorch: measure and apply on modules, optimizers and their gradients."""

from niwaki.torch.arrays import fill_, to_arrays, to_stored
from niwaki.torch.attachment import Handle, attach
from niwaki.torch.bound import bound_
from niwaki.torch.clip import clip_
from niwaki.torch.masks import Masks
from niwaki.torch.prune import prune_
from niwaki.torch.quantize import quantize_
from niwaki.torch.resizing import resize_
from niwaki.torch.runner import runner_for
from niwaki.torch.shrinking import shrink

__all__ = [
    "Handle",
    "Masks",
    "attach",
    "bound_",
    "clip_",
    "fill_",
    "prune_",
    "quantize_",
    "resize_",
    "runner_for",
    "shrink",
    "to_arrays",
    "to_stored",
]
