"""Networks shrunk to half, saved and loaded in three ways: into a fresh instance, as an exported program, as ONNX.

Prints for each the form of the smaller network and the largest difference of its outputs, relative to the largest
output. Without onnxscript and onnxruntime the last column says so.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import karikomi as kk


class Recurrent(nn.Module):
    """The outputs of a recurrent layer, read at each step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner, self.head = kind(16, 32, 2, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all steps."""
        return self.head(self.inner(x)[0])


class Attention(nn.Module):
    """Fused projections, split into heads by a view of written sizes or by ``unflatten``."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        self.written, self.width = written, 8
        self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projected mixture."""
        width = 8 if self.written else self.width
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, width)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.35)
        return self.out(mixed.transpose(1, 2).flatten(2))


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Return name -> network and example input."""
    images, tokens = torch.randn(2, 3, 16, 16), torch.randn(2, 6, 16)
    convolutions = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    depthwise = [nn.Conv2d(16, 16, 3, groups=16), nn.GroupNorm(4, 16)]
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return {
        "convolutions": (nn.Sequential(*convolutions, nn.Conv2d(16, 5, 1)), images),
        "depthwise": (nn.Sequential(*convolutions, *depthwise, nn.Conv2d(16, 5, 1)), images),
        "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 16, 2, 2), nn.Conv2d(16, 5, 1)), images),
        "flattened": (nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * 196, 5)), images),
        "layer norm": (
            nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 5)),
            tokens,
        ),
        "LSTM": (Recurrent(nn.LSTM), tokens),
        "GRU": (Recurrent(nn.GRU), tokens),
        "attention": (Attention(written=False), tokens),
        "written sizes": (Attention(written=True), tokens),
        "encoder layer": (nn.Sequential(encoder, nn.Linear(16, 5)), tokens),
    }


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest output."""
    return float((got - expected).abs().max() / expected.abs().max())


def through_file(small: nn.Module, fresh: nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """Return the outputs of a fresh network that took the packed file."""
    path = kk.save(small, folder / "small.karikomi")
    return kk.load(path, into=fresh).eval()(x)


def through_program(small: nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """Return the outputs of the exported program."""
    torch.export.save(torch.export.export(small, (x,)), folder / "small.pt2")
    return torch.export.load(folder / "small.pt2").module()(x)


def through_onnx(small: nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """Return the outputs of onnxruntime."""
    import onnxruntime

    path = str(folder / "small.onnx")
    torch.onnx.export(small, (x,), path, dynamo=True, verbose=False)
    session: Any = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@torch.no_grad()
def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    needed = ("onnx", "onnxscript", "onnxruntime")
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    print(f"{'network':14} {'form':7} {'file':>8} {'program':>8} {'onnx':>8}")
    for name, (network, x) in networks().items():
        small, report = kk.torch.shrink(network.eval(), x, width=0.5)
        expected = small.eval()(x)
        fresh = copy.deepcopy(network if report.form == "module" else small)
        for parameter in fresh.parameters():
            parameter.zero_()
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            outputs = [through_file(small, fresh, x, folder), through_program(small, x, folder)]
            outputs += [] if lacking else [through_onnx(small, x, folder)]
        cells = [f"{apart(output, expected):8.1e}" for output in outputs]
        cells += [f"needs {', '.join(lacking)}"] if lacking else []
        print(f"{name:14} {report.form:7} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
