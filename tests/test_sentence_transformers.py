"""sentence-transformers: it hands `vwt` on to the model, encodes by it, and saves and loads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tiny import tiny_model
from vwt_hf import count_tokens
from vwt_hf.answers import answer
from vwt_hf.processors import load_processor

sentence_transformers = pytest.importorskip("sentence_transformers")

SETTINGS = [True, {"keep_ratio": 0.5}, {"method": "local", "tolerance": 0.1}]


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Half of each is flat, so that tolerances find patches that are alike."""
    values = np.random.default_rng(0).integers(0, 255, (5, 40, 50, 3), dtype=np.uint8)
    values[:, 20:] = 90
    return [Image.fromarray(image) for image in values]


def clip(folder: Path) -> None:
    """A checkpoint of two towers."""
    tiny_model("clip").save_pretrained(folder)
    words = ("a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>")
    transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]),
    ).save_pretrained(folder)


def vit(folder: Path) -> None:
    """A checkpoint of a vision tower alone."""
    tiny_model("vit").save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def embedded(model: transformers.PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Of CLIP its image embedding; else the mean of its hidden states, as sentence-transformers pools by default."""
    if hasattr(model, "get_image_features"):
        return answer(model, pixel_values=pixel_values)
    return model(pixel_values=pixel_values).last_hidden_state.mean(1)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("save", [clip, vit])
def test_images_are_encoded_by_the_compressed_model_which_is_saved_and_loaded_with_its_setting(
    save, setting, photographs, tmp_path
):
    save(tmp_path / "checkpoint")
    given = {"model_kwargs": {"vwt": setting}, "device": "cpu"}
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "checkpoint"), **given)
    pixel_values = load_processor(str(tmp_path / "checkpoint"))(photographs, return_tensors="pt")["pixel_values"]
    auto = transformers.CLIPModel if save is clip else transformers.ViTModel
    model = auto.from_pretrained(tmp_path / "checkpoint", vwt=setting).eval()
    with torch.inference_mode(), count_tokens(model) as expected_count:
        expected = embedded(model, pixel_values)
    with count_tokens(encoder[0].model) as count:
        found = encoder.encode(photographs, batch_size=2)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)
    assert count.mean == expected_count.mean < 65 and count.images == 5
    plain = sentence_transformers.SentenceTransformer(str(tmp_path / "checkpoint"), device="cpu")
    assert plain[0].model.config.vwt is None
    assert np.abs(plain.encode(photographs) - found).max() > 1e-3

    encoder.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert again[0].model.config.vwt == encoder[0].model.config.vwt == model.config.vwt
    np.testing.assert_array_equal(again.encode(photographs, batch_size=2), found)
    whole = sentence_transformers.SentenceTransformer(
        str(tmp_path / "saved"), model_kwargs={"vwt": False}, device="cpu"
    )
    np.testing.assert_array_equal(whole.encode(photographs), plain.encode(photographs))


def test_texts_are_encoded_as_by_the_plain_model(tmp_path):
    clip(tmp_path / "checkpoint")
    settings = ({}, {"model_kwargs": {"vwt": True}})
    plain, short = (
        sentence_transformers.SentenceTransformer(str(tmp_path / "checkpoint"), device="cpu", **given).encode(
            ["a b", "b"]
        )
        for given in settings
    )
    np.testing.assert_array_equal(plain, short)
