"""The child process of `pydocs`: writes the running interpreter's standard-library docstrings as JSON lines.

It is run as a script, ``python pydocs_reader.py OUT.jsonl``, in a process of its own, because importing the whole
standard library has side effects. It imports nothing but the standard library. The first line written is
``{"unimportable": [module, …]}``; every other line is one object with a docstring.
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

SKIPPED = {
    "antigravity",  # opens a browser
    "this",  # prints
    "idlelib",
    "turtle",
    "turtledemo",
    "tkinter",
    "test",
    "ensurepip",
    "posix",  # the same functions are documented as those of os
    "nt",
    "lib2to3.tests",
    "unittest.__main__",
}
"""Modules that open windows, print, start things, are tests, or repeat another module."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Found(NamedTuple):
    """An object under one of its names; ``own`` when the name is in the module that defines it."""

    name: str
    module: str
    type: str
    own: bool
    thing: Any


def main(out: str) -> None:
    """Writes the JSON lines to ``out``."""
    warnings.simplefilter("ignore")
    # Some functions have these as defaults, and a signature must not show this machine's values.
    setattr(type(os.environ), "__repr__", lambda self: "os.environ")  # noqa: B010
    sys.executable = "python"
    modules, unimportable = import_all()
    with open(out, "w", encoding="utf-8", newline="\n") as file:  # noqa: PTH123
        print(json.dumps({"unimportable": unimportable}), file=file)
        for found in sorted(canonical(modules), key=lambda f: f.name):
            doc = own_doc(found.thing)
            if doc is not None:
                title = found.name + signature(found)
                entry = {"id": found.name, "title": title, "module": found.module, "type": found.type, "doc": doc}
                print(json.dumps(entry), file=file)


def import_all() -> tuple[dict[str, ModuleType], list[str]]:
    """The public standard-library modules by name, and the names of those that cannot be imported here."""
    modules: dict[str, ModuleType] = {}
    unimportable = []
    waiting = sorted(sys.stdlib_module_names, reverse=True)
    while waiting:
        name = waiting.pop()
        if name in SKIPPED or any(part.startswith("_") or part in ("test", "tests") for part in name.split(".")):
            continue
        try:
            module = importlib.import_module(name)
        except BaseException:  # noqa: BLE001 - a module may raise anything, SystemExit too, where it does not belong
            unimportable.append(name)
            continue
        modules[name] = module
        below = {info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))}
        waiting += sorted((f"{name}.{child}" for child in below), reverse=True)
    return modules, sorted(unimportable)


def canonical(modules: dict[str, ModuleType]) -> list[Found]:
    """Every public object once: under the name with the fewest dots, at equal depth where it is defined."""
    best: dict[int, Found] = {}
    alive = []
    for found in everything(modules):
        alive.append(found.thing)  # an id is only unique among living objects
        key = id(found.thing)
        if key not in best or _rank(found) < _rank(best[key]):
            best[key] = found
    return list(best.values())


def everything(modules: dict[str, ModuleType]) -> Iterator[Found]:
    """Modules, their public functions and classes, and what the classes themselves define."""
    for name, module in sorted(modules.items()):
        package, _, child = name.rpartition(".")
        if not package or getattr(modules.get(package), child, module) is module:  # unittest.main is also a class
            yield Found(name, name, "module", True, module)
        for member, thing in public_members(module, modules):
            own = getattr(thing, "__module__", None) == name
            if inspect.isclass(thing):
                yield from class_and_methods(f"{name}.{member}", name, own, thing)
            else:
                yield Found(f"{name}.{member}", name, "function", own, thing)


def public_members(module: ModuleType, modules: dict[str, ModuleType]) -> list[tuple[str, Any]]:
    """The functions and classes that a module offers: its ``__all__``, else what it does not owe to another one."""
    listed = getattr(module, "__all__", None)
    members = []
    for name in sorted(set(listed if listed is not None else vars(module))):
        thing = getattr(module, name, None)
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        home = getattr(thing, "__module__", None)
        if listed is not None or home == module.__name__ or home is None or home not in modules:
            members.append((name, thing))
    return members


def class_and_methods(name: str, module: str, own: bool, cls: type) -> Iterator[Found]:
    """A class and the public methods in its own body; what it inherits belongs to the base class."""
    yield Found(name, module, "class", own, cls)
    for member, value in sorted(vars(cls).items()):
        thing = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if not member.startswith("_") and inspect.isroutine(thing):
            yield Found(f"{name}.{member}", module, "method", own, thing)


def own_doc(thing: Any) -> str | None:
    """The object's docstring with indentation removed; None when there is none."""
    doc = getattr(thing, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return None
    return inspect.cleandoc(doc)


def signature(found: Found) -> str:
    """``(a, b=1)``, without memory addresses; empty for modules and where the interpreter does not know it."""
    if found.type == "module":
        return ""
    try:
        return _ADDRESS.sub("", str(inspect.signature(found.thing)))
    except Exception:  # noqa: BLE001 - it evaluates what C functions claim as their defaults, which can raise anything
        return ""


def _rank(found: Found) -> tuple[int, bool, int, str]:
    return found.name.count("."), not found.own, len(found.name), found.name


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # what the imported modules registered to run at exit is not wanted
