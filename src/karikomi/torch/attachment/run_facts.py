"""Facts about optimizers for a record: which they are, learning rates, and how the norms of its rows are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from karikomi.record.log_codes import MOST as ROW_MOST
from karikomi.rule import Composite, Rule
from karikomi.torch.attachment.step_norms import StepNorms

_KEYS = ("betas", "eps", "momentum", "weight_decay")


def run_facts(
    optimizers: Sequence[torch.optim.Optimizer],
    found: Mapping[str, torch.Tensor],
    clip: Rule | Composite | None,
    norms: StepNorms | None,
) -> dict[str, Any]:
    """Return the row of a run: its optimizers and rule, and the provenance of its norms."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = {
        key: groups[0][key]
        for key in _KEYS
        if all(key in group and group[key] == groups[0][key] for group in groups)
    }
    sizes = {name: tensor.numel() for name, tensor in found.items()}
    return {
        "optimizer": " + ".join(dict.fromkeys(type(item).__name__ for item in optimizers)),
        **{key: value for key, value in settings.items() if _is_plain(value)},
        "clip": None if clip is None else repr(clip),
        "norms": "of each step, before the clip",
        "weights": _measured(norms, "after the step"),
        "updates": _measured(norms, "change by the step"),
        **({"sizes": sizes} if len(sizes) <= ROW_MOST else {}),
    }


def rates(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, float]:
    """Return ``lr``, the largest of all groups, ``lr_least`` where they differ, and ``loss_scale`` under AMP."""
    found = [float(g["lr"]) for item in optimizers for g in item.param_groups]
    least = {} if min(found) == max(found) else {"lr_least": min(found)}
    scale = getattr(optimizers[0], "grad_scale", None)
    return {"lr": max(found), **least, **({} if scale is None else {"loss_scale": float(scale)})}


def _is_plain(value: object) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(part, int | float) for part in parts)


def _measured(norms: StepNorms | None, when: str) -> str | None:
    if norms is None:
        return None
    return f"{when}, estimated from 16,384 entries of each larger tensor" if norms.sampled else when
