"""Beside other libraries: PEFT, Trainer, quantization, export."""

from __future__ import annotations

import pytest
import torch
import transformers

from settings import SETTINGS
from tiny import MODELS, MORE_MODELS, TINY, answers, sample_pixel_values, tiny_model
from vwt_hf import compress

setting = pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))


@setting
def test_lora_trains_saves_and_loads_on_a_compressed_model(setting, tmp_path):
    peft = pytest.importorskip("peft")
    images, labels = sample_pixel_values(4), torch.tensor([0, 1, 0, 1])
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
def test_trainer_trains_and_evaluates_a_compressed_model(setting, tmp_path):
    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"pixel_values": sample_pixel_values(6)[index], "labels": torch.tensor(index % 2)}

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


@setting
def test_linear_layers_in_8_bits_answer_nearly_as_in_32(setting):
    quantization = pytest.importorskip("torch.ao.quantization")
    model = compress(tiny_model("dinov2-classifier"), setting)
    images = sample_pixel_values()
    expected = answers(model, images)
    small = quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in small.modules())
    torch.testing.assert_close(answers(small, images), expected, atol=0.05, rtol=0.05)


TOWERS = [name for name in (MODELS | MORE_MODELS) if name not in ("clip", "metaclip-2", "chinese-clip", "altclip")]
TOWERS = [name for name in TOWERS if name not in ("clipseg", "siglip")]


@pytest.mark.parametrize("dropped", ["discard", "merge"])
@pytest.mark.parametrize("name", TOWERS)
def test_an_exported_program_answers_as_the_model(name, dropped):
    model = compress(tiny_model(name), SETTINGS[dropped])
    images = sample_pixel_values()
    program = torch.export.export(model, (), {"pixel_values": images}, strict=False)
    found = program.module()(pixel_values=images)
    torch.testing.assert_close(
        found[0] if isinstance(found, tuple) else next(iter(found.values())), answers(model, images)
    )


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier", "clip-projection", "siglip-vision"])
def test_onnx_answers_as_torch(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class First(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixel_values)[0]

    model, images = compress(tiny_model(name), SETTINGS["discard"]), sample_pixel_values()
    torch.onnx.export(First(model).eval(), (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), answers(model, images), atol=1e-4, rtol=1e-4)


def test_words_are_not_exported_and_say_why():
    model = compress(transformers.ViTModel(transformers.ViTConfig(**TINY)).eval(), SETTINGS["inter"])
    with pytest.raises(ValueError, match=r"its own number of tokens.*method='intra'"):
        torch.export.export(model, (), {"pixel_values": sample_pixel_values()}, strict=False)
    assert answers(model, sample_pixel_values()).isfinite().all()
