"""Nested containers of tensors as flat dicts of names, and back: dicts, lists, tuples, named tuples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from karikomi.errors import InvalidArgument, Unsupported, check

DEEPEST = 100
"""The deepest nesting of containers: far above that of networks, far below Python's recursion limit."""

_Path = tuple[object, ...]


def collected(tree: Any) -> Any:
    """Return a tree unchanged, or a list of the items of an iterable that is not a container.

    A generator is consumed here, and the list can be iterated again. An object with a shape is taken for a
    tensor and returned unchanged, like any other object.

    >>> collected(x * x for x in (1, 2)), collected({"a": 1})
    ([1, 4], {'a': 1})
    """
    whole = isinstance(tree, Mapping | list | tuple | str | bytes) or hasattr(tree, "shape")
    return tree if whole or not isinstance(tree, Iterable) else list(tree)


def flatten(tree: Any, *, where: str = "tree") -> dict[str, Any]:
    """Return leaf name -> leaf, in the order of the leaves in the tree.

    A name is the path to the leaf joined with ``"."``: keys of mappings, fields of named tuples,
    places in lists and tuples. ``None`` is a leaf, and so is any object that is not a mapping, list or tuple;
    empty containers have no leaves. `where`: the beginning of an error message.

    Raises `InvalidArgument` for a tree that is not a container, a key that is not a string, an
    iterator inside of the tree, containers that contain themselves or are nested more than `DEEPEST` deep,
    and two leaves of the same name.

    >>> flatten({"encoder": {"layers": [{"weight": 1}, {"weight": 2}]}, "head": (3, None)})
    {'encoder.layers.0.weight': 1, 'encoder.layers.1.weight': 2, 'head.0': 3, 'head.1': None}
    """
    if _children(tree, (), where) is None:
        raise InvalidArgument("not a dict or list of arrays", where=where, got=type(tree).__name__)
    found: dict[str, Any] = {}
    paths: dict[str, _Path] = {}
    for path, leaf in _leaves(tree, (), (), where):
        name = _name(path)
        if name in found:
            both = f"{_shown(paths[name])} and {_shown(path)}"
            raise InvalidArgument(f"two leaves have the name {name!r}", where=where, got=both)
        found[name], paths[name] = leaf, path
    return found


def unflatten(tree: Any, leaves: Mapping[str, Any], *, where: str = "tree") -> Any:
    """Return a tree of the same containers with other leaves: `leaves` as `flatten` names them.

    Containers keep their types and mappings their order; a default dict keeps its factory. The tree
    itself is not changed. Raises `InvalidArgument` if `leaves` are not exactly the tree's, and
    `Unsupported` for a container whose type cannot be constructed from its items, such as an open file.

    >>> tree = {"a": [1, 2], "b": (3,)}
    >>> unflatten(tree, {name: 10 * leaf for name, leaf in flatten(tree).items()})
    {'a': [10, 20], 'b': (30,)}
    """
    odd = sorted(flatten(tree, where=where).keys() ^ leaves.keys())
    check(where, (not odd, "these are not the leaves of this tree", ", ".join(odd[:5]), None))
    return _rebuilt(tree, (), leaves, where)


def _leaves(
    node: Any, path: _Path, above: tuple[int, ...], where: str
) -> Iterator[tuple[_Path, Any]]:
    children = _children(node, path, where)
    if children is None:
        yield path, node
        return
    if id(node) in above:
        raise InvalidArgument(f"the tree contains itself at {_shown(path)}", where=where)
    if len(path) >= DEEPEST:
        raise InvalidArgument(
            "the tree is too deep", where=where, got=_shown(path[:5]), allowed=f"{DEEPEST} levels"
        )
    for key, child in children:
        yield from _leaves(child, (*path, key), (*above, id(node)), where)


def _children(node: Any, path: _Path, where: str) -> list[tuple[object, Any]] | None:
    """Return ``(key, child)`` of a container, ``None`` for a leaf."""
    if isinstance(node, Mapping):
        return [(_key(key, path, where), child) for key, child in node.items()]
    if _is_named_tuple(node):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    if isinstance(node, Iterator):
        raise InvalidArgument(
            "an iterator cannot be part of a tree, since it can be consumed only once",
            where=f"{where}: {_name(path)}" if path else where,
            got=type(node).__name__,
            hint="make a list of it",
        )
    return None


def _key(key: object, path: _Path, where: str) -> str:
    if not isinstance(key, str):
        raise InvalidArgument(
            "the keys of a tree are names, strings",
            where=f"{where}: {_name(path)}" if path else where,
            got=f"{key!r} ({type(key).__name__})",
        )
    return key


def _rebuilt(node: Any, path: _Path, leaves: Mapping[str, Any], where: str) -> Any:
    children = _children(node, path, where)
    if children is None:
        return leaves[_name(path)]
    made = {key: _rebuilt(child, (*path, key), leaves, where) for key, child in children}
    try:
        return _as(node, made)
    except (TypeError, ValueError, AttributeError) as error:
        raise Unsupported(
            f"a {type(node).__name__} cannot be built anew with other leaves",
            where=f"{where}: {_name(path)}" if path else where,
            hint="pass a dict, list or tuple of what it holds",
        ) from error


def _as(node: Any, made: dict[Any, Any]) -> Any:
    if isinstance(node, defaultdict):
        return type(node)(node.default_factory, made)
    if isinstance(node, Mapping):
        return type(node)(made)  # type: ignore[call-arg]
    if _is_named_tuple(node):
        # Not the constructor, which a subclass may have changed.
        return type(node)._make(made.values())
    return type(node)(made.values())


def _is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _name(path: _Path) -> str:
    return ".".join(map(str, path))


def _shown(path: _Path) -> str:
    return "".join(f"[{key!r}]" for key in path)
