"""The claims of test_families.py on shapes that no one here chose.

They are transformers' own: the default configs of every model type of the family table, cut to two layers, and the
configs that transformers tests its models with, which come with a source checkout of it and in no wheel. To run those:
`PYTHONPATH=path/to/transformers python -m pytest tests/test_transformers_shapes.py`.

On the newest transformers alone: test_families.py goes through every family on both ends, and test_real.py through
trained models.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import tempfile
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from settings import STATISTICS
from vwt_hf import VisualVocabulary, VWTConfig, compress, restore
from vwt_hf.families import FAMILIES, find_layers, find_tower

pytestmark = pytest.mark.newest

Answers = dict[str, torch.Tensor]


def default_cases() -> Iterator[Any]:
    """Family, model class, config and whether to try every setting, for the models of every model type."""
    for family in FAMILIES:
        for model_type in family.model_types:
            config_class = transformers.CONFIG_MAPPING[model_type]
            # A tower beside a text model gets one layer: it is tried by itself, too.
            parts = {part: {"num_hidden_layers": 1, "vocab_size": 99} for part in config_class.sub_configs}
            config = config_class(**(parts or {"num_hidden_layers": 2}))
            # AutoModel does not know every tower; they are named as their configs are.
            named = config_class.__name__.removesuffix("Config") + "Model"
            base = MODEL_MAPPING.get(config_class, None) or getattr(transformers, named)
            heads = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(config_class, ())
            for model_class in (base, *(heads if isinstance(heads, tuple) else (heads,))):
                every = model_class is base and not parts
                yield pytest.param((family, model_class, config, every), id=f"default-{model_class.__name__}")


def checkout_cases() -> Iterator[Any]:
    """The same for the models that transformers' own tests go through, as far as they read images alone."""
    for family in FAMILIES:
        config_module = transformers.CONFIG_MAPPING[family.model_types[0]].__mro__[1].__module__
        name = "tests" + config_module.removeprefix("transformers").replace(".configuration_", ".test_modeling_")
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a checkout of another version may stumble on anything
            reason = f"needs a transformers checkout on PYTHONPATH; importing {name}: {error!r}"
            yield pytest.param(None, id=f"checkout-{family.name}", marks=pytest.mark.skip(reason=reason))
            continue
        for test_class in vars(module).values():
            if not (inspect.isclass(test_class) and issubclass(test_class, unittest.TestCase)):
                continue
            for model_class in getattr(test_class, "all_model_classes", ()):
                of_family = model_class.config_class.model_type in family.model_types
                refused = model_class.__name__ in family.predicts_masked or model_class.__name__.endswith("Backbone")
                reads_text = "input_ids" in inspect.signature(model_class.forward).parameters
                if of_family and not refused and (not reads_text or hasattr(model_class, "get_image_features")):
                    test = test_class("setUp")
                    test.setUp()
                    config, _ = test.model_tester.prepare_config_and_inputs_for_common()
                    yield pytest.param((family, model_class, config, True), id=f"checkout-{model_class.__name__}")


@dataclasses.dataclass
class Subject:
    model: transformers.PreTrainedModel
    patch_size: int
    settings: dict[str, VWTConfig]
    images: torch.Tensor
    """White, a quarter noise, half noise: tokens of three numbers."""
    plain: Answers = dataclasses.field(default_factory=dict)
    """What the plain model answers about the last image."""
    plain_tokens: int = 0
    """How many its first layer was given for it."""
    tokens: int = 0
    """How many its first layer was given last."""

    def answers(self, images: torch.Tensor, model: Any = None) -> Answers:
        """All tensors that the model gives out; of one that reads texts, too, those about images."""
        call = getattr(model or self.model, "get_image_features", model or self.model)
        accepted = inspect.signature(getattr(call, "forward", call)).parameters
        rows = images.shape[-1] // self.patch_size
        inputs = {"pixel_values": images}
        if "spatial_shapes" in accepted:  # SigLIP 2, whose image processor cuts the patches
            cut = images.unflatten(-1, (rows, -1)).unflatten(-3, (rows, -1)).permute(0, 2, 4, 3, 5, 1)
            inputs["pixel_values"] = cut.flatten(3).flatten(1, 2)
            inputs["pixel_attention_mask"] = torch.ones(len(images), rows * rows, dtype=torch.long)
            inputs["spatial_shapes"] = torch.tensor([[rows, rows]] * len(images))
        if "noise" in accepted:  # ViT-MAE, which shuffles patches by it: into the order they have
            inputs["noise"] = torch.arange(rows * rows, dtype=torch.float32).expand(len(images), -1)
        with torch.no_grad():
            return {name: value for name, value in call(**inputs).items() if isinstance(value, torch.Tensor)}

    def need_every_setting(self) -> None:
        if len(self.settings) == 1:
            pytest.skip("takes its time, and is tried on the tower alone, or on a model like it with fewer patches")


@pytest.fixture(scope="module", params=[*default_cases(), *checkout_cases()])
def subject(request: pytest.FixtureRequest) -> Subject:
    family, model_class, config, every = request.param
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "mask_ratio"):
        vision.mask_ratio = 0.0  # ViT-MAE's drops patches at random
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as in tiny.py
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    channels, patch = getattr(vision, "num_channels", 3), vision.patch_size
    side = getattr(vision, "image_size", None) or int(vision.num_patches**0.5) * patch
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, channels, side, side, generator=generator)
    images[0] = 1.3
    for image, rows in ((images[1], side * 3 // 4), (images[2], side // 2)):
        image[:, :rows] = image[:, :rows] * 0.25 + 0.7
    words = VisualVocabulary(torch.rand(20, channels, patch, patch, generator=generator.manual_seed(0)))
    inter = {name: values[:channels] for name, values in STATISTICS.items()}
    inter |= {"method": "inter", "vocabulary": words, "threshold": 0.3}
    settings = {"packed": VWTConfig(**inter, layout="packed")}
    # OWLv2's 2304 patches take seconds each time; OWL-ViT is the same code.
    if every and (side // patch) ** 2 < 1000:
        settings |= {"padded": VWTConfig(**inter, layout="padded"), "merge": VWTConfig(dropped="merge")}
        settings |= {} if model_class.__name__ in family.needs_every_patch else {"discard": VWTConfig()}
    subject = Subject(model, patch, settings, images)

    def count(layer: Any, args: Any, kwargs: Any) -> None:
        subject.tokens = (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()

    layers = find_layers(find_tower(model, family).module)
    layers[0].register_forward_pre_hook(count, with_kwargs=True)
    subject.plain = subject.answers(images[2:])
    subject.plain_tokens = subject.tokens
    return subject


def joined(alone: list[Answers]) -> Answers:
    return {name: torch.cat([answer[name] for answer in alone]) for name in alone[0]}


def close(found: Answers, expected: Answers, setting: str, near: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        atol = near * max(1.0, float(values.abs().max()))  # rounding is of the size of the largest: AIMv2's are 80
        torch.testing.assert_close(
            found[name], values, atol=atol, rtol=0, msg=lambda text, name=name: f"{setting}, {name}: {text}"
        )


def test_keeping_every_patch_answers_as_the_plain_model(subject):
    subject.need_every_setting()
    for name, near in (("merge", 1e-5), ("discard", 0)):
        if name in subject.settings:
            compress(subject.model, dataclasses.replace(subject.settings[name], keep_ratio=1.0))
            close(subject.answers(subject.images[2:]), subject.plain, name, near)


def test_a_batch_answers_as_its_images_do_alone_in_either_layout_and_unlike_the_plain_model(subject):
    found: dict[str, Answers] = {}
    for name, setting in subject.settings.items():
        compress(subject.model, setting)
        found[name] = subject.answers(subject.images)
        assert subject.tokens < 3 * subject.plain_tokens
        if name == "padded":
            alone = found["packed"]
        else:
            alone = joined([subject.answers(image[None]) for image in subject.images])
            assert subject.tokens < subject.plain_tokens
        close(found[name], alone, name, 2e-5)
        key = next(iter(alone))
        plain, last = subject.plain[key], found[name][key][2:]
        assert last.shape != plain.shape or (last - plain).abs().max() > 1e-4


def test_in_half_precision_a_batch_answers_as_its_images_do_alone(subject):
    subject.need_every_setting()
    model, images = copy.deepcopy(restore(subject.model)).bfloat16(), subject.images[:2].bfloat16()
    compress(model, subject.settings["packed"])
    alone = joined([subject.answers(image[None], model) for image in images])
    close(subject.answers(images, model), alone, "packed", 4e-2)


def test_a_saved_model_answers_the_same_when_loaded(subject):
    model = compress(subject.model, subject.settings["packed"])
    expected = subject.answers(subject.images[:2])
    with tempfile.TemporaryDirectory() as folder:  # a hundred MB, which pytest would keep
        model.save_pretrained(folder)
        loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    close(subject.answers(subject.images[:2], loaded), expected, "packed", 1e-5)


def test_restore_gives_the_exact_plain_model_back(subject):
    for setting in reversed(subject.settings.values()):
        compress(subject.model, setting)
    subject.answers(subject.images[:1])
    found = subject.answers(subject.images[2:], restore(subject.model))
    close(found, subject.plain, "restored", 0)
