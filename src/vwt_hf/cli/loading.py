"""Loads checkpoints for verbs: complete, quietly, by the class that a verb needs."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from ..printable import shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")
NAMED = 3
"""How many missing weights an error names."""


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--device`, which `processes.usable_device` reads."""
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--dtype`, which `load` takes."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on a CPU, else as saved)")


def own_class(config: Any) -> Any:
    """The class that a checkpoint's config names for its model; `None` if transformers does not have it."""
    import transformers

    from ..model_configs import plain_class

    classes = [getattr(transformers, name, None) for name in config.architectures or []]
    return next((each for each in classes if getattr(each, "config_class", None) is plain_class(type(config))), None)


def features_class(config: Any) -> Any:
    """The class that loads a checkpoint for features: its own, such as CLIPVisionModelWithProjection, or `AutoModel`.

    `AutoModel` is for models with another head, such as one for labels, and loads the model below.
    """
    from transformers import AutoModel

    named = own_class(config)
    return named if named is not None and named.__name__.endswith(("Model", "WithProjection")) else AutoModel


def load(
    checkpoint: str, device: torch.device, *, auto: Any = None, dtype: str | None = None, vwt: Any = False
) -> PreTrainedModel:
    """A checkpoint's model, ready to answer. If its pooler is untrained, it gives no pooled output.

    Args:
        auto: the class that loads it; by default `AutoModel`.
        dtype: of the weights, such as "bfloat16", or "auto" for the checkpoint's; by default float32 on a CPU, else
            "auto".
        vwt: the setting, by default none; `None`: the checkpoint's own, if it has one.

    Raises:
        ValueError: the checkpoint lacks other weights or has some of another shape, or the family is not supported.
        OSError: there is no such checkpoint.
    """
    from transformers import AutoModel

    from ..families import family_of
    from ..processors import quiet_transformers

    with quiet_transformers():
        loaded: Any = (auto or AutoModel).from_pretrained(
            checkpoint,
            **({} if vwt is None else {"vwt": vwt}),
            trust_remote_code=False,
            # Half precision is slower than single on most CPUs.
            dtype=dtype or ("float32" if device.type == "cpu" else "auto"),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else the error refers to a report, which is hidden here
        )
    model, report = loaded
    _require_shapes(model, report["mismatched_keys"], checkpoint)
    family_of(model)
    leave_out_random(model, report["missing_keys"], checkpoint)
    return model.to(device).eval()


def _require_shapes(model: Any, mismatched: Collection[tuple[str, Any, Any]], checkpoint: str) -> None:
    """Refuses a model of which weights have another shape in the checkpoint: their names, and both shapes of each."""
    if mismatched:
        name, there, here = min(mismatched)
        raise ValueError(
            f"{checkpoint} has weights {name} of shape {tuple(there)}, and its config.json makes a "
            f"{type(model).__name__} with {tuple(here)}; expected weights and a config that belong together. Correct "
            "config.json (id2label, image_size, ...)."
        )


def leave_out_random(model: Any, missing: Iterable[str], checkpoint: str) -> None:
    """Takes the pooler off a model if its weights are among the `missing`; refuses a model that lacks others, too."""
    missing = {name for name in missing if not name.endswith("mask_token")}
    poolers = {name for name in missing if "pooler." in name}
    if missing != poolers:
        named = sorted(missing - poolers)
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise ValueError(
            f"{checkpoint} lacks weights of {type(model).__name__}, which would be random: "
            f"{', '.join(named[:NAMED])}{more}. Expected a complete checkpoint."
        )
    if poolers:
        model.pooler = None  # what it gave would be random


def load_model(checkpoint: str, device: torch.device, dtype: str | None, vwt: Any = False) -> PreTrainedModel:
    """As `load`, with the model's classifier, if it has one."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    is_classifier = any("ForImageClassification" in name for name in config.architectures or [])
    auto = AutoModelForImageClassification if is_classifier else features_class(config)
    return load(checkpoint, device, auto=auto, dtype=dtype, vwt=vwt)


def load_whole(checkpoint: str) -> PreTrainedModel:
    """A checkpoint's plain model as it was saved, on the CPU: of its own class, with all weights, in their data type.

    Raises:
        ValueError: transformers does not have the class, or the model cannot be compressed.
        OSError: there is no such checkpoint.
    """
    import torch
    from transformers import AutoConfig, __version__

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    model_class = own_class(config)
    if model_class is None:
        raise ValueError(
            f"{checkpoint} has architectures {shown(config.architectures)} in its config.json; expected a class of "
            f"transformers {__version__} for a {type(config).__name__}: saved as another the model may lose weights. "
            "Correct it, or leave out --output and load the model with the setting that is printed."
        )
    return load(checkpoint, torch.device("cpu"), auto=model_class, dtype="auto")


def tokenizer_beside(checkpoint: str) -> Any:
    """The tokenizer of a Hub id or folder; `None` if there is none. Raises `ValueError` if it lacks some files."""
    from transformers.utils import cached_file

    from ..processors import load_tokenizer

    if cached_file(checkpoint, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    return load_tokenizer(checkpoint)
