"""What one forward of a compressed vision tower knows, and where its parts find it.

A pre-hook of the tower begins a forward, a hook of its embeddings stores the plan by which patches became tokens, and
attention, rotations and heads read it. All of it is one object, behind a context variable: each thread and each asyncio
task has its own, so one model may serve many. When a forward ends that ran within another, the other is the current one
again.

A call with `patch_words` is such a forward, too, of the model that is called: its towers run within it.

torch.compile traces no context variable. A forward that one graph can hold, as all images have the same number of
tokens, lies in a variable of its thread while it is traced, which is empty again when the forward ends.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .on_gpu import is_compiling
from .plans import Grouped, Kept


@dataclasses.dataclass(eq=False)
class GivenWords:
    """The `patch_words` of one call, until the embeddings of the call use them."""

    words: torch.Tensor
    """(..., patches), integers, as the caller gave them."""
    repeats: int = 1
    """How many times in a row each image may come, as `generate` repeats them for beams."""
    generates: bool = False
    """Whether the call is `generate`, which without a cache embeds its images anew at every step."""
    embedded: torch.Tensor | None = None
    """The `pixel_values` that they were used for; `None` until embeddings use them."""
    model: Any = None
    """The model that is called with them, set as the call begins."""

    def are_for(self, module: nn.Module) -> bool:
        """Whether a module is a part of the called model, and not of another that a hook runs within the call."""
        # A shallow copy has the forward of the model that it was copied from.
        copied_from = getattr(self.model.__dict__.get("forward"), "args", ())
        return any(part is module for part in (*copied_from, *self.model.modules()))

    def take(self, pixel_values: torch.Tensor) -> GivenWords:
        """Marks the words as used for images and returns them.

        Raises:
            ValueError: they were used before, for others.
        """
        if self.embedded is not None and not (self.generates and torch.equal(self.embedded, pixel_values)):
            raise ValueError(
                f"patch_words {tuple(self.words.shape)} were given to a call that embeds two batches of images, as of "
                "images and of a video. Call the model with one batch at a time, or without patch_words."
            )
        self.embedded = pixel_values
        return self

    def require_taken(self) -> None:
        """Raises `ValueError` if no embeddings used the words."""
        if self.embedded is None:
            raise ValueError(
                f"patch_words {tuple(self.words.shape)} were given to a call that embeds no images by them. Give "
                "them with the pixel_values that they were made of, to a compressed model."
            )


@dataclasses.dataclass(eq=False)
class Forward:
    """A forward of a vision tower under way."""

    tower: Any
    """The vision tower that runs."""
    relative: bool
    """Whether its attention takes, as its mask, a bias that depends on where patches lie relative to each other."""
    members: weakref.WeakSet[nn.Module] = dataclasses.field(default_factory=weakref.WeakSet)
    """Modules that are known to be parts of the tower."""
    outer: Forward | None = None
    """The ordinary, untraced forward that this one runs inside; it is current again when this one ends. `None` if there
    is none, or this one is traced."""
    within: Traced | None = None
    """The forward traced by torch.compile that this one runs inside, if that is nearer than `outer`; else `None`."""
    begun_in: _InGraphs | None = None
    """`_in_thread.graphs` of the thread that it began in; `None` if it is traced."""
    given: GivenWords | None = None
    """The `patch_words` of the call that this is, or runs within; `None` if it was given none."""
    words: torch.Tensor | None = None
    """(batch, patches), int64: set by `hooks.Repaint` where the setting chooses words before patches are embedded."""
    shown: torch.Tensor | None = None
    """The images that `hooks.Repaint` gave to the embeddings, until these have run; `None` in a graph."""
    plan: Kept | Grouped | None = None
    """Which tokens the patches became; `None` before the embeddings ran, and where all patches stay as they are."""
    real: torch.Tensor | None = None
    """(batch, rows), bool, where images are padded: which rows of the tower's output are no padding. Until the
    embeddings have run it is the caller's `pixel_attention_mask`, (batch, patches), or `None`."""
    called_by: types.FrameType | None = None
    """The stack frame that calls the tower; `None` once the call has ended."""
    plans: list[Grouped] = dataclasses.field(default_factory=list)
    """All plans of groups so far, the first before the first layer and one more after each join. Each gives tokens
    another shape (sequences, tokens)."""
    attended: int = 0
    """How many times attention has gone by one of them."""
    by_plan: set[int] = dataclasses.field(default_factory=set)
    """The numbers (`id`) of the attention modules that did; of a traced forward it stays empty."""
    after: dict[nn.Module, Grouped] = dataclasses.field(default_factory=dict)
    """By each layer after which tokens were to be joined: the plan from there on."""
    counts: list[Any] = dataclasses.field(default_factory=list)
    """The counts of tokens (`count_tokens`) that heard the embeddings of this forward."""
    rotations: Any = None
    """Cosine and sine of rotary positions, (patches, head size) each; `None` where the tower has none."""

    @property
    def grouped(self) -> Grouped | None:
        """The plan, if its tokens stand for different numbers of patches."""
        return self.plan if isinstance(self.plan, Grouped) else None

    def go_by(self, plan: Kept | Grouped) -> None:
        """Makes a plan that of the layers still to run."""
        self.plan = plan
        if isinstance(plan, Grouped):
            self.plans.append(plan)

    def begin_again(self) -> Forward:
        """Begins a forward in place of this one and returns it, as the tower embeds images for a second time.

        Layers that ran before may still be repeated for their gradients, within this one.
        """
        again = dataclasses.replace(self, plan=None, plans=[], after={}, attended=0, by_plan=set())
        if _in_thread.graphs.traced is self:
            _in_thread.graphs.traced = again  # type: ignore[assignment]
        else:
            _current.set(again)
            self.called_by = None  # a frame holds what its call was given
        return again

    def plan_of_shape(self, sequences: int, tokens: int) -> Grouped | None:
        """The plan that gave tokens this shape; `None` if none did.

        It need not be the last one, as a layer may be repeated for its gradient.
        """
        return next((plan for plan in self.plans if plan.shape == (sequences, tokens)), None)

    @property
    def draws_by_sequence(self) -> bool:
        """Whether layers draw random numbers for each sequence, as stochastic depth does in training."""
        # Asked of the layers, as the config may have changed since they were made.
        layers = (part for part in self.tower.modules() if type(part).__name__.endswith("DropPath"))
        return any(layer.training and (getattr(layer, "drop_prob", None) or 0) > 0 for layer in layers)

    @property
    def left(self) -> bool:
        """Whether the call of the tower was cut off so that no hook heard of it, as by `KeyboardInterrupt`."""
        if self.called_by is None:
            return False
        try:
            self.called_by.clear()  # refused while the call runs, in whichever thread
        except RuntimeError:
            return False
        return True

    @torch.compiler.disable  # where layers are compiled one by one, it must see them and their wrappers as they are
    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is a part of the tower, also one that was put into it after it first ran."""
        if module not in self.members and any(module is part for part in self.tower.modules()):
            self.members.add(module)
        return module in self.members


@dataclasses.dataclass(eq=False)
class Call(Forward):
    """A call with `patch_words` under way; `tower` is the called model, which is or holds a vision tower."""

    by_context: bool = False
    """Whether `call_with` began it, and ends it."""

    def holds(self, module: nn.Module) -> bool:
        """False: a call has no plan that a module could run by."""
        return False


@dataclasses.dataclass(eq=False)
class Traced(Forward):
    """A forward that torch.compile traces, into one graph or, where that breaks, into several."""

    members: Any = None
    """The numbers (`id`) of the modules of the tower."""

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is a part of the tower."""
        return id(module) in self.members


def _ids(module: nn.Module) -> list[int]:
    """`id` of a module and of all within it; `module.modules()` keeps a set of modules, which is not traced."""
    ids = [id(module)]
    for child in module._modules.values():
        if child is not None:
            ids += _ids(child)
    return ids


class _InGraphs:
    """What one thread is within, in attributes that torch.compile can trace."""

    def __init__(self) -> None:
        self.traced: Traced | None = None
        """The innermost forward under way, if that is a traced one."""
        self.words = False
        """Whether a call under way was given `patch_words`: then its forwards run natively."""


class _InThread(threading.local):
    def __init__(self) -> None:
        # An object of its own, as torch loses what is set on a `threading.local` itself where a graph breaks.
        self.graphs = _InGraphs()


_current: contextvars.ContextVar[Forward | None] = contextvars.ContextVar("vwt_hf forward", default=None)
_in_thread = _InThread()


def current_forward() -> Forward | None:
    """The forward that this code runs in; `None` if it runs in none of a compressed tower."""
    graphs = _in_thread.graphs
    if graphs.traced is not None:
        return graphs.traced
    forward = _current.get()
    while forward is not None and forward.left:
        _current.set(forward.outer)
        graphs.words = forward.outer is not None and forward.outer.given is not None
        if forward.within is not None and forward.begun_in is graphs:
            graphs.traced = forward.within
            return forward.within
        forward = forward.outer
    return forward


def traced_within(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile traces the function within a traced forward, and leaves it out of graphs elsewhere."""
    outside = torch.compiler.disable(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _in_thread.graphs.traced is None and torch.compiler.is_dynamo_compiling():
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    # Torch limits how often it compiles one code object, which all functions made here would share.
    named: Any = run
    named.__code__ = named.__code__.replace(co_name=function.__name__)
    return named


def begin_forward(tower: nn.Module, members: weakref.WeakSet[nn.Module], relative: bool) -> Forward:
    """Begins a forward of `tower`, within the one that is under way if there is one."""
    forward = Forward(tower, relative, members, called_by=_calling_frame())
    _enter(forward)
    forward.given = _given_in(forward.outer, tower)
    return forward


def begin_traced(tower: nn.Module, relative: bool) -> None:
    """`begin_forward` while torch.compile traces the call of `tower`."""
    _in_thread.graphs.traced = Traced(tower, relative, _ids(tower), within=_in_thread.graphs.traced)


def end_forward(tower: nn.Module) -> Forward | None:
    """Ends the forward of `tower`, and those within it that an error left.

    Returns:
        The forward; `None` if `tower` has none under way, and then those of other towers go on.
    """
    if not torch.compiler.is_dynamo_compiling():
        current_forward()  # which forgets those that an interrupt left
    traced = _in_thread.graphs.traced
    while traced is not None and traced.tower is not tower:
        traced = traced.within
    if traced is not None:
        _in_thread.graphs.traced = traced.within
        return traced
    ended, forward = [], _current.get()
    while forward is not None:
        ended.append(forward)
        if forward.tower is tower:
            for one in ended:
                _leave(one)
            return forward
        forward = forward.outer
    return None


def _enter(forward: Forward) -> None:
    """Makes a forward the current one."""
    current_forward()  # which forgets those that an interrupt left
    graphs = forward.begun_in = _in_thread.graphs
    forward.within, graphs.traced = graphs.traced, None
    outer = _current.get()
    while outer is not None and outer.left:
        outer = outer.outer
    forward.outer = outer
    _current.set(forward)


def _leave(forward: Forward) -> None:
    """Makes the forward that this one ran within the current one."""
    _current.set(forward.outer)
    _in_thread.graphs.traced = forward.within
    forward.called_by = None  # a frame holds what its call was given


def given_words(module: nn.Module) -> GivenWords | None:
    """The `patch_words` of the call under way that are for `module`; `None` if there are none, as in a graph."""
    return None if is_compiling() else _given_in(current_forward(), module)


def _given_in(forward: Forward | None, module: nn.Module) -> GivenWords | None:
    """The words of a forward, if there are any for `module`."""
    given = None if forward is None else forward.given
    return given if given is None or given.are_for(module) else None


def words_are_given() -> bool:
    """Whether a call of this thread that is under way was given `patch_words`; also for graphs to ask.

    After an interrupt (`KeyboardInterrupt`) of such a call it stays true until another model runs natively.
    """
    return _in_thread.graphs.words


@torch.compiler.disable
def begin_call(model: nn.Module, patch_words: torch.Tensor) -> None:
    """Begins a call of `model` with words, within the forward that is under way if there is one."""
    given = GivenWords(patch_words, model=model)
    _enter(Call(model, False, given=given, called_by=_calling_frame()))
    _in_thread.graphs.words = True


def end_call(model: nn.Module) -> GivenWords | None:
    """Ends a call of `model` that `begin_call` began, and returns its words; `None` if none is under way."""
    forward, given = current_forward(), None
    if isinstance(forward, Call) and forward.tower is model and not forward.by_context:
        given = forward.given
        _leave(forward)
        forward = current_forward()
    _in_thread.graphs.words = forward is not None and forward.given is not None
    return given


@contextlib.contextmanager
def call_with(model: nn.Module, given: GivenWords) -> Iterator[None]:
    """Within this context, what runs is a call of `model` with words.

    Raises:
        ValueError: no embeddings used them.
    """
    given.model = model
    call = Call(model, False, given=given, by_context=True)
    _enter(call)
    before, _in_thread.graphs.words = _in_thread.graphs.words, True
    try:
        yield
    finally:
        _leave(call)
        _in_thread.graphs.words = before
    given.require_taken()


def words_to_generate_by(model: Any, patch_words: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> GivenWords:
    """`patch_words` for a call of `model.generate(*args, **kwargs)`, which repeats each image for beams or answers."""
    configs = (*args[1:2], kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def number(name: str) -> int:  # the first that is given counts, as in transformers
        given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((one for one in given if one is not None), 1)

    return GivenWords(patch_words, max(number("num_beams"), number("num_return_sequences")), generates=True)


def _calling_frame() -> types.FrameType | None:
    """The frame of torch's that calls the module whose hook this function is called from."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals is not nn.modules.module.__dict__:
        frame = frame.f_back
    return frame


def run_within(forward: Forward | None, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function with `forward` as the current one."""
    graphs = _in_thread.graphs
    token, (traced, graphs.traced) = _current.set(forward), (graphs.traced, None)
    try:
        return function(*args, **kwargs)
    finally:
        _current.reset(token)
        graphs.traced = traced


def forward_within(module: nn.Module) -> Forward | None:
    """The forward under way that `module` is a part of; `None` if it runs by itself or in another model's."""
    forward = current_forward()
    return forward if forward is not None and forward.holds(module) else None


def forward_of(module: nn.Module) -> Forward:
    """`forward_within` for a module that never runs outside a forward.

    Raises:
        RuntimeError: it did.
    """
    forward = forward_within(module)
    if forward is None:
        raise RuntimeError(
            f"{type(module).__name__} ran outside a call of its compressed model, which keeps what each token stands "
            "for and gives every patch a hidden state at its end. Call model(...), and no part of it by itself."
        )
    return forward
