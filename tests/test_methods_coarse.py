"""Blocks of patches that are shown at half the size, as one patch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from settings import ViTImageProcessor, coarse
from test_families import assert_near, sample_images
from tiny import answers, forward, inputs, padded_patches, sample_pixel_values, tiny_model, watch_embeddings
from vwt_hf import VWTConfig, compress, count_tokens
from vwt_hf.blocks import cut_blocks, detail_lost, grid_blocks, halve, padded_blocks, put_back, with_halves
from vwt_hf.families import family_of, find_layers, find_tower
from vwt_hf.patches import Patches, padded_places
from vwt_hf.plans import Grouped
from vwt_hf.words import patchify

NAMES = ["vit", "dinov2", "dinov3", "beit", "clip", "blip-vision", "aimv2-vision", "siglip2-vision"]
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def images() -> torch.Tensor:
    """White, noise, nearly flat and half flat."""
    return sample_images()


def whole(images: torch.Tensor, patch: int = 4) -> Patches:
    return Patches.of_images(images, (patch, patch))


def words_by_hand(image: torch.Tensor, tolerance: float, rows: int, columns: int, patch: int = 4) -> list[int]:
    """The word of each patch of one image whose deviation is 0.5, by the definition."""
    words = list(range(rows * columns))
    for row in range(0, rows - 1, 2):
        for column in range(0, columns - 1, 2):
            block = image[:, row * patch : (row + 2) * patch, column * patch : (column + 2) * patch].double() * 0.5
            means = block.unflatten(2, (patch, 2)).unflatten(1, (patch, 2)).mean((2, 4))
            rest = block - means.repeat_interleave(2, 1).repeat_interleave(2, 2)
            if rest.square().mean().sqrt() < tolerance:
                first = row * columns + column
                for member in (first, first + 1, first + columns, first + columns + 1):
                    words[member] = first
    return words


@pytest.mark.parametrize("size", [(32, 32), (36, 28), (20, 39)])
def test_blocks_that_lose_little_become_one_token(size):
    pixel_values = sample_pixel_values(3, *size) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    pixel_values[2, :, :16, :16] = pixel_values[2, :, :1, :1]
    patches = whole(pixel_values)
    rows, columns = patches.grid
    found, _ = coarse(tolerance=0.2).repainted(patches)
    expected = [words_by_hand(image, 0.2, rows, columns) for image in pixel_values]
    assert found.tolist() == expected
    lengths = [len(set(words)) for words in expected]
    assert lengths[0] == rows * columns - 3 * (rows // 2) * (columns // 2) < lengths[2] < rows * columns


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        *(({"num_patches": asked}, tokens) for asked, tokens in ((40, 40), (39, 37), (1, 16), (64, 64), (99, 64))),
        *(({"keep_ratio": asked}, tokens) for asked, tokens in ((0.25, 16), (0.5, 31), (1.0, 64))),
    ],
)
def test_of_a_number_those_that_lose_least(asked, tokens, images):
    patches = whole(images)
    found = detail_lost(images, halve(images), (4, 4), HALF).flatten(1)
    words, _ = VWTConfig(method="coarse", image_std=HALF, **asked).repainted(patches)
    for image in range(4):
        assert len(words[image].unique()) == tokens
        gone = words[image][grid_blocks(8, 8, images.device)[0, :, 3]] < grid_blocks(8, 8, images.device)[0, :, 3]
        assert gone.sum() == (64 - tokens) // 3
        if gone.any() and not gone.all():
            assert found[image][gone].max() <= found[image][~gone].min()
    if tokens == 64:
        assert torch.equal(words, torch.arange(64).expand(4, -1))


def test_a_grid_with_an_odd_side_keeps_its_last_row_and_column():
    words, _ = coarse(num_patches=1).repainted(whole(sample_pixel_values(2, 36, 28)))
    assert all(len(image.unique()) == 63 - 3 * 12 for image in words)
    last = words.view(2, 9, 7)
    own = torch.arange(63).view(9, 7)
    assert torch.equal(last[:, 8], own[8].expand(2, -1)) and torch.equal(last[..., 6], own[:, 6].expand(2, -1))


@pytest.mark.parametrize("fields", [{"tolerance": 1.0}, {"num_patches": 1}], ids=["tolerance", "number"])
@pytest.mark.parametrize("name", ["dinov3", "siglip2-vision"])
def test_images_of_one_row_of_patches_have_no_blocks_and_the_answers_of_the_plain_model(name, fields):
    row = sample_pixel_values(2, 4, 32)
    expected = answers(tiny_model(name), row)
    torch.testing.assert_close(answers(compress(tiny_model(name), coarse(**fields)), row), expected)


def test_what_a_token_is_and_how_much_attention_it_draws_by_hand(images):
    """The mean of the embeddings of an image that has the block at half the size in all four places."""
    model, plain = compress(tiny_model("vit"), coarse(num_patches=40)), tiny_model("vit")
    image = images[1:2]  # noise, of which each block loses something
    words = coarse(num_patches=40).repainted(whole(image))[0][0].tolist()
    changed = image.clone()
    for first in {word for word in words if words.count(word) == 4}:
        row, column = 4 * (first // 8), 4 * (first % 8)
        small = torch.nn.functional.avg_pool2d(image[0, :, row : row + 8, column : column + 8], 2)
        changed[0, :, row : row + 8, column : column + 8] = small.repeat(1, 2, 2)
    with torch.no_grad():
        embedded = plain.embeddings(changed)[0]
        kept = sorted(set(words))
        assert len(kept) == 40
        members = [[1 + index for index, word in enumerate(words) if word == first] for first in kept]
        hidden = torch.stack([embedded[0], *(embedded[rows].mean(0) for rows in members)])[None]
        bias = torch.tensor([0.0, *(math.log(len(rows)) * 2 / 3 for rows in members)]).view(1, 1, 1, -1)
        for layer in find_layers(plain):
            hidden = layer(hidden, attention_mask=bias)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        expected = plain.layernorm(hidden)[0]
    found = answers(model, image)[0]
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    for place, rows in enumerate(members):
        for row in rows:
            torch.testing.assert_close(found[row], expected[1 + place], atol=1e-5, rtol=1e-5)
    assert (found - answers(tiny_model("vit"), image)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("proportional", [True, False])
def test_without_proportional_attention_sizes_do_not_count(proportional, images):
    model = compress(tiny_model("vit"), coarse(layout="padded", proportional_attention=proportional))
    taken = watch_embeddings(model)
    answers(model, images)
    plan = taken[-1][1]
    finite = plan.key_bias[plan.layout.sizes > 0]
    assert (finite.max() > 0.9) == proportional and finite.min() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_layouts_answer_alike_and_as_images_alone(name, dtype, images):
    images, model = images.to(dtype), tiny_model(name).to(dtype)
    found, alone = [], []
    for layout in ("packed", "padded"):
        compress(model, coarse(layout=layout, similarity=0.5))
        with count_tokens(model) as count:
            found.append(answers(model, images))
        assert count.mean < 50
        alone.append(torch.cat([answers(model, image[None]) for image in images]))
    for one in (found[1], *alone):
        assert_near(found[0], one)


@pytest.mark.parametrize("setting", [coarse(), coarse(num_patches=40)], ids=["tolerance", "number"])
def test_a_batch_of_no_images_is_one_of_no_answers(setting, images):
    model = compress(tiny_model("blip-vision"), setting)
    assert answers(model, images[:0]).shape == answers(tiny_model("blip-vision"), images[:0]).shape == (0, 65, 32)


def test_a_number_of_tokens_that_similarity_changes_is_not_exported_and_says_why(images):
    model = compress(tiny_model("vit"), coarse(num_patches=40, similarity=0.5))
    with pytest.raises(ValueError, match=r"its own number of tokens.*'coarse' with num_patches and no similarity"):
        torch.export.export(model, (), {"pixel_values": images}, strict=False)


def test_a_model_in_float64_shows_halves_in_it(images):
    """Else the least change of a pixel, by which derivatives are checked, would be lost."""
    wide = images.double() + 1e-12
    assert halve(wide).dtype == torch.float64 and halve(images).dtype == torch.float32
    assert (halve(wide) - halve(images.double())).sub(1e-12).abs().max() < 1e-14


def test_images_of_another_number_of_channels_are_refused_as_by_the_plain_model():
    model = compress(tiny_model("vit"), coarse())
    with pytest.raises(ValueError, match="channel dimension"):
        model(pixel_values=torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize("name", ["vit", "siglip2-vision"])
def test_a_hook_that_changes_images_once_blocks_are_chosen_is_refused_until_it_runs_first(name, images):
    model = compress(tiny_model(name), coarse())
    given = inputs(model, images)
    with torch.no_grad():
        expected = model(**given | {"pixel_values": given["pixel_values"] / 4})[0]
    embeddings = find_tower(model, family_of(model)).embeddings
    embeddings.register_forward_pre_hook(lambda module, args: (args[0] / 4, *args[1:]))
    with pytest.raises(ValueError, match=r"the embeddings got other images .* so that it runs first"):
        answers(model, images)
    compress(model, model.config.vwt)
    with torch.no_grad():
        assert torch.equal(model(**given)[0], expected)


def test_a_hook_that_gives_embeddings_fewer_images_than_blocks_are_of_is_refused(images):
    model = compress(tiny_model("vit"), coarse())
    model.embeddings.register_forward_pre_hook(lambda module, args: (args[0][:2], *args[1:]))
    with pytest.raises(ValueError, match=r"the embeddings got other images \(2, .*gave them \(4, "):
        answers(model, images)


def test_a_hook_may_copy_images_and_change_their_data_type(images):
    images[3, 0, 0, 0] = torch.nan
    model = compress(tiny_model("vit").double(), coarse())
    expected = answers(model, images.double())
    model.embeddings.register_forward_pre_hook(lambda module, args: (args[0].double().clone(), *args[1:]))
    for given in (images.double(), images):
        torch.testing.assert_close(answers(model, given)[:3], expected[:3], atol=1e-5, rtol=1e-5)


def test_tokens_are_joined_after_some_layers_where_a_setting_says_so(images):
    plain, joined = coarse(num_patches=40), coarse(num_patches=40, join_ratio=0.25)
    model, counts = tiny_model("vit"), []
    for setting in (plain, joined, coarse(), coarse(similarity=0.5)):
        with count_tokens(compress(model, setting)) as count:
            answers(model, images)
        counts.append([tokens / 4 for tokens in count.by_layer])
    assert counts[:2] == [[41, 41], [41, 31]]
    assert counts[2][0] == counts[2][1] == counts[3][0] > counts[3][1]
    assert plain.even and joined.even and not coarse().even and not coarse(num_patches=40, similarity=0.5).even
    assert not coarse(tolerance=0).shortens and coarse(tolerance=0, similarity=0.5).shortens
    with pytest.raises(ValueError, match=r"layers is \(1,\), and neither similarity nor join_ratio says"):
        coarse(layers=[1])


def test_images_with_an_odd_grid_and_pixels_beyond_it_are_answered_as_alone():
    model = compress(tiny_model("dinov2"), coarse(tolerance=0.3))
    images = sample_pixel_values(3, 39, 28) * torch.tensor([0.1, 0.4, 1.0]).view(3, 1, 1, 1)
    found = forward(model, images)
    torch.testing.assert_close(found, torch.cat([forward(model, image[None]) for image in images]))
    plain = forward(tiny_model("dinov2"), images)
    assert found.shape == plain.shape
    assert torch.equal(found[2], plain[2]) or (found[2] - plain[2]).abs().max() < 1e-5
    assert (found[0] - plain[0]).abs().max() > 1e-3


def test_padded_patches_become_the_blocks_that_whole_images_become(images):
    """Images of 8 × 8, 6 × 8, 8 × 5 and 6 × 5 patches, as SigLIP 2 takes them."""
    given = padded_patches(images, 4)
    shapes = given["spatial_shapes"]
    assert len(shapes.unique(dim=0)) > 1
    padded = Patches.of_padded(given["pixel_values"], (4, 4), shapes)
    for setting in (coarse(), coarse(num_patches=20), VWTConfig(method="coarse", keep_ratio=0.4, image_std=HALF)):
        words, shown = setting.repainted(padded)
        _, seen = setting.repainted(padded, words, enlarged=True)
        for image, (rows, columns) in enumerate(shapes.tolist()):
            count = rows * columns
            one = whole(images[image : image + 1, :, : rows * 4, : columns * 4])
            expected, _ = setting.repainted(one)
            assert torch.equal(words[image, :count], expected[0])
            for enlarged, found in ((False, shown), (True, seen)):
                pixels = patchify(setting.repainted(one, expected, enlarged)[1], (4, 4))[0]
                by_channel = pixels.unflatten(1, (3, 16)).transpose(1, 2).flatten(1)
                torch.testing.assert_close(found[image, :count], by_channel)
        assert torch.equal(shown[~padded.real], padded.pixel_values[~padded.real])


def test_padded_images_go_by_words_as_by_the_number_that_found_them(images):
    model = compress(tiny_model("siglip2-vision"), coarse(num_patches=20))
    given, taken = inputs(model, images), watch_embeddings(model)
    with torch.no_grad():
        expected = model(**given).pooler_output
        words = taken[-1][1].patch_words(4, given["pixel_values"].shape[1])
        torch.testing.assert_close(model(**given, patch_words=words).pooler_output, expected)


@pytest.mark.parametrize("shapes", [[[1, 64], [64, 1]], [[8, 8], [1, 3]], [[5, 7], [2, 2]], [[3, 3], [2, 32]]])
def test_blocks_of_padded_patches_lie_within_their_image(shapes):
    places, real = padded_places(torch.tensor(shapes), 64)
    members = padded_blocks(places.long(), real)
    for image, (rows, columns) in enumerate(shapes):
        expected = [
            [row * columns + column + more for more in (0, 1, columns, columns + 1)]
            for row in range(0, rows - 1, 2)
            for column in range(0, columns - 1, 2)
        ]
        found = [four for four in members[image].tolist() if four[0] < 64]
        assert found == expected
        assert all(four == [64] * 4 for four in members[image].tolist()[len(found) :])
    patches = torch.randn(2, 64, 4 * 4 * 3)
    assert torch.equal(put_back(patches, cut_blocks(patches, members, (4, 4)), members), patches)


def test_a_mask_of_pixels_makes_blocks_of_real_patches_alone(images):
    """A caller's mask may leave out patches within an image; no block holds one of them."""
    model = compress(tiny_model("siglip2-vision"), coarse(tolerance=0.99))
    given = inputs(model, images)
    given["pixel_attention_mask"][:, 0] = 0
    taken = watch_embeddings(model)
    with torch.no_grad():
        model(**given)
    words = taken[-1][1].patch_words(4, 64)
    columns = given["spatial_shapes"][:, 1]
    for image in range(4):
        assert words[image, 0] == -1 and words[image, 1] == 1 and words[image, columns[image] + 1] == columns[image] + 1
    with torch.no_grad():
        expected = model(**given).pooler_output
        torch.testing.assert_close(model(**given, patch_words=words).pooler_output, expected)


def test_a_picture_shows_blocks_enlarged(images):
    setting, patches = coarse(num_patches=16), whole(images)
    shown = with_halves(images, halve(images), torch.ones(4, 4, 4, dtype=torch.bool), (4, 4), True)
    large = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(images, 2), scale_factor=2)
    torch.testing.assert_close(shown, large)
    torch.testing.assert_close(setting.seen(patches, setting.plan(patches)), patchify(large, (4, 4)))


def test_decode_shows_what_the_model_sees(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"method": "coarse", "num_patches": 16})
    values = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = processor([Image.fromarray(values.numpy())], return_tensors="pt")
    (picture,) = processor.decode(made["patch_words"], made)
    small = values.float().unflatten(1, (16, 2)).unflatten(0, (16, 2)).mean((1, 3))
    expected = small.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert (torch.from_numpy(np.asarray(picture).copy()) - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [((0, 1), "patch 0 .* the word 1;"), ((1, 0), "patch 1 .* the word 0;"), ((63, 62), "patch 63 .* the word 62;")],
)
def test_words_of_parts_of_blocks_are_refused(changed, said, images):
    model = compress(tiny_model("vit"), coarse())
    words = torch.arange(64).repeat(4, 1)
    words[0, changed[0]] = changed[1]
    with pytest.raises(ValueError, match=said + " expected its own index or, as all four of its block, that of"):
        answers(model, images, patch_words=words)
    even = compress(tiny_model("vit"), coarse(num_patches=40))
    words = torch.arange(64).repeat(4, 1)
    words[0, [0, 1, 8, 9]] = 0
    with pytest.raises(ValueError, match=r"keep 61 to 64 patches"):
        answers(even, images, patch_words=words)
    words[:, [0, 1, 8, 9]] = 0
    with count_tokens(even) as count:
        answers(even, images, patch_words=words)
    assert count.mean == 62


@pytest.mark.parametrize("name", ["vit", "siglip2-vision"])
def test_gradients_reach_every_pixel_of_a_block_and_the_projection(name, images):
    model = compress(tiny_model(name), coarse(num_patches=1)).train()
    given = inputs(model, images)
    given["pixel_values"].requires_grad_()
    model(**given)[0].square().sum().backward()
    gradient = given["pixel_values"].grad
    if name == "vit":  # all patches lie in blocks
        assert (gradient != 0).all()
    assert gradient.isfinite().all() and (gradient != 0).any()
    weight = next(value for key, value in model.named_parameters() if "patch_embedding" in key and "weight" in key)
    assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0


def test_by_number_a_plan_has_no_padding(images):
    model = compress(tiny_model("vit"), coarse(num_patches=40))
    taken = watch_embeddings(model)
    answers(model, images)
    plan = taken[-1][1]
    assert isinstance(plan, Grouped) and plan.layout.even and plan.shape == (4, 41)


def test_whole_numbers_are_averaged_as_exactly_as_floats(images):
    pixels = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    model = compress(tiny_model("clip-vision"), coarse(num_patches=16))
    assert torch.equal(answers(model, pixels), answers(model, pixels.float()))


def test_padded_patches_may_be_whole_numbers():
    model = compress(tiny_model("siglip2-vision"), coarse())
    floats = inputs(model, sample_images())
    floats["pixel_values"] = (floats["pixel_values"] * 50 + 128).round().clamp(0, 255)
    whole = floats | {"pixel_values": floats["pixel_values"].to(torch.uint8)}
    with torch.no_grad():
        assert torch.equal(model(**whole)[0], model(**floats)[0])
