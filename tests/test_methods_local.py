"""Neighbours that stand for each other before the first layer, and alike tokens that are joined after some layers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from settings import SETTINGS, fixed, gradual, inter, local
from test_families import assert_near, sample_images
from tiny import MODELS, TINY, answers, inputs, padded_patches, sample_pixel_values, tiny_model, watch_embeddings
from vwt_hf import VWTConfig, compress, count_tokens, restore
from vwt_hf.families import family_of, find_layers, find_stacks, find_tower
from vwt_hf.forward import current_forward
from vwt_hf.layout import _rounded
from vwt_hf.patches import Patches
from vwt_hf.plans import Grouped

NAMES = ["vit", "dinov2", "dinov3", "beit", "clip", "blip-vision", "siglip2-vision"]
BOTH = pytest.mark.parametrize("setting", [local(), gradual()], ids=["local", "gradual"])


@pytest.fixture
def images() -> torch.Tensor:
    """White, noise, nearly flat and half flat."""
    return sample_images()


def token_counts(model: transformers.PreTrainedModel, images: torch.Tensor) -> list[list[int]]:
    """Tokens of each image in each layer, prefix tokens included."""
    counts = []

    def look(layer, args, kwargs):
        forward = current_forward()
        plan = forward.plan_of_shape(*args[0].shape[:2])
        counts.append((plan.layout.rows.amax(dim=1) - plan.layout.rows[:, 0] + 1).tolist())

    hooks = [
        layer.register_forward_pre_hook(look, with_kwargs=True)
        for layer in find_layers(find_tower(model, family_of(model)).module)
    ]
    answers(model, images)
    for hook in hooks:
        hook.remove()
    return counts


def test_each_image_has_as_many_tokens_as_it_needs(images):
    model = compress(tiny_model("vit"), local())
    first, second = token_counts(model, images)
    assert first == second and first[0] == 1 + 4  # white: a sixteenth
    assert first[0] < first[3] < first[1] and first[1] > 55
    with count_tokens(model) as count:
        answers(model, images)
    assert (count.tokens, count.images, count.mean) == (sum(first), 4, sum(first) / 4)


def test_tokens_that_are_alike_are_joined_after_the_first_layer(images):
    model = compress(tiny_model("vit"), gradual())
    first, second = token_counts(model, images)
    assert first == token_counts(compress(tiny_model("vit"), local()), images)[0]
    assert all(late <= early for late, early in zip(second, first, strict=True)) and sum(second) < sum(first) - 20
    with count_tokens(model) as count:
        answers(model, images)
    assert count.by_layer == [sum(first), sum(second)] and count.mean == (sum(first) + sum(second)) / 2 / 4
    alone = compress(tiny_model("vit"), gradual(tolerance=0))
    first, second = token_counts(alone, images)
    assert first == [65] * 4 and max(second) < 65
    plain = answers(tiny_model("vit"), images)
    torch.testing.assert_close(answers(compress(alone, gradual(tolerance=0, similarity=1)), images), plain)


@pytest.mark.parametrize("layers", [None, (2, 3)])
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_a_model_whose_layers_were_taken_out_is_saved_once_it_is_compressed_by_those_left(
    name, layers, tmp_path, images
):
    """Loaded, it would join its tokens after other layers, or after none that it has."""
    model = compress(tiny_model(name, num_hidden_layers=4), gradual(layers=layers))
    tower = find_tower(model, family_of(model)).module
    ((parent, stack),) = find_stacks(tower)
    (attribute,) = (key for key, child in parent.named_children() if list(child.children()) == stack)
    setattr(parent, attribute, torch.nn.ModuleList(stack[:3]))
    tower.config.num_hidden_layers = 3
    with count_tokens(model) as count:
        answers(model, images)
    assert len(count.by_layer) == 3 and count.by_layer[2] < count.by_layer[1] == count.by_layer[0]
    with pytest.raises(
        ValueError, match=r"joins tokens after layers \[2, 3\] of its 3, and loaded it would join|\(2, 3\)"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    compress(model, gradual(layers=layers and (1, 2))).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(answers(loaded, images), answers(model, images))


def test_what_a_token_shows_is_one_patch_as_it_is(images):
    model = tiny_model("vit")
    plain = watch_embeddings(model)
    answers(model, images)
    taken = watch_embeddings(compress(model, local(layout="padded")))
    answers(model, images)
    tokens, plan = taken[-1]
    words = plan.patch_words(4, 64)
    for image in range(4):
        kept = list(dict.fromkeys(words[image].tolist()))  # in the order of the first patches that each stands for
        assert torch.equal(tokens[image, 1 : 1 + len(kept)], plain[0][0][image][[1 + index for index in kept]])
        sizes = [(words[image] == index).sum() for index in kept]
        assert plan.layout.sizes[image, 1 : 1 + len(kept)].tolist() == sizes


def test_joined_tokens_answer_as_a_mean_by_hand(images):
    """A model of two layers, of which the second gets what the definition says of the first's output."""
    model, plain = compress(tiny_model("vit"), gradual(tolerance=0)), tiny_model("vit")
    layers = find_layers(plain)
    image = images[3:]
    with torch.no_grad():
        output = layers[0](plain.embeddings(image))
        output = (output[0] if isinstance(output, tuple) else output)[0]
        cosines = torch.nn.functional.normalize(output, dim=-1) @ torch.nn.functional.normalize(output, dim=-1).T
        mean = cosines[2::2, 1::2].mean().item()
        members = {row: [row] for row in range(65)}
        for source in range(2, 65, 2):
            differs = {row: (1 - cosines[source, row].item()) / (1 - mean) for row in range(1, 65, 2)}
            best = min(differs, key=lambda row: differs[row] + 1e-4 * (row // 2))
            if 1 - differs[best] >= 0.2:
                members[best].append(source)
                del members[source]
        kept = sorted(members, key=lambda row: min(members[row]))
        joined = torch.stack([output[members[row]].mean(0) for row in kept])
        lengths = torch.stack([output[members[row]].norm(dim=1).mean() for row in kept])
        joined = (joined * (lengths / joined.norm(dim=1))[:, None])[None]
        bias = 0.9 * torch.tensor([len(members[row]) for row in kept]).float().log()
        hidden = _with_bias(layers[1], joined, bias)
        expected = plain.layernorm(hidden)[0]
    assert 10 < len(kept) < 60
    found = answers(model, image)[0]
    for place, row in enumerate(kept):
        for member in members[row]:
            torch.testing.assert_close(found[member], expected[place], atol=1e-5, rtol=1e-5)


def _with_bias(layer, tokens: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    output = layer(tokens, attention_mask=bias.view(1, 1, 1, -1))
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_layouts_answer_alike_and_as_images_alone(name, dtype, layout, images):
    images = images.to(dtype)
    model = compress(tiny_model(name).to(dtype), gradual(layout=layout))
    alone = torch.cat([answers(model, image[None]) for image in images])
    assert_near(answers(model, images), alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("setting", [gradual(), inter()], ids=["gradual", "inter"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_padding_that_round_a_packed_batch_change_no_answer(name, setting, attention, images, monkeypatch):
    model, lengths = compress(tiny_model(name), setting), []
    if name != "blip-vision":  # whose attention is one of its own
        model.set_attn_implementation(attention)
    batches = (images, images[1:2])
    expected = [answers(model, batch) for batch in batches]
    monkeypatch.setattr("vwt_hf.attention.is_slow_for_new_lengths", lambda device, dtype: True)
    monkeypatch.setattr("vwt_hf.layout._rounded", lambda rows: -(-rows // 11) * 11)
    find_layers(find_tower(model, family_of(model)).module)[0].register_forward_pre_hook(
        lambda layer, args: lengths.append(args[0].shape[1])
    )
    for batch, answer in zip(batches, expected, strict=True):
        torch.testing.assert_close(answers(model, batch), answer, atol=1e-5, rtol=1e-5)
    assert lengths and not any(length % 11 for length in lengths)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit", "blip-vision"])
def test_rows_of_padding_change_no_gradient_of_layers_that_are_repeated(name, images, monkeypatch):
    def gradients() -> list[torch.Tensor]:
        model = compress(tiny_model(name, num_hidden_layers=3), gradual(layers=(1, 2))).train()
        model.gradient_checkpointing_enable()
        model(pixel_values=images).last_hidden_state.square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    monkeypatch.setattr("vwt_hf.attention.is_slow_for_new_lengths", lambda device, dtype: True)
    monkeypatch.setattr("vwt_hf.layout._rounded", lambda rows: -(-rows // 11) * 11)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_half_precision_on_a_cpu_rounds_the_rows_of_a_packed_batch(images):
    def layout(dtype: torch.dtype, autocast: bool = False):
        model, found = compress(tiny_model("vit").to(dtype), gradual()), []
        find_layers(find_tower(model, family_of(model)).module)[0].register_forward_pre_hook(
            lambda layer, args: found.append(current_forward().plan.layout)
        )
        with torch.autocast("cpu", enabled=autocast):
            answers(model, torch.cat((images, images[1:2])).to(dtype))
        return found[0]

    whole = layout(torch.float32)
    assert not whole.rounds and whole.sizes.shape[1] == whole.tokens
    for rounded in (layout(torch.bfloat16), layout(torch.float16), layout(torch.float32, autocast=True)):
        assert rounded.rounds and rounded.sizes.shape[1] == _rounded(rounded.tokens) > rounded.tokens


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "clip-vision"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_hidden_states_of_every_layer_have_a_row_for_every_patch(name, layout, images):
    model, shapes = compress(tiny_model(name), gradual(layout=layout)), []
    layers = find_layers(find_tower(model, family_of(model)).module)
    hook = layers[0].register_forward_hook(lambda layer, args, output: shapes.append(current_forward().after[layer]))
    plain = tiny_model(name)
    with torch.no_grad():
        found = model(pixel_values=images, output_hidden_states=True).hidden_states
        usual = plain(pixel_values=images, output_hidden_states=True).hidden_states
    hook.remove()
    assert [state.shape for state in found] == [state.shape for state in usual]
    rows, prefix = shapes[0].layout.rows, shapes[0].layout.prefix
    joined = [
        pair
        for image in range(4)
        for pair in rows[image, prefix:].unique(return_counts=True)[1].tolist()
        if pair > 1
    ]  # fmt: skip
    assert joined
    for image in range(4):
        for row in rows[image].unique():
            same = found[-1][image][rows[image] == row]
            assert torch.equal(same, same[:1].expand_as(same))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, gradual()) for name in ("vit", "dinov2", "dinov3", "beit", "blip-vision")),
        *((name, SETTINGS["discard"]) for name in ("beit", "data2vec", "dinov3")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients(name, setting, reentrant, images):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = compress(tiny_model(name), setting).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs(model, images.clone().requires_grad_(reentrant)))[0].square().sum().backward()
        return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys() and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("setting", [local(), gradual(), SETTINGS["merge"]], ids=["local", "gradual", "merge"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_checkpointed_backbones_give_the_same_gradients(used, setting, images):
    """Also through the map of the last layer, whose output every patch gets its state back in."""
    stages = {"out_features": ["stage1", "stage2"]}
    plain = transformers.Dinov2Backbone(transformers.Dinov2Config(**TINY, **stages))

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = compress(copy.deepcopy(plain), setting).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        maps = model(images).feature_maps
        sum(maps[stage].square().sum() for stage in used).backward()
        return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys() and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit", "blip-vision"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_setting_that_was_taken_out_before_the_gradient_is_an_error(name, reentrant, images):
    """Layers that are repeated would attend across images."""
    model = compress(tiny_model(name), gradual()).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for change in (restore, lambda model: compress(model, SETTINGS["discard"])):
        compress(model, gradual())
        answer = model(**inputs(model, images.clone().requires_grad_(reentrant)))[0].square().sum()
        change(model)
        with pytest.raises(RuntimeError, match=r"was taken out or changed between forward and backward"):
            answer.backward()
        model.zero_grad()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layers_that_keep_their_products_for_the_gradient_give_the_same(implementation, layout, images):
    """Kept in their order, so that nothing else may come before them at first that is not repeated."""

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = compress(tiny_model("vit"), gradual(layout=layout)).train()
        model.set_attn_implementation(implementation)
        if checkpointed:
            kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.bmm.default])
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": kept})
        model(pixel_values=images).last_hidden_state.square().sum().backward()
        return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys() and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "tokens"), [({"num_patches": 20}, 20), ({"keep_ratio": 0.5, "tolerance": None}, 32)]
)
def test_a_number_of_patches_is_the_same_for_every_image(fields, tokens, images):
    model = compress(tiny_model("vit"), local(**fields))
    taken = watch_embeddings(model)
    answers(model, images)
    assert taken[-1][0].shape == (4, 1 + tokens, 32)
    assert taken[-1][1].layout.sizes.sum(dim=1).tolist() == [65] * 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "setting",
    [local(), gradual(), local(num_patches=20), fixed()],
    ids=["tolerance", "gradual", "num_patches", "keep_ratio"],
)
def test_pixels_that_are_no_numbers_do_not_vanish_from_the_answer(setting, value, images):
    """Of a patch of odd row and column, which goes first."""
    images[2, 0, -1, -1] = value
    model = tiny_model("vit")
    assert answers(model, images)[2].isnan().any()
    found = answers(compress(model, setting), images)
    assert found[2].isnan().any() and found[:2].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["vit", "siglip2-vision"])
def test_pixels_that_are_no_numbers_do_not_vanish_where_the_fewest_patches_stay(name, value, images):
    model = compress(tiny_model(name), local(num_patches=1))
    given = inputs(model, images)
    last = given["spatial_shapes"][2].prod() - 1 if "spatial_shapes" in given else (0, -1)
    given["pixel_values"][2][last][-1] = value  # of the last patch, behind all that always stay
    with torch.no_grad():
        found = model(**given)[0]
    assert found[2].isnan().any() and found[[0, 1, 3]].isfinite().all()


def test_a_patch_that_is_no_number_stays_in_place_of_the_only_one_and_the_words_say_so():
    images = torch.zeros(2, 3, 16, 16)
    images[1, 0, -1, -1] = torch.nan
    patches = Patches.of_images(images, (4, 4))
    assert local(num_patches=1).patch_words(patches).tolist() == [[0] * 16, [15] * 16]
    plan = local(num_patches=1).plan(patches)
    assert plan.sources.tolist() == [[0], [16 + 15]] and plan.layout.sizes.tolist() == [[16.0], [16.0]]


def test_no_number_leaves_fewer_than_one_in_each_block_or_more_than_there_are(images):
    for number, tokens in ((1, 4), (100, 64)):
        model = compress(tiny_model("vit"), local(num_patches=number))
        taken = watch_embeddings(model)
        answers(model, images)
        assert taken[-1][0].shape[1] == 1 + tokens


@pytest.mark.parametrize(("side", "fewest"), [(32, 4), (52, 16), (56, 16), (60, 16), (68, 25)])
def test_the_fewest_are_one_of_each_four_rows_and_columns(side, fewest):
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    plan = local(num_patches=1).plan(Patches.of_images(images, (4, 4)))
    assert plan.layout.runs == ((fewest, 2),)


@pytest.mark.parametrize("fields", [{"num_patches": 20}, {"keep_ratio": 0.5, "tolerance": None}, {"num_patches": 1}])
def test_padded_images_keep_their_own_number(fields, images):
    model = compress(tiny_model("siglip2-vision"), local(**fields))
    taken = watch_embeddings(model)
    answers(model, images)
    plan = taken[-1][1]
    shapes = padded_patches(images, 4)["spatial_shapes"].tolist()
    lengths = (plan.layout.rows.amax(dim=1) - plan.layout.rows.amin(dim=1) + 1).tolist()
    wanted = [fields.get("num_patches", rows * columns // 2) for rows, columns in shapes]
    fewest = [-(-rows // 4) * -(-columns // 4) for rows, columns in shapes]  # every fourth of every fourth row
    assert lengths == [max(pair) for pair in zip(wanted, fewest, strict=True)]


@pytest.mark.parametrize("fields", [{}, {"num_patches": 20}])
def test_an_image_processors_words_are_those_that_the_model_finds(fields, images):
    model = compress(tiny_model("vit"), local(**fields))
    taken = watch_embeddings(model)
    found = answers(model, images)
    words = taken[-1][1].patch_words(4, 64)
    assert torch.equal(answers(model, images, patch_words=words), found)
    by_words = compress(tiny_model("vit"), {"method": "given", "tokens": "representatives"})
    torch.testing.assert_close(answers(by_words, images, patch_words=words), found, atol=1e-5, rtol=1e-5)
    wrong = words.clone()
    wrong[1, 5] = 6 if words[1, 6] != 6 else 64
    with pytest.raises(ValueError, match="expected the index of one that has its own"):
        answers(by_words, images, patch_words=wrong)


@pytest.mark.parametrize("number", [1, 20])
def test_a_fixed_number_can_be_exported(number, images, tmp_path):
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = compress(tiny_model("vit"), local(num_patches=number))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixel_values).last_hidden_state

    model = Tokens().eval()
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": images}, dynamic_shapes=batch, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(loaded(pixel_values=images[:2]), model(pixel_values=images[:2]))
        images[1, 0, -1, -1] = torch.nan
        found = loaded(pixel_values=images[:2])
        assert found[0].isfinite().all() and found[1].isnan().all()


def test_ragged_images_are_not_exported_and_the_error_says_what_is(images):
    model = compress(tiny_model("vit"), local())
    with pytest.raises(Exception, match="every image its own number of tokens"):
        torch.export.export(model, (), {"pixel_values": images}, strict=False)


def test_a_model_that_does_not_say_how_its_images_are_normalised_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    logger = transformers.utils.logging.get_logger("vwt_hf.methods.local")
    with caplog.at_level("WARNING", logger=logger.name):
        model = compress(tiny_model("vit"), {"method": "local"})
    assert model.config.vwt["image_std"] == [0.5] * 3
    assert "no image processor" in caplog.text and "0.5 for each channel" in caplog.text
    assert "Give VWTConfig(method='local', image_std=...)" in caplog.text


def test_the_deviation_of_a_models_image_processor_is_used_and_saved(tmp_path, images):
    tiny_model("vit").save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.2, 0.4, 0.8]).save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, vwt={"method": "gradual"})
    assert model.config.vwt["image_std"] == [0.2, 0.4, 0.8]
    expected = answers(model, images)
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.vwt == model.config.vwt and torch.equal(answers(loaded, images), expected)
    again = transformers.AutoModel.from_pretrained(tmp_path / "saved", vwt={"method": "local", "tolerance": 0.1})
    assert again.config.vwt["image_std"] == [0.2, 0.4, 0.8]


def test_the_deviation_of_the_setting_that_a_model_has_is_that_of_the_next():
    model = compress(tiny_model("vit"), local(image_std=[0.2, 0.4, 0.8]))
    compress(model, {"method": "gradual", "tolerance": 0.1})
    assert model.config.vwt["method"] == "gradual" and model.config.vwt["image_std"] == [0.2, 0.4, 0.8]


def test_a_tolerance_means_the_same_however_images_are_normalised(images):
    raw = images * 0.2 + 0.5
    counts = []
    for mean, std in ((0.5, 0.5), (0.2, 0.25)):
        model = compress(tiny_model("vit"), local(image_std=(std,) * 3, tolerance=0.1))
        counts.append(token_counts(model, (raw - mean) / std)[0])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tolerance": -0.1}, r"tolerance is -0.1; expected a difference of raw RGB, in \[0, 1\]"),
        ({"tolerance": True}, "tolerance is True"),
        ({"tolerance": 0.1, "keep_ratio": 0.5}, "tolerance is 0.1 and keep_ratio is 0.5; expected one of them"),
        ({"keep_ratio": 0.0}, r"keep_ratio is 0.0; expected a number in \(0, 1\]"),
        ({"num_patches": 0}, "num_patches is 0; expected None or an integer of at least 1"),
        ({"image_std": [0.5, -1, 1]}, r"image_std is \[0.5, -1, 1\]; expected None or positive numbers"),
        ({"image_std": [1e-30] * 3}, "image_std is .*; expected one number in"),
        ({"output": "compressed"}, "output is 'compressed', but under method='local'"),
        ({"method": "gradual", "similarity": 1.5}, r"similarity is 1.5; expected a number in \[-1, 1\], or 3"),
        ({"method": "gradual", "similarity": [0.9, 0.8]}, r"similarity is .*0.9, 0.8.*or 3 of them"),
        ({"method": "gradual", "layers": [3, 2], "similarity": 0.9}, r"layers is .*3, 2.*each once, ascending"),
        ({"method": "gradual", "layers": []}, r"layers is \[\]; expected None or numbers of layers"),
        ({"method": "gradual", "join_ratio": 0.6}, r"join_ratio is 0.6; expected a share .* in \[0, 0.5\], or"),
        ({"method": "gradual", "join_ratio": [0.1]}, r"join_ratio is \[0.1\]; .* or 3 of them"),
        ({"method": "gradual", "join_ratio": 0.1, "similarity": 0.9}, "is 0.9 and join_ratio is 0.1; expected one"),
        ({"method": "gradual", "layers": [0]}, r"layers is \[0\]; expected None or numbers of layers"),
        ({"method": "gradual", "layers": [1.5]}, r"layers is \[1.5\]; expected None or numbers of layers"),
    ],
)
def test_a_bad_setting_is_refused_by_field_value_and_range(fields, words):
    with pytest.raises(ValueError, match=words):
        VWTConfig.parse({"method": "local", **fields})


@pytest.mark.parametrize("setting", [VWTConfig(method="local"), VWTConfig(method="coarse"), VWTConfig(method="inter")])
def test_a_deviation_that_somebody_saved_makes_sense_or_is_refused(setting):
    """It may be in the file of a stranger, where the setting of a user leaves it out."""
    assert setting.with_saved({"image_std": [0.5] * 3}).image_std == (0.5,) * 3
    with pytest.raises(ValueError, match=r"image_std is .*; expected one number in"):
        setting.with_saved({"image_std": [1e-30] * 3})


def test_a_deviation_for_other_channels_and_layers_that_a_model_lacks_are_refused():
    with pytest.raises(ValueError, match=r"image_std is \(0.5,\); expected 3 numbers"):
        compress(tiny_model("vit"), local(image_std=[0.5]))
    model = tiny_model("vit")
    with pytest.raises(ValueError, match=r"layers is \(1, 2\), and the model has 2 layers.*from 1 to 1"):
        compress(model, gradual(layers=[1, 2]))
    assert getattr(model.config, "vwt", None) is None
    compress(model, {"keep_ratio": 0.5})
    with pytest.raises(ValueError, match="the model has 2 layers"):
        compress(model, gradual(layers=[1, 2]))
    assert model.config.vwt["keep_ratio"] == 0.5
    assert answers(model, sample_pixel_values()).shape[1] == 33  # CLS and 32 of 64 patches, as before


@pytest.mark.parametrize(("layers", "expected"), [(12, [5, 7, 9]), (24, [10, 14, 18]), (2, [1]), (1, [])])
def test_layers_are_those_in_the_middle_if_a_setting_does_not_say(layers, expected):
    assert list(VWTConfig(method="gradual").joins(layers)) == expected


def test_each_layer_has_its_similarity():
    assert VWTConfig(method="gradual", layers=[2, 5], similarity=[0.9, 0.8]).joins(12) == {2: 0.9, 5: 0.8}
    assert VWTConfig(method="gradual", layers=[2, 5], similarity=0.7).joins(12) == {2: 0.7, 5: 0.7}
    assert VWTConfig(method="gradual").joins(12) == dict.fromkeys((5, 7, 9), 0.61)
    assert VWTConfig(method="gradual", join_ratio=0.2).joins(12) == dict.fromkeys((5, 7, 9), 0.2)
    assert VWTConfig(method="gradual", join_ratio=[0.4, 0.3, 0.2]).joins(12) == {5: 0.4, 7: 0.3, 9: 0.2}


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_each_images_tokens_is_joined(name, images):
    model = compress(tiny_model(name), fixed())
    taken = watch_embeddings(model)
    first, second = token_counts(model, images)
    prefix = taken[0][1].layout.prefix
    if family_of(model).padded is None:
        assert first == [prefix + 32] * 4 and second == [prefix + 24] * 4
    first, second = token_counts(compress(model, gradual(join_ratio=0.25)), images)
    assert len(set(first)) > 1
    assert second == [early - int((early - prefix) * 0.25) for early in first]


@pytest.mark.parametrize("method", ["gradual", "coarse"])
def test_a_share_joined_in_several_layers_is_that_of_the_image_alone_in_either_layout(method):
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=64, patch_size=4)).eval()
    images = torch.rand(6, 3, 64, 64)
    images[:, :, :32] = images[:, :, :1, :1].round(decimals=1)  # the same number of tokens of each, or nearly
    setting = local(method=method, join_ratio=0.2, layers=[1, 2, 3], output="full")
    alone = torch.cat([answers(compress(model, setting), image[None]) for image in images])
    for layout in ("packed", "padded"):
        compress(model, local(method=method, join_ratio=0.2, layers=[1, 2, 3], output="full", layout=layout))
        torch.testing.assert_close(answers(model, images), alone, atol=1e-5, rtol=1e-5)
        one = torch.cat([answers(model, image[None]) for image in images])
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)


def test_every_model_of_the_matrix_joins_some_tokens(images):
    for name in MODELS:
        model = compress(tiny_model(name), gradual())
        taken = watch_embeddings(model)
        with count_tokens(model) as count:
            answers(model, images)
        assert isinstance(taken[-1][1], Grouped) and count.by_layer[-1] < count.by_layer[0], name


@pytest.mark.parametrize("method", ["gradual", "coarse"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_number_of_patches_that_layers_join_further_lies_as_it_is_told(method, layout, images):
    setting = local(method=method, num_patches=40, similarity=0.2, layout=layout, output="full")
    model = compress(tiny_model("vit"), setting)
    shapes = []
    for layer in find_layers(model):
        layer.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
    found = answers(model, images)
    assert [shape[0] == 1 for shape in shapes] == [layout == "packed"] * 2
    assert shapes[1].numel() < shapes[0].numel()
    alone = torch.cat([answers(model, image[None]) for image in images])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_a_value_that_is_no_number_stays_in_its_image_where_padding_hides_the_others(images):
    """SigLIP has no token before the first patch, of which padding is a copy."""
    images[0, :, 0, 0] = torch.nan
    model = compress(tiny_model("siglip-vision"), local(layout="padded"))
    expected = torch.cat([answers(model, image[None]) for image in images])
    assert expected[0].isnan().any() and expected[1:].isfinite().all()
    torch.testing.assert_close(answers(model, images), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
