"""The general rule: a vision transformer whose model type has no row in the family table is tried before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import NotVouched, Tower, find_layers, not_vouched

MOST_PREFIX = 16
"""The most prefix tokens that a model is taken to have; more rows than that beside the patches are something else."""
NEAR = 1e-3
"""Outputs that differ by no more than this share of the largest value are taken to differ by rounding alone."""
ROUNDINGS = 8
"""Or, in half precision, by no more than so many times what two values next to each other do."""


@torch.no_grad()
def vouch(model: PreTrainedModel, tower: Tower) -> None:
    """Tries on noise what the general rule rests on: each patch is one row, and layers do not ask where a row lies.

    Raises:
        NotVouched: it does not hold, or it cannot be tried.
    """
    try:
        _vouch(tower)
    except NotVouched as error:
        raise not_vouched(model, error) from error


def _vouch(tower: Tower) -> None:
    if not find_layers(tower.module):
        raise NotVouched("has no layers of a kind that transformers checkpoints")
    if not getattr(tower.module, "_supports_attention_backend", False):
        raise NotVouched("has attention that does not go through transformers' AttentionInterface")
    if any(parameter.is_meta for parameter in tower.module.parameters()):
        raise NotVouched("has weights that are elsewhere, so it cannot be tried; load it whole")
    training = [module for module in tower.module.modules() if module.training]
    tower.module.eval()
    try:
        _try(tower)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise NotVouched(f"cannot be tried on an image ({str(error).splitlines()[0]})") from error
    finally:
        for module in training:
            module.training = True


def _try(tower: Tower) -> None:
    size = tower.module.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = height // tower.patch_size[0], width // tower.patch_size[1]
    patches, middle = rows * columns, (rows // 2) * columns + columns // 2
    weight = next(parameter for parameter in tower.module.parameters() if parameter.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, tower.channels, height, width, generator=generator, device="cpu")
    pixel_values = noise.to(weight.device, weight.dtype)

    embedded, plain = _run(tower, pixel_values, lambda tokens: tokens)
    prefix = embedded.shape[1] - patches
    if not 0 <= prefix <= MOST_PREFIX or plain.shape != embedded.shape:
        raise NotVouched(f"makes {embedded.shape[1]} rows of {patches} patches and gives {tuple(plain.shape)} out")
    other = pixel_values.clone()
    top, left = (middle // columns) * tower.patch_size[0], (middle % columns) * tower.patch_size[1]
    other[..., top : top + tower.patch_size[0], left : left + tower.patch_size[1]] += 1
    changed, _ = _run(tower, other, lambda tokens: tokens)
    rows_changed = (changed != embedded).any(dim=2).any(dim=0).nonzero().flatten().tolist()
    if rows_changed != [prefix + middle]:
        raise NotVouched(f"changes rows {rows_changed[:5]} with patch {middle}, which should be row {prefix + middle}")
    # On the CPU, from where it indexes tensors of every device: a tower may lie on several.
    shuffled = torch.randperm(patches, generator=generator, device="cpu")
    order = torch.cat((torch.arange(prefix, device="cpu"), prefix + shuffled))
    _, moved = _run(tower, pixel_values, lambda tokens: tokens[:, order])
    near = max(NEAR, ROUNDINGS * torch.finfo(plain.dtype).eps)
    if (moved - plain[:, order]).abs().max() > near * plain.abs().max():
        raise NotVouched("answers by where in the sequence a patch lies, by more than the positions in its embeddings")
    kept = prefix + patches // 2
    _, short = _run(tower, pixel_values, lambda tokens: tokens[:, :kept])
    if short.shape[1] != kept:
        raise NotVouched(f"gives {short.shape[1]} hidden states of {kept} tokens")


def _run(tower: Tower, pixel_values: torch.Tensor, change: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the embeddings, and that of the tower when its layers get `change(output of the embeddings)`."""
    taken = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            raise NotVouched("has embeddings that give more than tokens")
        taken.append(output)
        return change(output)

    with tower.embeddings.register_forward_hook(hook):
        output = tower.module(pixel_values)
    return taken[0], output[0]
