"""Models and data that a user names on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT_NAMES, LABEL_NAMES = ("x", "inputs", "images"), ("y", "labels")


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
            if not path.is_file():
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


def load_model(target: Target) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """The model, and the function that makes it.

    Raises:
        SettingError: If the target gives no module.
    """
    from torch import nn

    function = target.find()
    if isinstance(function, nn.Module):
        raise SettingError(
            f"{target}: expected a function that returns the model, got a {type(function).__name__} itself. "
            "Write a function that makes it; loading the pruned model calls it too."
        )
    model = target.call()
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"{target}: expected {target.function}() to return a torch.nn.Module, got "
            f"{type(model).__name__}. Return the model."
        )
    return model, function


def load_data(option: str, text: str, *, batch_size: int, seed: int) -> Any:
    """What `Calibration.of` takes, from a function or an ``.npz`` file.

    Raises:
        SettingError: If the function is missing or fails.
        CalibrationError: If the file is missing or does not hold what it should.
    """
    if text.endswith(".npz"):
        return _npz(option, Path(text), batch_size, seed)
    if ":" not in text:
        raise SettingError(
            f"{option} {text}: expected package.module:function or a .npz file, got neither. "
            f"Write {option} data.py:load or {option} images.npz, for example."
        )
    target = Target.of(option, text)
    found = target.find()
    return target.call() if callable(found) else found


def _npz(option: str, path: Path, batch_size: int, seed: int) -> list[tuple[torch.Tensor, ...]]:
    """Batches in an order drawn from `seed`: files are often sorted by class, and batches should not be."""
    import numpy as np
    import torch

    where = f"{option} {path}"
    if batch_size < 1:
        raise SettingError(f"--batch-size {batch_size}: expected at least 1. Give 64, for example.")
    if not path.is_file():
        raise CalibrationError(f"{where}: expected a file, got none there. Check the path.")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(
            f"{where}: expected arrays as numpy.savez writes them, got a file that cannot be read ({error}). "
            "Save it again, without objects."
        ) from error
    shapes = (
        ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in held.items()) or "no array"
    )
    inputs = next((held[name] for name in INPUT_NAMES if name in held), None)
    labels = next((held[name] for name in LABEL_NAMES if name in held), None)
    if inputs is None:
        raise CalibrationError(
            f"{where}: expected an array named x, inputs or images, and labels named y or labels, "
            f"got {shapes}. Do numpy.savez(path, x=..., y=...)."
        )
    if inputs.ndim == 0 or len(inputs) == 0:
        raise CalibrationError(f"{where}: expected samples along axis 0, got {shapes}. Do save at least two.")
    if inputs.dtype == np.uint8:
        raise CalibrationError(
            f"{where}: expected inputs as the model takes them, got raw bytes ({shapes}). "
            "Do normalise them as in training and save them as float32."
        )
    if inputs.dtype.kind not in "fiub":
        raise CalibrationError(f"{where}: expected inputs that are numbers, got {shapes}. Do save float32.")
    if labels is not None and (labels.ndim == 0 or len(labels) != len(inputs)):
        raise CalibrationError(
            f"{where}: expected a label for each input, got {shapes}. Do save arrays of one length."
        )
    if labels is not None and labels.dtype.kind not in "fiub":
        raise CalibrationError(f"{where}: expected labels that are numbers, got {shapes}. Do save integers.")
    arrays = [inputs] if labels is None else [inputs, labels]
    order = np.random.default_rng(seed).permutation(len(inputs))
    kinds = {"f": torch.get_default_dtype(), "i": torch.int64, "u": torch.int64, "b": torch.bool}
    tensors = [torch.from_numpy(array[order]).to(kinds[array.dtype.kind]) for array in arrays]
    return list(zip(*(tensor.split(batch_size) for tensor in tensors), strict=True))


def example_of(text: str) -> torch.Tensor:
    """A tensor from ``1x3x224x224`` or ``1x16:int64``: normal floats, zero integers.

    Raises:
        SettingError: If it is not of this form.

    Example:
        >>> example_of("2x16:int64").shape
        torch.Size([2, 16])
    """
    import torch

    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or not isinstance(dtype, torch.dtype):
        raise SettingError(
            f"--input {text}: expected sizes and, if not float32, a dtype, got something else. "
            "Write 1x3x224x224 or 1x16:int64, for example."
        )
    shape = [int(size) for size in sizes.split("x")]
    if math.prod(shape) > 2**31:
        raise SettingError(f"--input {text}: expected an input that fits into memory. Give a smaller one.")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
