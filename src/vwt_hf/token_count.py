"""`count_tokens`: how many tokens the layers of a model run on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .compress import joining_layers, parts_of, reduce_hook_of
from .families import family_of, find_places, find_tower, model_of
from .forward import forward_within
from .hooks import Numbered


@dataclasses.dataclass
class TokenCount:
    """Tokens that forwards of a model ran on, padding left out."""

    by_layer: list[int]
    """Tokens that entered each layer, of all images."""
    images: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that entered the first layer, of all images."""
        return self.by_layer[0]

    @property
    def mean(self) -> float:
        """Tokens of an image, the mean over images and layers.

        Raises:
            ValueError: no forward ran.
        """
        if not self.images:
            raise ValueError(
                "no tokens were counted; call the model inside `with count_tokens(model)`. Of what torch.compile "
                "compiled, and ran before, nothing may be counted; call torch.compiler.reset() first."
            )
        return sum(self.by_layer) / len(self.by_layer) / self.images


class _Counting(Numbered):
    """A hook that counts. In a copy or pickle of the model, which may outlive the block, it does nothing."""

    def __init__(self, add: Callable[..., None]) -> None:
        self._add: Callable[..., None] | None = add

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        # While another thread takes this hook out, torch may no longer know that it takes keywords.
        if self._add is not None and len(rest) == 2:
            self._add(module, args, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_add": None}


@contextlib.contextmanager
def count_tokens(model: PreTrainedModel) -> Iterator[TokenCount]:
    """Counts how many tokens enter the layers of a model, prefix tokens included and padding left out.

    Args:
        model: of a supported family, plain or compressed; or any that holds one part which was compressed alone. All
            its forwards inside the block count, of any thread, but for those whose images were embedded before. Copies
            of it do not.

    Raises:
        ValueError: the family is not supported, or several parts were compressed alone; of a forward, that the setting
            changed inside the block.
        TypeError: `model` is no transformers model; what torch.compile and DataParallel make of one is none.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> from vwt_hf import compress
        >>> model = compress(ViTModel(ViTConfig(num_hidden_layers=1)), {"keep_ratio": 0.25})
        >>> with count_tokens(model) as count:
        ...     _ = model(pixel_values=torch.zeros(2, 3, 224, 224))
        >>> count.tokens, count.images, count.mean  # CLS + 49 of 196 patches
        (100, 2, 50.0)
    """
    model = model_of(model)
    compressed = parts_of(model)  # alone, in a whole that may be of no family
    if len(compressed) > 1:
        names = [name for name, module in model.named_modules() if module in compressed]
        raise ValueError(
            f"{type(model).__name__} holds {len(compressed)} parts that were compressed alone ({', '.join(names)}); "
            f"expected one. Count the tokens of each by itself, as by vwt_hf.count_tokens(model.{names[0]})."
        )
    part = compressed[0] if compressed else model
    try:
        tower = find_tower(part, family_of(part))
    except ValueError as error:
        raise ValueError(
            f"the tokens of a {type(part).__name__} cannot be counted: it is of no supported family, or has several "
            "vision towers. Count those of a tower within it, as by vwt_hf.count_tokens(model.its_tower)."
        ) from error
    places = find_places(tower.module)
    count = TokenCount([0] * len(places))

    def add(embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A setting that came since reduces behind this. Copies and replicas have hooks of their own.
        if embeddings is counted and reduce_hook_of(embeddings) is not reduce:
            raise ValueError(
                "vwt_hf.compress or vwt_hf.restore was called within count_tokens, which counts by the setting that "
                "the model had as the block began. Write `with count_tokens(model)` anew after each change."
            )
        images, tokens = _images_and_tokens(embeddings, args, kwargs, output)
        forward = forward_within(embeddings)
        if forward is not None:
            forward.counts.append(count)
        count.images += images
        add_from(0, tokens)

    def add_from(layer: int, tokens: int) -> None:
        for number in range(layer, len(places)):
            count.by_layer[number] += tokens

    def fewer(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = forward_within(layer)
        if forward is not None and layer in forward.after and any(one is count for one in forward.counts):
            tokens = args[0] if args else kwargs["hidden_states"]
            before = forward.plan_of_shape(*tokens.shape[:2])
            if before is not None:
                add_from(number, forward.after[layer].layout.tokens - before.layout.tokens)

    # Behind `Reduce`, which is a hook of the embeddings or of a wrapper around them, such as torch.compile's.
    counted = next((part for part in tower.embeddings.modules() if reduce_hook_of(part)), tower.embeddings)
    reduce = reduce_hook_of(counted)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(counted.register_forward_hook(_Counting(add), with_kwargs=True))
        for number in joining_layers(tower.module):
            for layer in places[number - 1]:
                counting = _Counting(functools.partial(fewer, number))
                hooks.enter_context(layer.register_forward_hook(counting, with_kwargs=True))
        yield count


def _images_and_tokens(
    embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[int, int]:
    """How many images the embeddings were given, and how many tokens they made of them."""
    forward = forward_within(embeddings)
    plan = None if forward is None else forward.grouped
    if plan is not None:
        tokens = plan.layout.tokens if plan.layout.real is None else int((plan.layout.sizes > 0).sum())
        return len(plan.layout.rows), tokens
    output = output[0] if isinstance(output, tuple) else output  # some embeddings give more than tokens
    shapes = kwargs.get("spatial_shapes", args[1] if len(args) > 1 else None)
    if isinstance(shapes, torch.Tensor) and shapes.shape == (len(output), 2):  # patches that come padded
        return len(output), int(shapes.prod(dim=1).sum())
    return output.shape[0], output.shape[0] * output.shape[1]
