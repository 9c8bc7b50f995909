"""The house by technique: rooms without cycles, small folders, names of one meaning, and forms of code that hide."""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from layout.imports import Import, imports, of_every_module
from layout.source import PACKAGE, modules, tree

FRAMEWORKS = ("torch", "keras", "jax")
FILES_MOST = 12
# 16, three that came with the shrinking of exported graphs: labelling, exporting, compensation, and two with
# running quantized networks: equalization (rewrites before it) and onnx_export.
TORCH_ROOMS_MOST = 21
# Folders of one registered method or one verb per file, the reference, and two that still wait for their subfolders.
ANY_NUMBER = {"clip", "bound", "numpy", "quantize", "report", "search", "cli"}
ANY_NUMBER |= {"prune/scores", "prune/allocations", "pack/codecs"}
# Base classes and their Keras counterpart, under which users find them: prune.Penalty, keras.Penalty.
SHARED_CLASSES = {"Penalty"}
# File names that several folders have, with their one meaning.
MEANINGS = {
    "account": "what a technique changed, row by row",
    "after_step": "what is applied after each step of an optimizer",
    "arguments": "validation of arguments that several functions take",
    "arrays": "named arrays of the caller's weights",
    "bounding": "weight bounds",
    "calibration": "sums of what a weight multiplies",
    "clipping": "gradient clipping",
    "codes": "codes of quantized weights, stored with them",
    "compensated": "rounding of weights whose inputs are known",
    "contractions": "rules of products that are summed",
    "costs": "what a network costs",
    "curvature": "how much a network minds errors of weights",
    "dead_units": "units whose removal changes nothing",
    "elementwise": "rules of what combines tensors place by place",
    "eligible": "which tensors are quantized, and how",
    "forward": "facts from forward passes",
    "gradients": "by gradients: scores, and the facts for them",
    "head_groups": "which projections make one attention head",
    "importances": "scores by name, without pruning",
    "in_place": "the public in-place function of a technique",
    "inputs": "by inputs: scores, and the facts for them",
    "internals": "members private to a framework",
    "label_run": "one propagation of labels through a network",
    "library": "the array operations of a framework",
    "masks": "a container of masks",
    "measure": "measure the facts that a score needs",
    "movement": "rules of what only moves data",
    "normalizations": "rules of normalisations and softmax",
    "norms": "norms that survive overflow and underflow",
    "other_forms": "a network in the forms that other programs read",
    "outcomes": "outcomes read out of a state",
    "output_units": "which weights have a scale in common",
    "outputs": "by outputs: scores, and the facts for them",
    "penalties": "terms of the loss that push weights towards zero",
    "per_example": "clip the gradients of single examples",
    "pooling": "rules of what works over positions",
    "proof": "proof that removing equals zeroing",
    "projections": "the nearest points of convex sets",
    "prunable": "which weights can be pruned, and how they lie",
    "pruning": "masks and pruning",
    "quantizing": "codes of trees of arrays",
    "recurrent": "rules of recurrent layers",
    "recurrent_layers": "re-fits of recurrent layers",
    "recurrent_reads": "what recurrent kernels multiply",
    "reductions": "rules of sums, means and maxima",
    "request": "one prune request",
    "rewriting": "the smaller network from the original",
    "runner": "training and evaluation of the model of a task",
    "scaling": "scale arrays by factors",
    "smaller_copy": "the public function that returns a smaller copy",
    "spectral_norm": "the largest singular value",
    "trained": "a trained model and its data, as a search takes them",
    "training": "the training of the search",
    "unit_axes": "which axis of a tensor is one unit",
    "weight_reads": "what a weight multiplies",
    "unit_scores": "scores of the units of groups",
    "while_training": "quantization while a network trains",
}


def _relative(name: str) -> str:
    """Return the dotted name of a module below the package."""
    return name.partition(".")[2]


def rooms(framework: str) -> dict[str, set[str]]:
    """Return room of a framework folder -> the rooms that it imports, at any depth."""
    start, found = f"karikomi.{framework}.", defaultdict(set)
    for name, found_there in of_every_module().items():
        if name.startswith(start):
            room = name.removeprefix(start).split(".")[0]
            targets = [item.target for item in found_there]
            found[room] |= {
                target.removeprefix(start).split(".")[0]
                for target in targets
                if target.startswith(start)
            } - {room}
    return found


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_rooms_import_in_one_direction(framework: str) -> None:
    """Raises `graphlib.CycleError`, with the cycle, where two rooms need each other."""
    graph = rooms(framework)
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_torch_has_few_rooms() -> None:
    folders = [path for path in (PACKAGE / "torch").iterdir() if (path / "__init__.py").exists()]
    assert 0 < len(folders) + 1 <= TORCH_ROOMS_MOST


def users_of_the_reference(name: str, found: list[Import]) -> list[str]:
    """Return the imports of the NumPy reference in a module outside of it and of the front door."""
    if _relative(name).split(".")[0] in ("", "numpy"):
        return []
    return [
        f"{name}:{item.line} imports {item.target}"
        for item in found
        if f"{item.target}.".startswith("karikomi.numpy.")
    ]


def test_nothing_imports_the_reference() -> None:
    """A parity test against code that both sides run proves nothing."""
    every = of_every_module().items()
    assert [line for name, found in every for line in users_of_the_reference(name, found)] == []


def test_an_import_of_the_reference_is_found(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("def f():\n    from karikomi.numpy.norms import norm\n")
    found = imports("karikomi.torch.one", file, modules())
    assert len(users_of_the_reference("karikomi.torch.one", found)) == 1


def crowded(files: list[str]) -> dict[str, int]:
    """Return folder -> number of files, of folders that have too many; ``__init__.py`` counts."""
    counts: dict[str, int] = defaultdict(int)
    for file in files:
        counts[str(Path(file).parent)] += 1
    return {
        folder: count
        for folder, count in counts.items()
        if count > FILES_MOST and folder not in ANY_NUMBER
    }


def test_folders_are_small() -> None:
    assert crowded([str(path.relative_to(PACKAGE)) for path in modules().values()]) == {}


def test_a_crowded_folder_is_found() -> None:
    files = [f"torch/clipping/file_{number}.py" for number in range(13)]
    assert crowded(files) == {"torch/clipping": 13} and crowded(files[1:]) == {}
    assert crowded([file.replace("torch/clipping", "clip") for file in files]) == {}


def ambiguous(classes: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Return class -> its modules, where a name has two meanings; `classes`: (module, class) pairs.

    The same file of the same technique in several frameworks has one meaning.
    """
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for module, name in classes:
        parts = _relative(module).split(".")
        technique = ".".join(parts[1:] if parts[0] in (*FRAMEWORKS, "numpy") else parts)
        places[name].setdefault(technique, module)
    return {
        name: sorted(found.values())
        for name, found in places.items()
        if len(found) > 1 and not name.startswith("_") and name not in SHARED_CLASSES
    }


def test_a_class_name_has_one_meaning() -> None:
    classes = [
        (module, node.name)
        for module, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    ]
    assert ambiguous(classes) == {}


def test_an_ambiguous_class_is_found() -> None:
    one, other = "karikomi.torch.pruning.masks", "karikomi.keras.pruning.masks"
    assert ambiguous([(one, "Masks"), (other, "Masks")]) == {}
    assert ambiguous([(one, "Masks"), ("karikomi.pack.masks", "Masks")]) == {
        "Masks": ["karikomi.pack.masks", one]
    }


def test_a_file_name_has_one_meaning() -> None:
    """A name that a second folder uses is added to `MEANINGS`, if it means the same there."""
    folders: dict[str, set[str]] = defaultdict(set)
    for path in modules().values():
        folders[path.stem].add(str(path.parent.relative_to(PACKAGE)))
    repeated = {name for name, found in folders.items() if len(found) > 1}
    assert repeated - {"__init__"} == set(MEANINGS)


def _named(node: ast.expr) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", None) or ""


def _ranked(node: ast.AST) -> bool:
    """Return whether an expression asks for the number of dimensions of an array."""
    return any(
        (isinstance(part, ast.Attribute) and part.attr == "ndim")
        or (
            isinstance(part, ast.Call)
            and _named(part.func) in ("dim", "ndim")
            and not part.args[1:]
            and not part.keywords
        )
        or (
            isinstance(part, ast.Call)
            and _named(part.func) == "len"
            and _named(part.args[0]) == "shape"
        )
        for part in ast.walk(node)
    )


def _conditions(node: ast.AST) -> Iterator[ast.expr]:
    yield from (part.test for part in ast.walk(node) if isinstance(part, ast.IfExp))


def _assigns_an_axis(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and any(
        _named(target).split("_")[-1] in ("axis", "axes") for target in node.targets
    )


def axes_by_rank(module: ast.Module) -> list[int]:
    """Return the lines where a condition on the number of dimensions decides an axis."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.If) and _ranked(node.test):
            branches = [part for child in (*node.body, *node.orelse) for part in ast.walk(child)]
            found += [node.test.lineno] if any(map(_assigns_an_axis, branches)) else []
            continue
        if isinstance(node, ast.keyword) and "ax" in (node.arg or "").split("_")[-1][:2]:
            values = [node.value]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [_named(target).split("_")[-1] for target in targets]
            values = [node.value] if {*names} & {"axis", "axes"} else []
        elif isinstance(node, ast.FunctionDef) and {*node.name.split("_")} & {"axis", "axes"}:
            returns = [part for part in ast.walk(node) if isinstance(part, ast.Return)]
            values = [part.value for part in returns if part.value is not None]
        else:
            continue
        found += [
            value.lineno
            for value in values
            if any(_ranked(condition) for condition in _conditions(value))
        ]
    return found


def test_no_axis_is_guessed_from_the_rank() -> None:
    """Which axis is one unit is a fact of the layer type; `*/modules/` and `*/layers/` know layers."""
    found = {
        name: lines
        for name, path in modules().items()
        if not {"numpy", "modules", "layers"} & {*name.split(".")[1:3]}
        and (lines := axes_by_rank(tree(path)))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "f(a, axis=0 if a.ndim > 1 else None)",
        "unit_axis = 0 if a.dim() > 1 else None",
        "def unit_axis(a):\n    return -1 if np.ndim(a) == 2 else 1",
        "axis = 0 if len(a.shape) > 1 else None",
        "if a.ndim == 2:\n    axis = 0\nelse:\n    axis = 1",
    ],
)
def test_a_guessed_axis_is_found(text: str) -> None:
    assert len(axes_by_rank(ast.parse(text))) == 1


def hidden_forms(module: ast.Module) -> list[str]:
    """Return unpacked literals in calls, variables named `one`, and walks of Python's frames, with their lines."""
    found = []
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call):
            unpacked = [part.value for part in node.args if isinstance(part, ast.Starred)]
            if any(isinstance(value, ast.Tuple | ast.List | ast.Set) for value in unpacked):
                found.append(f"{line}: a literal is unpacked in a call")
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        bound = isinstance(node, ast.ExceptHandler) and node.name == "one"
        argument = isinstance(node, ast.arg) and node.arg == "one"
        if (stored and _named(node) == "one") or argument or bound:
            found.append(f"{line}: a variable is named 'one'")
        if isinstance(node, ast.Attribute) and node.attr in ("_getframe", "currentframe", "f_back"):
            found.append(f"{line}: Python's frames are walked")
    return found


def test_no_form_hides_what_it_does() -> None:
    found = {name: lines for name, path in modules().items() if (lines := hidden_forms(tree(path)))}
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "f(*(a, b), c=1)",
        "f(*[a, b])",
        "for one in a: ...",
        "def f(one): ...",
        "try:\n    f()\nexcept ValueError as one: ...",
        "f(*{a, b})",
        "frame = sys._getframe(1)",
        "frame = frame.f_back",
    ],
)
def test_a_hidden_form_is_found(text: str) -> None:
    assert len(hidden_forms(ast.parse(text))) == 1


def test_a_tuple_that_has_a_name_is_none() -> None:
    assert hidden_forms(ast.parse("f(*pair, c=1)\nones = [1]\n[a for a in (1, 2)]")) == []
