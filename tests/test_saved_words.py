"""Words beside a model's weights: a folder holds the whole of one save, or loading it says that it does not."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
import shutil
import types
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from settings import STATISTICS, ViTImageProcessor, inter
from tiny import answers, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, compress, evaluate_model, model_loading, restore
from vwt_hf.compress import lexicon_of
from vwt_hf.processors import load_beside, load_processor
from vwt_hf.saved_words import require_sealed, seal_words, words_folder, write_words
from vwt_hf.whole_saves import sharing


def words(seed: int) -> VisualVocabulary:
    return VisualVocabulary(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(seed)))


def model(seed: int) -> transformers.PreTrainedModel:
    """Weights, words and threshold are of that seed."""
    made = tiny_model("vit")
    with torch.no_grad():
        made.embeddings.cls_token.add_(seed)
    return compress(made, inter(words(seed), threshold=0.2 + seed / 10))


def load(folder: Path, **kwargs) -> transformers.PreTrainedModel:
    return transformers.AutoModel.from_pretrained(folder, **kwargs)


def test_threads_that_save_one_model_leave_each_its_own_words(tmp_path):
    """Each of several saves, into folders of their own, which all can be loaded."""
    saved = model(0)
    folders = [tmp_path / f"{number}" for number in range(12)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(saved.save_pretrained, folders))
    for folder in folders:
        assert torch.equal(lexicon_of(load(folder)).vocabulary.words, words(0).words)


def test_threads_that_save_a_tower_of_a_compressed_whole_leave_it_compressed(tmp_path):
    tower = compress(tiny_model("clip"), {"method": "local", "image_std": [0.5] * 3}).vision_model
    folders = [tmp_path / f"{number}" for number in range(12)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(tower.save_pretrained, folders))
    assert all(json.loads((folder / "config.json").read_text())["vwt"]["method"] == "local" for folder in folders)


def test_a_save_with_words_waits_for_another_into_its_folder_and_one_without_does_not(tmp_path):
    with ThreadPoolExecutor(1) as thread:
        with sharing(tmp_path):
            thread.submit(compress(tiny_model("vit"), {"keep_ratio": 0.5}).save_pretrained, tmp_path).result(30)
            before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
            save = thread.submit(model(0).save_pretrained, tmp_path)
            assert not wait([save], 0.5).done
            assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
        save.result()
    assert load(tmp_path).config.vwt["method"] == "inter"


def test_a_model_that_was_saved_takes_its_own_setting_again(tmp_path):
    """Its words have another name in config.vwt since the save, and no other process has them under the first."""
    saved = model(0)
    saved.save_pretrained(tmp_path)
    setting, pickled = saved.config.vwt, pickle.dumps(saved)
    restore(saved)
    del saved
    gc.collect()
    shutil.rmtree(tmp_path)
    again = pickle.loads(pickled)
    compress(again, {**setting, "threshold": 0.4})
    assert torch.equal(lexicon_of(again).vocabulary.words, words(0).words) and again.config.vwt["threshold"] == 0.4


def test_a_setting_that_was_read_before_a_save_is_taken_after_it(tmp_path):
    saved = model(0)
    before = saved.config.vwt
    saved.save_pretrained(tmp_path / "saved")
    for setting in (before, saved.config.vwt, before):
        compress(saved, {**setting, "threshold": 0.4})
        assert torch.equal(lexicon_of(saved).vocabulary.words, words(0).words)
    ViTImageProcessor().save_pretrained(tmp_path)
    tiny_model("vit").save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=saved.config.vwt)
    assert torch.equal(processor.tokenizer_of_patches.setting.words.vocabulary.words, words(0).words)


def test_a_file_in_the_place_of_the_folder_to_save_into_is_named_and_stays(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    ViTImageProcessor().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(
        tmp_path, vwt={"vocabulary": words(0), "method": "inter", "patch_size": 4}
    )
    for saved in (words(0), model(0), compress(tiny_model("vit"), {"keep_ratio": 0.5}), processor):
        for place in (file, file / "folder"):
            with pytest.raises(NotADirectoryError, match="file is no folder; expected one to write into"):
                saved.save_pretrained(place)
        with pytest.raises(NotADirectoryError, match="No folder is named"):
            saved.save_pretrained("")
    assert file.read_text() == "old"


def test_a_pickle_in_place_of_a_saved_models_words_is_not_read(tmp_path):
    saved = model(0)
    saved.save_pretrained(tmp_path)
    [folder] = tmp_path.glob("visual_words-*")
    (folder / "vocabulary.json").unlink()
    torch.save(words(1).words.flatten(1), folder / "vocab.pt")
    with pytest.raises(FileNotFoundError, match=r"holds no vocabulary\.json"):
        load(tmp_path)


def test_what_saves_still_tells_its_arguments_and_what_it_does():
    assert "max_shard_size" in inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    for kind in (transformers.PreTrainedModel, ViTImageProcessor, transformers.ProcessorMixin):
        assert "save_directory" in kind.save_pretrained.__doc__


class Killed(BaseException):
    """In place of a signal that ends the process."""


def killed(monkeypatch, owner: type, name: str) -> None:
    def kill(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(owner, name, kill)


def test_a_save_that_ends_before_the_config_leaves_the_old_model_and_the_next_removes_its_words(
    pixel_values, tmp_path, monkeypatch
):
    model(0).save_pretrained(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed(patched, transformers.PreTrainedConfig, "save_pretrained")
        model(1).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("visual_words-*"))) == 2
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(0), pixel_values))
    (tmp_path / "notes.txt").write_text("mine")
    model(2).save_pretrained(tmp_path)
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(2), pixel_values))
    assert len(list(tmp_path.glob("visual_words-*"))) == 1 and (tmp_path / "notes.txt").read_text() == "mine"
    tiny_model("vit").save_pretrained(tmp_path)
    assert not list(tmp_path.glob("visual_words-*")) and load(tmp_path).config.vwt is None


def test_a_save_that_ends_before_the_weights_is_noticed(pixel_values, tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed(patched, transformers.PreTrainedModel, "state_dict")
        model(1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"config\.json of {tmp_path}: .*was not finished.*`vwt=False`"):
        load(tmp_path)
    model(1).save_pretrained(tmp_path)
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(1), pixel_values))


@pytest.mark.parametrize("what", ["weights", "words"])
def test_weights_or_words_of_another_save_are_noticed(what, tmp_path):
    for seed in (0, 1):
        model(seed).save_pretrained(tmp_path / str(seed))
    if what == "weights":
        shutil.copy(tmp_path / "1/model.safetensors", tmp_path / "0/model.safetensors")
        expected = r"model\.safetensors holds other weights"
    else:
        (own,), (other,) = (list((tmp_path / seed).glob("visual_words-*")) for seed in "01")
        shutil.copy(other / "vocabulary.safetensors", own / "vocabulary.safetensors")
        expected = "vocabulary"
    with pytest.raises(ValueError, match=expected):
        load(tmp_path / "0")
    assert load(tmp_path / "0", vwt=False).config.vwt is None
    assert load(tmp_path / "0", vwt=inter(words(3))).config.vwt["method"] == "inter"


def test_large_weights_are_told_apart_by_blocks_from_their_first_byte_to_their_last(tmp_path):
    length = 3 << 20
    (tmp_path / "model.safetensors").write_bytes(bytes(length))
    saved_as = write_words(tmp_path, words(0))
    seal_words(tmp_path, [saved_as])
    require_sealed(tmp_path / words_folder(saved_as))
    for place in (0, 1_540_000, length - 1):
        changed = bytearray(length)
        changed[place] = 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        with pytest.raises(ValueError, match=r"model\.safetensors holds other weights"):
            require_sealed(tmp_path / words_folder(saved_as))


def test_a_save_removes_the_words_of_other_saves_and_no_folder_of_a_user(tmp_path):
    of_a_save, *mine = (tmp_path / f"visual_words-{end}" for end in ("0" * 16, "0" * 16 + "-mine", "mine"))
    for folder in (of_a_save, *mine):
        folder.mkdir()
    link, file = (tmp_path / f"visual_words-{digit * 16}" for digit in "12")
    link.symlink_to(mine[1])
    file.write_text("mine")
    model(0).save_pretrained(tmp_path)
    assert not of_a_save.exists() and all(path.exists() for path in (*mine, link, file))


def test_a_seal_tells_of_no_files_but_weights(tmp_path):
    model(0).save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("mine")
    (seal,) = tmp_path.glob("model/visual_words-*/sealed.json")
    content = json.loads(seal.read_text())
    content["weights"] |= {"../notes.txt": "0", "config.json": "0"}
    seal.write_text(json.dumps(content))
    assert load(tmp_path / "model").config.vwt["method"] == "inter"


def test_a_model_whose_embeddings_were_replaced_since_is_not_saved_as_a_plain_one(tmp_path):
    model = compress(tiny_model("vit-classifier"), {"keep_ratio": 0.5})
    model.vit.embeddings = tiny_model("vit-classifier").vit.embeddings
    with pytest.raises(ValueError, match=r"embeddings of the ViT\w+ were replaced after it was compressed"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    restore(model).save_pretrained(tmp_path / "plain")
    compress(model, {"keep_ratio": 0.5}).save_pretrained(tmp_path / "short")
    plain, short = (transformers.AutoConfig.from_pretrained(tmp_path / name).vwt for name in ("plain", "short"))
    assert plain is None and short["keep_ratio"] == 0.5


@pytest.mark.parametrize("name", ["vit-classifier", "clip"])
def test_a_model_whose_tower_was_restored_or_replaced_since_is_saved_as_the_plain_one_that_it_is(name, tmp_path):
    whole = compress(tiny_model(name), {"keep_ratio": 0.5})
    tower = "vit" if name == "vit-classifier" else "vision_model"
    restore(getattr(whole, tower))
    whole.save_pretrained(tmp_path / "restored")
    other = compress(tiny_model(name), {"keep_ratio": 0.5})
    setattr(other, tower, getattr(tiny_model(name), tower))
    other.save_pretrained(tmp_path / "replaced")
    for saved in ("restored", "replaced"):
        assert transformers.AutoConfig.from_pretrained(tmp_path / saved).vwt is None


# Shards without a variant would replace those with one: transformers removes them.
@pytest.mark.parametrize(("first", "shards"), [(None, "1GB"), ("ft", "1GB"), (None, "30KB")])
def test_weights_of_another_variant_do_not_meet_other_words(first, shards, pixel_values, tmp_path):
    second = "ft" if first is None else None
    of = {"max_shard_size": shards}
    model(0).save_pretrained(tmp_path, variant=first, **of)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"which was saved with other words.*Save into another folder, or remove"):
        model(1).save_pretrained(tmp_path, variant=second, **of)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    model(1).save_pretrained(tmp_path, variant=first, **of)  # in place of the others
    model(1).save_pretrained(tmp_path, variant=second, **of)  # the same words
    for variant in (None, "ft"):
        found = answers(load(tmp_path, variant=variant), pixel_values)
        torch.testing.assert_close(found, answers(model(1), pixel_values))
    with pytest.raises(ValueError, match="which was saved with other words"):  # the last seal tells of both variants
        model(2).save_pretrained(tmp_path, variant=second, **of)


@pytest.mark.parametrize("with_words", [True, False])
def test_weights_in_one_file_that_stay_beside_shards_do_not_meet_other_words(with_words, pixel_values, tmp_path):
    """transformers leaves them there, and loads them in place of the shards."""
    model(0).save_pretrained(tmp_path)
    model(1).save_pretrained(tmp_path, max_shard_size="30KB")
    if not with_words:  # shards of before, and a plain model that is saved over them in one file
        (tmp_path / "model.safetensors").unlink()
        torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(1), pixel_values))
        restore(model(2)).save_pretrained(tmp_path / "plain")
        shutil.copy(tmp_path / "plain" / "model.safetensors", tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.safetensors is not of the save that wrote visual_words-.* Remove it if"
    ):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(1), pixel_values))


@pytest.mark.parametrize("subfolder", ["", "sub"])
def test_weights_that_are_saved_while_a_model_is_loaded_do_not_meet_its_words(subfolder, tmp_path, monkeypatch):
    """A save that ends after the weights were read and before the words are, whose seal fits what lies there then."""
    folder = tmp_path / subfolder
    model(0).save_pretrained(folder)
    follow = model_loading._follow

    def saved_meanwhile(*of):
        monkeypatch.undo()
        saved = model(1)
        saved.save_pretrained(folder)
        of[0].config.vwt = saved.config.vwt  # as config.json names them, which is written before the weights
        follow(*of)

    monkeypatch.setattr(model_loading, "_follow", saved_meanwhile)
    with pytest.raises(ValueError, match=rf"{folder}: a model was saved into it while this one was loaded.*again"):
        load(tmp_path, subfolder=subfolder)
    assert load(folder).config.vwt["threshold"] == pytest.approx(0.3)


def test_a_link_to_nothing_beside_the_weights_changes_nothing(pixel_values, tmp_path):
    """As in a snapshot of the Hub's cache of which a file was removed."""
    (tmp_path / "pytorch_model.bin").symlink_to(tmp_path / "gone")
    model(0).save_pretrained(tmp_path)
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(0), pixel_values))


@pytest.mark.parametrize("subfolder", ["sub/", "./sub", "sub//", Path("sub")], ids=str)
def test_a_subfolder_is_found_as_transformers_finds_it(subfolder, pixel_values, tmp_path):
    model(0).save_pretrained(tmp_path / "sub")
    found = answers(load(tmp_path, subfolder=subfolder), pixel_values)
    torch.testing.assert_close(found, answers(model(0), pixel_values))


@pytest.mark.parametrize("how", [lambda one: one, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_finds_what_lies_beside_the_weights_also_from_another_folder(how, tmp_path, monkeypatch):
    """Relative to that, and above the subfolder, lie models with other words and statistics."""
    for seed, (folder, deviation) in enumerate({"of/sub": 0.2, "of": 0.3, "there/of/sub": 0.4}.items()):
        model(seed).save_pretrained(tmp_path / folder)
        ViTImageProcessor(image_std=[deviation] * 3).save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    found = how(load(Path("of"), subfolder="sub", vwt=False))
    monkeypatch.chdir("there")
    assert compress(found, True).config.vwt["image_std"] == [0.2] * 3
    compress(restore(found), {"method": "inter"})
    assert torch.equal(lexicon_of(found).vocabulary.words, words(0).words)
    assert list(load_beside(found, load_processor, "image processor", "").image_std) == [0.2] * 3


def test_a_part_finds_what_lies_beside_the_weights_of_the_whole(tmp_path):
    tiny_model("clip").save_pretrained(tmp_path / "sub")
    ViTImageProcessor(image_std=[0.2] * 3).save_pretrained(tmp_path / "sub")
    part = load(tmp_path, subfolder="sub").vision_model
    assert compress(part, True).config.vwt["image_std"] == [0.2] * 3


def test_of_a_project_that_moved_the_model_of_its_name_counts(tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path / "before/out")
    monkeypatch.chdir(tmp_path / "before")
    pickled = pickle.dumps(load(Path("out"), vwt=False))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before").rename("after")
    with pytest.raises(FileNotFoundError, match=r"before/out"):  # and not the package's words in their place
        compress(pickle.loads(pickled), {"method": "inter", **STATISTICS})
    monkeypatch.chdir("after")
    found = compress(pickle.loads(pickled), {"method": "inter"})
    assert torch.equal(lexicon_of(found).vocabulary.words, words(0).words)


def test_a_pickled_model_holds_no_token(tmp_path):
    model(0).save_pretrained(tmp_path)
    assert b"hf_secret" not in pickle.dumps(load(tmp_path, token="hf_secret"))


def test_an_empty_name_of_a_folder_is_refused_before_words_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, **STATISTICS)
    processor.save_pretrained("plain")
    processor = AutoImageProcessor.from_pretrained(
        "plain", vwt=inter(words(0)).to_dict() | {"vocabulary": words(0), "patch_size": 4}
    )
    for saved in (model(0), words(0), processor):
        with pytest.raises(NotADirectoryError, match="No folder is named, but an empty text"):
            saved.save_pretrained("")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_threshold_may_be_changed_by_hand(tmp_path):
    model(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vwt"]["threshold"] = 0.05
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).config.vwt["threshold"] == 0.05
    given = load(tmp_path, vwt={"method": "inter", "threshold": 0.4, **STATISTICS})
    assert given.config.vwt["threshold"] == 0.4


def test_words_in_a_folder_without_a_seal_are_loaded_where_the_setting_names_no_save(pixel_values, tmp_path):
    made = tiny_model("vit")
    made.config.vwt = VWTConfig(method="inter", threshold=0.2, **STATISTICS).to_dict()
    made.config.save_pretrained(tmp_path)
    tiny_model("vit").save_pretrained(tmp_path / "weights")
    (tmp_path / "weights/model.safetensors").rename(tmp_path / "model.safetensors")
    words(0).save_pretrained(tmp_path / "visual_words")
    expected = compress(tiny_model("vit"), inter(words(0), threshold=0.2))
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(expected, pixel_values))


@pytest.mark.parametrize(
    "seal", [b"", b"[]", b'{"weights": 3}', b"[" * 100000], ids=["empty", "list", "number", "deep"]
)
def test_a_damaged_seal_is_told_by_its_name(seal, tmp_path):
    model(0).save_pretrained(tmp_path)
    (folder,) = tmp_path.glob("visual_words-*")
    (folder / "sealed.json").write_bytes(seal)
    with pytest.raises(ValueError, match=r"sealed\.json is damaged.*Save the model again, or say with `vwt="):
        load(tmp_path)
    model(0).save_pretrained(tmp_path, variant="ft")  # beside the weights that it does not tell of
    model(0).save_pretrained(tmp_path)
    load(tmp_path)


@pytest.mark.parametrize("saved_as", ["../../etc", "", 5, "A" * 16, "0" * 17])
def test_a_setting_names_no_folder_but_its_own(saved_as):
    with pytest.raises(ValueError, match=r"saved_as is .*expected None or 16 digits"):
        VWTConfig(method="inter", saved_as=saved_as)


def test_a_process_of_many_that_writes_no_config_leaves_the_words_that_it_names(pixel_values, tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path)
    with monkeypatch.context() as patched:  # as of every process but the first, once torch.distributed is set up
        patched.setattr(transformers.PreTrainedModel, "should_save_on_this_rank", lambda *_: False)
        model(0).save_pretrained(tmp_path)
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(0), pixel_values))


def test_adapters_saved_into_the_folder_of_a_model_leave_its_words(pixel_values, tmp_path):
    adapted = model(0)
    adapted.save_pretrained(tmp_path)
    # As `add_adapter` leaves a model, which needs another peft on each end of transformers.
    config = types.SimpleNamespace(save_pretrained=lambda folder: Path(folder, "adapter_config.json").write_text("{}"))
    adapted.__dict__.update(_hf_peft_config_loaded=True, peft_config={"mine": config})
    adapted.__dict__.update(active_adapters=lambda: ["mine"], get_adapter_state_dict=lambda **_: {})
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert len(list(tmp_path.glob("visual_words-*"))) == 1
    (tmp_path / "adapter_config.json").unlink()  # else the base model is loaded with it
    torch.testing.assert_close(answers(load(tmp_path), pixel_values), answers(model(0), pixel_values))


@pytest.mark.parametrize("setting", [VWTConfig(keep_ratio=0.5), inter(words(0), threshold=0.2)], ids=["kept", "words"])
@pytest.mark.parametrize("name", ["clip", "siglip", "aimv2"])
def test_a_tower_of_a_compressed_whole_is_saved_as_it_runs(name, setting, pixel_values, tmp_path):
    whole = compress(tiny_model(name), setting)
    tower = whole.vision_model
    tower.save_pretrained(tmp_path / "tower")
    assert tower.config.vwt is None and whole.config.vwt["method"] == setting.method
    again = type(tower).from_pretrained(tmp_path / "tower").eval()
    assert again.config.vwt["method"] == setting.method
    torch.testing.assert_close(again(pixel_values)[0], tower(pixel_values)[0])
    whole.save_pretrained(tmp_path / "whole")
    again = type(whole).from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(answers(again, pixel_values), answers(whole, pixel_values))


HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
NO_WORDS = {"method": "inter", "threshold": 0.5}


def of_16() -> VWTConfig:
    """Words of patches that the package has words for, too."""
    own = VisualVocabulary(torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(5)))
    return VWTConfig("inter", vocabulary=own, threshold=0.5, **HALVES)


@pytest.fixture
def with_own_words(tmp_path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A model saved with words of its own, images, and its answers."""
    own = compress(tiny_model("vit", patch_size=16, image_size=64), of_16())
    own.save_pretrained(tmp_path / "short")
    pixel_values = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = answers(own, pixel_values)
    by_package = compress(tiny_model("vit", patch_size=16, image_size=64), NO_WORDS | HALVES)
    assert (answers(by_package, pixel_values) - expected).abs().max() > 1e-3
    return tmp_path / "short", pixel_values, expected


def test_a_setting_without_words_takes_those_that_the_model_was_saved_with(with_own_words):
    folder, pixel_values, expected = with_own_words
    plain, restored, other = load(folder, vwt=False), restore(load(folder)), compress(load(folder), {"method": "local"})
    for again in (load(folder, vwt=NO_WORDS), *(compress(one, NO_WORDS) for one in (plain, restored, other))):
        torch.testing.assert_close(answers(again, pixel_values), expected)


def test_evaluation_goes_by_the_words_that_the_model_was_saved_with(tmp_path):
    own = compress(tiny_model("vit-classifier", patch_size=16, image_size=64), of_16())
    own.save_pretrained(tmp_path / "short")
    ViTImageProcessor(size={"height": 64, "width": 64}, **HALVES).save_pretrained(tmp_path / "short")
    for number, name in enumerate(sorted(own.config.id2label.values())[:2]):
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(number)) * 127 + 128
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / "images" / name / "bright.png")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "short")
    plain, own, found = evaluate_model(model, tmp_path / "images", vwt=[of_16(), NO_WORDS], progress=False).rows
    assert found.figures == own.figures != plain.figures and found.tokens == own.tokens


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_words_of_a_tower_that_was_compressed_alone_are_those_of_its_image_processor_too(name, tmp_path):
    whole = tiny_model(name, patch_size=16, image_size=64)
    compress(whole.vision_model, of_16())
    whole.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}, **HALVES).save_pretrained(tmp_path)
    own = of_16().vocabulary.words
    assert torch.equal(lexicon_of(type(whole).from_pretrained(tmp_path)).vocabulary.words, own)
    assert torch.equal(lexicon_of(type(whole).from_pretrained(tmp_path, vwt=NO_WORDS)).vocabulary.words, own)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=NO_WORDS)
    assert torch.equal(processor.tokenizer_of_patches.setting.words.vocabulary.words, own)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_tower_of_a_whole_that_was_saved_with_words_takes_those(name, tmp_path):
    whole = compress(tiny_model(name, patch_size=16, image_size=64), of_16())
    whole.save_pretrained(tmp_path)
    tower = type(whole.vision_model).from_pretrained(tmp_path, vwt=NO_WORDS)
    assert torch.equal(lexicon_of(tower).vocabulary.words, of_16().vocabulary.words)


def test_a_folder_that_a_config_names_by_itself_is_not_read(with_own_words, tmp_path):
    """`_name_or_path` within a config.json is what its writer liked it to be."""
    folder, _, _ = with_own_words
    saved_as = load(folder).config.vwt["saved_as"]
    config = tiny_model("clip", patch_size=16, image_size=64).config.to_dict()
    strange = {"vwt": NO_WORDS | HALVES | {"saved_as": saved_as}, "_name_or_path": str(folder)}
    config["vision_config"] |= strange
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger/config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match="this model was loaded from nowhere"):
        transformers.AutoModel.from_config(read)


def test_an_adapters_folder_has_the_words_of_its_base(with_own_words, tmp_path):
    peft = pytest.importorskip("peft")
    folder, pixel_values, _ = with_own_words
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(r=2, target_modules=["query", "q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = transformers.ViTModel.from_pretrained(tmp_path / "adapter").eval()
    assert loaded.config.vwt["method"] == "inter"
    torch.testing.assert_close(answers(loaded, pixel_values), answers(adapted.eval(), pixel_values))
