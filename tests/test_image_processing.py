"""Image processors with `vwt`: words made on the host, saved with the processor, and the same as the model's own."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageClassification, AutoProcessor, AutoTokenizer, BatchFeature, pipeline
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import vwt_hf.model_saving
from settings import SETTINGS, WORDS, ViTImageProcessor, inter
from test_pipeline import LLAVA, PHOTOGRAPHS, image_processor_class, tokenizer_with
from tiny import MODELS, TINY, inputs, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, compress, count_tokens, register, token_lengths, unregister
from vwt_hf.families import FAMILIES
from vwt_hf.image_processing import AT_ONCE, _is_padding
from vwt_hf.patches import Patches
from vwt_hf.plans import PATCH_WORDS as NAME
from vwt_hf.whole_saves import sharing

EVERY = list(MODELS)
KINDS = {
    **SETTINGS,
    "random": VWTConfig(criterion="random"),
    "grid": VWTConfig(criterion="grid", keep_ratio=0.3),
    "grid-merge": VWTConfig(criterion="grid", keep_ratio=0.3, dropped="merge"),
}
kind = pytest.mark.parametrize("setting", list(KINDS.values()), ids=list(KINDS))


def write(folder: Path, name: str = "vit-classifier") -> Path:
    """A folder as on the Hub: the tiny model of that name, and its image processor."""
    model = tiny_model(name)
    model.save_pretrained(folder)
    size = {"height": TINY["image_size"], "width": TINY["image_size"]}
    row = next(row for row in FAMILIES if model.config.model_type in row.model_types)
    fields = {"patch_size": TINY["patch_size"], "max_num_patches": 64} if row.padded else {}
    image_processor_class(row.model_types[0])(size=size, crop_size=size, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """The folder of the tiny model of a name; nobody writes to it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write(tmp_path_factory.mktemp(name), name)
        return made[name]

    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "model")


def called(model: transformers.PreTrainedModel, made, words: bool):
    given = {name: value for name, value in made.items() if words or name != NAME}
    for name, value in inputs(model, made["pixel_values"]).items() if "spatial_shapes" not in made else ():
        given.setdefault(name, value)
    if hasattr(model, "text_model"):
        given["input_ids"] = torch.tensor([[97, 5, 98], [97, 7, 98]])
    with torch.no_grad():
        output = model(**given)
    return output[0]


@kind
@pytest.mark.parametrize("name", EVERY)
def test_words_of_the_image_processor_are_the_model_s_own_and_so_are_the_answers(name, setting, folders, plans):
    processor = AutoImageProcessor.from_pretrained(folders(name), vwt=setting)
    model = compress(tiny_model(name), setting)
    made = processor(PHOTOGRAPHS, return_tensors="pt")
    assert made[NAME].shape == (5, 64) and made[NAME].dtype == torch.int64
    found = called(model, made, words=False)
    plan, patches, given = plans[-1]
    assert given is None and torch.equal(made[NAME], plan.patch_words(5, patches.count))
    torch.testing.assert_close(called(model, made, words=True), found, atol=1e-5, rtol=1e-5)
    assert plans[-1][2] is not None


OTHERS = [
    {"method": "local", "num_patches": 20},
    {"method": "local", "keep_ratio": 0.4},
    {"method": "gradual", "tolerance": 0},
    {"method": "gradual", "keep_ratio": 0.6, "join_ratio": 0.2},
    {"method": "coarse", "keep_ratio": 0.4},
    {"method": "coarse", "similarity": 0.5},
    {"dropped": "merge", "num_patches": 9},
    {"dropped": "merge", "num_patches": 64},
    {"num_patches": 64},
    inter(),
]


@pytest.mark.parametrize("fields", OTHERS, ids=str)
@pytest.mark.parametrize("name", ["vit", "siglip2"])
def test_words_are_those_of_the_plan_whether_or_not_tokens_are_laid_out_for_them(name, fields, folders):
    """Of whole images, and of padded ones that differ in their size."""
    processor = AutoImageProcessor.from_pretrained(folders(name), vwt=fields)
    images = [PHOTOGRAPHS[0], Image.fromarray(np.asarray(PHOTOGRAPHS[1])[:20]), PHOTOGRAPHS[2]]
    made, tokenizer = processor(images, return_tensors="pt"), processor.tokenizer_of_patches
    patches = tokenizer.patches(made)
    plan = tokenizer.setting.plan(patches)
    own = patches.without_padding(torch.arange(patches.count).repeat(3, 1))
    assert torch.equal(made[NAME], own if plan is None else plan.patch_words(3, patches.count))


@kind
def test_words_come_as_the_pixels_do_and_one_image_by_itself_as_among_others(setting, folders):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt=setting)
    tensors = processor(PHOTOGRAPHS, return_tensors="pt")[NAME]
    arrays, listed = processor(PHOTOGRAPHS, return_tensors="np")[NAME], processor(PHOTOGRAPHS)[NAME]
    assert isinstance(arrays, np.ndarray) and isinstance(listed, list) and isinstance(listed[0], np.ndarray)
    assert torch.equal(torch.from_numpy(arrays), tensors)
    assert torch.equal(torch.from_numpy(np.stack(listed)), tensors)
    for image, words in zip(PHOTOGRAPHS, tensors, strict=True):
        assert torch.equal(processor(image, return_tensors="pt")[NAME][0], words)
    assert len(PHOTOGRAPHS) <= AT_ONCE < 4 * len(PHOTOGRAPHS)
    assert torch.equal(processor(PHOTOGRAPHS * 4, return_tensors="pt")[NAME], tensors.repeat(4, 1))


def test_without_vwt_it_is_the_plain_image_processor(folders, tmp_path):
    folder = folders("vit-classifier")
    plain = AutoImageProcessor.from_pretrained(folder)
    off = AutoImageProcessor.from_pretrained(folder, vwt=False)
    assert type(plain) is type(off) is ViTImageProcessor
    assert plain.vwt is None and "vwt" not in plain.to_dict() and NAME not in plain(PHOTOGRAPHS)
    plain.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()


@kind
def test_a_saved_image_processor_gives_the_same_words(setting, folder, tmp_path):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=setting)
    expected = processor(PHOTOGRAPHS, return_tensors="pt")
    for _ in range(2):  # saved, loaded and saved again into the same folder
        processor.save_pretrained(tmp_path / "alone")
        processor = AutoImageProcessor.from_pretrained(tmp_path / "alone")
        assert processor.vwt["patch_size"] == [4, 4]
        found = processor(PHOTOGRAPHS, return_tensors="pt")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        files = sorted(path.name for path in (tmp_path / "alone").iterdir())
        assert len(files) == (2 if setting.words_to_save() or setting.method == "inter" else 1)
    assert type(processor).__name__ == ViTImageProcessor.__name__
    off = AutoImageProcessor.from_pretrained(tmp_path / "alone", vwt=False)
    assert type(off) is ViTImageProcessor


def test_model_and_image_processor_keep_their_words_in_one_folder(folder):
    words = VisualVocabulary(torch.rand(9, 3, 4, 4))
    for _ in range(2):
        compress(tiny_model("vit-classifier"), inter()).save_pretrained(folder)
        AutoImageProcessor.from_pretrained(folder, vwt=inter(words)).save_pretrained(folder)
    compress(tiny_model("vit-classifier"), inter()).save_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert sum(path.is_dir() for path in folder.iterdir()) == 2
    processor = AutoImageProcessor.from_pretrained(folder)
    held = processor.tokenizer_of_patches.setting.words.vocabulary
    assert torch.equal(held.words, words.words)
    assert model(**processor(PHOTOGRAPHS, return_tensors="pt")).logits.shape[0] == 5


def test_an_image_processor_with_words_is_saved_where_the_folder_cannot_be_listed(tmp_path, monkeypatch):
    ViTImageProcessor().save_pretrained(tmp_path / "plain")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "plain", vwt=inter().to_dict() | {"patch_size": 4})

    def refused(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        processor.save_pretrained(tmp_path / "own")
    assert AutoImageProcessor.from_pretrained(tmp_path / "own").vwt == processor.vwt


def test_saves_at_once_into_one_folder_leave_an_image_processor_that_loads(folder, tmp_path):
    """As the processes of a distributed run save: words of the last one, and none of the others."""
    saved = [AutoImageProcessor.from_pretrained(folder, vwt=inter()) for _ in range(4)]
    together = threading.Barrier(len(saved))

    def save(processor):
        together.wait()
        processor.save_pretrained(tmp_path)

    for _ in range(3):
        threads = [threading.Thread(target=save, args=(processor,)) for processor in saved]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loaded = AutoImageProcessor.from_pretrained(tmp_path)
        assert torch.equal(
            loaded(PHOTOGRAPHS[0], return_tensors="pt")[NAME], saved[0](PHOTOGRAPHS[0], return_tensors="pt")[NAME]
        )
        assert len(list(tmp_path.glob("processor_words-*"))) == 1


def test_a_save_beside_another_that_goes_on_removes_none_of_its_words(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vwt_hf.model_saving, "_TURN", 0.05)
    processor = AutoImageProcessor.from_pretrained(folder, vwt=inter())
    processor.save_pretrained(tmp_path)
    with sharing(tmp_path):
        processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("processor_words-*"))) == 2
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("processor_words-*"))) == 1


def test_an_image_processor_finds_the_words_that_its_model_was_saved_with(folder):
    compress(tiny_model("vit-classifier"), inter()).save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, vwt={"method": "inter", "threshold": 0.3})
    assert torch.equal(processor.tokenizer_of_patches.setting.words.vocabulary.words, WORDS.words)


def test_it_loads_as_the_plain_image_processor_where_vwt_hf_is_not_imported(folder, tmp_path):
    AutoImageProcessor.from_pretrained(folder, vwt=inter()).save_pretrained(tmp_path)
    script = (
        "import sys, numpy\n"
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor\n"
        f"made = AutoImageProcessor.from_pretrained({str(tmp_path)!r})\n"
        "print(type(made).__name__, sorted(made(numpy.zeros((40, 40, 3), numpy.uint8))), 'vwt_hf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == f"{ViTImageProcessor.__name__} ['pixel_values'] False", done.stderr


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_processor_of_texts_and_images_takes_and_saves_the_setting(name, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders(name), folder)
    tokenizer_with({"<pad>": 1, "<s>": 97, "</s>": 98}).save_pretrained(folder)
    kind = getattr(transformers, {"clip": "CLIPProcessor", "siglip": "SiglipProcessor"}[name])
    kind(AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    assert NAME not in AutoProcessor.from_pretrained(folder)(images=PHOTOGRAPHS, return_tensors="pt")
    processor = AutoProcessor.from_pretrained(folder, vwt=inter())
    made = processor(text=["a cat", "dogs tea"], images=PHOTOGRAPHS, return_tensors="pt", padding=True)
    model = compress(tiny_model(name), inter())
    with torch.no_grad():
        found = model(**made).logits_per_image
        expected = model(**{key: value for key, value in made.items() if key != NAME}).logits_per_image
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/processor_config.json").read_text())["image_processor"]["vwt"]["saved_as"]
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is kind
    assert torch.equal(again(images=PHOTOGRAPHS, return_tensors="pt")[NAME], made[NAME])
    # An image processor's own file is another: transformers reads that of the processor, whose words stay.
    AutoImageProcessor.from_pretrained(folder, vwt=inter(threshold=0.2)).save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(images=PHOTOGRAPHS, return_tensors="pt")[NAME], made[NAME])
    processor.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("processor_words-*"))) == 2


@pytest.mark.parametrize("beside_a_model", [False, True], ids=["alone", "beside a model"])
def test_a_processor_of_texts_and_images_takes_a_patch_size(beside_a_model, folders, tmp_path):
    if beside_a_model:
        tiny_model("clip").save_pretrained(tmp_path)
    tokenizer = tokenizer_with({"<pad>": 1, "<s>": 97, "</s>": 98})
    transformers.CLIPProcessor(AutoImageProcessor.from_pretrained(folders("clip")), tokenizer).save_pretrained(tmp_path)
    vwt = {"keep_ratio": 0.5, "patch_size": 4}
    for kind in (transformers.CLIPProcessor, AutoProcessor):
        processor = kind.from_pretrained(tmp_path, vwt=vwt)
        assert processor.image_processor.vwt["patch_size"] == [4, 4]
        assert processor(images=PHOTOGRAPHS, return_tensors="pt")[NAME].shape[1] == 64
    with pytest.raises(ValueError, match=r"patch_size.*Image processors alone take patch_size, as a model has its own"):
        compress(tiny_model("clip"), vwt)
    if beside_a_model:
        with pytest.raises(ValueError, match=r"vwt\['patch_size'\] is \(8, 8\), and the model's config says \(4, 4\)"):
            transformers.AutoConfig.from_pretrained(tmp_path, vwt={"patch_size": 8})


def test_blip_takes_words_from_its_processor(tmp_path, plans):
    from test_generation import blip, built

    model = compress(built(blip), inter())
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    tokenizer = tokenizer_with({"<pad>": 0, "<s>": 1, "</s>": 97})
    transformers.BlipProcessor(image_processor_class("blip")(size=size), tokenizer).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path, vwt=inter())
    made = processor(images=PHOTOGRAPHS, text=["a photo"] * 5, return_tensors="pt")
    found = model.generate(**made, max_new_tokens=3, do_sample=False)
    plan, patches, given = plans[-1]
    assert given is not None and torch.equal(plan.patch_words(5, patches.count), made[NAME])
    del made[NAME]
    assert torch.equal(model.generate(**made, max_new_tokens=3, do_sample=False), found)


def test_llava_takes_words_from_its_processor(tmp_path, plans):
    from test_generation import IMAGE_TOKEN, built, llava

    model = compress(built(llava), inter())
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    tokenizer = tokenizer_with({"<pad>": 0, "<s>": 1, "</s>": 97, "<image>": IMAGE_TOKEN})
    image_processor = image_processor_class("llava")(size=size, crop_size=size)
    transformers.LlavaProcessor(image_processor, tokenizer, **LLAVA).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path, vwt=inter())
    made = processor(text=["<image> a photo of"] * 5, images=PHOTOGRAPHS, return_tensors="pt")
    found = model.generate(**made, max_new_tokens=3, do_sample=False)
    assert plans[-1][2] is not None
    del made[NAME]
    assert torch.equal(model.generate(**made, max_new_tokens=3, do_sample=False), found)


def test_tiles_have_words_each_and_padding_has_none(tmp_path):
    size = {"shortest_edge": 32}
    fields = {"crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 64]]}
    processor = image_processor_class("llava_next")(size=size, **fields)
    processor.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"patch_size": 4, "dropped": "merge"})
    wide = Image.fromarray(np.asarray(PHOTOGRAPHS[0])[:25])
    made = processor([wide, PHOTOGRAPHS[1]], return_tensors="pt")
    assert made["pixel_values"].shape[:2] == (2, 5) and made[NAME].shape == (2, 5, 64)
    assert (made[NAME][0, 3:] == -1).all() and (made[NAME][0, :3] >= 0).all() and (made[NAME][1] >= 0).all()
    first = made[NAME][0, :3]
    assert torch.equal(processor(wide, return_tensors="pt")[NAME][0], first)
    pictures = processor.decode(made[NAME], made)
    assert len(pictures) == 3 + 5
    alone = processor(PHOTOGRAPHS[1], return_tensors="pt")
    assert all(map(np.array_equal, pictures[3:], processor.decode(alone[NAME], alone)))


@pytest.mark.parametrize(
    "given", [{"return_tensors": "pt"}, {}, {"do_pad": False}], ids=["tensor", "lists", "unpadded"]
)
def test_black_tiles_have_words_and_padding_has_none(given, tmp_path):
    """Where black is 0, as padding is."""
    fields = {"crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 64]], "image_mean": 0.0}
    image_processor_class("llava_next")(size={"shortest_edge": 32}, **fields).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"patch_size": 4, "dropped": "merge"})
    noise = np.random.default_rng(0).integers(1, 255, (32, 64, 3), dtype=np.uint8)
    images = [noise.copy(), noise.copy(), np.zeros_like(noise), noise.repeat(2, axis=0)]
    images[0][:, :40], images[1][:, 24:] = 0, 0
    made = processor([Image.fromarray(image) for image in images], **given)
    tiles = [list(map(torch.as_tensor, of_image)) for of_image in made["pixel_values"]]
    black = [[not tile.any() for tile in of_image] for of_image in tiles]
    assert black[0][:3] == [False, True, False] and black[1][:3] == [False, False, True] and all(black[2])
    for own, words, pixels in zip((3, 3, 3, 5), made[NAME], tiles, strict=True):
        words = torch.as_tensor(words)
        assert len(words) == len(pixels) == (own if "do_pad" in given else 5)
        assert (words[:own] >= 0).all() and (words[own:] == -1).all()


def test_a_black_tile_before_another_is_no_padding():
    values = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])[:, :, None, None, None].expand(2, 4, 3, 2, 2)
    assert _is_padding(values, None).tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2]


def test_rows_of_batches_that_were_padded_to_other_numbers_of_tiles_are_decoded(tmp_path):
    fields = {"crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 64]]}
    image_processor_class("llava_next")(size={"shortest_edge": 32}, **fields).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"patch_size": 4, "keep_ratio": 0.5})
    wide = Image.fromarray(np.asarray(PHOTOGRAPHS[0])[:25])
    padded, alone = processor([wide, PHOTOGRAPHS[1]]), processor([wide])
    assert [len(tiles) for tiles in (*padded["pixel_values"], *alone["pixel_values"])] == [5, 5, 3]
    rows = {name: [*padded[name], *alone[name]] for name in padded}
    expected = processor.decode(padded[NAME], padded) + processor.decode(alone[NAME], alone)
    assert len(expected) == 11 and processor.decode(rows[NAME], rows) == expected
    assert processor.decode(padded[NAME][0], {name: own[0] for name, own in padded.items()}) == expected[:3]


@pytest.mark.parametrize("setting", [{"keep_ratio": 0.5}, {"dropped": "merge"}], ids=["discard", "merge"])
def test_one_sample_of_a_batch_that_was_padded_is_decoded_without_its_padding(setting, tmp_path):
    """Whether or not `image_sizes` is beside its tiles."""
    fields = {"crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 64]]}
    image_processor_class("llava_next")(size={"shortest_edge": 32}, **fields).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"patch_size": 4, **setting})
    wide = Image.fromarray(np.asarray(PHOTOGRAPHS[0])[:25])
    made = processor([wide, PHOTOGRAPHS[1]], return_tensors="pt")
    expected = processor.decode(made[NAME], made)
    assert len(expected) == 3 + 5
    for one, own in enumerate((expected[:3], expected[3:])):
        assert processor.decode(made[NAME][one], {name: values[one] for name, values in made.items()}) == own
        assert processor.decode(made[NAME][one], made["pixel_values"][one]) == own


def test_several_images_of_one_sample_have_words_each(tmp_path):
    """Beside what an image processor tells of each sample, not of each image."""
    size = {"height": 32, "width": 32}
    image_processor_class("llava_onevision")(size=size, image_grid_pinpoints=[[32, 64], [64, 64]]).save_pretrained(
        tmp_path
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"patch_size": 4, "dropped": "merge"})
    made = processor([PHOTOGRAPHS[:2]])
    assert list(made["batch_num_images"]) == [2] and len(made["pixel_values"]) == len(made[NAME]) == 2
    for values, words in zip(made["pixel_values"], made[NAME], strict=True):
        assert words.shape == (len(values), 64) and (words >= 0).all()


@pytest.mark.parametrize("change", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made)), copy.copy])
@kind
def test_a_copy_gives_the_same_words(change, setting, folders):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt=setting)
    other = change(processor)
    assert type(other) is type(processor) and other.vwt == processor.vwt
    found = other(PHOTOGRAPHS, return_tensors="pt")[NAME]
    assert torch.equal(found, processor(PHOTOGRAPHS, return_tensors="pt")[NAME])


@pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_pipeline_tokenises_once(batch_size, setting, folders, plans, monkeypatch):
    pipe = pipeline("image-classification", model=str(folders("vit-classifier")), model_kwargs={"vwt": setting})
    expected = pipe(PHOTOGRAPHS)
    find, found = type(setting).patch_words, []
    monkeypatch.setattr(type(setting), "patch_words", lambda *given: found.append(given) or find(*given))
    plans.clear()
    assert len(pipe(PHOTOGRAPHS, batch_size=batch_size)) == len(expected)
    assert len(found) == len(PHOTOGRAPHS) and all(given is not None for _, _, given in plans)


def test_a_pipeline_of_a_saved_setting_tokenises_on_the_host(folder, plans):
    compress(tiny_model("vit-classifier"), inter()).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(folder, vwt=inter()).save_pretrained(folder)
    pipeline("image-classification", model=str(folder))(PHOTOGRAPHS)
    assert all(given is not None for _, _, given in plans) and len(plans) == 5


def rewritten(folder: Path, **fields) -> Path:
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vwt": config.get("vwt", {}) | fields}))
    return folder


@pytest.mark.parametrize("kind", ["Pix2Struct", "Kosmos2_5", "Fuyu", "Qwen2VL", "Idefics", "Mllama"])
def test_an_image_processor_that_makes_no_whole_images_is_refused_with_what_it_makes(kind, tmp_path):
    """When it is loaded, where its class says so, else when it is called."""
    own = getattr(transformers, f"{kind}ImageProcessorPil")
    own().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pixel_values.*oad it without `vwt`"):
        own.from_pretrained(tmp_path, vwt={"keep_ratio": 0.5, "patch_size": 16})(PHOTOGRAPHS[:1], return_tensors="pt")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep_ratio": 3}, r"`vwt` of the image processor of .*keep_ratio is 3; expected.*`vwt=False` loads"),
        ({"method": "given"}, r"goes by patch_words that something else makes"),
        ({"patch_size": "big"}, r"vwt\['patch_size'\] is 'big'; expected height and width"),
        ({"patch_size": [4, True]}, r"vwt\['patch_size'\] is \[4, True\]"),
        ({"nothing": 1}, r"has no field 'nothing'"),
        ({"method": "inter", "vocabulary": "/etc", "patch_size": 4}, r"'/etc' is no Hub id"),
        ({"method": "inter", "vocabulary": "../words", "patch_size": 4}, r"is no Hub id"),
        ({"method": "inter", "saved_as": "../../etc", "patch_size": 4}, r"saved_as is '../../etc'"),
        ({}, r"no model config that says the size of its patches.*'patch_size': 16"),
        (
            {"method": "local", "image_std": functools.reduce(lambda inner, _: [inner], range(100), 1)},
            "holds lists within 9 lists",
        ),
    ],
)
def test_what_a_stranger_s_file_says_is_looked_at(fields, said, folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=said):
        AutoImageProcessor.from_pretrained(rewritten(folder, **fields))
    assert AutoImageProcessor.from_pretrained(folder, vwt=False).vwt is None


@pytest.mark.parametrize(
    "names", [["\x1b]0;owned\x07"], "x" * 10**5, [1], 5, ["x"] * 10**5], ids=lambda names: str(names)[:9]
)
def test_names_of_inputs_that_a_stranger_wrote_are_shown_as_text(names, folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": names}))
    with pytest.raises(ValueError, match=r"makes \[.*pixel_values|model_input_names .*expected a list") as raised:
        AutoImageProcessor.from_pretrained(folder, vwt=True)
    text = str(raised.value)
    assert text.isprintable() and len(text) < 600
    assert (str(folder) in text) == (names in ([1], 5, "x" * 10**5))


@pytest.mark.parametrize(
    "vwt", [{"method": "coarse"}, {"method": "local"}, inter()], ids=lambda vwt: type(vwt).__name__
)
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGBA", 4)])
def test_images_of_other_channels_than_the_setting_was_made_ready_for_are_refused(mode, channels, vwt, folder):
    ViTImageProcessor(do_normalize=False, size={"height": 32, "width": 32}).save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, vwt=vwt)
    with pytest.raises(ValueError, match=rf"\(1, {channels}, 32, 32\) have {channels} channels; expected 3, .*Convert"):
        processor(PHOTOGRAPHS[0].convert(mode), return_tensors="pt")
    assert processor(PHOTOGRAPHS[0].convert("RGB"), return_tensors="pt")[NAME].shape == (1, 64)


@pytest.mark.parametrize("size", [2, 8])
def test_padded_patches_of_another_size_than_the_models_are_refused(size, folders):
    processor = AutoImageProcessor.from_pretrained(folders("siglip2-vision"), vwt=True)
    with pytest.raises(
        ValueError, match=rf"{3 * size * size} values for each patch; expected 48, of 3 channels and 4 × 4"
    ):
        processor(PHOTOGRAPHS, return_tensors="pt", patch_size=size)


@pytest.mark.parametrize("size", [0, -4, [4, 0], [4]])
def test_a_patch_size_in_a_config_that_can_be_none_is_not_taken(size, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"patch_size": size}))
    with pytest.raises(ValueError, match="no model config that says the size of its patches"):
        AutoImageProcessor.from_pretrained(folder, vwt=True)


def test_words_that_are_damaged_or_missing_are_refused(folder, tmp_path):
    AutoImageProcessor.from_pretrained(folder, vwt=inter()).save_pretrained(tmp_path / "alone")
    (words,) = (path for path in (tmp_path / "alone").iterdir() if path.is_dir())
    file = words / "vocabulary.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        AutoImageProcessor.from_pretrained(tmp_path / "alone")
    shutil.rmtree(words)
    with pytest.raises(FileNotFoundError, match="of the image processor of"):
        AutoImageProcessor.from_pretrained(tmp_path / "alone")


def test_words_of_another_patch_size_are_refused(folder):
    with pytest.raises(ValueError, match=r"words are 7×7 pixels, the model's patches 4×4"):
        AutoImageProcessor.from_pretrained(folder, vwt=VisualVocabulary(torch.rand(5, 3, 7, 7)))


def test_unregistering_gives_the_plain_image_processor_back(folder):
    AutoImageProcessor.from_pretrained(folder, vwt=True).save_pretrained(folder)
    unregister()
    try:
        plain = AutoImageProcessor.from_pretrained(folder)
        assert type(plain) is ViTImageProcessor and NAME not in plain(PHOTOGRAPHS)
    finally:
        register()
    assert NAME in AutoImageProcessor.from_pretrained(folder)(PHOTOGRAPHS)


def test_decoding_shows_what_is_left(folders):
    """Kept patches as they are; each patch of a merged group as the one that stands for it; words as their mean."""
    folder = folders("vit")
    plain = AutoImageProcessor.from_pretrained(folder)(PHOTOGRAPHS, return_tensors="pt")["pixel_values"]
    cut = Patches.of_images(plain, (4, 4)).pixels()
    for name, setting in SETTINGS.items():
        processor = AutoImageProcessor.from_pretrained(folder, vwt=setting)
        made = processor(PHOTOGRAPHS, return_tensors="pt")
        pictures = processor.decode(made[NAME], made["pixel_values"])
        assert [picture.size for picture in pictures] == [(32, 32)] * 5
        assert np.array_equal(processor.decode(made[NAME][1], PHOTOGRAPHS[1])[0], pictures[1])
        for images in (
            PHOTOGRAPHS,
            made,
            processor(PHOTOGRAPHS),
            made["pixel_values"].numpy(),
            [*made["pixel_values"]],
        ):
            again = processor.decode(made[NAME], images)
            assert all(np.array_equal(one, other) for one, other in zip(again, pictures, strict=True))
        for values in (made["pixel_values"][1], processor(PHOTOGRAPHS)["pixel_values"][1]):  # as a row of a data set
            assert np.array_equal(processor.decode(made[NAME][1], values)[0], pictures[1])
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        seen = Patches.of_images((pixels - 0.5) / 0.5, (4, 4)).pixels()
        words = made[NAME]
        for image in range(5):
            for patch in range(64):
                alike = words[image] == words[image, patch]
                # What blocks of coarse show: test_methods_coarse.py.
                if words[image, patch] < 0 or (name == "coarse" and alike.sum() > 1):
                    continue
                if name in ("merge", "local"):
                    expected = cut[image, words[image, patch]]
                else:
                    expected = cut[image][alike].mean(0) if name == "inter" else cut[image, patch]
                torch.testing.assert_close(seen[image, patch], expected, atol=5e-3, rtol=0)
        if name == "discard":
            pale = seen[0][words[0] < 0].unflatten(-1, (3, 4, 4))
            torch.testing.assert_close(pale[:, 0], pale[:, 1])


def test_decoding_refuses_words_of_other_images(folders):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt=True)
    with pytest.raises(ValueError, match="patch_words are of 3 images, and there are 2"):
        processor.decode([[0] * 64] * 3, [np.zeros((3, 32, 32), np.float32), np.zeros((3, 32, 64), np.float32)])
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt=True)
    words = processor(PHOTOGRAPHS, return_tensors="pt")[NAME]
    with pytest.raises(ValueError, match=r"patch_words are \(4, 64\), of 4 images, and the model is given 5 images"):
        processor.decode(words[:4], PHOTOGRAPHS)


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_what_the_processor_made_of_images_of_several_sizes_or_of_one_is_decoded(folders, kind):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt=SETTINGS["merge"])
    photographs = [PHOTOGRAPHS[0].resize((32, 32)), PHOTOGRAPHS[1].resize((64, 32))]
    alone = [processor(one, do_resize=False, return_tensors="pt") for one in photographs]
    expected = [processor.decode(made[NAME], made)[0] for made in alone]
    values = [made["pixel_values"][0] if kind == "pt" else made["pixel_values"][0].numpy() for made in alone]
    together = {"pixel_values": values, NAME: [made[NAME][0].tolist() for made in alone]}
    for images in (together, values):
        assert processor.decode(together[NAME], images) == expected
    halves = [alone[0]["pixel_values"][0].bfloat16()] * 2
    assert len(processor.decode([alone[0][NAME][0].tolist()] * 2, halves)) == 2
    for one, picture in zip(alone, expected, strict=True):  # as a data set gives a row
        row = {name: value[0].tolist() for name, value in one.items()}
        assert processor.decode(row[NAME], row) == [picture]
    assert [picture.size for picture in expected] == [(32, 32), (64, 32)]


def test_images_of_several_sizes_are_decoded_as_what_the_processor_made_of_them(folders):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt={"keep_ratio": 0.5}, do_resize=False)
    photographs = [PHOTOGRAPHS[0].resize((32, 32)), PHOTOGRAPHS[1].resize((64, 32))]
    made = processor(photographs)
    found = processor.decode(made[NAME], photographs)
    assert found == processor.decode(made[NAME], made)
    assert [picture.size for picture in found] == [(32, 32), (64, 32)]
    column = pandas.Series([words.tolist() for words in made[NAME]]).map(np.array)
    assert processor.decode(column.to_numpy(), photographs) == found
    assert token_lengths(column) == token_lengths(made[NAME]) == [32, 64]
    rows = {name: np.empty(2, object) for name in (NAME, "pixel_values")}  # as `datasets` has them for NumPy
    for name, own in rows.items():
        for index, one in enumerate(made[name]):
            own[index] = np.asarray(one)
    assert processor.decode(rows[NAME], rows) == found
    data = datasets.Dataset.from_dict({name: list(map(np.ndarray.tolist, own)) for name, own in rows.items()})
    for form in (None, "numpy", "torch", "arrow"):
        columns = data.with_format(form)
        assert token_lengths(columns[NAME]) == [32, 64]
        assert processor.decode(columns[NAME], {name: columns[name] for name in rows}) == found


def test_a_column_of_images_is_decoded_and_a_dict_without_any_is_refused(folders):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt={"keep_ratio": 0.5})
    words = processor(PHOTOGRAPHS, return_tensors="pt")[NAME]
    data = datasets.Dataset.from_dict({"image": PHOTOGRAPHS, NAME: words.tolist()})
    assert processor.decode(data[NAME], data["image"]) == processor.decode(words, PHOTOGRAPHS)
    for images in ({"image": PHOTOGRAPHS}, {"image": PHOTOGRAPHS, "pixel_values": None}):
        with pytest.raises(ValueError, match=r"a dict without pixel_values \(its fields: 'image'.*what this image"):
            processor.decode(words, images)


def test_words_in_columns_beside_others_are_numbers(folders):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt={"keep_ratio": 0.5})
    made = processor(PHOTOGRAPHS[:2], return_tensors="pt")
    frame = pandas.DataFrame(made[NAME].numpy())
    for kind in ("int64", "object", "Int64"):
        table = frame.astype(kind).rename(columns=str)
        assert token_lengths(table) == token_lengths(made[NAME])
        assert processor.decode(table, made) == processor.decode(made[NAME], made)
    frame.insert(0, "name", ["a.jpg", "b.jpg"])
    words = frame.to_numpy()[:, 1:]
    assert words.dtype == object and token_lengths(words) == token_lengths(made[NAME])
    assert token_lengths(list(words)) == token_lengths(made[NAME])
    assert processor.decode(words, made) == processor.decode(made[NAME], made)


def test_images_are_decoded_by_an_image_processor_that_makes_tensors_alone(folder):
    class Own(ViTImageProcessor):
        def preprocess(self, images, return_tensors=None, **kwargs):
            assert return_tensors == "pt"
            return super().preprocess(images, return_tensors="pt", **kwargs)

    processor = Own.from_pretrained(folder, vwt={"keep_ratio": 0.5})
    made = processor(PHOTOGRAPHS, return_tensors="pt")
    assert processor.decode(made[NAME], PHOTOGRAPHS) == processor.decode(made[NAME], made)


def test_images_of_several_sizes_are_decoded_where_tensors_are_stacked(folder):
    """As Idefics 2 and 3 do with torchvision and without `do_pad`."""

    class Own(ViTImageProcessor):
        def preprocess(self, images, return_tensors=None, **kwargs):
            made = super().preprocess(images, **kwargs)
            if return_tensors == "pt":
                made["pixel_values"] = torch.stack(list(map(torch.as_tensor, made["pixel_values"])))
            return made

    processor = Own.from_pretrained(folder, do_resize=False, vwt={"keep_ratio": 0.5})
    photographs = [image.resize((width, 32)) for image, width in zip(PHOTOGRAPHS[:2], (32, 64), strict=True)]
    made = processor(photographs)
    assert processor.decode(made[NAME], photographs) == processor.decode(made[NAME], made)


def test_a_table_of_words_of_images_of_several_sizes_is_decoded(folder):
    processor = AutoImageProcessor.from_pretrained(folder, do_resize=False, vwt={"keep_ratio": 0.5})
    photographs = [image.resize(size) for image, size in zip(PHOTOGRAPHS[:2], ((32, 64), (64, 32)), strict=True)]
    made = processor(photographs)
    table = pandas.DataFrame(np.stack(made[NAME]))
    assert processor.decode(table, made) == processor.decode(made[NAME], made)


def test_images_without_words_are_refused_though_they_are_black(folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt={"keep_ratio": 0.5})
    made = processor(PHOTOGRAPHS[:3], return_tensors="pt")
    made["pixel_values"][1], made[NAME][1] = 0, -1
    for words, values in ((made[NAME], made["pixel_values"]), (made[NAME][1], made["pixel_values"][1])):
        with pytest.raises(ValueError, match="patch_words"):
            processor.decode(words, values)


def test_no_images_are_decoded_to_none(folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=True)
    for images in ([], torch.empty(0, 3, 32, 32), {"pixel_values": torch.empty(0, 3, 32, 32)}):
        assert processor.decode(torch.empty(0, 64, dtype=torch.int64), images) == []


def test_a_config_of_any_number_of_channels_takes_no_memory(tmp_path):
    tiny_model("vit").config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"num_channels": 2**40}
    (tmp_path / "config.json").write_text(json.dumps(content))
    transformers.ViTImageProcessorPil(image_mean=0.5, image_std=0.5).save_pretrained(tmp_path)
    assert len(AutoImageProcessor.from_pretrained(tmp_path, vwt=True).vwt["image_std"]) == 3


@pytest.mark.parametrize(("channels", "statistics"), [(1, 0.5), (2, [0.5, 0.4]), (4, 0.5)])
@pytest.mark.parametrize("vwt", [{"method": "local", "tolerance": 0.1}, {"keep_ratio": 0.5, "dropped": "merge"}])
def test_images_of_other_channels_have_words_as_the_model_finds_them(channels, statistics, vwt, tmp_path):
    model = tiny_model("vit", num_channels=channels)
    model.save_pretrained(tmp_path)
    own = {"image_mean": statistics, "image_std": statistics, "do_convert_rgb": False, "do_resize": False}
    transformers.ViTImageProcessorPil(**own).save_pretrained(tmp_path)
    small = np.random.default_rng(0).random((2, channels, 8, 8)).astype(np.float32)
    images = list(small.repeat(4, axis=2).repeat(4, axis=3))
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=vwt)
    given = {"do_rescale": False, "input_data_format": "channels_first", "return_tensors": "pt"}
    made = processor(images, **given)
    processor.save_pretrained(tmp_path)
    assert torch.equal(AutoImageProcessor.from_pretrained(tmp_path)(images, **given)[NAME], made[NAME])
    compressed = transformers.AutoModel.from_pretrained(tmp_path, vwt=vwt)
    with torch.no_grad(), count_tokens(compressed) as count:
        expected = compressed(made["pixel_values"])[0]
    assert count.tokens == sum(token_lengths(made[NAME])) + 2 < 2 * 65
    with torch.no_grad():
        torch.testing.assert_close(compressed(made["pixel_values"], patch_words=made[NAME])[0], expected)


@pytest.mark.parametrize("fields", [{"method": "local", "keep_ratio": 0.5}, {"method": "coarse"}, {"dropped": "merge"}])
def test_an_image_processor_that_adds_a_channel_finds_the_words_of_its_model(fields, tmp_path):
    """VitMatte's, which has a mean for three of the four channels that it makes."""
    model = tiny_model("vit", num_channels=4)
    model.save_pretrained(tmp_path)
    transformers.VitMatteImageProcessorPil().save_pretrained(tmp_path)
    setting = fields | ({"image_std": [0.5] * 4} if "method" in fields else {})
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=setting)
    image = PHOTOGRAPHS[0].resize((32, 32))
    made = processor(images=image, trimaps=image.convert("L"), return_tensors="pt")
    assert made["pixel_values"].shape == (1, 4, 32, 32) and made[NAME].shape == (1, 64)
    compress(model, setting)
    with torch.no_grad(), count_tokens(model) as count:
        expected = model(made["pixel_values"])[0]
        torch.testing.assert_close(model(made["pixel_values"], patch_words=made[NAME])[0], expected)
    assert count.tokens == 2 * (token_lengths(made[NAME])[0] + 1) < 2 * 65


def test_padded_patches_are_decoded_to_images_of_many_sizes(folders):
    processor = AutoImageProcessor.from_pretrained(folders("siglip2"), vwt=SETTINGS["merge"])
    made = processor(PHOTOGRAPHS, return_tensors="pt")
    pictures = processor.decode(made[NAME], made)
    assert [picture.size[::-1] for picture in pictures] == [
        (4 * high, 4 * wide) for high, wide in made["spatial_shapes"].tolist()
    ]


def test_more_padded_images_than_are_looked_at_together_have_the_words_that_each_has_alone(folders):
    processor = AutoImageProcessor.from_pretrained(folders("siglip2"), vwt=SETTINGS["merge"])
    images = [PHOTOGRAPHS[0].resize((20 + 4 * number, 32)) for number in range(AT_ONCE + 1)]
    together = processor(images, return_tensors="pt")[NAME]
    for image, words in zip(images, together, strict=True):
        assert torch.equal(processor(image, return_tensors="pt")[NAME][0], words)


def test_floating_point_images_with_channels_last_are_decoded_as_images(folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=SETTINGS["merge"])
    words = processor(PHOTOGRAPHS[0], return_tensors="pt")[NAME]
    found, expected = (
        processor.decode(words, image)[0] for image in (np.asarray(PHOTOGRAPHS[0], np.float32), PHOTOGRAPHS[0])
    )
    assert np.abs(np.asarray(found, np.int64) - np.asarray(expected, np.int64)).max() <= 1


def test_an_image_processor_is_pushed_by_the_token_and_to_the_branch_that_are_given(hub, folder, monkeypatch):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=inter())
    processor.push_to_hub("me/pushed")
    huggingface_hub.create_branch("me/pushed", branch="words")
    token = hub.token
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    given = {"push_to_hub": True, "repo_id": "me/pushed", "revision": "words"}
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        processor.save_pretrained(folder / "here", **given)
    processor.save_pretrained(folder / "here", **given, token=token)
    assert (
        AutoImageProcessor.from_pretrained("me/pushed", revision="words").vwt["saved_as"] == processor.vwt["saved_as"]
    )
    assert AutoImageProcessor.from_pretrained("me/pushed").vwt["saved_as"] != processor.vwt["saved_as"]


@pytest.mark.parametrize("setting", [VWTConfig(dropped="merge"), inter()], ids=["merge", "inter"])
def test_a_pushed_image_processor_comes_back_with_its_words(setting, hub, folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=setting)
    expected = processor(PHOTOGRAPHS, return_tensors="pt")[NAME]
    processor.push_to_hub("me/pushed")
    processor.save_pretrained(folder / "here", push_to_hub=True, repo_id="me/saved")
    for name in ("me/pushed", "me/saved"):
        files = set(hub.files(name))
        assert "preprocessor_config.json" in files
        assert any(file.endswith("vocabulary.safetensors") for file in files) == (setting.method == "inter")
        loaded = AutoImageProcessor.from_pretrained(name)
        assert torch.equal(loaded(PHOTOGRAPHS, return_tensors="pt")[NAME], expected)


def test_a_vocabulary_on_the_hub_is_named_by_its_commit(hub, folder, tmp_path):
    commit = VisualVocabulary(WORDS.words).push_to_hub("me/words").oid
    processor = AutoImageProcessor.from_pretrained(folder, vwt="me/words")
    processor.save_pretrained(tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["preprocessor_config.json"]
    assert (processor.vwt["vocabulary"], processor.vwt["revision"]) == ("me/words", commit)
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "alone")
    found = loaded(PHOTOGRAPHS, return_tensors="pt")[NAME]
    assert torch.equal(found, processor(PHOTOGRAPHS, return_tensors="pt")[NAME])


class Photographs(torch.utils.data.Dataset):
    def __init__(self, processor) -> None:
        self.processor = processor

    def __len__(self) -> int:
        return len(PHOTOGRAPHS)

    def __getitem__(self, place: int):
        return {name: value[0] for name, value in self.processor(PHOTOGRAPHS[place], return_tensors="pt").items()}


FORKED_BEFORE = """
import importlib, sys
import torch, transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor

def work(folder, queue):
    from vwt_hf.image_processing import HostTokenizer
    found, seen = HostTokenizer.patches, []
    HostTokenizer.patches = lambda *args: seen.append(torch.get_num_threads()) or found(*args)
    processor = AutoImageProcessor.from_pretrained(folder, vwt={"dropped": "merge"})
    processor(torch.rand(1, 3, 32, 32), return_tensors="pt")
    queue.put((seen, torch.get_num_threads()))

torch.set_num_threads(2)
assert "vwt_hf" not in sys.modules
for library in ("multiprocessing", "multiprocess"):
    context = importlib.import_module(library).get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(sys.argv[1], queue))
    child.start()
    assert queue.get() == ([1], 2), library
    child.join()
"""


@pytest.mark.newest
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_process_that_was_forked_before_the_import_finds_words_by_one_thread(folders):
    """Its parent's threads, for which torch would wait, are not in it."""
    run = [sys.executable, "-W", "ignore", "-c", FORKED_BEFORE, str(folders("vit"))]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.newest)])
def test_workers_of_a_data_loader_make_the_words(method, folders):
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt=inter())
    loader = torch.utils.data.DataLoader(
        Photographs(processor), batch_size=5, num_workers=1, multiprocessing_context=method
    )
    (batch,) = loader
    assert torch.equal(batch[NAME], processor(PHOTOGRAPHS, return_tensors="pt")[NAME])


def test_a_mapped_and_a_transformed_dataset_have_words(folders):
    datasets = pytest.importorskip("datasets")
    processor = AutoImageProcessor.from_pretrained(folders("vit"), vwt=inter())
    expected = processor(PHOTOGRAPHS, return_tensors="pt")[NAME]
    dataset = datasets.Dataset.from_dict(
        {"image": PHOTOGRAPHS}, features=datasets.Features({"image": datasets.Image()})
    )

    def process(batch):
        return processor([image.convert("RGB") for image in batch["image"]])

    mapped = dataset.map(process, batched=True, remove_columns="image").with_format("torch")
    assert torch.equal(mapped[:][NAME], expected)
    transformed = dataset.with_transform(process)
    assert torch.equal(torch.from_numpy(np.stack(transformed[:][NAME])), expected)


@pytest.mark.newest
@pytest.mark.parametrize("classifier", ["dinov2-small-caltech101", "vit-small-caltech101"])
def test_trained_classifiers_answer_alike_by_either_one_s_words(classifier, shared, plans):
    """By every method, in single precision, on photographs of many kinds of things."""
    folder = shared / "models" / classifier
    paths = sorted((shared / "data/caltech101/validation").glob("*/*"))[::100]
    plain = AutoImageProcessor.from_pretrained(folder)
    train = shared / "data/imagenet-sample/train"
    words = VisualVocabulary.learn(train, plain, size=100, patch_size=14, max_images=60, progress=False)
    images = [Image.open(path).convert("RGB") for path in paths]
    for vwt in ({}, {"criterion": "random"}, {"criterion": "grid"}, {"dropped": "merge"}, words):
        processor = AutoImageProcessor.from_pretrained(folder, vwt=vwt)
        model = AutoModelForImageClassification.from_pretrained(folder, vwt=vwt, dtype=torch.float32)
        made = processor(images, return_tensors="pt")
        with torch.no_grad():
            found = model(pixel_values=made["pixel_values"]).logits
            plan, patches, _ = plans[-1]
            assert torch.equal(made[NAME], plan.patch_words(len(found), patches.count))
            torch.testing.assert_close(model(**made).logits, found, atol=1e-5, rtol=1e-5)


def test_the_class_of_an_image_processor_with_a_setting_makes_plain_ones(folder):
    tokenizing = AutoImageProcessor.from_pretrained(folder, vwt={"keep_ratio": 0.5})
    for made in (type(tokenizing).from_pretrained(folder), type(tokenizing)(size={"height": 32, "width": 32})):
        assert made.vwt is None and set(made([Image.new("RGB", (32, 32))], return_tensors="pt")) == {"pixel_values"}


def test_a_class_that_a_user_derives_from_that_of_an_image_processor_with_a_setting_is_one_of_its_own(folder):
    tokenizing = AutoImageProcessor.from_pretrained(folder, vwt={"keep_ratio": 0.5})
    own = type("Mine", (type(tokenizing),), {"__module__": __name__, "mine": True})
    expected = tokenizing(PHOTOGRAPHS[:1], return_tensors="pt")
    for made in (own.from_pretrained(folder), own.from_pretrained(folder, vwt=False)):
        assert type(made) is own and made.vwt is None and "vwt" not in made.to_dict()
        assert torch.equal(made(PHOTOGRAPHS[:1], return_tensors="pt")["pixel_values"], expected["pixel_values"])
    made = own.from_pretrained(folder, vwt={"keep_ratio": 0.5})
    for each in (made, copy.deepcopy(made)):
        assert type(each) is own and each.mine
        assert torch.equal(each(PHOTOGRAPHS[:1], return_tensors="pt")[NAME], expected[NAME])
    made.save_pretrained(folder / "saved")
    assert own.from_pretrained(folder / "saved").vwt == tokenizing.vwt


def test_words_are_of_the_pixels_that_a_users_own_call_returns(folder):
    class Mirrored(image_processor_class("vit")):
        def __call__(self, images, **kwargs):
            made = super().__call__(images, **kwargs)
            made["pixel_values"] = made["pixel_values"].flip(-1)
            return made

    plain, own = (Mirrored.from_pretrained(folder, vwt=vwt) for vwt in (False, {"keep_ratio": 0.5}))
    found = own(PHOTOGRAPHS[:2], return_tensors="pt")
    assert torch.equal(found["pixel_values"], plain(PHOTOGRAPHS[:2], return_tensors="pt")["pixel_values"])
    patches = Patches.of_images(found["pixel_values"], (4, 4))
    assert torch.equal(found[NAME], VWTConfig(keep_ratio=0.5).patch_words(patches))


def test_a_users_own_call_may_return_another_form(folder):
    class OfOne(image_processor_class("vit")):
        def __call__(self, images, **kwargs):
            return {name: value[0] for name, value in super().__call__(images, **kwargs).items()}

    found = OfOne.from_pretrained(folder, vwt={"keep_ratio": 0.5})(PHOTOGRAPHS[:1], return_tensors="pt")
    own = AutoImageProcessor.from_pretrained(folder, vwt={"keep_ratio": 0.5})(PHOTOGRAPHS[:1], return_tensors="pt")
    assert all(torch.equal(value, own[name][0]) for name, value in found.items()) and len(found) == 2


def test_no_images_have_no_words(folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt={"keep_ratio": 0.5})
    made = processor([], return_tensors="pt")
    assert made["pixel_values"].shape == made["patch_words"].shape == (0,)


def test_an_image_processor_saved_with_another_setting_than_its_model_is_told_of(folder, caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    transformers.AutoModel.from_pretrained(folder, vwt={"method": "local", "tolerance": 0.1}).save_pretrained(folder)
    for method, tolerance, is_told in (("local", 0.1, False), ("gradual", 0.1, False), ("local", 0.2, True)):
        vwt = {"method": method, "tolerance": tolerance}
        AutoImageProcessor.from_pretrained(folder, vwt=vwt).save_pretrained(folder)
        with caplog.at_level("WARNING"):
            AutoImageProcessor.from_pretrained(folder)
        assert ("was saved with vwt=" in caplog.text) == is_told
    caplog.clear()
    transformers.AutoModel.from_pretrained(folder, vwt={"method": "given"}).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(folder)
    assert not caplog.text


def test_an_image_processor_saved_beside_another_that_is_read_in_its_place_is_told_of(folders, tmp_path, caplog):
    processor = AutoImageProcessor.from_pretrained(folders("clip"), vwt={"method": "local", "tolerance": 0.1})
    tokenizer = tokenizer_with({"<s>": 97, "</s>": 98, "<pad>": 1})
    processor.save_pretrained(tmp_path)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not caplog.text
    other = AutoImageProcessor.from_pretrained(folders("clip"), vwt={"method": "local", "tolerance": 0.2})
    other.save_pretrained(tmp_path)
    assert "holds processor_config.json with another image processor, and transformers reads that" in caplog.text
    caplog.clear()
    transformers.CLIPProcessor(other, tokenizer).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").rename(tmp_path / "unread")
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')  # as of long ago
    processor.save_pretrained(tmp_path)
    assert not caplog.text and AutoImageProcessor.from_pretrained(tmp_path).vwt == processor.vwt
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path / "off")
    AutoImageProcessor.from_pretrained(tmp_path / "off", vwt=False).save_pretrained(tmp_path / "off")
    assert "holds processor_config.json with another image processor" in caplog.text
    caplog.clear()
    by_words = AutoImageProcessor.from_pretrained(folders("clip"), vwt=inter())
    transformers.CLIPProcessor(by_words, tokenizer).save_pretrained(tmp_path / "words")
    by_words.save_pretrained(tmp_path / "words")
    assert not caplog.text


def test_an_image_processor_is_loaded_by_the_name_of_its_file_with_the_words_beside_it(folder, monkeypatch):
    AutoImageProcessor.from_pretrained(folder, vwt=inter()).save_pretrained(folder)
    expected = AutoImageProcessor.from_pretrained(folder)(PHOTOGRAPHS, return_tensors="pt")[NAME]
    monkeypatch.chdir(folder)
    for file in (folder / "preprocessor_config.json", "preprocessor_config.json"):
        for given in ({}, {"vwt": inter()}):
            made = ViTImageProcessor.from_pretrained(file, **given)(PHOTOGRAPHS, return_tensors="pt")
            assert torch.equal(made[NAME], expected)


def test_a_plain_image_processor_removes_the_words_of_one_that_was_saved_there(folder):
    AutoImageProcessor.from_pretrained(folder, vwt=inter()).save_pretrained(folder)
    assert list(folder.glob("processor_words-*"))
    AutoImageProcessor.from_pretrained(folder, vwt=False).save_pretrained(folder)
    assert not list(folder.glob("processor_words-*"))


OTHERS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("saved", ["model", "image processor", "model by another method"])
@pytest.mark.parametrize("vwt", [{"method": "local", "tolerance": 0.1}, {"method": "inter", "vocabulary": WORDS}])
def test_statistics_that_are_given_on_loading_hold_for_words_of_a_setting_that_was_saved(vwt, saved, folder):
    image = Image.fromarray(np.random.default_rng(0).integers(90, 150, (32, 32, 3), dtype=np.uint8))
    expected = AutoImageProcessor.from_pretrained(folder, vwt=vwt, **OTHERS)(image, return_tensors="pt")
    asked = {"vwt": vwt}
    if saved == "model":
        asked = {"vwt": {name: value for name, value in vwt.items() if name != "vocabulary"}}  # that is beside it
    if saved == "image processor":
        AutoImageProcessor.from_pretrained(folder, vwt=vwt).save_pretrained(folder)
        asked = {}
    else:
        by = {"method": "coarse"} if saved != "model" else vwt
        transformers.AutoModel.from_pretrained(folder, vwt=by).save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, **asked, **OTHERS)
    made = processor(image, return_tensors="pt")
    assert torch.equal(made[NAME], expected[NAME]) and torch.equal(made["pixel_values"], expected["pixel_values"])
    processor.save_pretrained(folder)
    again = AutoImageProcessor.from_pretrained(folder)
    assert again.vwt["image_std"] == OTHERS["image_std"]
    assert torch.equal(again(image, return_tensors="pt")[NAME], expected[NAME])


@pytest.mark.parametrize("vwt", [{"method": "local", "tolerance": 0.1}, {"method": "inter", "vocabulary": WORDS}])
def test_pixels_that_are_normalised_already_have_the_words_of_the_statistics_that_were_saved(vwt, folder):
    image = Image.fromarray(np.random.default_rng(0).integers(90, 150, (32, 32, 3), dtype=np.uint8))
    AutoImageProcessor.from_pretrained(folder, vwt=vwt).save_pretrained(folder)
    expected = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    as_is = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    processor = AutoImageProcessor.from_pretrained(folder, **as_is)
    assert torch.equal(processor(expected["pixel_values"], return_tensors="pt")[NAME], expected[NAME])


def test_the_patches_of_the_model_beside_go_before_those_of_a_setting_that_was_saved(folder):
    AutoImageProcessor.from_pretrained(folder, vwt=True).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"patch_size": 8}))
    assert AutoImageProcessor.from_pretrained(folder, vwt=True).vwt["patch_size"] == [8, 8]


@pytest.mark.parametrize("newer", [{"newer_field": 1}, {"tolerance": "much"}, {"method": "later"}])
def test_a_setting_that_cannot_be_read_gives_way_to_the_one_asked_for(newer, folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vwt": {"patch_size": [4, 4]} | newer}))
    (folder / "config.json").unlink()
    assert AutoImageProcessor.from_pretrained(folder, vwt=True)(PHOTOGRAPHS)[NAME]
    with pytest.raises(ValueError, match=r"`vwt=False` loads the plain image processor"):
        AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    "vwt", [{"method": "local", "tolerance": 0.1}, {"method": "coarse"}, {"method": "inter", "vocabulary": WORDS}]
)
def test_statistics_that_change_after_the_setting_was_made_ready_are_refused(vwt, folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=vwt)
    image = Image.fromarray(np.random.default_rng(0).integers(90, 150, (32, 32, 3), dtype=np.uint8))
    expected = processor(image, return_tensors="pt")
    scaled = np.asarray(image, np.float32) / 255  # so that the same statistics are in other numbers
    again = processor(scaled, do_rescale=False, input_data_format="channels_last", return_tensors="pt")
    assert torch.equal(again[NAME], expected[NAME])
    for factor in (1.0, 1 / 255):  # whatever white is
        given = {"do_resize": False, "rescale_factor": factor, "input_data_format": "channels_last"}
        again = processor(scaled / factor, **given, return_tensors="pt")
        assert torch.equal(again[NAME], expected[NAME])
    as_is = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    done = processor(expected["pixel_values"], **as_is, return_tensors="pt")
    assert torch.equal(done[NAME], expected[NAME])
    with pytest.raises(ValueError, match=r"and image_std .*0\.3, 0\.3, 0\.3.*, and its `vwt` was made ready for"):
        processor(image, image_std=[0.3] * 3)
    with pytest.raises(ValueError, match=r"and image_std \(0\.0, 1\.0\), and its `vwt` was made ready for"):
        processor(image, do_normalize=False)
    with pytest.raises(ValueError, match=r"\[0\.3\], and its|\[0\.3\]\), and its `vwt` was made ready for"):
        processor(image, image_std=[0.3])
    processor.do_normalize = False
    with pytest.raises(ValueError, match=r"was made ready for"):
        processor.save_pretrained(folder)
    processor.do_normalize = True
    std, processor.image_std = processor.image_std, [0.3] * 3
    for use in (lambda: processor(image), lambda: processor.save_pretrained(folder)):
        with pytest.raises(ValueError, match=r"Load it with them: from_pretrained\(..., image_mean"):
            use()
    processor.image_std = std
    assert torch.equal(processor(image, return_tensors="pt")[NAME], expected[NAME])


@pytest.mark.parametrize(
    "own",
    [
        {"method": "local", "tolerance": 0.1, "image_std": [0.2, 0.3, 0.4]},
        {"method": "inter", "vocabulary": WORDS, "image_mean": [0.2, 0.3, 0.4]},
    ],
)
def test_a_setting_with_statistics_of_its_own_takes_images_of_any(own, folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=own)
    assert processor(Image.new("RGB", (32, 32)), image_std=[0.3] * 3, return_tensors="pt")[NAME].shape == (1, 64)


class OldStyle(BaseImageProcessor):
    """As the code of some checkpoints: it says nothing of how it normalises."""

    def preprocess(self, images, **kwargs) -> BatchFeature:
        pixels = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) / 255 for image in images])
        return BatchFeature({"pixel_values": pixels}, tensor_type=kwargs.get("return_tensors"))


@pytest.mark.parametrize("vwt", [{"keep_ratio": 0.5}, {"method": "local", "image_std": [1.0] * 3, "tolerance": 0.1}])
def test_an_image_processor_that_says_nothing_of_statistics_takes_a_setting_that_needs_none(vwt, folder):
    OldStyle().save_pretrained(folder)
    processor = OldStyle.from_pretrained(folder, vwt=vwt)
    assert processor([Image.new("RGB", (32, 32))], return_tensors="pt")[NAME].shape == (1, 64)


def test_without_a_model_the_setting_tells_how_many_channels_images_have(tmp_path):
    OldStyle().save_pretrained(tmp_path)
    vwt = {"method": "local", "image_std": [1.0], "tolerance": 0.1, "patch_size": 4}
    processor = OldStyle.from_pretrained(tmp_path, vwt=vwt)
    assert processor([np.zeros((32, 32, 1))], return_tensors="pt")[NAME].shape == (1, 64)


def test_an_image_processor_that_was_not_made_ready_for_its_setting_says_how_it_is():
    processor = ViTImageProcessor()
    processor.vwt = {"keep_ratio": 0.5}
    with pytest.raises(ValueError, match=r"was not made ready for it\. Load it with from_pretrained\(\.\.\., vwt"):
        processor(Image.new("RGB", (32, 32)))


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "with texts"])
def test_an_image_processor_whose_setting_was_assigned_is_not_saved_in_place_of_a_good_one(whole, folder):
    saved = AutoImageProcessor.from_pretrained(folder, vwt=inter())
    assigned = copy.deepcopy(saved)
    assigned.vwt = assigned.vwt
    if whole:
        tokenizer = tokenizer_with({"<s>": 97, "</s>": 98, "<pad>": 1})
        saved, assigned = (transformers.CLIPProcessor(each, tokenizer) for each in (saved, assigned))
    saved.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=r"was not made ready for it\. Load it with from_pretrained\(\.\.\., vwt"):
        assigned.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before


class BaseVideoProcessor(OldStyle):
    """What reads videos, by the name that transformers gives it where there is torchvision."""


def test_what_reads_videos_stays_plain_as_the_model_finds_their_words_itself():
    processor = BaseVideoProcessor()
    processor.vwt = {"keep_ratio": 0.5}
    assert type(processor) is BaseVideoProcessor and processor.vwt is None


def test_a_setting_without_statistics_takes_images_of_any(folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt={"keep_ratio": 0.5})
    assert processor(Image.new("RGB", (32, 32)), image_std=[0.3] * 3, return_tensors="pt")[NAME].shape == (1, 64)
