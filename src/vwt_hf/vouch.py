"""The trial of a vision transformer whose model type has no row in the family table, before it is compressed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .checks import sides
from .families import NotVouched, Tower, find_layers, not_vouched
from .weights import is_in_parts

MOST_PREFIX = 16
"""The most prefix tokens that a model is taken to have; more rows than that beside the patches are something else."""
NEAR = 1e-3
"""Outputs that differ by no more than this share of the largest value are taken to differ by rounding alone."""
ROUNDINGS = 8
"""In half precision that share is this many times the distance from 1 to the next number."""
APART = 0.1
"""Outputs of an image alone and in a batch may differ by this share of the largest value: models that are quantised
while they run round all images of a batch together."""


@torch.no_grad()
def vouch(model: PreTrainedModel, tower: Tower) -> None:
    """Tries on noise what the general rule rests on: each patch is one row, layers treat rows alike wherever they lie,
    and images do not change each other's answers.

    Raises:
        NotVouched: one of these does not hold, or the model cannot be tried.
    """
    try:
        _require_usual(tower)
        with _evaluating(tower.module):
            _try(tower)
    except NotVouched as error:
        raise not_vouched(model, error) from error
    except Exception as error:  # a model may raise anything
        reason = f"cannot be tried on an image ({type(error).__name__}: {str(error)[:200]})"
        raise not_vouched(model, reason) from error


def _require_usual(tower: Tower) -> None:
    """Raises `NotVouched` where the modules of a tower show that it cannot be tried."""
    if not find_layers(tower.module):
        raise NotVouched("has no layers of a kind that transformers checkpoints")
    if not getattr(tower.module, "_supports_attention_backend", False):
        raise NotVouched("has attention that does not go through transformers' AttentionInterface")
    if any(parameter.is_meta for parameter in tower.module.parameters()):
        raise NotVouched("has weights that are elsewhere, so it cannot be tried; load it whole")
    if any(map(is_in_parts, tower.module.parameters())):
        raise NotVouched("has weights in parts in several processes, so it cannot be tried; compress it before that")


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Puts `module` into evaluation mode, and at the end those of its modules back that were in training."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def may_change_rows(tower: Tower) -> bool:
    """Whether the embeddings of a tower may give other rows than one for each patch: they hold modules that are neither
    transformers' nor torch's, hooks, or a convolution whose patches overlap."""
    return any(
        not type(part).__module__.startswith(("torch.", "transformers."))
        or part._forward_hooks
        or (isinstance(part, nn.Conv2d) and part.kernel_size != part.stride)
        for part in tower.embeddings.modules()
    )


@torch.no_grad()
def vouch_rows(model: PreTrainedModel, tower: Tower) -> None:
    """Tries on noise that each patch is one row, and that these rows come after those of prefix tokens.

    A model that cannot be tried, as its weights are elsewhere or in parts or it fails on noise, is let through.

    Raises:
        NotVouched: it does not hold.
    """
    if any(parameter.is_meta for parameter in tower.embeddings.parameters()):
        return
    if any(map(is_in_parts, tower.module.parameters())):  # FSDP would ever after take the tower for the whole
        return
    try:
        with _evaluating(tower.embeddings):
            _require_rows(tower, _noise(tower), most=None)
    except NotVouched as error:
        raise not_vouched(model, error) from error
    except Exception:  # a model may raise anything
        return


def _noise(tower: Tower) -> torch.Tensor:
    """Two images of noise of the size that a tower is made for."""
    height, width = sides(tower.module.config.image_size)
    weight = next(parameter for parameter in tower.module.parameters() if parameter.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, tower.channels, height, width, generator=generator, device="cpu")
    return noise.to(weight.device, weight.dtype)


def _require_rows(tower: Tower, pixel_values: torch.Tensor, most: int | None) -> tuple[torch.Tensor, int]:
    """Requires that each patch is one row in the output of a tower's embeddings, after at most `most` prefix tokens.

    Returns:
        That output, (batch, prefix + patches, hidden), and the number of prefix tokens.
    """
    rows, columns = (side // patch for side, patch in zip(pixel_values.shape[2:], tower.patch_size, strict=True))
    patches, row, column = rows * columns, rows // 2, columns // 2
    embedded = _embedded(tower, pixel_values)
    prefix = embedded.shape[1] - patches
    if prefix < 0 or (most is not None and prefix > most):
        raise NotVouched(f"makes {embedded.shape[1]} rows of {patches} patches")
    other = pixel_values.clone()
    height, width = tower.patch_size
    other[..., row * height : (row + 1) * height, column * width : (column + 1) * width] += 1
    changed = (_embedded(tower, other) != embedded).any(dim=2).any(dim=0).nonzero().flatten().tolist()
    middle = row * columns + column
    if changed != [prefix + middle]:
        raise NotVouched(f"changes rows {changed[:5]} with patch {middle}, which should be row {prefix + middle}")
    return embedded, prefix


def _try(tower: Tower) -> None:
    """Raises `NotVouched` where the general rule does not hold for a tower."""
    pixel_values = _noise(tower)
    plain = _run(tower, pixel_values, lambda tokens: tokens)
    embedded, prefix = _require_rows(tower, pixel_values, MOST_PREFIX)
    patches = embedded.shape[1] - prefix
    if plain.shape != embedded.shape:
        raise NotVouched(f"makes {embedded.shape[1]} rows of {patches} patches and gives {tuple(plain.shape)} out")
    # On the CPU, from where it indexes tensors on any device: a tower may lie on several.
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(patches, generator=generator, device="cpu")
    order = torch.cat((torch.arange(prefix, device="cpu"), prefix + shuffled))
    moved = _run(tower, pixel_values, lambda tokens: tokens[:, order])
    near = max(NEAR, ROUNDINGS * torch.finfo(plain.dtype).eps)
    alone = _run(tower, pixel_values[:1], lambda tokens: tokens)
    if alone.shape != plain[:1].shape or (alone - plain[:1]).abs().max() > APART * plain.abs().max():
        raise NotVouched("answers of an image by what else is in the batch, as of the frames of a video")
    if (moved - plain[:, order]).abs().max() > near * plain.abs().max():
        raise NotVouched(
            "answers by where in the sequence a patch lies, by more than the positions in its embeddings (or rounds "
            "too coarsely to tell, as quantised models may, which are compressed before they are quantised)"
        )
    kept = prefix + patches // 2
    short = _run(tower, pixel_values, lambda tokens: tokens[:, :kept])
    if short.shape[1] != kept:
        raise NotVouched(f"gives {short.shape[1]} hidden states of {kept} tokens")


class _Embedded(Exception):
    """Ends a forward once its embeddings have run; its argument is their output."""


def _embedded(tower: Tower, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the embeddings of a tower make of images: all of their output, or its first."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        raise _Embedded(output[0] if isinstance(output, tuple) else output)

    with tower.embeddings.register_forward_hook(hook):
        try:
            tower.module(pixel_values)
        except _Embedded as done:
            return done.args[0]
    raise RuntimeError("The embeddings of the tower did not run.")


def _run(tower: Tower, pixel_values: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The output of a tower whose layers get `change(output of the embeddings)`."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            raise NotVouched("has embeddings that give more than tokens")
        return change(output)

    with tower.embeddings.register_forward_hook(hook):
        return tower.module(pixel_values)[0]
