"""Load a model from a function, timm, a Hugging Face folder or a ``.pt2`` file."""

from __future__ import annotations

import ast
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from secateur.cli.loading.target import Target
from secateur.common.reading import parse_json, read_bytes
from secateur.errors import SettingError

if TYPE_CHECKING:
    from torch import nn


class ModelSource(Protocol):
    """A source of a model: it makes the model, with or without its weights."""

    @property
    def import_line(self) -> str:
        """Python code that defines `make_model`, a function that makes the dense model with any weights."""

    def make(self) -> nn.Module:
        """Make the model with any weights."""

    def load(self) -> nn.Module:
        """Make the model with its weights."""


def model_source(option: str, text: str) -> ModelSource:
    """Return the source that a user's text names. Nothing is loaded.

    Raises:
        SettingError: If it names nothing of the kinds there are.

    Example:
        >>> model_source("--model", "timm:resnet18,num_classes=10")
        TimmModel(option='--model', name='resnet18', keywords={'num_classes': 10})
    """
    if text.startswith("timm:"):
        name, *pairs = text.removeprefix("timm:").split(",")
        return TimmModel(option, name, dict(_pair(option, text, pair) for pair in pairs))
    mapped = text.startswith("mapped:")
    path = Path(text.removeprefix("mapped:"))
    if mapped and not os.path.isdir(path):
        raise SettingError(
            f"{option} {text}: expected a Hugging Face folder after 'mapped:', got none. Check the path."
        )
    if path.suffix == ".pt2":
        if not os.path.isfile(path):
            raise SettingError(f"{option} {text}: expected an exported program, got no file. Check the path.")
        return ExportedModel(option, text)
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise SettingError(
                f"{option} {text}: expected a Hugging Face folder, got one without config.json. "
                "Write it with save_pretrained, or name a function."
            )
        return HuggingFaceModel(option, str(path), mapped)
    return FunctionModel(Target.of(option, text))


def check_model(option: str, text: str) -> None:
    """Check that a text names a model; raises as `model_source` does."""
    model_source(option, text)


def load_model(source: Target | ModelSource) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Load a model. Return it, and a function that makes the same model with any weights.

    Raises:
        SettingError: If the source gives no module.
    """
    found = FunctionModel(source) if isinstance(source, Target) else source
    return found.load(), found.make


@dataclass(frozen=True)
class FunctionModel:
    """A user's own function, which returns the trained model."""

    target: Target

    @property
    def import_line(self) -> str:
        """See `ModelSource`."""
        return self.target.import_line

    def make(self) -> nn.Module:
        """See `ModelSource`."""
        return self.load()

    def load(self) -> nn.Module:
        """See `ModelSource`.

        Raises:
            SettingError: If the function does not return a module.
        """
        from torch import nn

        target = self.target
        function = target.find()
        if isinstance(function, nn.Module):
            raise SettingError(
                f"{target}: expected a function that returns the model, got a {type(function).__name__} "
                "itself. Write a function that makes it; loading the pruned model calls it too."
            )
        model = target.call()
        if not isinstance(model, nn.Module):
            raise SettingError(
                f"{target}: expected {target.function}() to return a torch.nn.Module, got "
                f"{type(model).__name__}. Return the model."
            )
        return model


@dataclass(frozen=True)
class TimmModel:
    """A model of timm, ``timm:resnet18`` or ``timm:resnet18,num_classes=10,checkpoint_path=own.safetensors``.

    Without a checkpoint it has timm's pretrained weights, from timm's cache or the Hub.

    Attributes:
        option: The option it was given to, for messages.
        name: Of the architecture.
        keywords: Arguments of ``timm.create_model``.
    """

    option: str
    name: str
    keywords: dict[str, Any]

    @property
    def shape(self) -> dict[str, Any]:
        """The keywords that define the architecture, without those for weights."""
        return {k: v for k, v in self.keywords.items() if k not in ("pretrained", "checkpoint_path")}

    @property
    def import_line(self) -> str:
        """See `ModelSource`."""
        arguments = "".join(f", {name}={value!r}" for name, value in self.shape.items())
        return f"import timm\nmake_model = lambda: timm.create_model({self.name!r}{arguments}).eval()"

    def make(self) -> nn.Module:
        """See `ModelSource`."""
        return self._create(**self.shape)

    def load(self) -> nn.Module:
        """See `ModelSource`.

        Raises:
            SettingError: If timm is missing, does not know the model, or cannot get its weights.
        """
        checkpoint = self.keywords.get("checkpoint_path")
        if checkpoint is None:
            return self._create(**{"pretrained": True, **self.keywords})
        model = self._create(**self.shape)
        with self._errors(f"weights of {self.name} in {checkpoint}"):
            from timm.models import load_state_dict

            model.load_state_dict(load_state_dict(str(checkpoint), weights_only=True))
        return model

    def _create(self, **keywords: Any) -> nn.Module:
        with self._errors(f"a model that timm.create_model({self.name!r}) makes"):
            import timm

            model: nn.Module = timm.create_model(self.name, **keywords).eval()
            return model

    @contextmanager
    def _errors(self, wanted: str) -> Iterator[None]:
        with library_errors(f"{self.option} timm:{self.name}", wanted, "Check the name.", library="timm"):
            yield


@dataclass(frozen=True)
class HuggingFaceModel:
    """A folder that ``save_pretrained`` of Transformers wrote. Nothing is downloaded, no code of it is run.

    Attributes:
        option: The option it was given to, for messages.
        folder: The folder.
        mapped: Whether the weights stay in the folder's files: see `secateur.map_weights`.
    """

    option: str
    folder: str
    mapped: bool = False

    @property
    def architecture(self) -> str:
        """The class that the folder's configuration names.

        Raises:
            SettingError: If it names none.
        """
        try:
            file = Path(self.folder) / "config.json"
            text = read_bytes(file, 1 << 24, f"{self.option} {file}", SettingError)
            name = parse_json(text, constants=True)["architectures"][0]
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"no name of a class: {str(name)[:40]!r}")
            return name
        except SettingError:
            raise
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise SettingError(
                f"{self.option} {self.folder}: expected a config.json with architectures, got none "
                f"({type(error).__name__}: {error}). Write it again with save_pretrained."
            ) from error

    @property
    def import_line(self) -> str:
        """See `ModelSource`."""
        return (
            f"from transformers import AutoConfig, {self.architecture}\n"
            f"make_model = lambda: {self.architecture}(AutoConfig.from_pretrained({self.folder!r})).eval()"
        )

    def make(self) -> nn.Module:
        """See `ModelSource`."""
        with self._errors():
            from transformers import AutoConfig

            model: nn.Module = self._class()(AutoConfig.from_pretrained(self.folder)).eval()
            return model

    def load(self) -> nn.Module:
        """See `ModelSource`.

        Raises:
            SettingError: If Transformers is missing or cannot read the folder.
        """
        if self.mapped:
            from secateur.common.mapped import map_weights
            from secateur.targets.experts.empty import empty_weights

            with empty_weights():
                empty = self.make()
            return map_weights(empty, self.folder)
        with self._errors():
            model: nn.Module = self._class().from_pretrained(self.folder, local_files_only=True).eval()
            return model

    def _class(self) -> Any:
        import transformers

        found = getattr(transformers, self.architecture)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise ValueError(f"{self.architecture} is no model of Transformers")
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        wanted, advice = "a folder that Transformers can read", "Write it again with save_pretrained."
        with library_errors(f"{self.option} {self.folder}", wanted, advice, library="transformers"):
            yield


@dataclass(frozen=True)
class ExportedModel:
    """A program that ``torch.export.save`` wrote.

    Attributes:
        option: The option it was given to, for messages.
        path: The ``.pt2`` file.
    """

    option: str
    path: str

    @property
    def import_line(self) -> str:
        """See `ModelSource`."""
        return (
            "from secateur.cli.loading import model_source\n"
            f"make_model = model_source('model', {self.path!r}).make"
        )

    def make(self) -> nn.Module:
        """See `ModelSource`."""
        return self.load()

    def load(self) -> nn.Module:
        """See `ModelSource`.

        Raises:
            SettingError: If torch cannot read the file.
        """
        with library_errors(
            f"{self.option} {self.path}", "an exported program", "Write it again with torch.export.save."
        ):
            import torch

            zipfile.ZipFile(self.path).close()  # torch prints pages about a file that is no archive
            program = torch.export.load(self.path).module()
        for name in ("train", "eval"):  # torch puts versions there that only raise
            vars(program).pop(name, None)
        return program.eval()


@contextmanager
def library_errors(where: str, wanted: str, advice: str, *, library: str = "") -> Iterator[None]:
    """Turn errors of another library inside the block into a SettingError.

    Args:
        where: The beginning of the message.
        wanted: What was expected.
        advice: What to do, unless the library itself is the cause.
        library: The library that the block imports.
    """
    try:
        yield
    except SettingError:
        raise
    except Exception as error:  # a library may fail in any way on the user's input
        got = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        remedy = _remedy(error, library) or advice
        raise SettingError(f"{where}: expected {wanted}, got {got}. {remedy}") from error


def _remedy(error: Exception, library: str) -> str:
    """Advise what to do if a library is missing or does not load with this torch; empty otherwise."""
    import torch

    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None:
        return f"Run pip install {missing.partition('.')[0]}."
    if "torchvision" in str(error) and not isinstance(error, FileNotFoundError):
        return (
            f"torchvision is installed, but does not load beside torch {torch.__version__}: install the "
            f"version that belongs to it, or remove it with pip uninstall torchvision."
        )
    if library and isinstance(error, ImportError):
        return f"{library} is installed, but does not load: install another version of it."
    return ""


def _pair(option: str, text: str, pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals or not name.isidentifier():
        raise SettingError(
            f"{option} {text}: expected name=value after a comma, got {pair!r}. "
            f"Write {option} timm:resnet18,num_classes=10, for example."
        )
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
