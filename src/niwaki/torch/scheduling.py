"""Prune as a schedule says, at a step of a training: what loops of one's own and `attach` have in common.

Separate from `prune_`, which knows no steps.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from niwaki.errors import Refused
from niwaki.prune.timetable import Timetable, check_fields
from niwaki.torch.masks import Masks
from niwaki.torch.prune import prune_
from niwaki.torch.questions import Facts

WHERE = "torch.update"


def update(
    module: nn.Module,
    schedule: Timetable,
    step: int,
    masks: Masks | None = None,
    *,
    facts: Facts | None = None,
) -> Masks:
    """Prune further when `schedule` is due at `step`, else only re-apply the masks; return them.

    To be called after each optimizer step. Raises what `prune_` raises, and `Refused` for a schedule that
    lets weights come back or rewinds them, which `attach` does.

    >>> import torch, niwaki as nw
    >>> layer, masks = torch.nn.Linear(10, 10), None
    >>> rule = nw.prune.Gradual(0.8, steps=(0, 4), every=2)
    >>> for step in range(6):
    ...     masks = update(layer, rule, step, masks)
    ...     print(masks.sparsity, end=" ")
    0.0 0.0 0.7 0.7 0.8 0.8

    Source: Zhu and Gupta 2017, "To prune, or not to prune".
    """
    check_fields(schedule, where=WHERE)
    if schedule.regrows_by is not None or schedule.rewinds_to is not None:
        raise Refused(
            f"{type(schedule).__name__} needs what attach sees of a step",
            where=WHERE,
            hint="nw.torch.attach(optimizer, model, prune=schedule)",
        )
    if not schedule.due(step):
        masks = masks or Masks()
        masks.apply_(module)
        return masks
    return pruned_at(module, schedule, step, masks, facts=facts)


def pruned_at(
    module: nn.Module,
    schedule: Timetable,
    step: int,
    masks: Masks | None,
    *,
    exclude: Collection[str] = (),
    facts: Facts | None = None,
) -> Masks:
    """Prune to what `schedule` says for `step`, due or not, and return the masks.

    `exclude`: names that are left alone besides what the schedule excludes. Raises what `prune_` raises.
    """
    own = schedule.exclude or ()
    return prune_(
        module,
        sparsity=None if schedule.pattern_says else schedule.sparsity_at(step),
        score=schedule.scored_by(),
        allocation=schedule.allocation,
        pattern=schedule.pattern,
        only=schedule.only,
        exclude=[*([own] if isinstance(own, str) else own), *exclude] or None,
        masks=masks,
        facts=facts,
    )
