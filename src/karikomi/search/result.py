"""The result of a compression: read back, measured on the test split, with an account of every byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from karikomi import __version__, pack, record
from karikomi.audit import audit
from karikomi.files import tensor_file
from karikomi.search.accounting import bytes_by_cause
from karikomi.search.candidate_steps import step_of
from karikomi.search.folder import Folder
from karikomi.search.search_outcome import Candidate, SearchOutcome
from karikomi.tasks import Arrays, Data, Runner, Task

CORRUPTED = 500
"""Examples that the audit of a run corrupts; `karikomi audit` takes more (`--most`)."""
_LAST_DIGITS = 1e-6
_NARROW = (
    "the network came in bfloat16: it is searched, judged and returned in float32, which holds the same values;"
    " the bytes before are those of bfloat16"
)
COSTS = [f"{what}_{when}" for what in ("parameters", "macs", "ms") for when in ("before", "after")]
"""What the network costs in memory and to run, before and after its dead units are removed."""


def describe(
    task: Task,
    data: Data,
    runner: Runner,
    outcome: SearchOutcome,
    folder: Folder,
    *,
    max_drop: float | None,
    seed: int,
) -> dict[str, Any]:
    """Return the result of a run, after reading its packed file back and measuring it.

    What is measured on examples is kept in the run folder: summed again, its last digits may be others.
    """
    file, arrays, dense = outcome.chosen.path, outcome.chosen.arrays, outcome.dense.arrays
    reloaded, shrink = pack.load(file), outcome.shrink
    identical = _identical(reloaded, arrays)
    facts = folder.once(
        f"judged-{outcome.chosen.stamp}",
        lambda: _judged(task, data, runner, outcome, reloaded, seed=seed),
    )
    given = runner.given_bytes(dense)
    narrower = sum(array.nbytes for array in dense.values()) - sum(given.values())
    dense_bytes = len(tensor_file(dense)) - narrower
    tensors = _tensors(file, dense, given)
    weights = sum(array.size for array in dense.values())
    return {
        "task": task.name,
        "about": task.about,
        "framework": task.framework,
        "network": runner.describe(),
        "seed": seed,
        "karikomi": __version__,
        "metric": task.metric_name,
        "goal": task.direction,
        **{name: facts[name] for name in ("metric_before", "metric_after", "drop", "audit")},
        "validation_before": outcome.dense.validation,
        "validation_after": outcome.chosen.validation,
        "max_drop": max_drop,
        "examples": {
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        "predictions": int(np.sum(data.test.targets != task.ignore_index))
        if task.classifies
        else None,
        "bytes_dense": dense_bytes,
        "bytes_dense_file": dense_bytes + narrower,
        "bytes_packed": file.stat().st_size,
        "ratio": dense_bytes / file.stat().st_size,
        "parameters": weights,
        "nonzero": int(sum(np.count_nonzero(array) for array in reloaded.values())),
        "sparsity": _sparsity(reloaded, dense, runner.prunable()),
        "verified": identical and facts["verified"],
        "bytes_by_cause": {
            **{
                cause: sum(row["bytes"][cause] for row in tensors)
                for cause in ("dense", "pruned", "quantized", "packed")
            },
            "file": file.stat().st_size,
        },
        "tensors": tensors,
        "candidates": _candidates(outcome),
        "shrink": {k: v for k, v in shrink.items() if k not in ("notes", "validation")},
        **{name: shrink.get(name) for name in COSTS},
        **_measured(outcome.chosen),
        "left_alone": runner.left_alone(),
        "tied": runner.tied(),
        "warnings": [_NARROW] if narrower else [],
    }


def _measured(chosen: Candidate) -> dict[str, Any]:
    """Return the times in the engine that the chosen network was measured in for its budget, where it has both."""
    if "dense_ms" not in chosen.facts:
        return {}
    times = {"ms_before": chosen.facts["dense_ms"], "ms_after": chosen.facts["ms"]}
    return {**times, "engine": "ONNX Runtime, before in floats, after in integers"}


def _judged(
    task: Task, data: Data, runner: Runner, outcome: SearchOutcome, reloaded: Arrays, *, seed: int
) -> dict[str, Any]:
    """Return what is measured on the test split, and whether the file has the outputs of the candidate."""
    outcome.chosen.work.adopt()
    dense, test = outcome.dense.arrays, data.test
    of_file, of_arrays = (
        outcome.chosen.work.outputs(arrays, test.inputs)
        for arrays in (reloaded, outcome.chosen.arrays)
    )
    before = task.judge(runner.outputs(dense, test.inputs), test.targets)
    after, direct = (task.judge(found, test.targets) for found in (of_file, of_arrays))
    return {
        "metric_before": before,
        "metric_after": after,
        "drop": task.drop(before, after),
        "verified": math.isclose(after, direct, rel_tol=_LAST_DIGITS),
        "audit": audit(
            task,
            dense,
            reloaded,
            seed=seed,
            runner=runner,
            data=data,
            labels=("dense", "compressed"),
            most=CORRUPTED,
        ),
    }


def _identical(first: Arrays, second: Arrays) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].tobytes() == second[name].tobytes()
        for name in first
    )


def _sparsity(arrays: Arrays, dense: Arrays, names: list[str]) -> float:
    total = sum(dense[name].size for name in names)
    kept = sum(int(np.count_nonzero(arrays[name])) for name in names)
    return 1.0 - kept / total if total else 0.0


def _tensors(file: Path, dense: Arrays, given: Mapping[str, int]) -> list[dict[str, Any]]:
    coded, rows = pack.load_coded(file), []
    for entry in pack.inspect(file).entries:
        packed = entry.payload + entry.tables
        original = dense[entry.name]
        bits = 8 * given[entry.name] // max(original.size, 1)
        rows.append(
            {
                "name": entry.name,
                "shape": list(original.shape),
                "shape_after": list(entry.shape),
                "elements": original.size,
                "nonzero": entry.nonzero,
                "sparsity": 1.0 - entry.nonzero / original.size if original.size else 0.0,
                "codec": entry.codec,
                "quantizer": entry.quantizer,
                "bits_per_weight": 8 * packed / original.size if original.size else 0.0,
                "bytes": {
                    **bytes_by_cause(coded[entry.name], packed, bits=bits),
                    "dense": given[entry.name],
                },
            }
        )
    return rows


def _candidates(outcome: SearchOutcome) -> list[dict[str, Any]]:
    return [
        {
            "stage": "prune" if step_of(rung.proposal) == "prune" else "width",
            "what": rung.what,
            "value": _setting(rung),
            "validation": rung.validation,
            "passed": rung.passed,
            "chosen": rung.proposal == outcome.rung,
        }
        for rung in outcome.rungs
    ] + [
        {
            "stage": "quantize",
            "what": candidate.what,
            "value": candidate.size,
            "bytes": candidate.size,
            "validation": candidate.validation,
            "passed": candidate.passed,
            "chosen": candidate.proposal == outcome.chosen.proposal,
        }
        for candidate in outcome.files
    ]


def _setting(rung: Candidate) -> float:
    settings = rung.proposal.settings
    return settings["prune"][-1] if "prune" in settings else settings["width"]


def clip_summary(task: Task, path: Path) -> dict[str, Any]:
    """Return how often the run's steps were clipped and skipped, by its record."""
    return {"rule": repr(task.recipe.clip), **record.tally(record.read(path))}
