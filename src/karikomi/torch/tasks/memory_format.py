"""The memory format of images: channels-last, fastest for convolutions on a CPU, where the network takes it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

_IMAGES = (nn.Conv2d, nn.ConvTranspose2d)


def format_for(model: nn.Module, inputs: np.ndarray) -> torch.memory_format:
    """Return the format for inputs of a network: channels-last for images and two-dimensional convolutions.

    A network that takes no such tensors keeps the ordinary format: ``view`` raises a `RuntimeError` on what a
    convolution then returns. That is tried out on two examples, in evaluation mode.
    """
    images = any(isinstance(layer, _IMAGES) for layer in model.modules())
    if not images or np.ndim(inputs) != 4:
        return torch.contiguous_format
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(tensor_in(inputs[:2], torch.channels_last))
    except RuntimeError:
        # Of another cause, it is raised again where the network is run.
        return torch.contiguous_format
    finally:
        model.train(was_training)
    return torch.channels_last


def convert_(model: nn.Module, layout: torch.memory_format) -> None:
    """Convert the weights that a format is for: ``model.to`` refuses a network that has others of five dimensions."""
    for layer in model.modules():
        if isinstance(layer, _IMAGES):
            for parameter in layer.parameters(recurse=False):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=layout)


def tensor_in(inputs: np.ndarray, layout: torch.memory_format) -> torch.Tensor:
    """Return inputs as a tensor in a format."""
    tensor = torch.from_numpy(np.ascontiguousarray(inputs))
    return tensor.contiguous(memory_format=layout)
