"""Whose code runs when a class's method is called: a package's own, or that of a subclass, a decorator or a patch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Members that a subclass may have of its own: they do not run when a network computes or a scheduler steps.
_HARMLESS = {"__init__", "__new__", "__repr__", "__str__", "extra_repr", "__eq__", "__hash__", "__dict__"}
_HARMLESS |= {"__weakref__", "__init_subclass__", "__class_getitem__", "__annotate__", "__annotate_func__"}
_HARMLESS |= {"train", "eval", "to", "from_pretrained", "save_pretrained", "from_config", "save_config"}


def is_from(package: str, thing: Any) -> bool:
    """Whether a class or function says that it was defined in a package."""
    return _top(getattr(thing, "__module__", "")) == package


def named(thing: Any) -> str:
    """A function, class or object by its name."""
    thing = getattr(thing, "func", thing)  # functools.partial
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def written_in(packages: tuple[str, ...], function: Any) -> bool:
    """Whether a function's code, and that of each function which it wraps, is of one of the packages.

    The code is judged by its globals, since ``functools.wraps`` copies ``__module__``.
    """
    while function is not None:
        inner = getattr(function, "func", function)  # functools.partial, staticmethod and classmethod
        inner = getattr(inner, "__func__", inner)
        home = getattr(inner, "__globals__", {}).get("__name__", getattr(inner, "__module__", ""))
        if _top(home) not in packages:
            return False
        function = getattr(inner, "__wrapped__", None) if not isinstance(inner, type) else None
    return True


def is_stock(packages: tuple[str, ...], kind: type, name: str) -> bool:
    """Whether a class has a method from a class of one of the packages, and nobody has put another in its place."""
    owner = next((c for c in kind.__mro__ if name in vars(c)), None)
    if owner is None:
        return True
    return _top(owner.__module__) in packages and written_in((*packages, "torch"), vars(owner)[name])


def overridden(packages: tuple[str, ...], kind: type) -> Iterator[str]:
    """The methods and properties of the packages' classes that subclasses outside them replace, as ``Class.name``."""
    for i, base in enumerate(kind.__mro__):
        top = _top(base.__module__)
        if top in (*packages, "builtins", "abc", "typing", "collections"):
            continue
        known = {name for c in kind.__mro__[i + 1 :] if _top(c.__module__) in packages for name in vars(c)}
        if known:
            known |= {"__getattribute__", "__getattr__"}
        for name, member in vars(base).items():
            if name in known - _HARMLESS and (callable(member) or hasattr(member, "__get__")):
                yield f"{base.__name__}.{name}"


def replaced(packages: tuple[str, ...], thing: Any) -> Iterator[tuple[str, Any]]:
    """The methods of an object's class that functions from outside the packages replace on the object itself."""
    for name, value in vars(thing).items():
        if name in _HARMLESS or isinstance(value, type) or not callable(value):
            continue
        if callable(getattr(type(thing), name, None)) and not written_in(packages, value):
            yield name, value


def _top(module: Any) -> str:
    return str(module).partition(".")[0]
