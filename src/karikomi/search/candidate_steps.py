"""The plan of a candidate as steps, each of which continues what its parent left.

``dense``, ``width`` (units that stay: a share, or a number for each layer), ``recover`` (epochs, short ones first),
``prune`` (a ladder of sparsities), ``shrink``, and a step that ends in a file: ``entries`` (a codebook whose values
are trained), ``codebook`` (one that is not), ``bits``, ``rate`` (bits of an entropy coder, by a ``method``),
``learned`` (bits, by quantized training of so many ``epochs``) or ``store``; ``int8`` runs a file with integer
activations.
"""

from __future__ import annotations

from typing import Any

from karikomi.search.driver import Proposal

FILES = ("entries", "codebook", "bits", "rate", "learned", "store")
"""The steps that make a packed file."""

LAST_STEPS = ("int8", *FILES)
"""The steps that a candidate with a packed file ends in."""

_ORDER = (*LAST_STEPS, "shrink", "prune", "recover", "width", "dense")
_BESIDE = {"rate": ("method",), "learned": ("epochs",)}
_LADDERS = ("prune", "recover")


def step_of(proposal: Proposal) -> str:
    """Return the last step of a proposal."""
    return next(name for name in _ORDER if name in proposal.settings)


def parent_of(proposal: Proposal) -> Proposal | None:
    """Return the proposal that a candidate continues, or None for the dense network.

    >>> step = Proposal.of(dense="trained", prune=[0.8, 0.9], shrink="dead")
    >>> parent_of(step).text, parent_of(parent_of(step)).text
    ('{"dense":"trained","prune":[0.8,0.9]}', '{"dense":"trained","prune":[0.8]}')
    >>> parent_of(Proposal.of(dense="given", rate=2.5, method="gptq")).text
    '{"dense":"given"}'
    """
    settings, step = proposal.settings, step_of(proposal)
    if step == "dense":
        return None
    if step in _LADDERS and len(settings[step]) > 1:
        return Proposal.of(**{**settings, step: settings[step][:-1]})
    gone = {step, *_BESIDE.get(step, ())}
    return Proposal.of(**{name: value for name, value in settings.items() if name not in gone})


def structure_of(proposal: Proposal) -> Proposal:
    """Return the step of width, recovery or sparsity that a candidate is of, or the dense network."""
    settings = proposal.settings
    kept = ("dense", "width", "recover", "prune")
    return Proposal.of(**{name: settings[name] for name in kept if name in settings})


def stage_of(proposal: Proposal) -> str:
    """Return the name of a candidate in the rows of the record, and of its files.

    >>> stage_of(Proposal.of(dense="trained", prune=[0.8, 0.9], shrink="dead", entries=16))
    'quantize-0.9-16'
    >>> stage_of(Proposal.of(dense="given", width=[8, 4], recover=[2, 6]))
    'width-8-4-recover-6'
    """
    settings, step = proposal.settings, step_of(proposal)
    wide = f"width-{_units(settings['width'], '-')}" if "width" in settings else ""
    sparsity = repr((settings.get("prune") or [0.0])[-1])
    name = {
        "dense": "train",
        "width": wide,
        "recover": f"recover-{(settings.get('recover') or [0])[-1]}",
        "prune": f"prune-{sparsity}",
        "shrink": f"shrink-{sparsity}",
    }.get(step) or f"quantize-{sparsity}-{_ending(settings)}"
    return f"{wide}-{name}" if wide and step != "width" else name


def words_of(proposal: Proposal) -> str:
    """Return the last step in the words of a report.

    >>> words_of(Proposal.of(dense="given", rate=2.5, method="gptq", int8="minmax"))
    '2.5 bits a number (gptq), int8 activations'
    """
    settings, step = proposal.settings, step_of(proposal)
    if step == "int8":
        parent = parent_of(proposal)
        return f"{'' if parent is None else words_of(parent)}, int8 activations"
    words = {
        "dense": "the dense network",
        "width": f"width {_units(settings.get('width'), ', ')}",
        "recover": f"width {_units(settings.get('width'), ', ')}, {sum(settings.get('recover', []))} epochs",
        "prune": f"sparsity {(settings.get('prune') or [0])[-1]:g}",
        "shrink": "dead units removed",
        "entries": f"{settings.get('entries')} shared weights per tensor",
        "codebook": f"{settings.get('codebook')} shared weights per tensor, not tuned",
        "bits": f"{settings.get('bits')} bits per channel",
        "rate": f"{settings.get('rate')} bits a number ({settings.get('method')})",
        "learned": f"{settings.get('learned')} bits a weight, {settings.get('epochs')} epochs of quantized training",
        "store": "no quantization",
    }
    return words[step]


def course_of(proposal: Proposal) -> str:
    """Return all steps of a candidate in order, in the words of a report; of a ladder the last rung.

    >>> course_of(Proposal.of(dense="trained", prune=[0.8, 0.9], shrink="dead", entries=16))
    'sparsity 0.9, dead units removed, 16 shared weights per tensor'
    >>> course_of(Proposal.of(dense="given", width=0.5, recover=[1, 3], rate=2.5, method="gptq", int8="minmax"))
    'width 0.5, 4 epochs, 2.5 bits a number (gptq), int8 activations'
    """
    # The words of these say what the step before them was.
    said = {"int8": FILES, "recover": ("recover", "width"), "prune": ("prune",)}
    words, later, at = list[str](), tuple[str, ...](), proposal
    while (step := step_of(at)) != "dense":
        if step not in later:
            words.append(words_of(at))
        later = said.get(step, ())
        parent = parent_of(at)
        assert parent is not None  # noqa: S101  (only the dense network has none)
        at = parent
    return ", ".join(reversed(words)) or words_of(proposal)


def _ending(settings: dict[str, Any]) -> str:
    """Return the name of what a file's step does."""
    names = {
        "entries": str(settings.get("entries")),
        "codebook": f"{settings.get('codebook')}-untuned",
        "bits": "int8" if settings.get("bits") == 8 else f"int{settings.get('bits')}",
        "rate": f"{settings.get('rate')}-{settings.get('method')}",
        "learned": f"{settings.get('learned')}-learned-{settings.get('epochs')}",
        "store": "none",
    }
    made = next(names[name] for name in FILES if name in settings)
    return f"{made}-activations" if "int8" in settings else made


def _units(width: Any, between: str) -> str:
    return between.join(map(str, width)) if isinstance(width, list) else str(width)
