"""What one forward of a compressed vision tower knows, and where its parts find it.

A pre-hook of the tower begins a forward, a hook of its embeddings stores the plan by which patches became tokens, and
attention, rotations and heads read it. All of it is one object behind one context variable: each thread and each
asyncio task has its own, so one model may serve many. When a forward ends that ran within another, the other is the
current one again.
"""

from __future__ import annotations

import contextvars
import dataclasses
from typing import Any

import torch
from torch import nn

from .plans import Grouped, Kept


@dataclasses.dataclass(eq=False)
class Forward:
    """A forward of a vision tower under way."""

    tower: Any
    """The vision tower that runs."""
    members: frozenset[int]
    """The `id` of each module of the tower."""
    relative: bool
    """Whether its attention takes a bias by where patches lie to each other, handed over as its mask."""
    outer: Forward | None
    """The forward that this one runs within, of another model; `None` if there is none."""
    plan: Kept | Grouped | None = None
    """Which tokens the patches became; `None` before the embeddings ran, and where all patches stay as they are."""
    real: torch.Tensor | None = None
    """(batch, rows), bool, where images are padded: which rows of the tower's output are no padding. Until the
    embeddings have run it is the caller's `pixel_attention_mask`, (batch, patches), or `None`."""
    folded: dict[Any, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    """What `attention.fold_bias` adds to queries and keys, which is the same in every layer."""

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is a part of the tower, which may have got new ones since it was looked at."""
        if id(module) not in self.members:
            self.members = frozenset(map(id, self.tower.modules()))
        return id(module) in self.members

    @property
    def grouped(self) -> Grouped | None:
        """The plan, if its tokens stand for different numbers of patches."""
        return self.plan if isinstance(self.plan, Grouped) else None

    @property
    def draws_by_sequence(self) -> bool:
        """Whether layers draw random numbers for each sequence, as stochastic depth does in training."""
        return self.tower.training and getattr(self.tower.config, "drop_path_rate", 0) > 0


_current: contextvars.ContextVar[Forward | None] = contextvars.ContextVar("vwt_hf forward", default=None)


def current_forward() -> Forward | None:
    """The forward that this code runs in; `None` if it runs in none of a compressed tower."""
    return _current.get()


def begin_forward(tower: nn.Module, members: frozenset[int], relative: bool) -> Forward:
    """Begins a forward of `tower`, within the one that is under way if there is one."""
    forward = Forward(tower, members, relative, outer=_current.get())
    _current.set(forward)
    return forward


def end_forward(tower: nn.Module) -> Forward | None:
    """Ends the forward of `tower`, and those within it that an error left; `None` if there is none."""
    forward = _current.get()
    while forward is not None:
        _current.set(forward.outer)
        if forward.tower is tower:
            return forward
        forward = forward.outer
    return None


def run_within(forward: Forward | None, function: Any, *args: Any) -> Any:
    """Calls a function as if it ran in that forward."""
    token = _current.set(forward)
    try:
        return function(*args)
    finally:
        _current.reset(token)


def forward_of(module: nn.Module) -> Forward:
    """The forward that `module`, a part of a vision tower, runs in.

    Raises:
        RuntimeError: there is none.
    """
    forward = _current.get()
    if forward is None or not forward.holds(module):
        raise RuntimeError(
            f"{type(module).__name__} ran outside the call of its compressed model, which says what its tokens stand "
            "for and gives every patch its own in the end. Call model(...), not model.forward(...) or a layer."
        )
    return forward
