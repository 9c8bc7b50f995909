"""Which arguments of ``forward`` the parts of a batch are: by position, by name, or one value."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from karikomi.errors import InvalidArgument
from karikomi.torch.modules.parameters import unwrapped

LABELS = ("labels", "label", "label_ids", "targets", "target", "y")
"""The names under which a mapping that is a whole batch may have its targets."""
ALLOWED = "(inputs, targets); several inputs as ((a, b), targets) or ({'name': a}, targets)"


class ForwardArguments:
    """The parameters of a module's ``forward``; without a module, or where it has no signature, any arguments fit."""

    def __init__(self, module: nn.Module | None, *, where: str) -> None:
        self._where = where
        try:
            self._signature = (
                None if module is None else inspect.signature(unwrapped(module).forward)
            )
        except (TypeError, ValueError):
            self._signature = None

    def accepts(self, name: str) -> bool:
        """Return whether ``forward`` has a parameter of this name, or takes any."""
        if self._signature is None:
            return True
        parameters = self._signature.parameters
        named = name in parameters and parameters[name].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        return named or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def optional(self, names: Collection[str]) -> set[str]:
        """Return those names that ``forward`` runs without: parameters with a default, and all others."""
        parameters = {} if self._signature is None else self._signature.parameters
        needed = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
        return set(names) - needed

    def has_fields(self, value: Any) -> bool:
        """Return whether a value is a named tuple whose fields are names of parameters."""
        known = self._signature is not None and is_named_tuple(value)
        return known and all(name in self._signature.parameters for name in value._fields)  # type: ignore[union-attr]

    def takes_all_but_last(self, entries: Sequence[Any]) -> bool:
        """Return whether ``forward`` takes the entries but the last by position, and not the last one too."""
        known = self._signature is not None
        return known and self._fits(tuple(entries[:-1]), {}) and not self._fits(tuple(entries), {})

    def of(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments; raises `InvalidArgument` for inputs that ``forward`` does not take.

        A mapping, and a named tuple with the names of parameters, are named arguments. A tuple or list is spread,
        another named tuple one value, each the other way where ``forward`` takes only that.
        """
        if isinstance(inputs, Mapping):
            return self._checked((), {str(name): value for name, value in inputs.items()})
        if self.has_fields(inputs):
            return self._checked((), inputs._asdict())
        if isinstance(inputs, PackedSequence) or not isinstance(inputs, tuple | list):
            return self._checked((inputs,), {})
        ways = [tuple(inputs), (inputs,)]
        if is_named_tuple(inputs) and self._signature is not None:
            ways.reverse()
        fitting = [way for way in ways if self._fits(way, {})]
        return self._checked(fitting[0] if fitting else ways[0], {})

    def parted(self, entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return ``(inputs, targets)`` of a mapping that is a whole batch; targets: one entry, or none.

        The targets have one of the names in `LABELS`. Where ``forward`` takes them too, as models that compute their
        loss do, they are among the inputs as well. What ``forward`` does not take beside them, as the identity of
        an example, is left out with a warning.
        """
        found = next((name for name in LABELS if name in entries), None)
        targets = {} if found is None else {found: entries[found]}
        inputs = {n: v for n, v in entries.items() if n not in targets or self.accepts(n)}
        taken = {n: v for n, v in inputs.items() if self.accepts(n)}
        if targets and len(taken) < len(inputs) and self._fits((), taken):
            names = ", ".join(sorted(set(inputs) - set(taken)))
            warnings.warn(
                f"karikomi: left out of the batches, as the forward of the network does not take them: {names}",
                stacklevel=2,
            )
            inputs = taken
        return inputs, targets if self._signature is not None else {}

    def _fits(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        if self._signature is None:
            return True
        try:
            self._signature.bind(*positional, **named)
        except TypeError:
            return False
        return True

    def _checked(
        self, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self._fits(positional, named):
            got = ", ".join(named) if named else f"{len(positional)} without names"
            takes = ", ".join(self._signature.parameters if self._signature else ())
            raise InvalidArgument(
                f"the forward of the network takes {takes[:80]}, and not the inputs of this batch",
                where=self._where,
                got=got,
                allowed=ALLOWED,
                hint="targets of a mapping go under 'labels'; a mapping that is one argument: (({...},), targets)"
                if named
                else None,
            )
        return positional, named


def is_named_tuple(value: Any) -> bool:
    """Return whether a value is a named tuple that is no packed sequence."""
    is_one = isinstance(value, tuple) and hasattr(value, "_fields")
    return is_one and not isinstance(value, PackedSequence)
