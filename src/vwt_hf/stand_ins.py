"""`StandIn`: what replaces a module's forward, or another of its methods, and how `restore` finds it."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class StandIn(functools.partial):
    """A function of ours that replaces a method of a module; `restore` finds it by its type.

    It does not keep the module alive: with a reference in a circle, a model that is deleted would stay in memory until
    Python next looks for circles.
    """

    def __new__(cls, function: Any, module: nn.Module, *given: Any) -> StandIn:
        """Calls of it are calls of `function(module, *given, ...)`."""
        return super().__new__(cls, _call, function, weakref.ref(module), *given)

    @property
    def __code__(self) -> types.CodeType:
        """The code of the function, which torch.export of torch 2.6 reads of every forward."""
        return self.args[0].__code__

    def __reduce__(self) -> Any:
        function, module, *given = self.args
        # `__func__` was made by `class_forward`: `pickle` does not find it by its name.
        fields = {name: None if name == "__func__" else value for name, value in vars(self).items()}
        return type(self), (function, module(), *given), fields

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)
        if "__func__" in state:
            self.__func__ = class_forward(self.__signature__)  # type: ignore[attr-defined]


def _call(function: Any, held: weakref.ref[nn.Module], /, *args: Any, **kwargs: Any) -> Any:
    module = held()
    if module is None:
        raise ReferenceError("The model whose forward this is was deleted; keep the model as long as its methods.")
    return function(module, *args, **kwargs)


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
