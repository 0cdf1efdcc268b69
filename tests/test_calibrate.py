"""A calibrated setting keeps what was asked for, says what shows it, and leaves the model as it was."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from settings import FAST
from tiny import answers, sample_pixel_values, tiny_model, traces
from vwt_hf import VWTConfig, calibrate, compress
from vwt_hf.answers import answer, on_device
from vwt_hf.calibrate import CHOICES, FEWEST, Calibration, Choice, Level
from vwt_hf.cli import main
from vwt_hf.compress import setting_of
from vwt_hf.figures import agreement, cosines, share_interval
from vwt_hf.image_processing import HostTokenizer
from vwt_hf.processors import load_processor
from vwt_hf.timing import count_flops
from vwt_hf.token_count import count_tokens
from vwt_hf.weights import copy_sharing_weights

# No step of it depends on the version of transformers.
pytestmark = pytest.mark.newest
COUNT = 60


def soft_images(count: int = COUNT, seed: int = 0) -> list[Image.Image]:
    """Images with flat and busy parts, of which each level leaves fewer tokens."""
    values = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(values.integers(0, 255, (3, 3, 3), dtype=np.uint8)).resize((32, 32))
        noise = values.normal(0, 12, (32, 32, 1)) * np.linspace(0, 1, 32)[:, None, None]
        images.append(Image.fromarray((np.asarray(coarse) * 0.5 + 64 + noise).clip(0, 255).astype(np.uint8)))
    return images


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return soft_images()


@pytest.fixture(scope="module")
def processor() -> transformers.ViTImageProcessorPil:
    return transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})


def tiny_classifier() -> transformers.PreTrainedModel:
    return tiny_model("vit-classifier", num_hidden_layers=3, num_labels=40).requires_grad_(False)


@pytest.fixture
def classifier() -> transformers.PreTrainedModel:
    return tiny_classifier()


@pytest.fixture
def folder(tmp_path: Path, images: list[Image.Image]) -> Path:
    (tmp_path / "photographs").mkdir()
    for index, image in enumerate(images):
        image.save(tmp_path / "photographs" / f"{index:03}.png")
    return tmp_path / "photographs"


@pytest.fixture
def checkpoint(tmp_path: Path, classifier, processor) -> Path:
    classifier.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def level_setting(level: Choice) -> VWTConfig:
    return VWTConfig(**level._asdict(), image_std=(0.5,) * 3)


def choice_of(setting: VWTConfig) -> Choice:
    return Choice(setting.method, setting.tolerance, setting.similarity)


def every_level(model, images, processor) -> list[tuple[float, float, float, torch.Tensor]]:
    """Agreement, tokens, times fewer operations of each level, and cosines, found without `calibrate`."""
    batch = processor(images, return_tensors="pt")
    plain = answer(model, **batch)
    found = []
    for level in CHOICES:
        short = compress(copy_sharing_weights(model), level_setting(level))
        with count_tokens(short) as tokens:
            own = answer(short, **batch)
        flops = [count_flops(lambda one=one: one(**batch)) for one in (model, short)]
        found.append((agreement(own, plain), tokens.mean, flops[0] / flops[1], cosines(own, plain)))
    return found


@pytest.fixture(scope="module")
def known(images, processor) -> list[tuple[float, float, float, torch.Tensor]]:
    return every_level(tiny_classifier(), images, processor)


def options(processor, **more):
    return {"image_processor": processor, "by": "flops", "progress": False, **more}


def test_the_fastest_level_that_agrees_enough_is_found_and_the_evidence_is_what_it_does(
    classifier, images, processor, known
):
    agreements = [row[0] for row in known]
    search = Calibration(classifier, images, **options(processor))
    for target in {agreements[0], min(agreements[0], agreements[-1]), min(agreements)}:
        setting = search.find(agreement=target)
        index = CHOICES.index(choice_of(setting))
        assert agreements[index] >= target and not any(value >= target for value in agreements[index + 1 : index + 2])
        assert setting.evidence["value"] == pytest.approx(agreements[index], abs=1e-6)
        assert setting.evidence["interval"] == pytest.approx(share_interval(agreements[index], COUNT), abs=1e-6)
        assert setting.evidence["measure"] == "agreement" and setting.evidence["images"] == COUNT


@pytest.fixture
def on_a_line(classifier, images, processor, monkeypatch) -> Calibration:
    """A search in which each level agrees 0.01 less, has a token less and is by 0.1 faster than the one before."""

    def measure(self, level, bar):
        place = CHOICES.index(level)
        return Level(*level, 0.97 - place / 100, (0.5, 1.0), 60 - place, 65, 1.1 + place / 10)

    monkeypatch.setattr(Calibration, "_measure", measure)
    return Calibration(classifier, images, **options(processor))


@pytest.mark.parametrize("place", range(len(CHOICES)))
@pytest.mark.parametrize(
    ("target", "first", "step"), [("agreement", 0.965, -0.01), ("tokens", 60.5, -1), ("speed", 1.05, 0.1)]
)
def test_a_few_levels_are_tried_to_find_the_right_one(on_a_line, place, target, first, step):
    setting = on_a_line.find(**{target: first + place * step})
    assert choice_of(setting) == CHOICES[place] and len(on_a_line.tried) <= 4


@pytest.mark.parametrize(
    ("target", "asked", "reason"),
    [
        (
            "agreement",
            0.98,
            "and the nearest setting that was tried (gradual, tolerance 0.006, similarity 0.84) reaches agreement 0.97",
        ),
        (
            "speed",
            3,
            "and the nearest setting that was tried (coarse, tolerance 0.1, similarity 0.5) is 2.20 times as f",
        ),
        (
            "tokens",
            5,
            "and the nearest setting that was tried (coarse, tolerance 0.1, similarity 0.5) leaves 49.0 of 65",
        ),
    ],
)
def test_a_target_that_no_level_reaches_is_refused_with_the_nearest_that_one_does(on_a_line, target, asked, reason):
    with pytest.raises(ValueError, match=re.escape(f"{target} is {asked:g}, {reason}")) as refusal:
        on_a_line.find(**{target: asked})
    nearest = re.search(rf"Ask for {target}=([\d.]*\d)", str(refusal.value))
    assert nearest and on_a_line.find(**{target: float(nearest.group(1))})


def make_coarse(monkeypatch, **fields) -> None:
    """Has levels of coarse measured with these figures."""
    measure = Calibration._measure

    def measured(self, choice, bar):
        level = measure(self, choice, bar)
        return dataclasses.replace(level, **fields) if choice.method == "coarse" else level

    monkeypatch.setattr(Calibration, "_measure", measured)


def test_the_nearest_that_is_told_may_be_a_lighter_one(on_a_line, monkeypatch):
    """Grainy images leave coarse more tokens than the last of gradual."""
    make_coarse(monkeypatch, tokens=60)
    with pytest.raises(ValueError, match=r"nearest setting that was tried \(gradual, .* leaves 5\d.0 of 65 tokens"):
        on_a_line.find(tokens=40)


def test_of_those_that_agree_enough_the_fastest_is_taken(on_a_line, monkeypatch):
    """On images whose blocks all have detail coarse is slower than gradual."""
    make_coarse(monkeypatch, speed=0.9)
    setting = on_a_line.find(agreement=0.86)
    agreeing = [level for level in on_a_line.tried if level.value >= 0.86]
    assert agreeing[-1].method == "coarse" and agreeing[-1].speed == 0.9
    assert choice_of(setting) == CHOICES[9] and setting.evidence["speed"] == 2.0


def make_all_alike(monkeypatch, *figures) -> None:
    """Has each level measured with these figures."""
    monkeypatch.setattr(Calibration, "_measure", lambda self, choice, bar: Level(*choice, *figures))


@pytest.mark.parametrize(
    ("target", "asked", "advised"),
    [
        ("agreement", 0.9, "agreement=0.856 at most"),
        ("speed", 1.5, "speed=1.23 at most"),
        ("tokens", 40, "tokens=49 at least"),
    ],
)
def test_what_is_advised_is_rounded_to_what_a_level_reaches(on_a_line, monkeypatch, target, asked, advised):
    make_all_alike(monkeypatch, 0.8567, (0.8, 0.9), 48.4, 65, 1.236)
    with pytest.raises(ValueError, match=rf"Ask for {advised}, or leave the model plain\.$"):
        on_a_line.find(**{target: asked})


@pytest.mark.parametrize(
    ("target", "asked", "told"),
    [("agreement", 1.0, "agreement 0.9999 ("), ("speed", 1.5, "is 1.49 times"), ("tokens", 48, "leaves 48.1 of 65")],
)
def test_what_is_nearest_is_not_told_as_what_was_asked_for(on_a_line, monkeypatch, target, asked, told):
    make_all_alike(monkeypatch, 0.99997, (0.9, 1.0), 48.02, 65, 1.498)
    with pytest.raises(ValueError, match=re.escape(told)):
        on_a_line.find(**{target: asked})
    make_all_alike(monkeypatch, 0.57, (0.9, 1.0), 48.1, 65, 1.13)
    told = {"agreement": "agreement 0.5700 (", "speed": "is 1.13 times", "tokens": "leaves 48.1 of 65"}[target]
    on_a_line._tried.clear()
    with pytest.raises(ValueError, match=re.escape(told)):
        on_a_line.find(**{target: asked})


@pytest.mark.parametrize(
    ("target", "asked", "value"), [("speed", 1.5, -0.2), ("agreement", 0.5, -0.2), ("agreement", 0.5, 0.0004)]
)
def test_nothing_is_advised_that_would_be_refused(on_a_line, monkeypatch, target, asked, value):
    make_all_alike(monkeypatch, value, (-0.3, -0.1), 60, 65, 0.64)
    with pytest.raises(ValueError, match=rf"^{target} is {asked}, and .* on 60 images\. Leave the model plain\.$"):
        on_a_line.find(**{target: asked})


def test_without_a_classifier_it_is_the_mean_cosine(images, processor):
    model = tiny_model("vit", num_hidden_layers=3).requires_grad_(False)
    expected = [row[3].double().mean().item() for row in every_level(model, images, processor)]
    evidence = calibrate(model, images, agreement=expected[4] - 1e-6, **options(processor)).evidence
    assert evidence["measure"] == "cosine" and evidence["value"] == pytest.approx(expected[4], abs=2e-6)
    low, high = evidence["interval"]
    assert low < evidence["value"] < high


def test_a_speed_and_a_number_of_tokens_are_reached_by_the_lightest_level_that_does(
    classifier, images, processor, known
):
    assert [row[1] for row in known] == sorted((row[1] for row in known), reverse=True)
    search = Calibration(classifier, images, **options(processor, batch_size=COUNT))
    for index in (2, 5, 9):
        _, tokens, speed, _ = known[index]
        for setting in (search.find(tokens=tokens), search.find(speed=speed - 1e-9)):
            assert choice_of(setting) == CHOICES[index]
            assert setting.evidence["tokens"] == round(tokens, 1) and setting.evidence["of_tokens"] == 65
            assert setting.evidence["speed"] == round(speed, 3) and setting.evidence["by"] == "flops"
    assert setting.evidence["target"].startswith("speed=")


def test_time_is_that_of_both_models_in_turn(classifier, images, processor, monkeypatch):
    turns = []

    def stopwatch(run, device):
        turns.append(1)
        return run(), 3.0 if len(turns) % 2 else 2.0  # the plain model comes first

    monkeypatch.setattr(sys.modules[Calibration.__module__], "stopwatch", stopwatch)
    evidence = calibrate(
        classifier, images, tokens=64, image_processor=processor, batch_size=20, progress=False
    ).evidence
    assert (evidence["speed"], evidence["by"]) == (1.5, "time")


def test_the_model_is_given_back_as_it_was_whatever_happens(classifier, images, processor, monkeypatch):
    pixel_values = sample_pixel_values()
    for setting in (None, {"keep_ratio": 0.5}):
        if setting is not None:
            compress(classifier, setting)
        classifier.train()
        before, config, expected = traces(classifier), classifier.config.to_dict(), answers(classifier, pixel_values)
        calibrate(classifier, images, tokens=60, **options(processor))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Calibration, "_speed", interrupt)
            calibrate(classifier, images, tokens=60, **options(processor))
        assert traces(classifier) == before and classifier.config.to_dict() == config and classifier.training
        assert torch.equal(answers(classifier, pixel_values), expected)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_model_that_is_in_training_is_measured_as_it_answers_afterwards(images, processor):
    """Without dropout; and a batch holds no more images than there are."""
    model = tiny_model("vit-classifier", num_labels=40, hidden_dropout_prob=0.5).requires_grad_(False)
    found, expected = (
        calibrate(model.train(training), images, tokens=60, **options(processor, batch_size=500)).evidence
        for training in (True, False)
    )
    assert found["value"] == expected["value"] and found["batch_size"] == COUNT


def test_a_search_that_was_cut_off_goes_on_where_it_was(classifier, images, processor, tmp_path, monkeypatch):
    file, measure, measured = tmp_path / "new" / "search.json", Calibration._measure, []

    def measure_two(self, level, bar):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(level)
        return measure(self, level, bar)

    whole = calibrate(classifier, images, tokens=50, **options(processor))
    monkeypatch.setattr(Calibration, "_measure", measure_two)
    with pytest.raises(KeyboardInterrupt):
        calibrate(classifier, images, tokens=50, **options(processor, resume=file))
    first, measured[:] = list(measured), [None]  # one more alone
    assert len(json.loads(file.read_text())["levels"]) == 2
    monkeypatch.setattr(
        Calibration, "_measure", lambda self, level, bar: measured.append(level) or measure(self, level, bar)
    )
    assert calibrate(classifier, images, tokens=50, **options(processor, resume=file)) == whole
    assert not {*first} & {*measured}
    measured.clear()
    classifier.config._name_or_path = "elsewhere"  # another place for the same model
    assert calibrate(classifier, images, tokens=50, **options(processor, resume=file)) == whole and not measured


def test_what_another_search_left_is_refused_and_named(classifier, images, processor, tmp_path):
    file = tmp_path / "search.json"
    calibrate(classifier, images, tokens=60, **options(processor, resume=file))
    with pytest.raises(ValueError, match=r"search.json is of another search \(images '60 \w+' there, '59 \w+' here\)"):
        calibrate(classifier, images[1:], tokens=60, **options(processor, resume=file))
    other = copy_sharing_weights(classifier)
    other.classifier = torch.nn.Linear(32, 40)
    with pytest.raises(ValueError, match=r"another search \(model 'ViTForImageClassification"):
        calibrate(other, images, tokens=60, **options(processor, resume=file))
    content = json.loads(file.read_text())
    del content["levels"][0]["method"]  # as an earlier format
    file.write_text(json.dumps(content | {"of": content["of"] | {"format": 3}}))
    with pytest.raises(ValueError, match=r"another search \(format 3 there"):
        calibrate(classifier, images, tokens=60, **options(processor, resume=file))
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no file of a search"):
        calibrate(classifier, images, tokens=60, **options(processor, resume=file))


@pytest.mark.parametrize(
    "changed",
    [
        {"value": 7},
        {"value": None},
        {"speed": -1},
        {"tokens": 0},
        {"tokens": []},
        {"tolerance": [1]},
        {"interval": [0, 1, 1]},
    ],
)
def test_what_are_no_figures_of_a_setting_is_not_gone_on_with(changed, classifier, images, processor, tmp_path):
    file = tmp_path / "search.json"
    calibrate(classifier, images, tokens=60, **options(processor, resume=file))
    content = json.loads(file.read_text())
    content["levels"][0] |= changed
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"search.json is no file of a search \(these are no figures of a setting: {"):
        calibrate(classifier, images, tokens=60, **options(processor, resume=file))


def test_a_time_counts_for_the_processor_and_the_threads_that_took_it(
    classifier, images, processor, tmp_path, monkeypatch
):
    module, threads = sys.modules[Calibration.__module__], torch.get_num_threads()
    monkeypatch.setattr(module, "CHOICES", CHOICES[-1:])
    file, asked = tmp_path / "search.json", {"image_processor": processor, "progress": False, "tokens": 64}
    evidence = calibrate(classifier, images, resume=file, **asked).evidence
    assert evidence["threads"] == threads and evidence["by"] == "time"
    flops = calibrate(classifier, images, resume=tmp_path / "flops.json", by="flops", **asked)
    assert flops.evidence["threads"] is None
    with monkeypatch.context() as patched:
        patched.setattr(module, "has_kernels", lambda device: True)
        with pytest.raises(ValueError, match=r"another search \(kernels False there, True here\)"):
            calibrate(classifier, images, resume=file, **asked)
    monkeypatch.setattr(module, "cpu_name", lambda: "another")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    said = rf"another search \(processor .* there, 'another' here; threads {threads} there, {threads + 1} here\)"
    with pytest.raises(ValueError, match=said):
        calibrate(classifier, images, resume=file, **asked)
    assert calibrate(classifier, images, resume=tmp_path / "flops.json", by="flops", **asked) == flops


def test_a_link_to_the_file_stays_one(classifier, images, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[Calibration.__module__], "CHOICES", CHOICES[-1:])
    link, file = tmp_path / "search.json", tmp_path / "elsewhere" / "search.json"
    link.symlink_to(file)
    found = [calibrate(classifier, images, tokens=60, **options(processor, resume=link)) for _ in range(2)]
    assert link.is_symlink() and len(json.loads(file.read_text())["levels"]) == 1 and found[0] == found[1]


@pytest.mark.parametrize("name", ["file/search.json", "link.json", "file.json/", "folder"])
def test_a_file_that_cannot_be_written_is_refused_before_images_are_read(classifier, processor, tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "link.json").symlink_to(tmp_path / "file" / "search.json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").mkdir()
    with pytest.raises(OSError, match=r"is no folder; expected one to write into|is a folder; expected the name of a"):
        calibrate(classifier, "no images", tokens=60, **options(processor, resume=tmp_path / name))


def test_answers_by_nan_or_infinity_are_refused_and_said_whose_they_are(classifier, images, processor):
    def overflow(module, args, output):
        output.logits[-1] /= setting_of(module) is None

    hook = classifier.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=r"model shortened by VWTConfig\(.*, in float32, answers image \d+ by NaN or"):
        calibrate(classifier, images, agreement=0.9, **options(processor))
    hook.remove()
    with torch.no_grad():
        classifier.classifier.bias[0] = float("nan")
    for model in (classifier, classifier.base_model):
        with torch.no_grad():
            classifier.base_model.layernorm.bias[0] = float("nan")
        with pytest.raises(ValueError, match=r"the plain model, in float32, answers image \d+ by NaN or infinity"):
            calibrate(model, images, tokens=60, **options(processor))


def test_one_logit_agrees_where_its_sign_does(images, processor):
    model = tiny_model("vit-classifier", num_hidden_layers=3, num_labels=1).requires_grad_(False)
    batch = processor(images, return_tensors="pt")
    logits = answer(model, **batch)
    model.classifier.bias -= logits.median()
    model.classifier.weight *= 40
    model.classifier.bias *= 40
    plain = answer(model, **batch) > 0
    short = answer(compress(copy_sharing_weights(model), level_setting(CHOICES[-1])), **batch) > 0
    agree = (short == plain).double().mean().item()
    assert agree < 1
    search = Calibration(model, images, **options(processor))
    assert search._measure(CHOICES[-1], SimpleNamespace(set_postfix_str=print, update=print)).value == agree
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="has problem_type 'regression': it gives quantities, which are no labels"):
        calibrate(model, images, agreement=0.9, **options(processor))
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"it gives each image any number of labels, .* Load it by AutoModel"):
        calibrate(model, images, agreement=0.9, **options(processor))
    with pytest.raises(ValueError, match=r"seed is 1\.5; expected a whole number in \[0, 2\*\*63\)"):
        calibrate(model, images, agreement=0.9, **options(processor) | {"seed": 1.5})


@pytest.mark.parametrize("times", [1, 2])
def test_batches_are_shown_before_they_are_timed_where_new_shapes_cost_time(
    times, classifier, images, processor, monkeypatch
):
    """Batches of 17 of 50 images: that of the last 16 is not timed as one."""
    module, seen = sys.modules[Calibration.__module__], []
    monkeypatch.setattr(module, "is_slow_for_new_lengths", lambda *_: times == 2)

    def timed(model, batch):
        """Of the plain model ten seconds, of the other one; of the smaller batch, or what comes first, a hundred."""
        size = len(batch["pixel_values"])
        first = sum(own is model and other is batch for own, other in seen) < times - 1
        seen.append((model, batch))
        return answer(model, **batch), 100 if first or size < 17 else 10 if setting_of(model) is None else 1

    monkeypatch.setattr(module, "_timed", timed)
    search = Calibration(classifier, images[:50], **options(processor) | {"by": "time", "batch_size": 17})
    found = search._measure(CHOICES[0], SimpleNamespace(set_postfix_str=print, update=print))
    assert found.speed == 10 and len(seen) == 2 * (3 * times + module.FEWEST_TURNS - 2)


def test_a_class_of_ones_own_is_calibrated_as_the_one_it_is_made_from(classifier, images, processor):
    class Mine(transformers.ViTForImageClassification):
        pass

    search = Calibration(Mine(classifier.config).eval(), images, **options(processor))
    assert search.measure == "agreement"


def test_torchs_defaults_change_nothing(images, processor, monkeypatch):
    monkeypatch.setattr(sys.modules[Calibration.__module__], "CHOICES", CHOICES[-1:])
    model = tiny_model("vit", num_hidden_layers=3).requires_grad_(False)
    asked = {"tokens": 64, "image_processor": processor, "progress": False}
    expected = calibrate(model, images, by="flops", **asked)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert calibrate(model, images, by="flops", **asked) == expected
            assert calibrate(model, images, by="time", **asked).evidence["value"] == expected.evidence["value"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_folder_a_data_set_and_a_list_are_looked_at(checkpoint, folder, images):
    model = transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    found = [calibrate(model, given, tokens=60, by="flops", progress=False) for given in (folder, rows, images)]
    assert {(setting.tolerance, setting.evidence["value"]) for setting in found} == {
        (found[0].tolerance, found[0].evidence["value"])
    }
    assert [setting.evidence["images"] for setting in found] == [COUNT] * 3


def test_of_more_images_a_seed_chooses(classifier, images, processor):
    def chosen(seed: int, count: int = 50) -> str:
        return Calibration(classifier, images, **options(processor, seed=seed, max_images=count))._of["images"]

    assert chosen(0) == chosen(0) != chosen(1) and chosen(0).startswith("50 ")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "no target is given; expected exactly one of agreement, speed, tokens"),
        ({"agreement": 0.9, "speed": 2}, "agreement is 0.9 and speed is 2; expected exactly one"),
        ({"agreement": 98}, r"agreement is 98; expected a share in \(0, 1\]"),
        ({"agreement": 0}, "agreement is 0; expected a share"),
        ({"speed": 0.5}, "speed is 0.5; expected a ratio from 1 on"),
        ({"tokens": "few"}, "tokens is 'few'; expected a number from 1 on"),
        ({"tokens": 9, "by": "colour"}, "by is 'colour'; expected one of 'time', 'flops'"),
        ({"tokens": 9, "batch_size": 0}, "batch_size is 0; expected a whole number"),
        ({"tokens": 9, "max_images": 20}, "max_images is 20; expected a whole number of at least 50"),
        ({"tokens": 9, "image_processor": None}, "has no image processor that can be loaded"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(classifier, images, processor, asked, reason):
    with pytest.raises(ValueError, match=reason):
        calibrate(classifier, images, **{"image_processor": processor, "progress": False, **asked})


def test_a_model_can_be_trained_afterwards(images, processor):
    """BEiT keeps the index of its relative positions, which no tensor of inference mode may be then."""
    model = tiny_model("beit-classifier", num_labels=40)
    calibrate(model, images, tokens=60, **options(processor))
    model(pixel_values=processor(images[:2], return_tensors="pt")["pixel_values"]).logits.sum().backward()


def test_words_of_the_image_processor_are_not_looked_for(checkpoint, classifier, images, monkeypatch):
    """Each setting finds its own."""
    tokenizing = AutoImageProcessor.from_pretrained(checkpoint, vwt={"keep_ratio": 0.25})
    plain = calibrate(classifier, images, tokens=60, **options(load_processor(str(checkpoint))))
    monkeypatch.setattr(HostTokenizer, "words", None)
    assert calibrate(classifier, images, tokens=60, **options(tokenizing)) == plain


def test_images_that_cannot_be_read_are_left_out_and_named(classifier, processor, folder):
    expected = calibrate(classifier, folder, tokens=60, **options(processor))
    for name in ("broken.png", "cut.jpg"):
        (folder / name).write_bytes(b"no image")
    with pytest.warns(
        UserWarning, match=r"Of 62 images 2 could not be read and were left out. The first: .*broken\.png"
    ):
        found = calibrate(classifier, folder, tokens=60, **options(processor))
    assert found.evidence["images"] == COUNT and found.choice == expected.choice


def test_too_few_images_and_other_models_are_refused(classifier, images, processor):
    with pytest.raises(ValueError, match=r"images holds 49 images; expected at least 50: .*below 92\.8 %\.$"):
        calibrate(classifier, images[:49], tokens=60, **options(processor))
    with pytest.raises(TypeError, match=r"expected a transformers\.PreTrainedModel"):
        calibrate(torch.nn.Linear(1, 1), images, tokens=60)

    class Refuses(type(processor)):
        def __call__(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("too small")

    few = r"images holds 0 images; .* 60 could not be read and .*: image \d+ \(32×32\) is refused by Refuses: too small"
    with pytest.raises(ValueError, match=few):
        calibrate(classifier, images, tokens=60, **options(Refuses()))
    swin = transformers.SwinModel(transformers.SwinConfig(depths=[1], num_heads=[1], embed_dim=8))
    with pytest.raises(ValueError, match="Swin"):
        calibrate(swin, images, tokens=60, **options(processor))


def run(checkpoint: Path, folder: Path, *more: str) -> int:
    return main(["calibrate", str(checkpoint), str(folder), "--by", "flops", "--device", "cpu", *more])


def test_the_command_prints_the_front_and_saves_the_model_by_the_setting(checkpoint, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "vwt-hf[benchmark]"')
    files = {name: tmp_path / "out" / f"front.{name}" for name in ("json", "png")}
    output = tmp_path / "short"
    more = ["--json", str(files["json"]), "--plot", str(files["png"]), "--output", str(output)]
    assert run(checkpoint, folder, "--tokens", "55", *more) == 0
    printed = capsys.readouterr()
    (chosen,) = (line.split() for line in printed.out.splitlines() if line.startswith("→"))
    written = json.loads(files["json"].read_text())
    assert [float(cell) for cell in chosen[2:4]] == [written["vwt"]["tolerance"], written["vwt"]["similarity"]]
    assert float(chosen[4]) <= 55 and chosen[5:7] == ["of", "65"]
    rows = [line for line in printed.out.splitlines() if " to " in line]
    assert len(rows) == len(written["tried"]) and "60 images" in printed.out
    with Image.open(files["png"]) as picture:
        assert picture.width > 400
    loaded = transformers.AutoModelForImageClassification.from_pretrained(output)
    assert loaded.config.vwt == written["vwt"] and (output / "preprocessor_config.json").exists()


def test_the_command_calibrates_and_saves_a_checkpoint_that_has_a_setting(checkpoint, folder, tmp_path):
    short, again = tmp_path / "short", tmp_path / "again"
    assert run(checkpoint, folder, "--tokens", "55", "--output", str(short)) == 0
    assert run(short, folder, "--tokens", "50", "--output", str(again)) == 0
    settings = [transformers.AutoConfig.from_pretrained(output).vwt for output in (short, again)]
    assert settings[0] != settings[1] and settings[1]["method"] == "gradual"


def test_the_command_takes_a_model_without_a_classifier_or_a_pooler(checkpoint, folder, processor, tmp_path, capsys):
    tiny_model("vit").base_model.save_pretrained(tmp_path / "features")
    model = transformers.ViTModel(tiny_model("vit").config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "features")
    processor.save_pretrained(tmp_path / "features")
    assert run(tmp_path / "features", folder, "--tokens", "60") == 0
    assert "cosine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--tokens", "2"], "tokens is 2, and the nearest setting"),
        (["--agreement", "98"], "agreement is 98.0; expected a share in (0, 1]"),
        (["--tokens", "60", "--max-images", "3"], "max_images is 3; expected a whole number of at least 50"),
        (["--tokens", "60", "--json", "{folder}"], "is a folder; expected the name of a file"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(checkpoint, folder, tmp_path, capsys, more, reason):
    output = tmp_path / "short"
    assert run(checkpoint, folder, "--output", str(output), *(part.format(folder=folder) for part in more)) == 2
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1]
    assert line.startswith("vwt-hf calibrate: ") and reason in line and "Traceback" not in printed.err
    assert printed.out == "" and not output.exists()


@pytest.mark.parametrize("name", ["dinov2-small-caltech101", "vit-small-caltech101"])
def test_agreement_holds_on_photographs_that_were_not_seen(shared, name, monkeypatch):
    monkeypatch.setattr(sys.modules[Calibration.__module__], "CHOICES", CHOICES[4::3])
    paths = sorted((shared / "data/caltech101/validation").rglob("*.jpg"))
    seen, others = paths[0::20][:50], paths[1::20][:50]
    folder = shared / "models" / name
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=FAST)
    # Operations are counted of one batch, and a few images say as much of them.
    setting = calibrate(model, seen, agreement=0.95, by="flops", batch_size=5, progress=False)
    assert setting.evidence["value"] >= 0.95 and setting.evidence["speed"] > 1.2
    batch = load_processor(str(folder))([Image.open(path).convert("RGB") for path in others], return_tensors="pt")
    with torch.inference_mode():
        batch = on_device(batch, model)
        plain = answer(model, **batch)
        found = agreement(answer(compress(model, setting), **batch), plain)
    # Both numbers are of samples: they speak of one share where the intervals meet.
    assert share_interval(found, len(others))[1] >= setting.evidence["interval"][0]


@pytest.mark.parametrize("kind", ["folder", "list", "stream"])
def test_what_could_not_be_read_is_told_after_a_bar_that_is_closed_and_has_a_total(
    images, processor, tmp_path, kind, capsys
):
    for index, image in enumerate(images[:FEWEST]):
        image.save(tmp_path / f"{index:02}.png")
    (tmp_path / "30.png").write_text("no image")
    files = sorted(tmp_path.iterdir())
    rows = datasets.Dataset.from_dict({"image": list(map(str, files))}).cast_column("image", datasets.Image())
    given = {"folder": tmp_path, "list": files, "stream": rows.to_iterable_dataset()}[kind]
    with pytest.raises(ValueError, match=r"1 could not be read and were left out\. The first: .* cannot be read"):
        calibrate(tiny_classifier(), given, tokens=64, image_processor=processor, by="flops", max_images=FEWEST)
    said = capsys.readouterr().err
    assert f"/{FEWEST} [" in said and said.endswith("\n")
