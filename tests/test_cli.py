"""What the command `vwt-hf` promises on a terminal: output, exit status and one line of reason."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import vwt_hf
from test_pipeline import tokenizer_with
from tiny import tiny_model
from vwt_hf import visualize
from vwt_hf.cli import demo, main
from vwt_hf.cli.loading import features_class, leave_out_random
from vwt_hf.cli.show import default_pixel_values

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark

Image = pytest.importorskip("PIL.Image", reason='needs pillow: pip install "vwt-hf[demo]"')
pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "vwt-hf[demo]"')

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SIZE, "image_size": 32, "patch_size": 8}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with two photographs of different sizes and a file that is none."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    noise = torch.randint(0, 256, (80, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(folder / "noise.png")
    Image.linear_gradient("L").convert("RGB").save(folder / "ramp.JPG")
    (folder / "notes.txt").write_text("no photograph")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return save(transformers.ViTModel(transformers.ViTConfig(**VISION)), tmp_path)


def save(model: transformers.PreTrainedModel, tmp_path: Path) -> str:
    model.save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run_demo(checkpoint: str, photographs: Path, *more: str) -> int:
    output = str(photographs.parent / "out")
    return main(
        ["demo", "--model", checkpoint, "--images", str(photographs), "--repeats", "1", "--output", output, *more]
    )


def test_help_names_the_verb_and_the_verbs_help_its_options(capsys):
    for arguments, words in ((["--help"], ["demo", "kept patches"]), (["demo", "--help"], ["--keep-ratio", "cosine"])):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)


def test_demo_prints_a_row_for_each_ratio_and_writes_the_picture(checkpoint, photographs, capsys):
    assert run_demo(checkpoint, photographs, "--keep-ratio", "1", "0.5", "--device", "cpu") == 0
    printed = capsys.readouterr()
    recommended, everything, half = [line.split() for line in printed.out.splitlines() if "→" in line]
    # CLS and, of the noise, all 16 patches; of the ramp, whose patches are alike along a row, six.
    assert recommended[:4] == ["vwt=True", "17", "→", "12"] and 0.5 < float(recommended[-1]) <= 1
    assert everything[:4] == ["keep_ratio=1", "17", "→", "17"] and everything[-2:] == ["1.0000", "1.0000"]
    assert half[:4] == ["keep_ratio=0.5", "17", "→", "9"] and float(half[-1]) < 1
    assert "2 photographs at 32×32" in printed.out and "float32" in printed.out
    assert printed.err == ""
    picture = photographs.parent / "out" / "kept_patches.png"
    assert str(picture) in printed.out
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > image.height / 2 > 100


@pytest.mark.parametrize("fields", [{}, {"rescale_factor": 2 / 255}, {"do_normalize": False}], ids=str)
def test_demo_shows_the_colours_of_the_photographs(fields, tmp_path, photographs, monkeypatch):
    """The model of an image processor that gives other values to white than 1, too."""
    model = transformers.ViTModel(transformers.ViTConfig(**VISION))
    checkpoint = save(model, tmp_path)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    for name, value in fields.items():
        setattr(processor, name, value)
    processor.save_pretrained(checkpoint)
    shown = []
    monkeypatch.setattr(visualize, "kept_patches_figure", lambda *args, **kwargs: shown.append((args[0], kwargs)))
    monkeypatch.setattr(visualize, "write_png", lambda figure, file: None)
    run_demo(checkpoint, photographs)
    (pixels, kwargs), expected = shown[0], []
    for file in ("noise.png", "ramp.JPG"):
        with Image.open(photographs / file) as image:
            expected.append(np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)))
    mean, std = (torch.tensor(kwargs[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    found = ((pixels * std + mean) * 255).movedim(1, -1)
    assert (found - torch.from_numpy(np.stack(expected)).float()).abs().mean() < 2


def test_demo_compares_the_image_embeddings_of_a_clip_model(tmp_path, photographs, capsys):
    config = transformers.CLIPConfig(vision_config=VISION, text_config={**SIZE, "vocab_size": 99}, projection_dim=16)
    assert run_demo(save(transformers.CLIPModel(config), tmp_path), photographs, "--batch-size", "2") == 0
    assert "17 → 5" in capsys.readouterr().out


def test_demo_compares_the_mean_of_the_tokens_of_a_model_that_pools_none(tmp_path, photographs, capsys):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.IJepaModel(transformers.IJepaConfig(**size, image_size=32, patch_size=4))
    assert run_demo(save(model, tmp_path), photographs, "--keep-ratio", "1") == 0
    assert "criterion variance, mean of the tokens" in capsys.readouterr().out


def test_demo_reads_cls_where_the_checkpoint_has_no_pooler(tmp_path, photographs, capsys):
    """A classifier's checkpoint holds none; AutoModel adds a random one, another in each of the two models."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    assert run_demo(save(model, tmp_path), photographs, "--keep-ratio", "1") == 0
    printed = capsys.readouterr().out
    assert "CLS token" in printed and "1.0000       1.0000" in printed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--keep-ratio", "1.5"], "keep_ratio is 1.5; expected a number in (0, 1]"),
        (["--keep-ratio", "0.5", "0.01"], "keeps none of an image's 16 patches"),
        (["--repeats", "0"], "repeats is 0; expected a whole number of at least 1."),
        (
            ["--repeats", "9" * 20],
            f"repeats is {'9' * 20}; expected a whole number of at least 1, and less than 2**63.",
        ),
        (["--output", ""], "No folder is named, but an empty text"),
        (["--images", "nowhere.png"], "nowhere.png does not exist"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_what_cannot_be_done_is_status_2_and_one_line(checkpoint, photographs, capsys, options, reason):
    assert run_demo(checkpoint, photographs, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not (photographs.parent / "out").exists()
    assert printed.err.startswith("vwt-hf demo: ") and reason in printed.err and printed.err.count("\n") == 1


def test_a_folder_without_images_and_a_file_that_is_none_are_refused(checkpoint, photographs, capsys):
    text = photographs / "notes.txt"
    assert run_demo(checkpoint, photographs, "--images", str(text)) == 2
    assert "notes.txt" in capsys.readouterr().err
    (photographs / "empty").mkdir()
    assert run_demo(checkpoint, photographs, "--images", str(photographs / "empty")) == 2
    assert "holds no image" in capsys.readouterr().err


def test_an_unsupported_model_is_refused_by_name(tmp_path, photographs, capsys):
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    checkpoint = save(transformers.SwinModel(config), tmp_path)
    assert run_demo(checkpoint, photographs) == 2
    assert "SwinModel" in capsys.readouterr().err


def test_images_that_come_as_patches_are_refused(photographs, tmp_path, capsys):
    checkpoint = save(tiny_model("siglip2-vision"), tmp_path)
    transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64).save_pretrained(checkpoint)
    demo = ["demo", "--images", str(photographs), "--model", checkpoint]
    learn = ["learn", str(photographs), "--image-processor", checkpoint, "--patch-size", "4", "--size", "2"]
    for command in (demo, learn):
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        assert "expected whole images (batch, channels, height, width)" in capsys.readouterr().err


@pytest.mark.newest
def test_the_command_works_as_a_process_of_its_own_in_an_encoding_without_arrows(checkpoint, photographs):
    arguments = ["demo", "--model", checkpoint, "--images", str(photographs), "--repeats", "1", "--device", "cpu"]
    env = dict(os.environ, PYTHONIOENCODING="cp1252")
    command = [sys.executable, "-W", "ignore", "-m", "vwt_hf.cli", *arguments, "--output", str(photographs / "out")]
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert b"17 -> 9" in done.stdout and (photographs / "out" / "kept_patches.png").is_file()


@pytest.mark.parametrize("name", [b"Ba$$in.png", b"caf\xe9.png", b"a\nb.png", b"_{x^.png", b"\\frac.png"])
def test_names_of_photographs_are_drawn_and_printed_as_text(tmp_path, capsys, name):
    file = os.path.join(os.fsencode(tmp_path), name)
    with open(file, "wb") as opened:
        Image.new("RGB", (64, 64), "red").save(opened, "PNG")
    arguments = ["show", os.fsdecode(file), "--keep-ratio", "0.5", "--output", str(tmp_path / "out" / "show.png")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and len(printed.out.splitlines()) == 2
    assert (tmp_path / "out" / "show.png").is_file()


def test_more_photographs_than_a_picture_holds_all_count(checkpoint, tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(14):
        Image.effect_noise((40, 40), 20 + 5 * index).save(folder / f"{index:02}.png")
    assert run_demo(checkpoint, folder, "--keep-ratio", "0.5", "--batch-size", "5") == 0
    printed = capsys.readouterr().out
    assert "14 photographs at 32×32" in printed and "(the first 12 photographs)" in printed
    for index in (12, 13):
        (folder / f"{index:02}.png").unlink()
    assert run_demo(checkpoint, folder, "--keep-ratio", "0.5", "--batch-size", "5") == 0
    assert "the first" not in capsys.readouterr().out


def test_demo_goes_by_the_seed_and_the_batch_size_and_draws_the_cosines_that_it_prints(
    checkpoint, photographs, monkeypatch, capsys
):
    figures, batches, measure = [], [], demo.measure
    monkeypatch.setattr(visualize, "kept_patches_figure", lambda *args, **kwargs: figures.append((args, kwargs)))
    monkeypatch.setattr(visualize, "write_png", lambda figure, file: None)
    monkeypatch.setattr(
        demo, "measure", lambda models, given, *rest: measure(models, batches.extend(given) or batches, *rest)
    )
    asked = ["--criterion", "random", "--seed", "7", "--keep-ratio", "0.5", "0.25", "--batch-size", "2"]
    assert run_demo(checkpoint, photographs, *asked) == 0
    assert [len(batch["pixel_values"]) for batch in batches] == [2]
    ((_, _, settings), kwargs), printed = figures[0], capsys.readouterr().out
    assert settings["keep_ratio=0.5"].seed == settings["keep_ratio=0.25"].seed == 7
    means = [float(line.split()[-2]) for line in printed.splitlines() if "→" in line]
    drawn = [[float(caption.split()[-1]) for caption in of_one] for of_one in kwargs["captions"]]
    assert np.mean(drawn, axis=0) == pytest.approx(means, abs=1e-3)


def test_the_table_of_demo_is_of_one_image_and_of_the_medians_of_turns():
    seconds = torch.tensor([[1.0, 4.0, 2.0], [1.5, 1.0, 2.0]])
    made = demo.Measured(seconds, [[1.0, 1.0], [0.5, 0.75]], [130.0, 66.0], "CLS", torch.empty(0))
    _, row = demo.table(["half"], made, images=2)
    assert row == ("half", "65 → 33", "1000.0 → 750.0", "1.00", "0.6250", "0.5000")


@pytest.mark.parametrize(("patch_size", "side"), [(14, 224), (48, 240), (500, 500)])
def test_without_a_model_show_cuts_squares_of_whole_patches(photographs, patch_size, side):
    pixel_values = default_pixel_values([photographs / "noise.png"], patch_size, (0.5,) * 3, (0.5,) * 3)
    assert pixel_values.shape == (1, 3, side, side)


@pytest.mark.parametrize("verb", ["demo", "show", "learn", "vocab", "calibrate", "embed"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(photographs, tmp_path, capsys, verb):
    images = {"demo": ["--images", "nowhere"], "show": ["nowhere", "--keep-ratio", "0.5"]}
    images |= {"learn": ["nowhere/at/all", "--image-processor", "nowhere"], "vocab": ["nowhere/at/all"]}
    images |= {"calibrate": ["nowhere", "nowhere", "--speed", "2"], "embed": ["nowhere", "--model", "nowhere"]}
    output = photographs / "notes.txt" / "out"
    assert main([verb, *images[verb], "--output", str(output)]) == 2
    assert "notes.txt is no folder; expected one to write into" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["demo", "show"])
def test_a_photograph_that_cannot_be_read_is_named(checkpoint, photographs, tmp_path, capsys, verb):
    whole = (photographs / "ramp.JPG").read_bytes()
    (photographs / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    given = {"demo": ["--images", str(photographs)], "show": [str(photographs), "--keep-ratio", "0.5"]}[verb]
    assert main([verb, *given, "--model", checkpoint, "--output", str(tmp_path / "out")]) == 2
    assert "broken.jpg cannot be read" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [["demo", "--images", ""], ["show", "", "--keep-ratio", "0.5"]])
def test_an_empty_name_is_no_photograph_nor_the_folder_that_one_is_in(given, photographs, monkeypatch, capsys):
    monkeypatch.chdir(photographs)
    assert main(given) == 2
    assert "An image is named by an empty text; expected its path" in capsys.readouterr().err


def test_photographs_of_different_sizes_are_refused(photographs, tmp_path, capsys):
    checkpoint = save(transformers.ViTModel(transformers.ViTConfig(**VISION)), tmp_path)
    transformers.ViTImageProcessorPil(do_resize=False).save_pretrained(checkpoint)
    assert main(["show", str(photographs), "--keep-ratio", "0.5", "--model", checkpoint]) == 2
    assert "gives pixel_values of shapes" in capsys.readouterr().err


@pytest.fixture
def with_code(checkpoint, tmp_path, monkeypatch) -> tuple[str, list]:
    """A checkpoint whose model is code of its own, and what came of it: questions asked, and that the code ran."""
    folder, came = Path(checkpoint), []
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")
    config |= {"model_type": "own", "auto_map": dict.fromkeys(names, "own.Own")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: came.append(question) or "y")
    return checkpoint, came


def test_no_command_runs_or_asks_to_run_code_of_a_repository(with_code, photographs, tmp_path, capsys):
    checkpoint, came = with_code
    assert run_demo(checkpoint, photographs) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main(["embed", str(photographs), "--model", checkpoint, "--output", str(tmp_path / "features")]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main(["evaluate", checkpoint, "--dataset", str(photographs)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trust_remote_code"):
        benchmark.load(checkpoint)
    assert not came and not (tmp_path / "ran").exists()


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """As many images as `calibrate` needs, in part flat."""
    (tmp_path / "many").mkdir()
    values = torch.randint(0, 256, (50, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for index, pixels in enumerate(values):
        pixels[: index % 32] = 90
        Image.fromarray(pixels.numpy()).save(tmp_path / "many" / f"{index}.png")
    return tmp_path / "many"


@pytest.mark.parametrize("name", ["clip-projection", "clip", "vit-classifier"])
def test_calibrate_saves_the_whole_model_in_its_own_data_type_and_what_lies_beside(name, many, tmp_path):
    own, output = tiny_model(name).to(torch.bfloat16), tmp_path / "out"
    checkpoint = save(own, tmp_path)
    if name == "clip":
        tokenizer_with({"<pad>": 1, "<s>": 97, "</s>": 98}).save_pretrained(checkpoint)
    given = ["--tokens", "64", "--by", "flops", "--device", "cpu", "--output", str(output)]
    assert main(["calibrate", checkpoint, str(many), *given]) == 0
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (checkpoint, output))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == [type(own).__name__] and (output / "preprocessor_config.json").exists()
    assert type(own).from_pretrained(output).config.vwt["method"] == "gradual"
    assert (output / "tokenizer.json").exists() == (name == "clip")


def test_calibrate_draws_nothing_among_the_images(many, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("vwt_hf.cli.calibrate.load_model", pytest.fail)
    given = ["--tokens", "9", "--device", "cpu", "--plot", str(many / "new" / "front.png")]
    assert main(["calibrate", checkpoint, str(many), *given]) == 2
    assert "front.png would be a picture among the images of" in capsys.readouterr().err
    assert not (many / "new").exists()


def test_the_picture_of_an_earlier_demo_is_none_of_the_photographs(photographs, checkpoint, capsys):
    for _ in range(2):
        assert run_demo(checkpoint, photographs, "--output", str(photographs / "drawn")) == 0
        assert "2 photographs at 32" in capsys.readouterr().out
    assert (photographs / "drawn" / "kept_patches.png").exists()


def test_calibrate_refuses_to_save_a_tokenizer_of_which_files_are_missing(many, tmp_path, capsys):
    checkpoint, output = save(tiny_model("clip"), tmp_path), tmp_path / "out"
    tokenizer_with({"<pad>": 1, "<s>": 97, "</s>": 98}).save_pretrained(checkpoint)
    of_clip = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    Path(checkpoint, "tokenizer_config.json").write_text(json.dumps(of_clip))
    Path(checkpoint, "tokenizer.json").unlink()
    given = ["--tokens", "64", "--by", "flops", "--device", "cpu", "--output", str(output)]
    assert main(["calibrate", checkpoint, str(many), *given]) == 2
    assert ": the CLIPTokenizer knows no tokens but 4 special ones, as where its files" in capsys.readouterr().err
    assert not output.exists()


def test_a_report_of_calibrate_that_cannot_be_written_costs_nothing_else(
    many, tmp_path, checkpoint, capsys, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "rows.json")

    monkeypatch.setattr(sys.modules["vwt_hf.cli.calibrate"], "write_file", full)
    given = ["--tokens", "64", "--by", "flops", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    assert main(["calibrate", checkpoint, str(many), *given, "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "→" in printed.out and "No space left on device: 'rows.json'" in printed.err
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").vwt["method"] == "gradual"


@pytest.mark.parametrize(
    ("writes", "error"),
    [
        ("transformers.modeling_utils.safe_save_file", SafetensorError("I/O error: No space left on device")),
        ("transformers.PreTrainedConfig.save_pretrained", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_calibrate_names_the_folder_where_the_disk_is_full(
    many, tmp_path, checkpoint, capsys, monkeypatch, writes, error
):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(writes, full)
    given = ["--tokens", "64", "--by", "flops", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["calibrate", checkpoint, str(many), *given]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said and str(tmp_path / "out") in said


def test_calibrate_saves_nothing_where_another_image_processor_would_be_read(many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vwt_hf.cli.calibrate.load_model", pytest.fail)
    checkpoint, output = save(tiny_model("clip"), tmp_path), tmp_path / "out"
    tokenizer = tokenizer_with({"<pad>": 1, "<s>": 97, "</s>": 98})
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(output)
    given = ["--tokens", "64", "--by", "flops", "--device", "cpu", "--output", str(output)]
    assert main(["calibrate", checkpoint, str(many), *given]) == 2
    assert f"{output} holds processor_config.json, whose image processor" in capsys.readouterr().err
    assert not (output / "config.json").exists()


def test_calibrate_saves_no_model_of_a_class_that_transformers_lacks(many, tmp_path, checkpoint, capsys):
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    (Path(checkpoint) / "config.json").write_text(json.dumps(config | {"architectures": ["ViTOfMine"]}))
    given = ["--tokens", "64", "--by", "flops", "--device", "cpu"]
    assert main(["calibrate", checkpoint, str(many), *given, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "has architectures ['ViTOfMine'] in its config.json" in said and "Trying" not in said
    assert not (tmp_path / "out").exists()
    assert main(["calibrate", checkpoint, str(many), *given]) == 0


def test_a_model_that_lies_nowhere_is_named(photographs, tmp_path, capsys):
    nowhere, file = str(tmp_path / "nowhere"), tmp_path / "weights.safetensors"
    file.write_bytes(b"\x89")
    for given in (
        ["calibrate", nowhere, str(photographs), "--tokens", "64"],
        ["evaluate", nowhere, "--dataset", str(photographs)],
        ["embed", str(photographs), "--model", nowhere, "--output", str(tmp_path / "features")],
        ["show", str(photographs), "--keep-ratio", "0.5", "--model", nowhere, "--output", str(tmp_path / "a.png")],
        ["demo", "--images", str(photographs), "--model", nowhere, "--output", str(tmp_path / "demo")],
        ["learn", str(photographs), "--image-processor", nowhere, "--output", str(tmp_path / "words")],
    ):
        assert main(given) == 2
        assert f"{nowhere} does not exist; expected the folder of a model, or its Hub id." in capsys.readouterr().err
        assert main([str(file) if word == nowhere else word for word in given]) == 2
        assert f"{file} is a file; expected the folder of a model, or its Hub id." in capsys.readouterr().err


def test_a_program_that_unregistered_stays_so_after_a_command(checkpoint, photographs, tmp_path):
    given = ["show", str(photographs), "--keep-ratio", "0.5", "--output", str(tmp_path / "kept.png")]
    vwt_hf.unregister()
    try:
        assert main(given) == 0 and not hasattr(transformers.PreTrainedConfig, "vwt")
        assert run_demo(checkpoint, photographs, "--keep-ratio", "1.5") == 2
        assert not hasattr(transformers.PreTrainedConfig, "vwt")
    finally:
        vwt_hf.register()
    assert main(given) == 0 and hasattr(transformers.PreTrainedConfig, "vwt")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip-projection", "CLIPVisionModelWithProjection"),
        ("clip", "CLIPModel"),
        ("vit", "ViTModel"),
        ("vit-classifier", "ViTModel"),
    ],
)
def test_features_are_of_the_class_that_the_checkpoint_names_unless_it_has_a_head_for_something_else(
    name, expected, tmp_path
):
    checkpoint = save(tiny_model(name), tmp_path)
    compressed = tmp_path / "compressed"
    vwt_hf.compress(tiny_model(name), {"method": "local", "image_std": [0.2, 0.2, 0.2]}).save_pretrained(compressed)
    for folder in (checkpoint, compressed):
        config = transformers.AutoConfig.from_pretrained(folder)
        assert type(features_class(config).from_pretrained(folder)).__name__ == expected


@pytest.mark.parametrize(("missing", "named"), [("cab", r"a, b, c\."), ("edcba", r"a, b, c and 2 more\.")])
def test_of_missing_weights_three_are_named_and_a_mask_token_is_none(missing, named):
    leave_out_random(None, ["embeddings.mask_token"], "me/model")
    with pytest.raises(ValueError, match=rf"me/model lacks weights of .*: {named} Expected a complete checkpoint"):
        leave_out_random(None, missing, "me/model")


def test_torchs_defaults_change_no_photograph_that_show_draws(photographs):
    given = sorted(photographs.glob("*.png")), 16, (0.5,) * 3, (0.25,) * 3
    expected = default_pixel_values(*given)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = default_pixel_values(*given)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
