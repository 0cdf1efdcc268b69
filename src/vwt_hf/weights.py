"""The weights of a model: where they were loaded from, on which device they are, and a fingerprint of them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .printable import printable

_loaded_by: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
"""The `revision`, `subfolder`, `token` and the like that a model was loaded with, if there were any. They are not
attributes of the model: a pickle of it must not hold a token."""
_PLACE = "_vwt_hf_place"
"""The attribute that says where a model was loaded from, if its `name_or_path` alone does not; copies keep it."""


def remember_load(model: PreTrainedModel, hub_kwargs: dict[str, Any]) -> None:
    """Keeps where a model was loaded from and by which keyword arguments, to read what lies beside its weights later.

    Copies and pickles of the model know the place as well, and it stays the same where a program changes its folder.
    """
    kept = {name: value for name, value in hub_kwargs.items() if value is not None and name != "force_download"}
    place: dict[str, str] = {}
    if "subfolder" in kept:
        place["subfolder"] = os.fspath(kept["subfolder"])
    if "revision" in kept:  # as a plain text: what transformers resolved does not survive a pickle
        place["revision"] = str(getattr(kept["revision"], "resolved", kept["revision"]))
    named = model.name_or_path or ""
    if os.path.isdir(named) and not os.path.isabs(named):
        place["folder"] = os.path.join(os.getcwd(), named)  # "link/.." is where the link leads, and back
    if place:
        model.__dict__[_PLACE] = place | {"name": named}
    if kept:
        _loaded_by[model] = kept


def _place_of(model: PreTrainedModel) -> dict[str, str]:
    place = model.__dict__.get(_PLACE, {})
    return place if place.get("name") == model.name_or_path else {}  # somebody named it anew


def source_of(model: PreTrainedModel) -> str:
    """The Hub id or folder that `model` was loaded from; empty if from nowhere."""
    named, folder = model.name_or_path or "", _place_of(model).get("folder")
    moved = folder is not None and not os.path.isdir(folder) and os.path.isdir(named)  # a project with a pickle
    return named if folder is None or moved else folder


def loaded_by(model: PreTrainedModel) -> dict[str, Any]:
    """The keyword arguments by which what lies beside a model's weights is read: `revision`, `subfolder`, ..."""
    place = {name: value for name, value in _place_of(model).items() if name in ("revision", "subfolder")}
    return place | _loaded_by.get(model, {})


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with modules of its own and the very same weights, which `loaded_by` knows, too.

    Raises:
        ValueError: its weights lie in parts in several processes, or it holds something that cannot be copied.
    """
    require_unsharded(model)
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the {type(model).__name__} cannot be copied, as its settings are to be compared on a copy "
            f"({str(error).removesuffix('.')}). Take out what cannot be copied, as a lock or a tensor that a hook "
            "keeps; copy.deepcopy(model) shows what it is."
        ) from error
    if model in _loaded_by:
        _loaded_by[copied] = _loaded_by[model]
    return copied


def fingerprint_of(model: PreTrainedModel) -> str:
    """The class of `model` and a hash of its config, of all that its state dict holds and of which adapters are on.

    It changes with training, and with any field of the config that changes answers. Every weight is read.
    """
    digest = hashlib.sha256(json.dumps(lasting(model.config.to_dict()), sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        _hash_value(digest, _fetched(model, name, value))
    digest.update(json.dumps(list(_adapters_of(model)), sort_keys=True, default=str).encode())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


def _adapters_of(model: nn.Module) -> Iterator[Any]:
    """What layers with PEFT's adapters hold beside weights: whether adapters are on, which, and how strongly."""
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            state = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
            yield name, [getattr(module, field, None) for field in state]


_PASSING = {"architectures", "dtype", "problem_type", "torch_dtype", "transformers_version", "vwt"}
"""Fields of configs that change as a model is loaded, saved, trained or compressed."""


def lasting(value: Any) -> Any:
    """The part of a config's dict that says how its model computes, as JSON holds it."""
    if isinstance(value, Mapping):
        return {
            str(name): lasting(own)
            for name, own in value.items()
            if name not in _PASSING and not str(name).startswith("_")
        }
    if isinstance(value, (list, tuple)):
        return [lasting(own) for own in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def _hash_value(digest: Any, value: Any) -> None:
    """Adds an entry of a state dict to `digest`: of a tensor the shape, data type and all numbers."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # it is made of other tensors, such as torchao's of 8 bits
            _hash_value(digest, {name: getattr(value, name) for name in value.__tensor_flatten__()[0]})
            return
        if value.is_quantized:
            value = value.dequantize()
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        plain = value.detach().cpu().resolve_conj().resolve_neg()
        digest.update(plain.reshape(-1).contiguous().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for name, own in value.items():
            digest.update(str(name).encode())
            _hash_value(digest, own)
    elif isinstance(value, (list, tuple)):  # packed weights of torch's own 8 bits
        for own in value:
            _hash_value(digest, own)
    else:
        is_plain = value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype))
        digest.update((repr(value) if is_plain else type(value).__name__).encode())


_MARKS = ("_is_flat_param", "_fsdp_flattened", "ds_id")
"""Attributes by which FSDP 1 and DeepSpeed mark parameters of which a process may hold a part."""


def is_in_parts(parameter: nn.Parameter) -> bool:
    """Whether a process may hold a part of a parameter alone: by FSDP, DeepSpeed or tensor parallelism."""
    is_split = not all(placement.is_replicate() for placement in getattr(parameter, "placements", ()))
    return is_split or any(hasattr(parameter, mark) for mark in _MARKS)


def require_unsharded(model: PreTrainedModel) -> None:
    """Refuses a model of whose weights each process holds a part.

    Raises:
        ValueError: it is one, by FSDP, DeepSpeed or tensor parallelism.
    """
    for name, parameter in model.named_parameters():
        if is_in_parts(parameter):
            raise ValueError(
                f"{printable(name)} of the {type(model).__name__} lies in parts in several processes (by FSDP, "
                "DeepSpeed or tensor parallelism); expected each process to hold the whole model. Load it in each."
            )


def parameter_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A parameter of `model`, fetched where accelerate keeps its values elsewhere until they are used.

    Raises:
        ValueError: it has no values.
    """
    return _fetched(model, name, model.get_parameter(name).detach())


def _fetched(model: PreTrainedModel, name: str, value: Any) -> Any:
    """An entry of the state dict of `model`, fetched where accelerate keeps its values elsewhere."""
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return value
    parts = name.split(".")
    for depth in reversed(range(len(parts))):  # the hook of a module may hold values of modules within it
        for hook in _hooks_of(model.get_submodule(".".join(parts[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                return weights[".".join(parts[depth:])]
    raise ValueError(_no_values(model, name))


def _hooks_of(module: nn.Module) -> Sequence[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))  # a `SequentialHook` holds several


def _no_values(model: PreTrainedModel, name: str) -> str:
    return (
        f"{printable(name)} of the {type(model).__name__} is on the device meta, where it has no values; expected a "
        "model with weights. Load them by from_pretrained."
    )


def device_of(model: PreTrainedModel) -> torch.device:
    """The device on which `model` takes its images: that of its weights or, where these are kept elsewhere, that on
    which accelerate runs it.

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
