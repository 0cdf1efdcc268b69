"""`StandIn`: what replaces a module's forward, or another of its methods, and how `restore` finds it."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class StandIn(functools.partial):
    """A function of ours that replaces a method of a module; `restore` finds it by its type."""

    @property
    def __code__(self) -> types.CodeType:
        """The code of the function, which torch.export of torch 2.7 reads of every forward."""
        return self.func.__code__

    def __reduce__(self) -> Any:
        state: Any = super().__reduce__()
        made, given, (func, args, kwargs, fields) = state
        if "__func__" in (fields or {}):  # made by `class_forward`: `pickle` does not find it by its name
            fields = fields | {"__func__": None}
        return made, given, (func, args, kwargs, fields)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if "__func__" in vars(self):
            self.__func__ = class_forward(self.__signature__)  # type: ignore[attr-defined]


def class_forward(signature: inspect.Signature) -> Any:
    """A plain function that calls the forward of the class of a model, and shows this signature; `is_ours` finds it.

    accelerate makes a method of it where it wraps and unwraps a forward for mixed precision. It is a function because
    torch.compile and torch.export read the code of every forward.
    """

    def forward(self: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    function: Any = forward
    function.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return function


def is_ours(value: Any) -> bool:
    """Whether an attribute of a module is a stand-in of ours, or the method that accelerate made of one."""
    return isinstance(value, StandIn) or (isinstance(value, types.MethodType) and _is_class_forward(value.__func__))


def _is_class_forward(function: Any) -> bool:
    return getattr(function, "__qualname__", None) == "class_forward.<locals>.forward"


def slot_of(module: nn.Module) -> str:
    """The attribute that holds the forward of `module`: another where accelerate (`device_map`) wrapped it."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def own_forward(module: nn.Module) -> Any:
    """What replaces the forward of its class in `module`; `None` if nothing does.

    accelerate leaves the class's own forward in the module where it removed its hooks.
    """
    present = module.__dict__.get("forward")
    # Its wrapper of a stand-in has all attributes of that, `__func__` among them, and is no method.
    function = present.__func__ if isinstance(present, types.MethodType) else None
    return None if function is type(module).forward or _is_class_forward(function) else present


def require_replaceable(module: nn.Module) -> None:
    """Raises `ValueError` where the forward of `module` is not its class's, nor one of ours."""
    present = own_forward(module)
    if slot_of(module) == "forward" and present is not None and not isinstance(present, StandIn):
        raise ValueError(
            f"Something else replaced the forward of {type(module).__name__} in this model; take that out before "
            "compressing it."
        )
