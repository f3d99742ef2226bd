"""A digest of what models and functions do, apart from their tensors, to tell whether they were edited."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from secateur.graph.frames import codes_in
from secateur.signals.identity import plain

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype)
_LIBRARIES = {"torch", "numpy", "secateur", *sys.stdlib_module_names} - {"__main__"}
"""What checkpoints know by its version, or what does not change."""
_LINE = "__firstlineno__"
"""Where a class stands in its file, which classes know of themselves from Python 3.13 on."""


def code_digest(*things: Any) -> str:
    """Hash the code of models and functions, and the settings that modules hold as plain values. [hex]

    Followed are the classes of all modules, and the functions, classes and constants in capitals that their
    code names, through any number of calls. Of installed packages the version is taken, not the code. What is
    found only by computing, such as an entry of a dictionary of functions, is not seen.
    """
    found, left = hashlib.sha256(), list(things)
    seen: dict[int, Any] = {}  # the things too: what is deleted leaves its id to another
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        for part in _parts(thing):
            if isinstance(part, str):
                found.update(f"{len(part)}:{part}".encode("utf-8", "backslashreplace"))
            else:
                left.append(part)
    return found.hexdigest()[:40]


def _parts(thing: Any) -> Iterator[Any]:
    """Yield texts that say what a thing is, and further things that it is made of."""
    if isinstance(thing, nn.Module):
        yield plain(repr(thing))
        for path, module in thing.named_modules():
            yield f"{path} {_settings(module)}"
            if isinstance(module, torch.fx.GraphModule):
                yield module.code
            yield type(module)
            yield from (own for own in vars(module).values() if isinstance(own, FunctionType | MethodType))
    elif isinstance(thing, type):
        for kind in thing.__mro__:
            if (library := _library(kind)) is not None:
                yield f"{library} {kind.__qualname__}"
            else:
                yield f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"
                yield from (_function(value) for name, value in vars(kind).items() if name != _LINE)
    elif isinstance(thing, functools.partial):
        yield f"{_plain(thing.args)} {_plain(thing.keywords)}"
        yield _function(thing.func)
    elif isinstance(thing, MethodType):
        yield thing.__func__
    elif isinstance(thing, FunctionType):
        yield from _of_function(thing)
    elif thing is not None and not isinstance(thing, str):
        yield f"{getattr(thing, '__qualname__', '')} {type(thing).__qualname__} {_settings(thing)}"
        yield type(thing)


def _of_function(function: FunctionType) -> Iterator[Any]:
    if (library := _library(function)) is not None:
        yield f"{library} {function.__qualname__}"
        return
    yield f"{_plain(function.__defaults__)} {_plain(function.__kwdefaults__)}"
    codes = list(codes_in(function.__code__))
    for code in codes:
        yield _text(code)
    names = [name for code in codes for name in code.co_names]
    known = [function.__globals__.get(name) for name in names]
    for module in [each for each in known if isinstance(each, ModuleType) and _library(each) is None]:
        known += [vars(module).get(name) for name in names]  # without what lazy ones would import
    for cell in function.__closure__ or ():
        try:
            known.append(cell.cell_contents)
            yield _plain(cell.cell_contents)
        except ValueError:  # not set yet
            continue
    for name in names:
        if name.isupper():
            yield _plain(function.__globals__.get(name))
    for value in known:
        if isinstance(value, type | FunctionType | MethodType | functools.partial):
            yield value
        elif callable(value):
            yield getattr(value, "__qualname__", type(value).__qualname__)


def _text(code: CodeType) -> str:
    constants = [
        sorted(map(repr, each)) if isinstance(each, frozenset) else repr(each)
        for each in code.co_consts
        if not isinstance(each, CodeType) and not (_LINE in code.co_names and each == code.co_firstlineno)
    ]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _function(value: Any) -> Any:
    """The function of a method, a property, or what stands in a class; else a text."""
    if isinstance(value, FunctionType):
        return value
    inside = (getattr(value, name, None) for name in ("__func__", "fget", "func", "__wrapped__"))
    return next((each for each in inside if isinstance(each, FunctionType)), _plain(value))


def _settings(thing: Any) -> list[tuple[str, str]]:
    """The plain public values that an object holds, apart from the mode that it is in."""
    held = sorted(getattr(thing, "__dict__", {}).items())
    return [(n, text) for n, v in held if n[:1] != "_" and n != "training" and (text := _plain(v))]


def _plain(value: Any, depth: int = 8) -> str:
    """A text for plain values and what is made of them, so deep; empty for anything else."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth and isinstance(value, tuple | list):
        return f"[{', '.join(_plain(each, depth - 1) for each in value)}]"
    if depth and isinstance(value, dict):
        items = ((_plain(key), _plain(each, depth - 1)) for key, each in value.items())
        return f"{{{', '.join(f'{key}: {each}' for key, each in items if key)}}}"
    return ""


def _library(thing: Any) -> str | None:
    """The installed package that a thing is from, with its version; None for code of the user's own."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None) or ""
    root = name.partition(".")[0]
    if root in _LIBRARIES:
        return root
    package = sys.modules.get(root)
    if not {"site-packages", "dist-packages"} & set(Path(getattr(package, "__file__", None) or "").parts):
        return None
    return f"{root} {getattr(package, '__version__', '')}"
