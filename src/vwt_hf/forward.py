"""What one forward of a compressed vision tower knows, and where its parts find it.

A pre-hook of the tower begins a forward, a hook of its embeddings leaves the plan by which patches became tokens, and
attention, rotations and heads go by it. All of it is one object behind one context variable: each thread and each
asyncio task has its own, so one model may serve many, and a forward within another's gives way to it when it ends.

A call with `patch_words` is such a forward, too, of the model that is called: its towers run within it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .plans import Grouped, Kept


@dataclasses.dataclass(eq=False)
class GivenWords:
    """The `patch_words` of one call, which wait for the embeddings of the images that they are of."""

    words: torch.Tensor
    """(..., patches), integers: what `patch_words` was."""
    repeats: bool
    """Whether each image may come several times in a row, as `generate` repeats them for beams."""
    taken: bool = False
    """Whether embeddings have gone by them."""

    def take(self) -> GivenWords:
        """The same, once.

        Raises:
            ValueError: they were taken.
        """
        if self.taken:
            raise ValueError(
                f"patch_words {tuple(self.words.shape)} were given to a call that embeds two batches of images. Call "
                "the model with one batch at a time, or without patch_words."
            )
        self.taken = True
        return self

    def require_taken(self) -> None:
        """Raises `ValueError` if no embeddings went by the words."""
        if not self.taken:
            raise ValueError(
                f"patch_words {tuple(self.words.shape)} were given to a call that embeds no images by them. Give "
                "them with the pixel_values that they were made of, to a compressed model."
            )


@dataclasses.dataclass(eq=False)
class Forward:
    """A forward of a vision tower under way, or a call with `patch_words` of a model that holds one."""

    tower: Any
    """The vision tower that runs, or the model that was called."""
    members: frozenset[int]
    """The `id` of each module of the tower; none for a call."""
    relative: bool
    """Whether its attention is given a bias by where patches lie to each other, in place of a mask."""
    outer: Forward | None
    """The forward that this one runs within, of another model; `None` if there is none."""
    given: GivenWords | None = None
    """The words of the call that this is, or is within; `None` if there are none."""
    plan: Kept | Grouped | None = None
    """What became of the patches; `None` before the embeddings ran, and where they stay as they are."""
    real: torch.Tensor | None = None
    """Which rows of the tower's output are no padding, (batch, rows), where its images are padded; before its
    embeddings ran, which of its patches the caller says are none."""
    folded: dict[Any, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    """What `attention.fold_bias` adds to queries and keys, which is the same in every layer."""

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
    outer = _current.get()
    forward = Forward(tower, members, relative, outer, given=None if outer is None else outer.given)
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


def given_words() -> GivenWords | None:
    """The `patch_words` of the call that this code runs in; `None` if it was given none."""
    forward = _current.get()
    return None if forward is None else forward.given


def begin_call(model: nn.Module, patch_words: torch.Tensor) -> None:
    """Begins a call of `model` with words, within what is under way."""
    _current.set(Forward(model, frozenset(), False, _current.get(), GivenWords(patch_words, repeats=False)))


def end_call(model: nn.Module) -> GivenWords | None:
    """Ends a call of `model` that `begin_call` began, and returns its words; `None` if none is under way."""
    forward = _current.get()
    if forward is None or forward.given is None or forward.members or forward.tower is not model:
        return None
    _current.set(forward.outer)
    return forward.given


@contextlib.contextmanager
def call_with(model: nn.Module, patch_words: torch.Tensor, repeats: bool) -> Iterator[None]:
    """What runs in this context is a call of `model` with words.

    Raises:
        ValueError: nothing went by them.
    """
    given = GivenWords(patch_words, repeats)
    token = _current.set(Forward(model, frozenset(), False, _current.get(), given))
    try:
        yield
    finally:
        _current.reset(token)
    given.require_taken()


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
    if forward is None or id(module) not in forward.members:
        raise RuntimeError(
            f"{type(module).__name__} ran outside the call of its compressed model, which says what its tokens stand "
            "for and gives every patch its own in the end. Call model(...), not model.forward(...) or a layer."
        )
    return forward
