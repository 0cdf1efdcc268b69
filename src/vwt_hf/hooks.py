"""The hooks that `compress` puts into a model; `restore` finds them by their type.

In the order of a forward: words of the call, the tower begins, its embeddings are reduced, positions follow, tokens are
joined after some layers, patches are expanded, the tower ends.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from . import attention
from .config import VWTConfig
from .families import Family, find_stacks
from .forward import (
    Forward,
    GivenWords,
    begin_call,
    begin_forward,
    begin_traced,
    end_call,
    end_forward,
    forward_of,
    forward_within,
    given_words,
    traced_within,
    words_are_given,
)
from .layout import join
from .on_gpu import is_compiling, is_exported, is_one_of_many
from .patches import Patches
from .plans import DROPPED, PATCH_WORDS, Grouped, Kept

ONE_GRAPH = torch.__version__ >= "2.11.0a0"
"""Whether this torch compiles a whole forward into one graph. An older one breaks graphs within transformers anyway, so
there forwards run natively between them."""


def is_even(setting: VWTConfig, family: Family) -> bool:
    """Whether all images of a batch have the same number of tokens in every layer, so that one graph can hold them."""
    return setting.even and family.padded is None


class Numbered:
    """A hook that stays where it is once its model was unpickled: no hook of the new process takes its number."""

    def __getstate__(self) -> dict[str, Any]:
        # This stays as hooks come and go: `datasets.map` tells by the pickle of a model what it has mapped before.
        above = max(2**20, 1 << RemovableHandle.next_id.bit_length())
        return self.__dict__ | {"numbered_below": above}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Torch numbers hooks from 0 in each process, and a new one takes the place of one that came with its number.
        RemovableHandle.next_id = max(RemovableHandle.next_id, state.pop("numbered_below", 0))
        self.__dict__.update(state)


class Hook(Numbered):
    """Base of the hooks of compressed models, which `restore` takes out."""


class TakeWords(Hook):
    """Forward pre-hook of every model that is or holds the tower: takes `patch_words` out of the call, since
    transformers' forwards do not know them, and keeps them for the embeddings."""

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if PATCH_WORDS not in kwargs:
            return None
        kwargs = dict(kwargs)
        patch_words = kwargs.pop(PATCH_WORDS)
        if patch_words is not None:
            if not torch.compiler.is_dynamo_compiling() and is_exported():
                raise ValueError(
                    "patch_words were given to a model that is exported or traced. The program would hold how many "
                    "tokens these make, and answer wrongly by others. Leave them out."
                )
            begin_call(model, patch_words)
        return args, kwargs


class EndWords(Hook):
    """Forward hook of the models that have `TakeWords`: ends a call with words, and refuses words that no embeddings
    used."""

    def __call__(self, model: Any, args: Any, output: Any) -> None:
        if words_are_given():
            self._end(model, output)

    @torch.compiler.disable
    def _end(self, model: Any, output: Any) -> None:
        given = end_call(model)
        if given is not None and output is not None:  # no output: the forward raised
            given.require_taken()


@dataclasses.dataclass(eq=False)
class Begin(Hook):
    """Forward pre-hook of a vision tower: begins the `Forward` that its embeddings, attention and heads share."""

    relative: bool
    """Whether its attention takes a bias that depends on where patches lie relative to each other."""
    by_sizes: bool
    """Whether tokens stand for different numbers of patches, so that attention needs the plan."""
    strips_mask: bool
    """Whether images come as padded patches. Then `pixel_attention_mask` is kept from the layers, which see tokens and
    not patches, and stored in the `Forward` for the head."""
    by_interface: bool
    """Whether its layers reach this package's attention through transformers' `AttentionInterface`."""
    even: bool
    """What `is_even` says of the setting."""
    _members: weakref.WeakSet[nn.Module] | None = None
    """The modules of the tower, found at its first forward."""

    def __call__(self, tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_dynamo_compiling() and self._is_for_one_graph(tower):
            if self.relative and kwargs.get("attention_mask") is not None:
                raise ValueError("A graph of torch.compile cannot ask what attention_mask hides; leave it out.")
            begin_traced(tower, self.relative)
            # Not before: outside a traced forward, reading the config reads the context variable, which no graph can.
            if self.by_sizes:
                attention.require_usable(tower, self.strips_mask)
            return None
        return self._begin(tower, args, kwargs)

    def _is_for_one_graph(self, tower: Any) -> bool:
        """Whether torch.compile is to trace this forward, and not to run it natively.

        It runs natively where a caller gave words, since checking them depends on their values, and under gradient
        checkpointing, since torch traces no checkpointed layer that changes the `Forward`.
        """
        if not (self.even and ONE_GRAPH) or words_are_given():
            return False
        return not (torch.is_grad_enabled() and attention.checkpoints(tower))

    @torch.compiler.disable
    def _begin(self, tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.by_sizes:
            # `set_attn_implementation` and `unregister` may have come after `compress`.
            attention.require_usable(tower, self.strips_mask)
            if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
                raise ValueError(
                    "torch.onnx.export(..., dynamo=False) makes no program that onnxruntime takes of a model that "
                    "groups patches; leave out dynamo, or give dynamo=True."
                )
        if self.by_interface:
            attention.require_registered(tower, ", or vwt_hf.restore(model) for the plain model")
        if torch.is_grad_enabled():
            attention.carry_through_checkpoints(tower)
        members = self._members
        if members is None or tower not in members:  # as in a copy for another thread, which has these hooks, too
            members = self._members = weakref.WeakSet(tower.modules())
        if self.relative:  # layers would add it to the bias, which they read of one image
            kwargs = attention.without_mask(kwargs)
        forward = begin_forward(tower, members, self.relative)
        if not self.strips_mask:
            return args, kwargs
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        kwargs = dict(zip(names, args, strict=False), **kwargs)
        forward.real = kwargs.get("pixel_attention_mask")
        return args[len(names) :], kwargs | {"pixel_attention_mask": None}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_members": None}


class RefuseMask(Hook):
    """Forward pre-hook of a tower that leaves patches out: refuses an `attention_mask`, which is of whole images."""

    def __call__(self, tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if is_compiling():  # no graph can ask what a mask holds
            return None
        return args, attention.without_mask(kwargs)


@dataclasses.dataclass(eq=False)
class Reduce(Hook):
    """Forward hook of the embeddings: makes tokens of patches, by the plan that the setting makes of the images."""

    setting: VWTConfig
    family: Family
    patch_size: tuple[int, int]
    channels: int
    follows: bool
    """Whether the tower runs within a `Forward`, which keeps the plan for modules that run after the embeddings."""
    own_rows: bool = False
    """Whether batches must not be packed: what runs the layers is not transformers', and may read the CLS token of each
    image between them."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.follows and words_are_given() and torch.compiler.is_dynamo_compiling():
            return _outside_graphs(self, module, args, kwargs, output)
        if not self.setting.shortens:
            self._require_alone(module, output, args, kwargs)
            return output
        if kwargs.get("bool_masked_pos") is not None:
            raise ValueError(
                "bool_masked_pos masks patches of the whole image, of which a compressed model sees a part; "
                "call vwt_hf.restore(model) first."
            )
        if self.follows:
            return self._reduce_and_store(module, args, kwargs, output)
        given, patches = given_words(module), self.patches(output, args, kwargs)
        plan = self.plan(patches, given and given.take(patches.pixel_values))
        return output if plan is None else self.family.reduces(output, plan)

    @traced_within
    def _reduce_and_store(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        forward, tokens = forward_of(module), _tokens_of(output)
        patches = self.patches(output, args, kwargs, forward.real)
        if forward.shown is not None and not is_compiling():
            if patches.pixel_values is not forward.shown:
                _require_same_images(patches.pixel_values, forward.shown, self.setting)
            forward.shown = None
        if forward.plan is not None:
            forward = forward.begin_again()
        if not is_even(self.setting, self.family):
            by_interface = not self.family.attentions
            packs = not self.own_rows and attention.packs(forward, by_interface, tokens.device, tokens.dtype)
            rounds = attention.is_slow_for_new_lengths(tokens.device, tokens.dtype)
            patches = dataclasses.replace(patches, packs=packs, rounds=rounds, draws=forward.draws_by_sequence)
        plan = self.plan(patches, forward.given and forward.given.take(patches.pixel_values), forward.words)
        if plan is None:
            return output
        forward.go_by(plan)
        if patches.real is not None:
            assert isinstance(plan, Grouped)  # as every plan of padded images
            forward.real = patches.real if self.setting.restores else plan.stays
        return self.family.reduces(output, plan)

    def plan(
        self, patches: Patches, given: GivenWords | None, words: torch.Tensor | None = None
    ) -> Kept | Grouped | None:
        """What becomes of the patches; `None`: all stay as they are.

        Args:
            given: the caller's words, which come first.
            words: those that `Repaint` chose, which come second. Without either, the setting chooses.
        """
        if given is not None:
            return self.setting.plan_of(patches, patches.of_words(given.words, given.repeats))
        return self.setting.plan(patches) if words is None else self.setting.plan_repainted(patches, words)

    def _require_alone(self, module: nn.Module, output: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuses words of a caller by which some patch would not be a token of its own."""
        given = given_words(module)
        if given is None:
            return
        patches = self.patches(output, args, kwargs)
        for image in patches.of_words(given.take(patches.pixel_values).words, given.repeats):
            stay = image[image != DROPPED]
            tokens, expected = len(stay.unique()), patches.count if self.family.padded is None else len(stay)
            if tokens != expected:
                raise ValueError(
                    f"patch_words leave {tokens} tokens of {expected} patches, and the setting of the model keeps all. "
                    "Load image processor and model with the same `vwt`."
                )

    def patches(self, output: Any, args: Any, kwargs: dict[str, Any], mask: torch.Tensor | None = None) -> Patches:
        """The patches of the images that the embeddings are called with.

        Args:
            output: what the embeddings gave; `None` before they ran, when the number of prefix tokens is unknown.
            args, kwargs: what they were called with.
            mask: (batch, patches), which of padded patches the caller takes for real; `None`: all but padding.
        """
        pixel_values = args[0] if args else kwargs["pixel_values"]
        if self.setting.groups:
            _require_one_batch(pixel_values, self.setting)
        if self.setting.statistics and self.family.padded is None and pixel_values.shape[1] != self.channels:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} have {pixel_values.shape[1]} channels; expected "
                f"{self.channels}, as the model's config said when it was compressed. Set num_channels in its vision "
                f"config, and compress it again with a setting of method={self.setting.method!r} for such images."
            )
        if self.family.padded is not None:
            spatial_shapes = args[1] if len(args) > 1 else kwargs["spatial_shapes"]
            return Patches.of_padded(pixel_values, self.patch_size, spatial_shapes, mask)
        rows = None if output is None else _tokens_of(output).shape[1]
        return Patches.of_images(pixel_values, self.patch_size, rows)


@dataclasses.dataclass(eq=False)
class Repaint(Hook):
    """Forward pre-hook of the embeddings: gives them the images as the setting changes them, and stores the words by
    which it did for `Reduce`."""

    reduce: Reduce

    @traced_within
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward, setting, given = forward_of(module), self.reduce.setting, None
        pixel_values = args[0] if args else kwargs["pixel_values"]
        if self.reduce.family.padded is None and pixel_values.shape[1] != self.reduce.channels:
            return None  # the embeddings say what is wrong
        patches = self.reduce.patches(None, args, kwargs, forward.real)
        if forward.given is not None:  # `Reduce` takes them, and refuses what they must not be
            given = patches.of_words(forward.given.words, forward.given.repeats)
        words, shown = setting.repainted(patches, given)
        if given is None:
            forward.words = words
        if not is_compiling():
            forward.shown = shown
        if args:
            return (shown, *args[1:]), kwargs
        return args, kwargs | {"pixel_values": shown}


@torch.compiler.disable
def _outside_graphs(hook: Reduce | Rotate, *called: Any) -> Any:
    """Calls a hook for a compiled model whose caller gave words: these are checked by their values, which no graph
    knows."""
    return hook(*called)


def _tokens_of(output: Any) -> torch.Tensor:
    """The tokens in the output of embeddings or of a layer, (sequences, tokens, hidden): all of it, or its first."""
    return output[0] if isinstance(output, tuple) else output


def _require_one_batch(tensor: torch.Tensor, setting: VWTConfig) -> None:
    """Raises `ValueError` where `torch.func.vmap` makes many batches of one, each of which would need its own plan."""
    if not is_compiling() and is_one_of_many(tensor):
        raise ValueError(
            f"torch.func.vmap runs a model with method={setting.method!r} on many batches at once, which differ in "
            "what shares a token. Call it with all images as one batch and one set of weights at a time, compress it "
            "with method='intra' and dropped='discard', or call vwt_hf.restore(model) before."
        )


def _require_same_images(pixel_values: torch.Tensor, shown: torch.Tensor, setting: VWTConfig) -> None:
    """Raises `ValueError` where embeddings ran on other images than `Repaint` gave them. Another data type or device
    makes no other images."""
    same_shape = pixel_values.shape == shown.shape
    if not same_shape or not torch.allclose(pixel_values, shown.to(pixel_values), rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"the embeddings got other images {tuple(pixel_values.shape)} than method={setting.method!r} gave them "
            f"{tuple(shown.shape)}, as where a forward pre-hook that was registered after vwt_hf.compress changes "
            "images. Register it before, or call vwt_hf.compress(model, model.config.vwt) now, so that it runs first."
        )


@dataclasses.dataclass(eq=False)
class Rotate(Hook):
    """Forward hook of rotary positions: makes rotations of tokens of those of patches."""

    reduce: Reduce

    def __call__(self, rotary: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self.reduce.follows:
            return self._rotate_as_stored(rotary, output)
        if words_are_given() and torch.compiler.is_dynamo_compiling():  # as the embeddings, by the same words
            return _outside_graphs(self, rotary, args, kwargs, output)
        patches = self.reduce.patches(None, args, kwargs)  # a rotation is of a patch, so prefix tokens do not matter
        plan = self.reduce.plan(patches, given_words(rotary))
        return output if plan is None else plan.rotate(output)

    @traced_within
    def _rotate_as_stored(self, rotary: nn.Module, output: Any) -> Any:
        forward = forward_within(rotary)
        if forward is None or forward.plan is None:
            return output
        forward.rotations = output
        return forward.plan.rotate(output)


class RotateTokens(Hook):
    """Forward pre-hook of the layers after the first join: hands each the rotations of the tokens that it gets."""

    @traced_within
    def __call__(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = forward_within(layer)
        if forward is None or "position_embeddings" not in kwargs:
            return None
        tokens = args[0] if args else kwargs["hidden_states"]
        plan = forward.plan_of_shape(tokens.shape[0], tokens.shape[1])
        return None if plan is None else (args, kwargs | {"position_embeddings": plan.rotate(forward.rotations)})


@dataclasses.dataclass(eq=False)
class Join(Hook):
    """Forward hook of a layer: joins those tokens of its output that have become alike."""

    setting: VWTConfig
    wanted: float
    """What `VWTConfig.joins` says of the layer: a similarity, or a share of the tokens."""

    @traced_within
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        forward = forward_within(layer)
        if forward is None:
            return output
        tokens = _tokens_of(output)
        before = forward.plan_of_shape(tokens.shape[0], tokens.shape[1])
        if before is None:
            return output
        after = forward.after.get(layer)
        if after is None:  # else the layer is repeated for its gradient
            _require_one_batch(tokens, self.setting)
            joins = self.setting.seek(before, tokens.detach(), self.wanted)
            after = before if joins is None else before.joined(*joins, [plan.shape for plan in forward.plans])
            forward.after[layer] = after
        if after is before:
            return output
        forward.go_by(after)
        joined = join(tokens, before.layout, after.layout)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined


class OfWholeImage(Hook):
    """Forward pre-hook of a relative position bias: has it computed for the whole image, not for the fewer tokens."""

    def __call__(self, bias: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args[:1], {}


class Bias(Hook):
    """Forward hook of a relative position bias: makes the bias between tokens of that between patches."""

    @traced_within
    def __call__(self, bias: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        forward = forward_within(bias)
        return output if forward is None or forward.plan is None else forward.plan.bias(output)


class MaskPadding(Hook):
    """Forward pre-hook of a head that takes a mask of padded patches: gives it that of the rows that there are."""

    @torch.compiler.disable
    def __call__(self, head: nn.Module, args: Any) -> Any:
        forward = forward_within(head)
        return args if forward is None else (args[0], forward.real)


class Expand(Hook):
    """Forward hook of a tower's last layer, of what holds the layers, and of the tower: gives every patch in the output
    the hidden state of its token."""

    @traced_within
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = forward_within(module)
        if forward is None or not forward.plans:
            return output

        def expanded(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dim() < 3:
                return value
            plan = forward.plan_of_shape(value.shape[0], value.shape[1])
            return value if plan is None else plan.expand(value)

        return _pytree.tree_map(expanded, output)


@dataclasses.dataclass(eq=False)
class End(Hook):
    """Forward hook of a vision tower: ends its `Forward`. Refuses layers that attended without the plan, and
    `output_attentions`, as grouped patches have no attention weights."""

    layers: int
    """How many of its layers must attend by the plan, if its tokens are groups."""

    @traced_within
    def __call__(self, tower: nn.Module, args: Any, output: Any) -> None:
        forward = end_forward(tower)
        if forward is None or output is None:  # no output: the forward raised
            return
        if forward.attended < self.layers and any(map(_needs_attention, forward.plans)):
            _require_attention(tower, forward)
        squares = [(plan.shape[1],) * 2 for plan in forward.plans]
        if isinstance(tower, BackboneMixin):  # its maps of patches may be as many rows high as a plan has
            output = output[1:] if isinstance(output, tuple) else output.attentions
        for value in _pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2:] in squares:
                raise ValueError(
                    "output_attentions gives the attention between patches, and grouped patches attend as one token. "
                    "Leave it out, or call vwt_hf.restore(model) first."
                )


def _needs_attention(plan: Grouped) -> bool:
    """Whether attention that does not know the plan would give other answers."""
    return (plan.layout.packed and plan.layout.rows.shape[0] > 1) or plan.key_bias is not None


def attending_layers(tower: nn.Module) -> list[list[nn.Module]]:
    """The layers of a tower that attend: transformers' own, and any that a user put there and that hold an attention.

    One list, or where PEFT copied what holds the layers, one for each copy, of which one runs.
    """

    def attends(layer: nn.Module) -> bool:
        return any(
            isinstance(part, (GradientCheckpointingLayer, nn.MultiheadAttention)) or "Attention" in type(part).__name__
            for part in layer.modules()
        )

    return [[layer for layer in run if attends(layer)] for _, run in find_stacks(tower)]


def _kind_of(layer: nn.Module) -> list[tuple[type, type]]:
    """The kind of a layer: of each of its modules the class, and of what type the forward is that replaces its own."""
    return [(type(part), type(part.__dict__.get("forward"))) for part in layer.modules()]


def _require_attention(tower: Any, forward: Forward) -> None:
    """Raises `ValueError` where layers of a tower attended without the plan of a forward.

    A layer of the same kind as one that went by the plan is taken not to have run, as where a forward ends early.
    """
    # Some may have been taken out since it was compressed.
    layers = [layer for stack in attending_layers(tower) for layer in stack]
    by_plan = [layer for layer in layers if any(id(part) in forward.by_plan for part in layer.modules())]
    kinds = [_kind_of(layer) for layer in by_plan]
    others = [layer for layer in layers if _kind_of(layer) not in kinds]
    if others and (by_plan or not forward.attended):
        raise ValueError(
            f"{len(others)} of the {len(layers)} layers of the {type(tower).__name__} did not attend by the tokens "
            "of each image: attention that was replaced, or a layer of another kind, does not go through transformers' "
            "AttentionInterface, and would mix the images of a batch. Call vwt_hf.restore(model), or give it attention "
            "that does."
        )
