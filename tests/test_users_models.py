"""Models that a user changed before they were compressed: they answer a batch as its images alone, or are refused."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import transformers
from torch import nn

from settings import SETTINGS, coarse, fixed, gradual, inter, local
from tiny import sample_pixel_values, tiny_model
from vwt_hf import compress, restore
from vwt_hf.families import find_layers

GROUPS = {
    "merge": SETTINGS["merge"],
    "inter": inter(),
    "padded": inter(layout="padded"),
    "local": local(),
    "gradual": gradual(),
    "fixed": fixed(),
    "coarse": coarse(),
}
groups = pytest.mark.parametrize("setting", list(GROUPS.values()), ids=list(GROUPS))


def images() -> torch.Tensor:
    """Of different lengths: the first is white, the others are noise with more and more flat rows."""
    pixel_values = sample_pixel_values()
    for index, image in enumerate(pixel_values):
        image[:, : 6 * index] = 0.7
    pixel_values[0] = 1.3
    return pixel_values


def like(model: transformers.PreTrainedModel, kind: type) -> transformers.PreTrainedModel:
    """A model of class `kind` with the config and weights of another."""
    made = kind(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict(), strict=False)
    return made


@torch.no_grad()
def states(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    output = model(pixel_values)
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def require_as_alone(model: nn.Module) -> None:
    alone = torch.cat([states(model, image[None]) for image in images()])
    torch.testing.assert_close(states(model, images()), alone, atol=1e-5, rtol=1e-5)


class Mixer(nn.Module):
    """A layer, or an attention, in which every token sees all others, and that asks no interface."""

    def __init__(self, *outputs: None) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: torch.Tensor, *_, **__):
        mixed = hidden_states + self.weight * hidden_states.mean(dim=1, keepdim=True)
        return (mixed, *self.outputs) if self.outputs else mixed


class Encoder(nn.TransformerEncoderLayer):
    """A layer of torch's."""

    def __init__(self) -> None:
        super().__init__(32, 4, 64, batch_first=True)

    def forward(self, hidden_states: torch.Tensor, *_, **__):
        return super().forward(hidden_states)


class MixingAttention(Mixer):
    """Is known for an attention by its name alone."""


class Block(nn.Module):
    """A layer that somebody wrote, with an attention of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = MixingAttention()

    def forward(self, hidden_states: torch.Tensor, *_, **__):
        return self.mixing(hidden_states)


def patched(attention: nn.Module) -> None:
    def forward(self, hidden_states: torch.Tensor, *_, **__):
        return Mixer(None)(hidden_states)

    attention.forward = types.MethodType(forward, attention)


@groups
@pytest.mark.parametrize("how", ["attention", "forward", "layer", "own layer"])
def test_attention_that_goes_by_no_plan_is_an_error(how, setting):
    model = tiny_model("vit", num_hidden_layers=3)
    layer = model.layers[1]
    if how == "attention":
        layer.attention = Mixer(None)
    elif how == "forward":
        patched(layer.attention)
    else:
        model.layers[1] = (Encoder() if how == "layer" else Block()).eval()
    plain = states(model, images())
    compress(model, setting)
    with pytest.raises(ValueError, match="1 of the 3 layers of the ViTModel did not attend by the tokens of each"):
        states(model, images())
    assert torch.equal(states(restore(model), images()), plain)


def test_attention_put_in_after_compress_where_ours_stands_in_is_an_error():
    model = compress(tiny_model("blip-vision", num_hidden_layers=3), SETTINGS["local"])
    fresh = find_layers(tiny_model("blip-vision", num_hidden_layers=3))[1]
    states(model, images())
    for part, module in fresh.named_children():
        setattr(find_layers(model)[1], part, module)
    with pytest.raises(ValueError, match="1 of the 3 layers of the BlipVisionModel did not attend"):
        states(model, images())


def test_attention_that_needs_no_plan_may_be_any():
    """All images have as many tokens, none of which draws more attention than another; or no patch is part of another's
    token."""
    for setting in ({"dropped": "merge", "proportional_attention": False}, SETTINGS["discard"]):
        model = tiny_model("vit")
        patched(model.layers[1].attention)
        require_as_alone(compress(model, setting))


class Adapter(nn.Module):
    """A layer that sees each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, hidden_states: torch.Tensor, *_, **__):
        return hidden_states + self.linear(hidden_states)


class Early(transformers.ViTModel):
    """Which leaves its last layer out."""

    def forward(self, pixel_values: torch.Tensor, **_) -> torch.Tensor:
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states)
        return self.layernorm(hidden_states)


@groups
def test_layers_that_do_not_run_and_those_that_see_each_token_alone_are_no_error(setting):
    require_as_alone(compress(like(tiny_model("vit", num_hidden_layers=3), Early), setting))
    model = tiny_model("vit", num_hidden_layers=3)
    model.layers.insert(1, Adapter())
    require_as_alone(compress(model, setting))


class Nothing(nn.Module):
    """In place of a layer that was pruned."""

    def forward(self, hidden_states: torch.Tensor, *_, **__):
        return hidden_states


@groups
def test_a_layer_that_does_nothing_is_none(setting):
    model = tiny_model("vit", num_hidden_layers=3)
    model.layers[1] = Nothing()
    require_as_alone(compress(model, setting))
    model = compress(tiny_model("vit", num_hidden_layers=3), setting)
    model.layers[1] = Nothing()
    require_as_alone(model)


@groups
def test_a_layer_that_runs_twice_is_refused(setting):
    model = tiny_model("vit", num_hidden_layers=4)
    model.layers[2] = model.layers[0]
    with pytest.raises(ValueError, match="ViTModel runs its layer 1 again as layer 3; expected each once"):
        compress(model, setting)
    model.layers[2] = copy.deepcopy(model.layers[0])
    require_as_alone(compress(model, setting))


class Skip(nn.Module):
    """In place of a layer that somebody takes out."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden_states


@groups
def test_a_module_without_weights_may_stand_in_several_places(setting):
    model, expected = tiny_model("vit", num_hidden_layers=4), tiny_model("vit", num_hidden_layers=4)
    model.layers[0] = model.layers[2] = Skip()
    expected.layers = nn.ModuleList([expected.layers[1], expected.layers[3]])
    require_as_alone(compress(model, setting))
    assert states(compress(model, {"keep_ratio": 0.5}), images()).shape == (3, 33, 32)
    restore(model), restore(expected)
    torch.testing.assert_close(states(model, images()), states(expected, images()))


class Twice(transformers.ViTModel):
    """As it sees an image and its mirror."""

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        seen = [super(Twice, self).forward(one, **kwargs)[0] for one in (pixel_values, pixel_values.flip(-1) + 0.3)]
        return seen[0] + seen[1].detach() * 0.5


@groups
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_tower_that_sees_two_batches_in_one_forward_goes_by_the_plan_of_each(setting, checkpoints):
    once, twice = compress(tiny_model("vit"), setting), compress(like(tiny_model("vit"), Twice), setting)
    first, second = images(), images().flip(-1) + 0.3

    def gradients(model: nn.Module, value: torch.Tensor) -> list[torch.Tensor]:
        value.square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = states(once, first) + states(once, second) * 0.5
    torch.testing.assert_close(states(twice, first), expected, atol=1e-5, rtol=1e-5)
    if checkpoints:
        twice.gradient_checkpointing_enable({"use_reentrant": False})
        twice.train()
    found = gradients(twice, twice(first))
    value = once(first).last_hidden_state + once(second).last_hidden_state.detach() * 0.5
    for one, other in zip(found, gradients(once, value), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


class Deep(transformers.ViTModel):
    """Adds up CLS of each image over the layers."""

    def forward(self, pixel_values: torch.Tensor, **_) -> torch.Tensor:
        hidden_states, found = self.embeddings(pixel_values), 0
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            found = found + hidden_states[:, 0]
        return found


class Named(transformers.ViTModel):
    """Whose layers have names of their own."""

    def __init__(self, config: transformers.ViTConfig) -> None:
        super().__init__(config)
        self.first, self.second = self.layers
        del self.layers

    def forward(self, pixel_values: torch.Tensor, **_) -> torch.Tensor:
        return self.layernorm(self.second(self.first(self.embeddings(pixel_values))))


@pytest.mark.parametrize("setting", [SETTINGS["discard"], *GROUPS.values()], ids=["discard", *GROUPS])
def test_layers_may_have_names_of_their_own(setting):
    one, other = tiny_model("vit"), Named(tiny_model("vit").config).eval()
    weights = {
        name.replace("layers.0", "first").replace("layers.1", "second"): v for name, v in one.state_dict().items()
    }
    other.load_state_dict(weights)
    expected = states(compress(one, setting), images())
    torch.testing.assert_close(states(compress(other, setting), images()), expected, atol=1e-5, rtol=1e-5)


@groups
def test_a_forward_of_a_user_sees_each_image_in_a_row_of_its_own_between_layers(setting):
    require_as_alone(compress(like(tiny_model("vit"), Deep), setting))


@pytest.mark.parametrize(
    ("first", "shared"),
    [("inter", "layers"), ("inter", "embeddings"), ("discard", "embeddings")],  # "discard" has no hooks in layers
)
def test_towers_that_share_parts_are_not_compressed_beside_each_other(first, shared):
    one, other = tiny_model("vit"), tiny_model("vit")
    setattr(other, shared, getattr(one, shared))
    compress(one, SETTINGS[first])
    before = states(one, images())
    for setting in (SETTINGS["inter"], SETTINGS["discard"]):
        with pytest.raises(ValueError, match="Embeddings or layers of the ViTModel belong to another vision tower"):
            compress(other, setting)
    with pytest.raises(ValueError, match=r"belong to another model, too, .* Call vwt_hf\.restore on that one"):
        restore(other)
    assert torch.equal(states(one, images()), before) and one.config.vwt is not None
    compress(one, SETTINGS[first])  # again, and out
    restore(one)
    require_as_alone(compress(other, SETTINGS["inter"]))


Embeddings = type(tiny_model("vit").embeddings)


class Behind(Embeddings):
    """With a token behind the patches."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        tokens = super().forward(*args, **kwargs)
        return torch.cat((tokens, tokens[:, :1]), dim=1)


class Before(Embeddings):
    """With 20 tokens before CLS, as learned prompts are."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        tokens = super().forward(*args, **kwargs)
        return torch.cat((tokens[:, :1].expand(-1, 20, -1), tokens), dim=1)


class Fewer(Embeddings):
    """Which give every second row."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return super().forward(*args, **kwargs)[:, ::2]


def test_embeddings_of_a_user_give_a_row_of_each_patch_behind_prefix_tokens_or_are_refused():
    def changed(kind: type) -> transformers.PreTrainedModel:
        model = tiny_model("vit")
        model.embeddings.__class__ = kind
        return model

    for kind in (Behind, Fewer):
        for setting in (*GROUPS.values(), SETTINGS["discard"]):
            with pytest.raises(ValueError, match=r"ViTModel .*cannot be compressed: it (changes|makes) \d*\s?rows"):
                compress(changed(kind), setting)
    require_as_alone(model := compress(changed(Before), SETTINGS["discard"]))
    assert states(model, images()).shape[1] == 21 + 32
    dense = tiny_model("vit")
    dense.embeddings.patch_embeddings.projection.stride = (2, 2)
    dense.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 1 + 15 * 15, 32))
    with pytest.raises(ValueError, match="changes rows"):
        compress(dense, SETTINGS["discard"])
    prompted = tiny_model("vit")
    prompted.embeddings.register_forward_hook(lambda module, args, output: torch.cat((output, output[:, :3]), 1))
    with pytest.raises(ValueError, match="changes rows"):
        compress(prompted, SETTINGS["discard"])
    model = compress(tiny_model("vit"), SETTINGS["discard"])
    model.embeddings.register_forward_hook(lambda module, args, output: output[:, ::2], prepend=True)
    with pytest.raises(ValueError, match="made 33 tokens of an image of 8×8 patches; expected one of each"):
        states(model, images())


class Holder(transformers.ViTPreTrainedModel):
    """A class of a user's that predicts masked patches by another model within it."""

    def __init__(self, config: transformers.ViTConfig) -> None:
        super().__init__(config)
        self.inner = transformers.ViTForMaskedImageModeling(config)
        self.post_init()


def test_what_predicts_masked_patches_is_refused_within_another_model_too():
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling predicts patches that are masked"):
        compress(Holder(tiny_model("vit").config))
