"""What stands in place of a module's forward, or of another of its methods, and how `restore` knows it."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class StandIn(functools.partial):
    """A function of ours in place of a module's forward; `restore` finds it by its type."""

    @property
    def __code__(self) -> types.CodeType:
        """The code of that function, which torch.export of torch 2.6 reads of every forward."""
        return self.func.__code__

    def __reduce__(self) -> Any:
        state: Any = super().__reduce__()
        made, given, (func, args, kwargs, fields) = state
        if "__func__" in (fields or {}):  # a function that `pickle` does not find by its name
            fields = fields | {"__func__": None}
        return made, given, (func, args, kwargs, fields)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if "__func__" in vars(self):
            self.__func__ = class_forward(self.__signature__)  # type: ignore[attr-defined]


def class_forward(signature: inspect.Signature) -> Any:
    """The forward of a model's class as a function with `patch_words` in its signature; `is_ours` finds it.

    accelerate makes a method of it where it wraps and unwraps a forward for mixed precision. A function and no other
    object, as torch.compile and torch.export read the code of every forward.
    """

    def forward(self: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    function: Any = forward
    function.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return function


def is_ours(value: Any) -> bool:
    """Whether an attribute of a module is a forward or method of ours, or what accelerate left of one."""
    return isinstance(value, StandIn) or (isinstance(value, types.MethodType) and _is_class_forward(value.__func__))


def _is_class_forward(function: Any) -> bool:
    return getattr(function, "__qualname__", None) == "class_forward.<locals>.forward"


def slot_of(module: nn.Module) -> str:
    """The attribute that holds the forward of `module`: accelerate (`device_map`) moves it to another and wraps it."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def own_forward(module: nn.Module) -> Any:
    """The forward that `module` has in place of its class's; accelerate leaves that in it when hooks are removed."""
    present = module.__dict__.get("forward")
    function = getattr(present, "__func__", None)
    return None if function is type(module).forward or _is_class_forward(function) else present


def require_replaceable(module: nn.Module) -> None:
    """Raises `ValueError` where the forward of `module` is not its class's, nor one of ours."""
    present = own_forward(module)
    if slot_of(module) == "forward" and present is not None and not isinstance(present, StandIn):
        raise ValueError(
            f"Something else replaced the forward of {type(module).__name__} in this model; take that out before "
            "compressing it."
        )
