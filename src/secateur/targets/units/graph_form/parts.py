"""The modules of a captured program. They refuse to set attributes that no code of the program would read."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.common.preserving import ATOMS
from secateur.errors import ApplyError
from secateur.graph.flags import plain_attributes

KNOWN = "_secateur_dense"
"""The attribute with the names of fixed attributes, and their values."""
_MODULE = "a module"
"""Stands for a value that is not plain."""


class FixedAttributes:
    """A module that refuses new values for attributes of the dense module, since no code would read them."""

    def fix_attributes(self, dense: nn.Module) -> None:
        """Refuse from now on to change attributes and submodules that `dense` has, except tensors."""
        own = {k: v for k, v in vars(dense).items() if k[:1] != "_" and not isinstance(v, torch.Tensor)}
        fixed = {k: v if _is_plain(v) else _MODULE for k, v in own.items() if k != "training"}
        vars(self)[KNOWN] = dict.fromkeys(dense._modules, _MODULE) | fixed | plain_attributes(dense)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            ApplyError: The dense module's code may read it, and the captured program does not.
        """
        fixed = vars(self).get(KNOWN, {})
        if name in fixed and name not in vars(self)["_modules"]:
            old = fixed[name]
            if old is _MODULE or type(value) is not type(old) or value != old:
                was = "as it was" if old is _MODULE else repr(old)
                raise ApplyError(
                    f"{name}: expected it to stay {was} when the model was traced, got {value!r}: a captured "
                    f"program reads no attributes. Set it on the dense model and trace again, or take form "
                    f"'module'."
                )
        super().__setattr__(name, value)


def _is_plain(value: Any) -> bool:
    return type(value) in ATOMS or (type(value) in (list, tuple) and all(map(_is_plain, value)))


class Part(FixedAttributes, nn.Module):
    """A module without code of its own: it only has tensors and other modules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run.

        Raises:
            ApplyError: Always: the program has the code of the whole model only.
        """
        raise ApplyError(
            "forward: expected a call of the whole model, got one of a part of it: a captured program has a "
            "single forward pass, and its parts have no code. Take form 'module'."
        )

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook, and say that it never runs."""
        _never_runs("register_forward_pre_hook")
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook, and say that it never runs."""
        _never_runs("register_forward_hook")
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook, and say that it never runs."""
        _never_runs("register_full_backward_hook")
        return super().register_full_backward_hook(*args, **kwargs)


def _never_runs(what: str) -> None:
    warnings.warn(
        f"{what}: a captured program does not call this module, so the hook never runs. Take form 'module'.",
        stacklevel=3,
    )
