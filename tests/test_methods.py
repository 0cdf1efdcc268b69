"""A method is one class: methods of these tests' own go through every family without a change in the package."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from test_families import BACKBONES, NEAR, sample_images
from tiny import MODELS, answers, inputs, padded_patches, tiny_model, traces, watch_embeddings
from vwt_hf import VWTConfig, compress, restore
from vwt_hf.families import family_of
from vwt_hf.methods import METHODS
from vwt_hf.patches import Patches
from vwt_hf.plans import Grouped, Kept
from vwt_hf.words import gather_patches

# Both ends have the same seam, which test_families.py and test_given.py prove on either.
pytestmark = pytest.mark.newest


@dataclasses.dataclass(frozen=True, repr=False)
class EveryOther(VWTConfig):
    """Keeps the first of every `step` patches."""

    method: str = "every-other"
    step: int = 2

    @property
    def groups(self) -> bool:
        return False

    @property
    def shortens(self) -> bool:
        return self.step > 1

    def plan(self, patches: Patches) -> Kept | Grouped | None:
        return patches.keep(torch.arange(0, patches.count, self.step, device=patches.device).unsqueeze(0))


@dataclasses.dataclass(frozen=True, repr=False)
class Pairs(VWTConfig):
    """Has one token stand for two neighbours, which is their mean or the first of them."""

    method: str = "pairs"
    by: str = "mean"

    @property
    def groups(self) -> bool:
        return True

    def plan(self, patches: Patches) -> Grouped:
        pairs = (torch.arange(patches.count, device=patches.device) // 2).expand(len(patches.pixel_values), -1)
        if self.by == "mean":
            return patches.group(pairs, patches.packs and not patches.draws, self.size_exponent)
        firsts = torch.arange(0, patches.count, 2, device=patches.device).unsqueeze(0)
        return patches.represent(pairs, firsts, None, self.size_exponent)


@pytest.fixture
def images() -> torch.Tensor:
    """White, noise, nearly flat and half flat."""
    return sample_images()


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "every-other", EveryOther)
    monkeypatch.setitem(METHODS, "pairs", Pairs)


FIELDS = {
    "every-other": {"method": "every-other", "step": 2},
    "mean": {"method": "pairs", "by": "mean"},
    "first": {"method": "pairs", "by": "first"},
}
toy = pytest.mark.parametrize("fields", list(FIELDS.values()), ids=list(FIELDS))
every = pytest.mark.parametrize("name", list(MODELS))


@toy
@every
def test_a_batch_answers_as_its_images_do_alone_and_unlike_the_plain_model(name, fields, images):
    for dtype, near in NEAR.items():
        model, images = tiny_model(name).to(dtype), images.to(dtype)
        plain = answers(model, images)
        found = answers(compress(model, fields), images)
        alone = torch.cat([answers(model, image[None]) for image in images])
        torch.testing.assert_close(found, alone, atol=near, rtol=near)
        assert found.shape != plain.shape or (found - plain).abs().max() > 1e-4


@toy
@every
def test_a_model_is_loaded_with_the_fields_of_its_method_plain_where_asked_and_restored(
    name,
    fields,
    images,
    tmp_path,
):
    model = tiny_model(name)
    plain, before = answers(model, images), traces(model)
    expected = answers(compress(model, fields), images)
    model.save_pretrained(tmp_path)
    own = {"output": None, "proportional_attention": True}
    assert json.loads((tmp_path / "config.json").read_text())["vwt"] == fields | own
    loaded = type(model).from_pretrained(tmp_path)
    assert VWTConfig.parse(loaded.config.vwt) == VWTConfig(**fields)
    torch.testing.assert_close(answers(loaded, images), expected)
    torch.testing.assert_close(answers(type(model).from_pretrained(tmp_path, vwt=False), images), plain)
    restore(model)
    assert torch.equal(answers(model, images), plain) and traces(model) == before


@every
def test_a_setting_that_shortens_nothing_is_the_plain_model(name, images):
    model = tiny_model(name)
    plain = answers(model, images)
    assert torch.equal(answers(compress(model, {"method": "every-other", "step": 1}), images), plain)


@pytest.mark.parametrize("name", [name for name in BACKBONES if family_of(tiny_model(name)).padded is None])
def test_tokens_are_what_the_plan_says(name, images):
    """Of what the plain model's embeddings give."""
    model = tiny_model(name)
    taken = watch_embeddings(model)
    answers(model, images)
    whole = taken[0][0]
    prefix = whole.shape[1] - 64
    patches = whole[:, prefix:]
    for kind, expected in (
        ("every-other", patches[:, ::2]),
        ("first", patches[:, ::2]),
        ("mean", patches.unflatten(1, (32, 2)).mean(2)),
    ):
        model = compress(tiny_model(name), FIELDS[kind])
        taken = watch_embeddings(model)
        answers(model, images)
        tokens = taken[0][0].reshape(4, prefix + 32, -1)
        torch.testing.assert_close(tokens[:, :prefix], whole[:, :prefix])
        torch.testing.assert_close(tokens[:, prefix:], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        (FIELDS["every-other"], [15, 32, 15, 32]),
        (FIELDS["mean"], [15, 32, 15, 32]),
        (FIELDS["first"], [15, 32, 15, 32]),
        (FIELDS["first"] | {"output": "compressed"}, [15, 32, 15, 32]),
    ],
    ids=["every-other", "mean", "first", "first compressed"],
)
def test_padding_never_enters(fields, lengths, images):
    """An image of 6 × 5 patches among 64 answers as it does without padding, whatever stands in the padding."""
    model = compress(tiny_model("siglip2-vision"), fields)
    padded = padded_patches(images, 4)
    assert padded["spatial_shapes"].tolist() == [[6, 5], [8, 8], [6, 5], [8, 8]]
    taken = watch_embeddings(model)
    with torch.no_grad():
        found = model(**padded).pooler_output
        sizes = taken[0][1].layout.sizes
        if len(sizes) == len(images):
            assert (sizes > 0).sum(1).tolist() == lengths
        else:
            assert int((sizes > 0).sum()) == sum(lengths)
        alone = model(**{name: values[2:3, :30] for name, values in padded.items()}).pooler_output
        torch.testing.assert_close(found[2:3], alone, atol=1e-5, rtol=1e-5)
        noise = padded["pixel_values"].clone()
        noise[[0, 2], 30:] = torch.randn(2, 34, 48)
        torch.testing.assert_close(model(**padded | {"pixel_values": noise}).pooler_output, found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["variance", "grid", "random"])
def test_of_padded_patches_as_many_stay_as_a_number_says_or_an_image_has(criterion, images):
    model = compress(tiny_model("siglip2-vision"), {"num_patches": 40, "keep_ratio": 0.1, "criterion": criterion})
    taken = watch_embeddings(model)
    answers(model, images)
    assert (taken[0][1].layout.sizes > 0).sum(1).tolist() == [30, 40, 30, 40]


def test_a_masked_autoencoder_says_which_patches_were_dropped(images):
    given = inputs(tiny_model("vit-mae"), images)
    output = compress(tiny_model("vit-mae"), FIELDS["every-other"])(**given)
    assert output.mask.tolist() == [[0, 1] * 32] * 4
    both = torch.cat((output.last_hidden_state[:, 1:], torch.full((4, 32, 32), torch.nan)), dim=1)
    assert torch.equal(gather_patches(both, output.ids_restore)[:, ::2], output.last_hidden_state[:, 1:])
    for kind in ("mean", "first"):
        output = compress(tiny_model("vit-mae"), FIELDS[kind])(**given)
        assert not output.mask.any() and torch.equal(output.ids_restore, torch.arange(64).expand(4, -1))


@pytest.mark.parametrize("kind", ["every-other", "first"])
def test_an_exported_program_answers_as_the_model(kind, images):
    model = compress(tiny_model("vit"), FIELDS[kind])
    program = torch.export.export(model, (images,), strict=False).module()
    torch.testing.assert_close(program(images.flip(0))[0], model(images.flip(0))[0])


def test_a_field_of_another_method_is_told_whose_it_is():
    with pytest.raises(ValueError, match="step is 3, but method is 'pairs'; the field belongs to method='every-other'"):
        VWTConfig(method="pairs", step=3)


def test_a_setting_as_text_is_no_vocabulary():
    with pytest.raises(ValueError, match=r"a text; give the dict itself, as vwt=\{'keep_ratio': 0\.5\}"):
        VWTConfig.parse('{"keep_ratio": 0.25}')


def test_of_several_wrong_fields_the_first_is_named():
    for names in (("one", "two"), ("two", "one")):
        with pytest.raises(ValueError, match=f"no field '{names[0]}'"):
            VWTConfig(**dict.fromkeys(names, 1))


def test_numbers_of_numpy_are_numbers():
    setting = VWTConfig(
        "gradual",
        num_patches=np.int64(40),
        similarity=[np.float32(0.5), 0.5],
        layers=np.arange(5, 7),
        image_std=np.ones(3),
    )
    assert (
        json.loads(json.dumps(setting.to_dict()))
        == VWTConfig("gradual", num_patches=40, similarity=[0.5, 0.5], layers=[5, 6], image_std=[1.0] * 3).to_dict()
    )
    assert VWTConfig(keep_ratio=np.float64(0.5)) == VWTConfig()
    assert VWTConfig.parse(np.True_) == VWTConfig.parse(True) and VWTConfig.parse(np.False_) is None
    with pytest.raises(ValueError, match=r"tolerance is 2\.0"):
        VWTConfig("local", tolerance=np.float32(2))


@pytest.mark.parametrize("criterion", ["variance", "random", "grid"])
def test_of_a_padded_image_at_least_one_patch_stays(criterion):
    """Of the second, of two patches, a fifth would be none."""
    shapes = torch.tensor([[2, 3], [1, 2]])
    pixels = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))
    plan = VWTConfig(keep_ratio=0.2, criterion=criterion).plan(Patches.of_padded(pixels, (2, 2), shapes))
    assert plan.stays.tolist() == [[True], [True]]


@pytest.mark.parametrize("name", ["local", "true", "{words}"])
def test_a_folder_of_words_may_have_a_name_that_means_something_else(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="vwt is "):
        VWTConfig.parse(name)
    (tmp_path / name).mkdir()
    assert VWTConfig.parse(name).vocabulary == name


def test_an_empty_text_names_no_vocabulary_and_an_empty_list_is_of_no_channels():
    with pytest.raises(TypeError, match="vwt is ''; expected True, False, None"):
        VWTConfig.parse("")
    with pytest.raises(ValueError, match=r"image_std is \[\]; expected None or positive numbers, one for each channel"):
        VWTConfig("local", image_std=[])
