"""The memory format of images: channels-last, fastest for convolutions on a CPU, where the network takes it."""

from __future__ import annotations

import torch
from torch import nn

from karikomi.torch.tracing.batches import Batch

_IMAGES = (nn.Conv2d, nn.ConvTranspose2d)


def format_for(model: nn.Module, few: Batch) -> torch.memory_format:
    """Return the format for inputs of a network: channels-last for images and two-dimensional convolutions.

    A network that takes no such tensors keeps the ordinary format: ``view`` raises a `RuntimeError` on what a
    convolution then returns. That is tried out in evaluation mode on `few`, a batch of two examples.
    """
    images = any(isinstance(layer, _IMAGES) for layer in model.modules())
    if not images or all(tensor.dim() != 4 for tensor in few.tensors()):
        return torch.contiguous_format
    tried, was_training = laid_out(few, torch.channels_last), model.training
    try:
        with torch.no_grad():
            model.eval()(*tried.positional, **tried.named)
    except RuntimeError:
        # Of another cause, it is raised again where the network is run.
        return torch.contiguous_format
    finally:
        model.train(was_training)
    return torch.channels_last


def laid_out(batch: Batch, layout: torch.memory_format) -> Batch:
    """Return a batch with its images in a format."""
    return batch.inputs(lambda x: x.contiguous(memory_format=layout) if x.dim() == 4 else x)


def convert_(model: nn.Module, layout: torch.memory_format) -> None:
    """Convert the weights that a format is for: ``model.to`` refuses a network that has others of five dimensions."""
    for layer in model.modules():
        if isinstance(layer, _IMAGES):
            for parameter in layer.parameters(recurse=False):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=layout)
