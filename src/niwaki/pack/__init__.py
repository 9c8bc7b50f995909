"""The compressed file: entropy-coded tensors inside a safetensors container, arrays in and out."""

from __future__ import annotations

from niwaki.pack.account import Account, Inspection, inspect
from niwaki.pack.budget import Budget
from niwaki.pack.contest import encoded_sizes
from niwaki.pack.dense import expand
from niwaki.pack.reader import load, load_coded
from niwaki.pack.writer import save

__all__ = [
    "Account",
    "Budget",
    "Inspection",
    "encoded_sizes",
    "expand",
    "inspect",
    "load",
    "load_coded",
    "save",
]
