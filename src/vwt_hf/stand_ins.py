"""What stands in for a method of one module, and leaves the method to all others of its class.

A module that held a method of its own would hold itself. Nobody but Python's garbage collector could let go of it, and
that does not hurry for gigabytes of weights. So a module holds a function alone, and the method of its class, which is
replaced once, asks each module for it.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_classes: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes of which a method was replaced."""
_KEPT = ("forward", "_old_forward", "_original_forward")
"""Where a module may keep the forward of its class, bound: accelerate does for its hooks, for
`Accelerator.unwrap_model` and where it took hooks out."""


class StandIn:
    """What a module holds in its `__dict__`; `restore` finds it by its type.

    Args:
        owner: the class whose method it stands in for: that of the module, or one above it. In a class below `owner`
            with such a method of its own, `super()` reaches what `owner` had.
        name: of the method.
        function: is called as `function(method, module, *args, **kwargs)`, `method` being that of the class.
        parameter: name of a keyword that the signature of the method shows, too, as long as there is such a stand-in: a
            method has one signature for all modules of its class.
    """

    def __init__(self, owner: type, name: str, function: Callable[..., Any], parameter: str | None = None) -> None:
        self.owner = owner
        self.name = name
        self.function = function
        self.parameter = parameter
        method = _replace(owner, name)
        if parameter is not None:
            method._shown_by.add(weakref.ref(self, functools.partial(_hide, method)))
            method.__signature__ = _with_keyword(inspect.signature(method._method), parameter)

    def __reduce__(self) -> Any:
        return StandIn, (self.owner, self.name, self.function, self.parameter)


def _slot(name: str) -> str:
    return f"_vwt_hf_{name}"


def _hide(method: Any, gone: Any) -> None:
    """Has a method show its own signature again, if `gone` was the last that had it show another."""
    signature = method.__signature__
    method._shown_by.discard(gone)
    method.__signature__ = inspect.signature(method._method)
    if method._shown_by:  # also if another thread added one meanwhile
        method.__signature__ = signature


def _with_keyword(signature: inspect.Signature, name: str) -> inspect.Signature:
    added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.Tensor | None")
    return signature.replace(parameters=sorted((*signature.parameters.values(), added), key=lambda one: one.kind))


def _replace(owner: type, name: str) -> Any:
    """Has a method of a class ask its module for a stand-in, and returns the one that does."""
    if not _asks(vars(owner)[name]):
        setattr(owner, name, _asking(owner, name, vars(owner)[name]))
        _classes.add(owner)
    return vars(owner)[name]


def _asking(owner: type, name: str, method: Any) -> Any:
    """What `_replace` puts in place of a method."""
    slot = _slot(name)

    @functools.wraps(method)
    def asking(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stand_in = self.__dict__.get(slot)
        if stand_in is None or stand_in.owner is not owner:
            return method(self, *args, **kwargs)
        return stand_in.function(method, self, *args, **kwargs)

    replaced: Any = with_code_of_its_own(asking, f"{owner.__qualname__}.{name}")
    replaced._method, replaced._itself = method, replaced  # what wraps it has its attributes, too
    del replaced.__wrapped__  # through which accelerate goes down to the first where it unwraps a model
    replaced.__signature__ = inspect.signature(method)
    replaced._shown_by = set()
    return replaced


def with_code_of_its_own(function: Any, name: str) -> Any:
    """Gives a function, of which many are made by one definition, code of its own.

    torch.compile limits how many graphs it makes of one code, and tells codes apart by their names, too.
    """
    function.__code__ = function.__code__.replace(co_name=name)
    return function


def _asks(method: Any) -> bool:
    """Whether a method is one that `_replace` put there."""
    return isinstance(method, types.FunctionType) and vars(method).get("_itself") is method


def _of_class(method: Any) -> Any:
    """The method that a class had before `_replace`."""
    return method._method if _asks(method) else method


def put(module: nn.Module, name: str, function: Callable[..., Any], parameter: str | None = None) -> None:
    """Puts a function in place of a method of a module, as `StandIn` says; any before is forgotten."""
    owner = next(one for one in type(module).__mro__ if name in vars(one))
    module.__dict__[_slot(name)] = StandIn(owner, name, function, parameter)
    method = vars(owner)[name]
    for kept in _KEPT if name == "forward" else ():
        bound = module.__dict__.get(kept)
        if isinstance(bound, types.MethodType) and bound.__func__ is _of_class(method):
            module.__dict__[kept] = types.MethodType(method, module)


def has_stand_in(module: nn.Module, name: str) -> bool:
    """Whether something of ours stands in for a method of a module."""
    return _slot(name) in module.__dict__


def take_out(module: nn.Module) -> None:
    """Takes all stand-ins out of a module, and a forward that accelerate left there where it unwrapped the module."""
    for slot in [slot for slot, value in vars(module).items() if isinstance(value, StandIn)]:
        del module.__dict__[slot]
    forward = module.__dict__.get("forward")
    if isinstance(forward, types.MethodType) and _asks(forward.__func__):
        del module.__dict__["forward"]


def give_back() -> None:
    """Gives all classes the methods that they had before, but where somebody has replaced them again."""
    for one in list(_classes):
        for name, method in list(vars(one).items()):
            if _asks(method):
                setattr(one, name, method._method)
    _classes.clear()


def own_forward(module: nn.Module) -> Any:
    """What replaces the forward of its class in `module`; `None` if nothing does.

    accelerate leaves the class's own forward in the module where it removed its hooks.
    """
    present = module.__dict__.get("forward")
    function = present.__func__ if isinstance(present, types.MethodType) else None
    return None if function in (type(module).forward, _of_class(type(module).forward)) else present


def require_replaceable(module: nn.Module) -> None:
    """Raises `ValueError` where the forward of `module` is not its class's.

    Where accelerate (`device_map`) wrapped it, what it wrapped is asked.
    """
    if not hasattr(module, "_hf_hook") and own_forward(module) is not None:
        raise ValueError(
            f"Something else replaced the forward of {type(module).__name__} in this model; take that out before "
            "compressing it."
        )
