"""A function that a user names: ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from secateur.errors import SettingError


@dataclass(frozen=True)
class Target:
    """``package.module:function`` or ``file.py:function``, taken apart.

    Attributes:
        option: The option it was given to, for messages.
        module: Dotted name, or path of a Python file.
        function: Name in it, dots allowed.
    """

    option: str
    module: str
    function: str

    @classmethod
    def of(cls, option: str, text: str) -> Target:
        """Take `text` apart.

        Raises:
            SettingError: If it is not of this form.

        Example:
            >>> Target.of("--model", "net.py:make_model")
            Target(option='--model', module='net.py', function='make_model')
        """
        module, colon, function = text.rpartition(":")
        if not colon or not module or not function:
            raise SettingError(
                f"{option} {text}: expected package.module:function or file.py:function, got no function "
                f"after a colon. Write {option} net.py:make_model, for example."
            )
        return cls(option, module, function)

    @property
    def is_file(self) -> bool:
        """Whether `module` is the path of a Python file."""
        return self.module.endswith(".py")

    @property
    def import_line(self) -> str:
        """Python that defines `make_model` as this function."""
        if self.is_file:
            return f"import runpy; make_model = runpy.run_path({self.module!r})[{self.function!r}]"
        name, dot, rest = self.function.partition(".")
        line = f"from {self.module} import {name}"
        if dot:
            return f"{line}; make_model = {name}.{rest}"
        return line if name == "make_model" else f"{line} as make_model"

    def find(self) -> Any:
        """Import the module and return what it holds under `function`. The current folder is importable.

        Raises:
            SettingError: If the module or the function is missing, or importing fails.
        """
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        found: Any = self._module()
        for name in self.function.split("."):
            try:
                found = getattr(found, name)
            except AttributeError as error:
                raise SettingError(
                    f"{self}: expected {self.module} to hold {self.function}, got no {name}. "
                    f"It holds {_names(found)}."
                ) from error
        return found

    def call(self) -> Any:
        """Find the function and call it without arguments.

        Raises:
            SettingError: If that fails.
        """
        function = self.find()
        try:
            return function()
        except Exception as error:  # it is the user's: whatever it raises is about what they gave
            raise SettingError(
                f"{self}: expected {self.function}() to return, got {type(error).__name__}: {error}. "
                "It is called without arguments; --debug shows where it failed."
            ) from error

    def _module(self) -> ModuleType:
        try:
            if not self.is_file:
                return importlib.import_module(self.module)
            path = Path(self.module)
            if not os.path.isfile(path):
                raise SettingError(f"{self}: expected a Python file, got none at {path}. Check the path.")
            # A name of its own: the file's may be that of a module which exists already.
            name = f"_secateur_{re.sub(r'[^0-9A-Za-z_]', '_', str(path.resolve()))}"
            spec = importlib.util.spec_from_file_location(name, path)
            if spec is None or spec.loader is None:
                raise SettingError(f"{self}: expected a Python file, got {path}. Check the path.")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
        except SettingError:
            raise
        except Exception as error:
            raise SettingError(
                f"{self}: expected to import {self.module}, got {type(error).__name__}: {error}. "
                "Check the name, and run from the folder that holds it; --debug shows where it failed."
            ) from error

    def __str__(self) -> str:
        """As the user wrote it."""
        return f"{self.option} {self.module}:{self.function}"


def _names(where: Any) -> str:
    names = [name for name, value in vars(where).items() if callable(value) and not name.startswith("_")]
    return ", ".join(sorted(names)[:8]) or "nothing that can be called"
