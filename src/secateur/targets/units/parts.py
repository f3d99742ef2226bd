"""The modules of a captured program, which refuse attributes that no code would read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.common.preserving import ATOMS
from secateur.errors import ApplyError
from secateur.graph.flags import plain_attributes

KNOWN = "_secateur_dense"
_MODULE = "a module"


class Fixed:
    """Refuses other values for what the dense module has, where they would change nothing."""

    def knowing(self, dense: nn.Module) -> None:
        """Refuse other attributes and submodules than those of `dense` from now on, but for tensors."""
        held = {k: v for k, v in vars(dense).items() if k[:1] != "_" and not isinstance(v, torch.Tensor)}
        known = {k: v if _is_plain(v) else _MODULE for k, v in held.items() if k != "training"}
        vars(self)[KNOWN] = dict.fromkeys(dense._modules, _MODULE) | known | plain_attributes(dense)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            ApplyError: The dense module's code may read it, and the captured program does not.
        """
        known = vars(self).get(KNOWN, {})
        if name in known and name not in vars(self)["_modules"]:
            held = known[name]
            if held is _MODULE or type(value) is not type(held) or value != held:
                was = "as it was" if held is _MODULE else repr(held)
                raise ApplyError(
                    f"{name}: expected it to stay {was} when the model was traced, got {value!r}: a captured "
                    f"program reads no attributes. Set it on the dense model and trace again, or take form "
                    f"'module'."
                )
        super().__setattr__(name, value)


def _is_plain(value: Any) -> bool:
    return type(value) in ATOMS or (type(value) in (list, tuple) and all(map(_is_plain, value)))


class Part(Fixed, nn.Module):
    """A module that only holds tensors and other modules."""
