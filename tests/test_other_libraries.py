"""Beside other libraries: PEFT, Trainer, accelerate, quantization, export."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from settings import SETTINGS, coarse, fixed, gradual, local
from tiny import MODELS, answers, forward, inputs, sample_pixel_values, tiny_model
from vwt_hf import VWTConfig, compress, count_tokens, restore
from vwt_hf.families import FAMILIES, family_of, find_layers, find_tower
from vwt_hf.forward import current_forward, words_are_given


def family_name(model_class: type[transformers.PreTrainedModel]) -> str:
    return next(row.name for row in FAMILIES if model_class.config_class.model_type in row.model_types)


def one_of_each_family() -> list[str]:
    """The first model of each family that sees images alone."""
    found: dict[str, str] = {}
    for name, (model_class, _) in MODELS.items():
        family = family_name(model_class)
        if "text_config" not in model_class.config_class.sub_configs:
            found.setdefault(family, name)
    return list(found.values())


ONE_OF_EACH = one_of_each_family()
# Merging goes through all that families differ in; what settings differ in is the same for all of them.
PAIRS = [(name, kind) for name in ONE_OF_EACH for kind in SETTINGS if kind == "merge" or name == "vit"]
setting = pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))
pairs = pytest.mark.parametrize(("name", "kind"), PAIRS)
# SigLIP 2's plain embeddings read a weight where an offloaded one is not, and take 8 bits for the dtype of patches.
pairs_by_call = pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[0] != "siglip2-vision"])


def sample_images(batch: int = 4) -> torch.Tensor:
    """Noise, which is near to no word, with flat parts, which words group: more in each image than in the last."""
    images = sample_pixel_values(batch)
    for index, image in enumerate(images):
        image[:, : 8 * index] = 0.7
    return images


def differ(found: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether `found` are not the answers of the plain model, not even those of its weights in 8 bits."""
    return found.shape != plain.shape or bool((found - plain).abs().max() > 0.3)


def test_a_model_of_every_family_is_here():
    assert len(ONE_OF_EACH) == len(FAMILIES)


@setting
def test_lora_trains_saves_and_loads_on_a_compressed_model(setting, tmp_path):
    peft = pytest.importorskip("peft")
    images, labels = sample_images(), torch.tensor([0, 1, 0, 1])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    torch.manual_seed(0)
    model = peft.get_peft_model(compress(tiny_model("vit-classifier"), setting), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert any("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    expected = answers(model.eval(), images)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(compress(tiny_model("vit-classifier"), setting), tmp_path).eval()
    torch.testing.assert_close(answers(loaded, images), expected)


@setting
@pytest.mark.parametrize(("name", "projection"), [("siglip2-vision", "patch_embedding"), ("vit", "projection")])
def test_lora_reaches_the_projection_of_patches(name, projection, setting):
    peft = pytest.importorskip("peft")
    model = compress(tiny_model(name), setting)
    given = inputs(model, sample_images())
    with torch.no_grad():
        expected = model(**given)[0]
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[projection]))
        torch.testing.assert_close(adapted(**given)[0], expected)
        compress(model, setting)
        torch.testing.assert_close(adapted(**given)[0], expected)


@setting
def test_trainer_trains_and_evaluates_a_compressed_model(setting, tmp_path):
    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"pixel_values": sample_images(6)[index], "labels": torch.tensor(index % 2)}

    model = compress(tiny_model("vit-classifier"), setting)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=3, per_device_eval_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())
    assert trainer.train().training_loss > 0
    measured = trainer.evaluate()["eval_loss"]
    batch = torch.utils.data.default_collate([Images()[index] for index in range(6)])
    with torch.no_grad():
        assert measured == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-4)
    trainer.save_model(tmp_path / "saved")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(answers(loaded, batch["pixel_values"]), answers(model, batch["pixel_values"]))


@pytest.mark.parametrize("placement", ["auto", "split", "disk"])
@pairs_by_call
def test_device_map_places_a_model_that_answers_saves_and_is_restored_as_in_memory(name, kind, placement, tmp_path):
    # Without SigLIP's head, whose torch attention reads weights that are elsewhere in the plain model, too.
    model, images = tiny_model(name, vision_use_head=False), sample_images()
    plain = answers(model, images)
    model.save_pretrained(tmp_path / "plain")
    load = functools.partial(type(model).from_pretrained, tmp_path / "plain", vwt=SETTINGS[kind])
    expected = answers(load(), images)
    assert differ(expected, plain)
    where = {
        "auto": {"device_map": "auto"},
        "split": {"device_map": "auto", "max_memory": {"cpu": sum(p.nbytes for p in model.parameters()) * 6 // 10}},
        "disk": {"device_map": {"": "disk"}},
    }
    loaded = load(**where[placement], offload_folder=tmp_path / "offloaded")
    offloaded = [parameter.is_meta for parameter in loaded.parameters()]
    assert (any(offloaded), all(offloaded)) == (placement != "auto", placement == "disk")
    images = images.to(loaded.device if placement == "auto" else "cpu")
    torch.testing.assert_close(answers(loaded, images).cpu(), expected)
    loaded.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(answers(type(model).from_pretrained(tmp_path / "saved"), images.cpu()), expected)
    torch.testing.assert_close(answers(restore(loaded), images).cpu(), plain)


@pairs_by_call
def test_a_model_is_compressed_and_restored_while_its_weights_are_offloaded(name, kind):
    model, images = tiny_model(name, vision_use_head=False), sample_images()
    plain = answers(model, images)
    expected = answers(compress(tiny_model(name, vision_use_head=False), SETTINGS[kind]), images)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):  # accelerate wraps the methods of a compressed model otherwise
        torch.testing.assert_close(answers(compress(model, SETTINGS[kind]), images), expected)
    torch.testing.assert_close(answers(restore(model), images), plain)


@pytest.mark.parametrize("again", [compress, lambda model, kind: compress(restore(model), kind)])
def test_a_second_setting_keeps_what_fetches_the_weights(again):
    """A weight that the whole reads itself, as `logit_scale`, is fetched by accelerate's forward of the whole."""
    model = compress(tiny_model("clip"), SETTINGS["discard"])
    images = sample_images()
    expected = answers(model, images)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(answers(model, images), expected)
    torch.testing.assert_close(answers(again(model, SETTINGS["discard"]), images), expected)


@setting
def test_linear_layers_in_8_bits_answer_nearly_as_in_32(setting):
    quantization = pytest.importorskip("torch.ao.quantization")
    model = compress(tiny_model("dinov2-classifier"), setting)
    images = sample_images()
    expected = answers(model, images)
    small = quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in small.modules())
    torch.testing.assert_close(answers(small, images), expected, atol=0.05, rtol=0.05)


def torchao_config() -> transformers.TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes_config() -> transformers.BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def require_answers_in_8_bits(model: transformers.PreTrainedModel, images: torch.Tensor, whole: torch.Tensor) -> None:
    """Asserts that weights are in 8 bits, and that answers are near to those, `whole`, of weights in 32."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    # Both libraries leave torch's own attention, which SigLIP's head is, as it is.
    weights = [module.weight for module in linear if not isinstance(module, NonDynamicallyQuantizableLinear)]
    # torchao's tensors say float32 and hold `qdata`.
    assert {getattr(weight, "qdata", weight).dtype for weight in weights} == {torch.int8}
    found = answers(model, images)
    torch.testing.assert_close(found, whole, atol=0.1, rtol=0)
    torch.testing.assert_close(found, torch.cat([answers(model, image[None]) for image in images]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [torchao_config, bitsandbytes_config])
@pairs_by_call
def test_a_model_loaded_in_8_bits_answers_nearly_as_in_32_saves_and_is_restored(name, kind, config, tmp_path):
    model, images = tiny_model(name), sample_images()
    plain = answers(model, images)
    model.save_pretrained(tmp_path / "plain")
    load = functools.partial(type(model).from_pretrained, device_map="cpu")
    loaded = load(tmp_path / "plain", vwt=SETTINGS[kind], quantization_config=config())
    expected = answers(compress(model, SETTINGS[kind]), images)
    assert differ(expected, plain)
    require_answers_in_8_bits(loaded, images, expected)
    loaded.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(answers(load(tmp_path / "saved"), images), answers(loaded, images))
    require_answers_in_8_bits(restore(loaded), images, plain)


@pairs
def test_torchao_quantizes_a_compressed_model(name, kind):
    quantization = pytest.importorskip("torchao.quantization")
    model, images = tiny_model(name), sample_images()
    plain = answers(model, images)
    expected = answers(compress(model, SETTINGS[kind]), images)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    require_answers_in_8_bits(model, images, expected)
    require_answers_in_8_bits(restore(model), images, plain)


class Answers(torch.nn.Module):
    """The first output of each of some models, as what is exported."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(models).eval()

    def forward(self, **given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(model(**given)[0] for model in self.models)


class FirstOutput(torch.nn.Module):
    """The first output of a model about images, as what is traced."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values)[0]


def two_batches(model: transformers.PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """In the second one other patches stay."""
    return [inputs(model, images) for images in (sample_images(), sample_images().flip(0))]


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


# Heads differ in what discarding leaves them to read.
DISCARDS = ("vit-classifier", "beit-classifier", "clip", "siglip-classifier", "siglip2-vision")


# One of each other family is exported for batches of any size, below.
@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "merge") for name in MODELS if name not in ONE_OF_EACH or name == "siglip2-vision"),
        *((name, "discard") for name in DISCARDS),
    ],
)
def test_an_exported_program_answers_as_the_model_when_saved_and_loaded(name, kind):
    layers = 2 if name in ("vit-classifier", "beit-pretrained") else 1
    model = compress(tiny_model(name, num_hidden_layers=layers), SETTINGS[kind])
    batches = two_batches(model)
    program = saved_and_loaded(torch.export.export(Answers(model), (), batches[0], strict=False))
    for batch in batches:
        torch.testing.assert_close(program(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("criterion", ["random", "grid"])
@pytest.mark.parametrize("dropped", ["discard", "merge"])
def test_an_exported_program_keeps_the_same_patches_of_all_images(dropped, criterion):
    model = compress(tiny_model("dinov2"), VWTConfig(dropped=dropped, criterion=criterion, seed=5))
    batches = two_batches(model)
    program = saved_and_loaded(torch.export.export(Answers(model), (), batches[0], strict=False))
    for batch in batches:
        torch.testing.assert_close(program(**batch)[0], model(**batch)[0])


POSITIONS = ("vit", "dinov3", "beit")
"""A model of each kind of positions: absolute, rotary and relative."""
EVEN = {"merge": SETTINGS["merge"], "discard": SETTINGS["discard"], "fixed": fixed(), "coarse": coarse(num_patches=40)}
"""One of each kind of setting that an exported program can hold."""
SEVERAL = {
    "vit": tuple(EVEN),
    "dinov3": ("merge", "discard", "fixed"),
    "beit": ("merge", "discard", "fixed"),
    "vit-mae": ("merge", "discard"),
}
"""Kinds of settings that reach what is a family's own, beside merging: its positions, its mask."""


def exported_models(name: str) -> list[transformers.PreTrainedModel]:
    kinds = SEVERAL.get(name, ("merge",))
    return [compress(tiny_model(name, num_hidden_layers=1 + (kind == "fixed")), EVEN[kind]) for kind in kinds]


# How SigLIP 2 resizes its positions is for one number of images in transformers 5.17, in plain models, too.
@pytest.mark.parametrize(
    "name",
    [
        name if name in POSITIONS else pytest.param(name, marks=pytest.mark.newest)
        for name in ONE_OF_EACH
        if name != "siglip2-vision"
    ],
)
def test_an_exported_program_takes_batches_of_any_size(name):
    families = [family_name(model_class) for model_class, _ in MODELS.values()]
    for model in exported_models(name):
        given, batch = inputs(model, sample_images()), torch.export.Dim("batch")
        shapes = {key: {0: batch} for key in given}
        exported = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
        # Others are saved and loaded above, as other models of their family.
        saved = name == "vit" or families.count(family_name(MODELS[name][0])) == 1
        program = saved_and_loaded(exported) if saved else exported.module()
        for images in (sample_images(7), sample_images()[2:3]):
            given = inputs(model, images)
            torch.testing.assert_close(program(**given)[0], model(**given)[0])


APART = (*POSITIONS, "vit-mae", "siglip2-vision")
OTHERS = [name for name in ONE_OF_EACH if name not in APART]


# Torch exports the check of sizes in SigLIP 2's plain embeddings to ONNX no more than in compressed ones.
# Without gradients: with them torch takes sdpa with a relative position bias apart into views that it cannot have.
@pytest.mark.newest
@torch.no_grad()
@pytest.mark.parametrize(
    "names", [*((name,) for name in APART[:-1]), OTHERS[::3], OTHERS[1::3], OTHERS[2::3]], ids=" ".join
)
def test_onnx_answers_as_torch(names, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    # Several in one program: the half of what a conversion takes does not depend on how much there is to convert.
    models = [model for name in names for model in exported_models(name)]
    batches = two_batches(models[0])
    torch.onnx.export(
        Answers(*models), (), tmp_path / "model.onnx", kwargs=batches[0], dynamo=True, verbose=False, optimize=False
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in batches:
        found = session.run(None, {taken.name: batch[taken.name].numpy() for taken in session.get_inputs()})
        for one, model in zip(found, models, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(one),
                model(**batch)[0],
                atol=1e-4,
                rtol=1e-4,
                msg=lambda text, model=model: f"{type(model).__name__}: {text}",
            )


def test_all_that_a_masked_autoencoder_gives_out_is_exported_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = compress(tiny_model("vit-mae", num_hidden_layers=1), SETTINGS["discard"])
    given, other = two_batches(model)
    torch.onnx.export(model, (), tmp_path / "model.onnx", kwargs=given, dynamo=True, verbose=False, optimize=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {taken.name: other[taken.name].numpy() for taken in session.get_inputs()})
    for one, expected in zip(found, model(**other).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit"])
@pytest.mark.parametrize(
    "setting", [fixed(), coarse(num_patches=40), local(num_patches=30), SETTINGS["merge"], SETTINGS["discard"]]
)
def test_what_has_the_same_number_of_tokens_of_every_image_can_be_traced(name, setting):
    """With any number of images, for any number: of one, too, as is usual."""
    model = FirstOutput(compress(tiny_model(name), setting))
    for taken in (1, len(sample_images())):
        traced = torch.jit.trace(model, sample_images()[-taken:])
        for images in (sample_images(), sample_images().flip(0)[:3], sample_images()[:1]):
            torch.testing.assert_close(traced(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"pre_dispatch": True}], ids=str)
@pytest.mark.parametrize("kind", ["local", "inter"])
def test_what_make_fx_records_is_no_batch_of_images_with_their_own_numbers_of_tokens(kind, how):
    model = compress(tiny_model("vit"), SETTINGS[kind])
    with torch.no_grad():
        expected = model(sample_images())[0]
        with pytest.raises(ValueError, match="an exported or traced program cannot hold"):
            make_fx(lambda images: model(images)[0], **how)(sample_images())
        assert torch.equal(model(sample_images())[0], expected)
        even = compress(tiny_model("vit"), SETTINGS["discard"])
        recorded = make_fx(lambda images: even(images)[0], **how)(sample_images())
        torch.testing.assert_close(recorded(sample_images().flip(0)), even(sample_images().flip(0))[0])


def test_words_are_not_exported_or_traced_and_say_why():
    model = compress(tiny_model("vit"), SETTINGS["inter"])
    for kind in ("export", "trace"):
        with pytest.raises(ValueError, match=r"its own number of tokens.*method='intra'"):
            if kind == "export":
                torch.export.export(model, (), {"pixel_values": sample_images()}, strict=False)
            else:
                torch.jit.trace(FirstOutput(model), sample_images())
    fresh = compress(tiny_model("vit"), SETTINGS["inter"])
    assert torch.equal(answers(model, sample_images()), answers(fresh, sample_images()))


@pytest.mark.parametrize("setting", [{"method": "given"}, SETTINGS["discard"], SETTINGS["merge"], fixed()])
def test_words_of_a_caller_are_no_input_of_a_program_and_leave_nothing_behind(setting):
    model = compress(tiny_model("vit"), setting)
    given = {"pixel_values": sample_images(), "patch_words": torch.arange(64).expand(len(sample_images()), -1)}
    for record in (
        lambda: torch.jit.trace(lambda images, words: model(images, patch_words=words)[0], (*given.values(),)),
        lambda: torch.export.export(model, (), given, strict=False),
    ):
        with pytest.raises(ValueError, match="patch_words were given to a model that is exported or traced"):
            record()
        assert not words_are_given() and current_forward() is None


@pytest.mark.parametrize("kind", [None, *SETTINGS])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_layers_above_frozen_embeddings_learn_through_checkpoints(name, kind):
    """Checkpoints that re-enter need an input that asks for gradients, which a hook within the embeddings sees to."""

    def gradients(**checkpoints) -> dict[str, torch.Tensor]:
        model = tiny_model(name)
        if kind is not None:
            compress(model, SETTINGS[kind])
        model.embeddings.requires_grad_(False)
        if checkpoints:
            model.gradient_checkpointing_enable(checkpoints)
            model.enable_input_require_grads()
        forward(model.train(), sample_images()).square().sum().backward()
        assert all(parameter.grad is None for parameter in model.embeddings.parameters())
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    assert any("layer" in parameter for parameter in expected)
    for reentrant in (True, False):
        found = gradients(use_reentrant=reentrant)
        assert found.keys() == expected.keys()
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, expected[parameter], msg=parameter)


@setting
def test_a_copy_of_the_embeddings_that_peft_trains_is_what_tokens_are_of(setting):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["embeddings"])
    adapted = peft.get_peft_model(tiny_model("vit-classifier"), config)
    expected = tiny_model("vit-classifier")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in expected.vit.embeddings.named_parameters():
            parameter.add_(torch.randn_like(parameter))
            adapted.get_parameter(f"base_model.model.vit.embeddings.modules_to_save.default.{name}").copy_(parameter)
    images = sample_images()
    plain = answers(expected, images)
    torch.testing.assert_close(answers(adapted.eval(), images), plain)

    with pytest.raises(TypeError, match=r"; give its get_base_model\(\)\.$"):
        compress(adapted, setting)
    entering = []
    for model in (compress(expected, setting), compress(adapted.get_base_model(), setting)):
        find_layers(model)[0].register_forward_pre_hook(lambda layer, args: entering.append(args[0]))
    short = answers(expected, images)
    torch.testing.assert_close(answers(adapted, images), short)
    torch.testing.assert_close(*entering)
    assert (short - plain).abs().max() > 1e-5
    restore(adapted.get_base_model())
    torch.testing.assert_close(answers(adapted, images), plain)


@pytest.mark.parametrize("first", ["peft", "compress"])
@pytest.mark.parametrize(
    ("name", "copied"),
    [(name, copied) for name in ("dinov2-classifier", "clip", "dinov3") for copied in ("all", "first", "last")]
    + [("beit", "first"), ("beit", "last")],  # whose tower runs its layers itself
)
def test_layers_that_peft_copies_join_tokens_where_the_tower_does(name, copied, first):
    """The copies begin as what they are of, and only one of the two runs."""
    peft = pytest.importorskip("peft")
    setting, images = gradual(layers=(1, 3)), sample_images()
    expected = compress(tiny_model(name, num_hidden_layers=4), setting)
    with count_tokens(expected) as right:
        short = answers(expected, images)
    model = tiny_model(name, num_hidden_layers=4)
    tower = find_tower(model, family_of(model)).module
    listed = next(part for part in tower.modules() if isinstance(part, torch.nn.ModuleList))
    whole = next(part for part in tower.modules() if listed in part.children())
    part = {"all": whole, "first": listed[0], "last": listed[-1]}[copied]
    path = next(path for path, module in model.named_modules() if module is part)
    projection = next(path for path, module in model.named_modules() if isinstance(module, torch.nn.Conv2d))
    if first == "compress":
        compress(model, setting)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[projection], modules_to_save=[path]))
    if first == "peft":
        compress(model, setting)
    with count_tokens(model) as count:
        torch.testing.assert_close(answers(adapted.eval(), images), short)
    assert count.by_layer == right.by_layer and count.by_layer[3] < count.by_layer[1] < count.by_layer[0]
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(answers(merged, images), short)
    with count_tokens(merged) as count:
        answers(merged, images)
    assert count.by_layer == right.by_layer
    torch.testing.assert_close(answers(restore(merged), images), answers(restore(expected), images))


def test_a_second_encoder_that_a_user_keeps_in_the_tower_is_none_of_its_layers():
    model, images = tiny_model("dinov2", num_hidden_layers=4), sample_images()
    model.momentum = copy.deepcopy(model.encoder)
    expected = compress(tiny_model("dinov2", num_hidden_layers=4), gradual())
    with count_tokens(expected) as right, count_tokens(compress(model, gradual())) as count:
        torch.testing.assert_close(answers(model, images), answers(expected, images))
    assert count.by_layer == right.by_layer and len(count.by_layer) == 4


SHARDED = (("vit-classifier", "discard"), ("dinov2-classifier", "merge"), ("vit-classifier", "inter"))


def answer_sharded(rank: int, folder: str) -> None:
    """What a process of two does: shards compressed models by size, and writes what they answer."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    wrap = functools.partial(size_based_auto_wrap_policy, min_num_params=1000)
    for name, kind in SHARDED:
        model = compress(tiny_model(name), SETTINGS[kind])
        model = FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"))
        assert sum(isinstance(module, FullyShardedDataParallel) for module in model.modules()) > 3
        with torch.no_grad():
            torch.save(model(pixel_values=sample_images()).logits, f"{folder}/{name}-{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.newest
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_a_model_sharded_by_size_over_two_processes_answers_as_in_one(tmp_path):
    torch.multiprocessing.spawn(answer_sharded, (str(tmp_path),), nprocs=2)
    for name, kind in SHARDED:
        expected = answers(compress(tiny_model(name), SETTINGS[kind]), sample_images())
        for rank in (0, 1):
            torch.testing.assert_close(torch.load(tmp_path / f"{name}-{kind}-{rank}.pt"), expected)
