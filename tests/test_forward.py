"""A forward of a compressed model knows its own plan, whatever runs within it, beside it or before it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from settings import SETTINGS, coarse, fixed, gradual, inter, local
from tiny import answers, sample_pixel_values, tiny_model
from vwt_hf import compress
from vwt_hf.families import family_of, find_layers, find_tower
from vwt_hf.forward import current_forward

OUTER = {"merge": SETTINGS["merge"], "packed": inter(layout="packed"), "padded": inter(layout="padded")}
outer = pytest.mark.parametrize("setting", list(OUTER.values()), ids=list(OUTER))


def images(batch: int) -> torch.Tensor:
    """Of different lengths: the first is white, the others are noise with more and more flat rows."""
    pixel_values = sample_pixel_values(batch)
    for index, image in enumerate(pixel_values):
        image[:, : 6 * index] = 0.7
    pixel_values[0] = 1.3
    return pixel_values


def itself(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return model


def plain_twin(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Of the very config of `model`."""
    torch.manual_seed(5)
    return type(model)(model.config).eval()


def plain(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return tiny_model("dinov2")


def dropping(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return compress(tiny_model("clip-vision"), SETTINGS["discard"])


def merging(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return compress(tiny_model("beit"), SETTINGS["merge"])


def with_words(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return compress(tiny_model("siglip2-vision"), SETTINGS["inter"])


def places(model: transformers.PreTrainedModel) -> dict[str, Callable]:
    """Where something can be called within a forward of `model`, by what registers it there."""
    tower = find_tower(model, family_of(model))
    layers = find_layers(tower.module)
    return {
        "after the embeddings": tower.embeddings.register_forward_hook,
        "before the first layer": layers[0].register_forward_pre_hook,
        "within the first layer": next(layers[0].children()).register_forward_hook,
        "after the first layer": layers[0].register_forward_hook,
        "before the last layer": layers[-1].register_forward_pre_hook,
        "after the last layer": layers[-1].register_forward_hook,
    }


@pytest.mark.parametrize("name", ["vit", "blip-vision"])
@pytest.mark.parametrize("make", [itself, plain_twin, plain, dropping, merging, with_words])
@outer
def test_a_forward_within_another_changes_neither(name, setting, make):
    for place in places(tiny_model(name)):
        model = compress(tiny_model(name), setting)
        inner = make(model)
        expected, expected_inner = answers(model, images(3)), answers(inner, images(5))
        found = []

        def call(*args, inner=inner, found=found) -> None:
            if not found:  # else a model that calls itself never ends
                found.append(None)
                found[0] = answers(inner, images(5))

        places(model)[place](call)
        assert torch.equal(answers(model, images(3)), expected), place
        assert torch.equal(found[0], expected_inner), place
        assert current_forward() is None


@outer
def test_an_error_within_a_forward_leaves_it_as_it_was(setting):
    model = compress(tiny_model("vit"), setting)
    expected = answers(model, images(3))
    other = compress(tiny_model("vit"), SETTINGS["inter"])
    find_layers(other)[1].register_forward_pre_hook(fail)

    def call(*args) -> None:
        within = current_forward()
        with pytest.raises(ZeroDivisionError):
            answers(other, images(5))
        assert current_forward() is within

    for register in places(model).values():
        register(call)
    assert torch.equal(answers(model, images(3)), expected)


@outer
def test_a_model_that_is_refused_before_it_begins_leaves_the_forward_around_it(setting):
    model = compress(tiny_model("vit"), setting)
    expected = answers(model, images(3))
    other = compress(tiny_model("vit"), SETTINGS["inter"])
    other.config._attn_implementation = "flex_attention"

    def call(*args) -> None:
        within = current_forward()
        with pytest.raises(ValueError, match="attention implementation is 'flex_attention'"):
            answers(other, images(5))
        assert current_forward() is within

    for register in places(model).values():
        register(call)
    assert torch.equal(answers(model, images(3)), expected)


@outer
def test_a_forward_that_fails_leaves_nothing_to_the_next(setting):
    model = compress(tiny_model("vit"), setting)
    expected = answers(model, images(3))
    for register in places(model).values():
        handle = register(fail)
        with pytest.raises(ZeroDivisionError):
            answers(model, images(5))
        handle.remove()
        assert current_forward() is None
        assert torch.equal(answers(model, images(3)), expected)


def fail(*args) -> None:
    raise ZeroDivisionError


@outer
def test_forwards_of_two_threads_do_not_meet(setting):
    """Each is within every layer while the other is."""
    model = compress(tiny_model("vit"), setting)
    expected = [answers(model, images(batch)) for batch in (3, 5)]
    meeting = threading.Barrier(2, timeout=60)
    for register in places(model).values():
        register(lambda *args: (meeting.wait(), None)[1])
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda batch: answers(model, images(batch)), (3, 5)))
    assert all(map(torch.equal, found, expected))


def test_a_layer_called_by_itself_is_plain_and_within_a_forward_must_be_of_its_tokens():
    model = compress(tiny_model("vit"), SETTINGS["inter"])
    layer, tokens = find_layers(model)[0], torch.randn(2, 9, 32)
    plain = find_layers(tiny_model("vit"))[0](tokens)
    torch.testing.assert_close(layer(tokens), plain)
    errors = []

    def call(*args) -> None:
        if not errors:
            errors.append(None)
            with pytest.raises(RuntimeError, match="not the tokens of the forward") as error:
                layer(tokens)
            errors[0] = error

    find_layers(model)[1].register_forward_pre_hook(call)
    answers(model, images(3))
    assert errors[0] is not None


VMAP = {
    "local": local(),
    "count": local(num_patches=30),
    "coarse": coarse(),
    "inter": inter(),
    "merge": SETTINGS["merge"],
}
VMAP |= {"gradual": gradual(), "fixed": fixed(), "discard": SETTINGS["discard"]}


@pytest.mark.parametrize("setting", list(VMAP.values()), ids=list(VMAP))
def test_vmap_over_images_or_weights_answers_as_each_alone_or_says_what_to_do(setting):
    model, given = compress(tiny_model("vit"), setting), images(3)
    expected = answers(model, given)
    weights = {name: torch.stack((value.detach(), 1.1 * value.detach())) for name, value in model.named_parameters()}

    def of_image(image: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=image[None]).last_hidden_state[0]

    def of_weights(own: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, own, (given,)).last_hidden_state

    with torch.no_grad():
        for function, values, batch, works in (
            (of_image, given, 3, not setting.groups),
            (of_weights, weights, 2, setting.method != "gradual"),
        ):
            if works:
                each = [torch.utils._pytree.tree_map(lambda value, i=i: value[i], values) for i in range(batch)]
                right = torch.stack(list(map(function, each)))
                torch.testing.assert_close(torch.func.vmap(function)(values), right, atol=1e-5, rtol=1e-5)
            else:
                with pytest.raises(ValueError, match=rf"vmap .*='{setting.method}'.* as one batch .*restore\(model\)"):
                    torch.func.vmap(function)(values)
    torch.testing.assert_close(answers(model, given), expected)


class InHalves(transformers.ViTModel):
    """Embeds the images of one call in two batches."""

    def forward(self, pixel_values, **kwargs):
        halves = [super(InHalves, self).forward(half, **kwargs)[0] for half in pixel_values.split(2)]
        return (torch.cat(halves),)


@pytest.mark.parametrize("setting", [SETTINGS["merge"], gradual()], ids=["merge", "gradual"])
def test_a_tower_that_embeds_two_batches_goes_by_the_plan_of_each(setting):
    model = compress(tiny_model("vit"), setting)
    expected = torch.cat([answers(model, half) for half in images(4).split(2)])
    whole = InHalves(transformers.ViTConfig.from_dict(tiny_model("vit").config.to_dict())).eval()
    whole.load_state_dict(tiny_model("vit").state_dict())
    torch.testing.assert_close(answers(compress(whole, setting), images(4)), expected)
