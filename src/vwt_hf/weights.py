"""The weights of a model: where they are and what tells a model from others, in 8 bits or kept elsewhere as well."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .printable import printable


def fingerprint_of(model: PreTrainedModel) -> str:
    """The class of `model` and a hash of its config and of some of its weights, spread over all.

    Another training has another, and so have the same weights by another activation.
    """
    own = hashlib.sha256(json.dumps(_lasting(model.config.to_dict()), sort_keys=True).encode())
    for name, value in model.state_dict().items():
        own.update(f"{name}{_sample(_fetched(model, name, value))}".encode())
    return f"{type(model).__name__} {own.hexdigest()[:16]}"


_PASSING = {"architectures", "dtype", "problem_type", "torch_dtype", "transformers_version", "vwt"}
"""Fields of configs that change as a model is loaded, saved, trained or compressed."""


def _lasting(value: Any) -> Any:
    """What a config's dict says of how its model computes, as JSON holds it."""
    if isinstance(value, Mapping):
        return {
            str(name): _lasting(own)
            for name, own in value.items()
            if name not in _PASSING and not str(name).startswith("_")
        }
    if isinstance(value, (list, tuple)):
        return [_lasting(own) for own in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def _sample(value: Any) -> str:
    """Shape and some of the numbers of an entry of a state dict; of what is neither numbers nor holds any, its type."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # tensors in one, such as torchao's of 8 bits
            return _sample({name: getattr(value, name) for name in value.__tensor_flatten__()[0]})
        if value.is_quantized:
            value = value.dequantize()
        some = value.flatten()[:: max(1, value.numel() // 64)][:65]
        return f"{tuple(value.shape)}{some.tolist()}"
    if isinstance(value, Mapping):
        return "".join(f"{name}{_sample(own)}" for name, own in value.items())
    if isinstance(value, (list, tuple)):  # packed weights of torch's own 8 bits
        return "".join(map(_sample, value))
    is_plain = value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype))
    return repr(value) if is_plain else type(value).__name__


def parameter_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A parameter of `model`, also where accelerate keeps its values elsewhere until they are used.

    Raises:
        ValueError: it has no values.
    """
    return _fetched(model, name, model.get_parameter(name).detach())


def _fetched(model: PreTrainedModel, name: str, value: Any) -> Any:
    """An entry of the state dict of `model`, as `parameter_of` gives it."""
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return value
    parts = name.split(".")
    for depth in reversed(range(len(parts))):  # the hook of a module may fetch what its own modules have
        for hook in _hooks_of(model.get_submodule(".".join(parts[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                return weights[".".join(parts[depth:])]
    raise ValueError(_no_values(model, name))


def _hooks_of(module: nn.Module) -> Sequence[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))  # one holds several


def _no_values(model: PreTrainedModel, name: str) -> str:
    return (
        f"{printable(name)} of the {type(model).__name__} is on the device meta, where it has no values; expected a "
        "model with weights. Load them by from_pretrained."
    )


def device_of(model: PreTrainedModel) -> torch.device:
    """Where `model` takes its images: where its weights are or, of those kept elsewhere, where accelerate runs it.

    Raises:
        ValueError: its weights have no values.
    """
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        for hook in _hooks_of(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    raise ValueError(_no_values(model, next(name for name, own in model.named_parameters() if own.is_meta)))
