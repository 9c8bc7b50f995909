"""The compressed file: entropy-coded tensors inside a safetensors container, arrays in and out."""

from __future__ import annotations

from karikomi.pack.groups.contest import encoded_sizes
from karikomi.pack.plain import expand
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import load, load_coded
from karikomi.pack.size_account import Inspection, SizeAccount, inspect
from karikomi.pack.writer import save

Account = SizeAccount
"""Alias of `SizeAccount`."""

__all__ = [
    "Account",
    "SizeAccount",
    "Budget",
    "Inspection",
    "encoded_sizes",
    "expand",
    "inspect",
    "load",
    "load_coded",
    "save",
]
