"""What the command's verbs for visual words promise: learn, vocab and show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from vwt_hf import VisualVocabulary
from vwt_hf.cli import main, vocab
from vwt_hf.cli.show import default_statistics
from vwt_hf.visualize import group_by_words, shared_words, tint, token_counts, word_captions, word_color, words_figure
from vwt_hf.vocabulary import kmeans, learning
from vwt_hf.vocabulary.files import VocabularyInfo

Image = pytest.importorskip("PIL.Image", reason='needs pillow: pip install "vwt-hf[demo]"')
pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "vwt-hf[demo]"')

IMAGES, SIDE, PATCH_SIZE, SIZE = 12, 64, 8, 20
PATCHES = (SIDE // PATCH_SIZE) ** 2


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen photographs: flat colours above, noise below."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for number in range(IMAGES):
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
        pixels[: SIDE // 2, : SIDE // 2] = torch.tensor([200, 20, 10 * number], dtype=torch.uint8)
        pixels[: SIDE // 2, SIDE // 2 :] = torch.tensor([10, 90, 20 * number], dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"photograph_{number}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and an image processor: of a model, that is all these verbs need."""
    folder = tmp_path_factory.mktemp("model")
    transformers.ViTConfig(image_size=SIDE, patch_size=PATCH_SIZE).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(photographs: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned") / "words"
    assert run_learn(photographs, checkpoint, folder) == 0
    return folder


def run_learn(photographs: Path, checkpoint: Path, output: Path, *more: str) -> int:
    arguments = ["learn", str(photographs), "--image-processor", str(checkpoint), "--output", str(output)]
    return main([*arguments, "--size", str(SIZE), "--batch-size", "2", "--device", "cpu", *more])


def test_learn_writes_a_vocabulary_that_loads_and_prints_what_it_learned_from(
    photographs, checkpoint, tmp_path, capsys, monkeypatch
):
    # So few images would only just fill the buffer.
    monkeypatch.setattr(kmeans, "BUFFERED_AT_LEAST", 100)
    monkeypatch.setattr(kmeans, "BUFFERED", 1)
    output = tmp_path / "words"
    assert run_learn(photographs, checkpoint, output, "--seed", "3") == 0
    printed = capsys.readouterr()
    vocabulary = VisualVocabulary.from_pretrained(output)
    assert (len(vocabulary), vocabulary.patch_size, vocabulary.info.images) == (SIZE, PATCH_SIZE, IMAGES)
    assert vocabulary.info.seed == 3
    facts = facts_of(printed.out)
    assert facts["patches"] == f"{IMAGES * PATCHES}" and facts["images"] == f"{IMAGES}" and facts["unreadable"] == "0"
    assert float(facts["seconds"]) >= 0 and f"{vocabulary.info.inertia:.4g}," in facts["inertia"]
    assert facts["vocabulary"] == str(output)
    assert "inertia=" in printed.err and "patches/s=" in printed.err
    # Nothing but the vocabulary is left: no progress of a run that has ended.
    assert {path.name for path in output.iterdir()} == {
        "README.md", "vocabulary.json", "vocabulary.safetensors", "words.png"
    }  # fmt: skip


def test_learn_resumes_where_it_was_interrupted_and_ends_with_the_same_words(
    photographs, checkpoint, words, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "words"
    monkeypatch.setattr(learning, "CHECKPOINT_EVERY", 2)
    with monkeypatch.context() as patched:
        interrupt_before_batch(5, patched)
        assert run_learn(photographs, checkpoint, output) == 130
    assert capsys.readouterr().err.endswith("vwt-hf learn: interrupted\n")
    assert not (output / "vocabulary.json").exists()

    assert run_learn(photographs, checkpoint, output) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err

    assert run_learn(photographs, checkpoint, output, "--resume") == 0
    printed = capsys.readouterr()
    assert "since it was resumed" in facts_of(printed.out)["seconds"]
    assert f"{IMAGES}/{IMAGES}" in printed.err
    resumed, whole = VisualVocabulary.from_pretrained(output), VisualVocabulary.from_pretrained(words)
    assert torch.equal(resumed.words, whole.words) and resumed.info == whole.info


def test_learn_removes_of_the_folder_of_its_progress_what_it_wrote_alone(photographs, checkpoint, tmp_path):
    progress = tmp_path / "words" / ".checkpoint"
    progress.mkdir(parents=True)
    (progress / "mine.txt").write_text("mine")
    assert run_learn(photographs, checkpoint, tmp_path / "words") == 0
    assert [path.name for path in progress.iterdir()] == ["mine.txt"]


def interrupt_before_batch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = learning.MiniBatchKMeans.update
    calls = iter(range(1, number + 1))

    def interrupted(self, patches):
        if next(calls) == number:
            raise KeyboardInterrupt
        update(self, patches)

    monkeypatch.setattr(learning.MiniBatchKMeans, "update", interrupted)


def test_learn_counts_the_images_that_it_cannot_read_and_warns_in_one_line(photographs, checkpoint, tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    assert run_learn(folder, checkpoint, tmp_path / "words") == 0
    printed = capsys.readouterr()
    assert facts_of(printed.out)["unreadable"] == "1"
    warning = printed.err.splitlines()[-1]
    assert warning.startswith("vwt-hf learn: warning: 1 of 13 images could not be read") and "broken.png" in warning


def test_learn_goes_on_with_more_images_from_a_checkpoint_that_was_named(photographs, checkpoint, words, tmp_path):
    progress = ["--checkpoint", str(tmp_path / "progress")]
    assert run_learn(photographs, checkpoint, tmp_path / "words", *progress, "--max-images", "6") == 0
    assert VisualVocabulary.from_pretrained(tmp_path / "words").info.images == 6
    assert run_learn(photographs, checkpoint, tmp_path / "words", *progress, "--resume") == 0
    more, whole = VisualVocabulary.from_pretrained(tmp_path / "words"), VisualVocabulary.from_pretrained(words)
    assert torch.equal(more.words, whole.words) and more.info == whole.info


def test_learn_reads_a_data_set_of_the_hub_by_its_id(photographs, checkpoint, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        paths = sorted(map(str, photographs.iterdir()))
        return datasets.Dataset.from_dict({"photo": paths}).cast_column("photo", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert (
        run_learn(Path("me/photographs"), checkpoint, tmp_path / "words", "--split", "test", "--column", "photo") == 0
    )
    assert asked == [("me/photographs", None, {"split": "test", "streaming": False})]
    info = VisualVocabulary.from_pretrained(tmp_path / "words").info
    assert (info.dataset, info.images) == ("me/photographs", IMAGES)


def test_learn_refuses_a_public_repository_for_private_words_before_it_learns(
    photographs, checkpoint, tmp_path, hub, capsys, monkeypatch
):
    hub.put("me/words", {"README.md": b""})
    monkeypatch.setattr(VisualVocabulary, "learn", lambda *_, **__: pytest.fail("learned"))
    assert run_learn(photographs, checkpoint, tmp_path / "words", "--push-to-hub", "me/words", "--private") == 2
    assert "me/words is public; expected a private repository" in capsys.readouterr().err


def test_learn_asks_who_pushes_before_it_learns(photographs, checkpoint, tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(VisualVocabulary, "learn", lambda *_, **__: pytest.fail("learned"))
    assert run_learn(photographs, checkpoint, tmp_path / "words", "--push-to-hub", "me/words") == 2
    assert "is invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("--push-to-hub", "me/../words", "me/../words"),
        ("--push-to-hub", "", "Repo id must"),
        ("--checkpoint", "file", "file is no folder"),
    ],
)
def test_learn_finds_before_it_learns_that_nothing_can_be_kept(
    argument, value, reason, photographs, checkpoint, tmp_path, hub, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VisualVocabulary, "learn", lambda *_, **__: pytest.fail("learned"))
    assert run_learn(photographs, checkpoint, tmp_path / "words", argument, value) == 2
    assert reason in capsys.readouterr().err


def test_learn_pushes_where_it_is_asked_to(photographs, checkpoint, tmp_path, hub, capsys):
    assert run_learn(photographs, checkpoint, tmp_path / "words", "--push-to-hub", "me/words", "--private") == 0
    on_hub = VisualVocabulary.from_pretrained("me/words")
    assert torch.equal(on_hub.words, VisualVocabulary.from_pretrained(tmp_path / "words").words)
    assert on_hub.revision in capsys.readouterr().out and hub.repos["me/words"].private
    hub.repos["me/words"].private = False  # which words that are pushed without --private may be
    assert run_learn(photographs, checkpoint, tmp_path / "again", "--push-to-hub", "me/words") == 0


def test_vocab_prints_the_facts_and_writes_the_sheet(words, tmp_path, capsys):
    picture = tmp_path / "new" / "sheet.png"
    assert main(["vocab", str(words), "--output", str(picture)]) == 0
    printed = capsys.readouterr()
    facts = facts_of(printed.out)
    assert facts["size"] == f"{SIZE} words" and facts["patch size"] == f"{PATCH_SIZE}×{PATCH_SIZE} pixels"
    assert facts["its mean"] == "0.5, 0.5, 0.5" and facts["images"] == f"{IMAGES}" and facts["seed"] == "0"
    assert facts["source"] == str(words) and facts["ten most frequent words"].endswith("% of the patches")
    assert printed.err == "" and f"the {SIZE} most frequent, row by row" in printed.out
    with Image.open(picture) as sheet:
        assert sheet.format == "PNG"


def test_vocab_says_what_a_vocabulary_does_not_record(tmp_path, capsys):
    VisualVocabulary(torch.rand(3, 1, 4, 4)).save_pretrained(tmp_path / "bare", card=False)
    assert main(["vocab", str(tmp_path / "bare"), "--output", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    assert "(the first words, row by row)" in printed
    facts = facts_of(printed)
    assert facts["inertia"] == facts["ten most frequent words"] == facts["its mean"] == "not recorded"


def test_vocab_prints_each_figure_beside_its_name(tmp_path, capsys):
    info = VocabularyInfo(image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), patches=1200, inertia=0.25)
    words = VisualVocabulary(torch.rand(12, 3, 4, 4), torch.tensor([1, *[100] * 9, 1, 98]), info)
    words.save_pretrained(tmp_path / "words", card=False)
    assert main(["vocab", str(tmp_path / "words"), "--output", str(tmp_path / "sheet.png")]) == 0
    facts = facts_of(capsys.readouterr().out)
    assert facts["its mean"] == "0.1, 0.2, 0.3" and facts["its standard deviation"] == "0.4, 0.5, 0.6"
    assert facts["patches"] == "1,200" and facts["inertia"] == "0.25"
    assert facts["ten most frequent words"] == "99.8 % of the patches"
    many = VisualVocabulary(words.words, torch.full((12,), 2**62))  # whose sum no integer of 64 bits holds
    assert dict(vocab.facts(many))["ten most frequent words"] == "83.3 % of the patches"


@pytest.mark.parametrize("with_model", [False, True])
def test_show_writes_a_picture_and_a_line_for_each_photograph(
    photographs, checkpoint, words, tmp_path, capsys, with_model
):
    picture = tmp_path / "new" / "show.png"
    files = [str(photographs / "photograph_1.png"), str(photographs / "photograph_2.png")]
    model = ["--model", str(checkpoint)] if with_model else []
    assert main(["show", *files, "--vocabulary", str(words), "--output", str(picture), *model]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    first, second, last = printed.out.splitlines()
    # Without a model photographs are enlarged to 224 pixels.
    patches = PATCHES if with_model else (224 // PATCH_SIZE) ** 2
    assert first.startswith(f"{files[0]}: {patches} patches → ") and second.startswith(f"{files[1]}: {patches} ")
    assert last == f"picture: {picture}"
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 400


def test_patches_that_stay_alone_are_as_in_the_photograph_and_shared_words_have_one_colour():
    photographs = torch.rand(2, 3, 9, 8)
    photographs[0, :, :4], photographs[1, :, 4:8, :] = 1.0, 1.0
    words = torch.ones(1, 3 * 4 * 4)
    grouped = group_by_words(photographs, (4, 4), words, threshold=0.01)
    assert shared_words(*grouped).tolist() == [[[0, 0], [-1, -1]], [[-1, -1], [0, 0]]]
    assert word_captions(*grouped) == ["4 patches → 3 tokens, 1 word"] * 2
    figure = words_figure(*grouped, names=["a", "b"])
    plain, tinted, seen = ([torch.tensor(axis.images[0].get_array()) for axis in figure.axes[i::3]] for i in range(3))
    assert torch.equal(plain[0][4:], tinted[0][4:]) and torch.equal(plain[1][:4], tinted[1][:4])
    assert torch.equal(plain[1][8:], tinted[1][8:])  # beyond the last whole patch
    inner = tinted[0][1:3]  # within the outline
    assert torch.equal(inner, tinted[1][5:7]) and not torch.equal(inner, plain[0][1:3])
    assert torch.equal(seen[0][:4], plain[0][:4])  # the mean of white patches is white


def test_the_last_column_shows_each_patch_as_its_token_does():
    photograph = torch.ones(1, 3, 4, 12)
    photograph[..., 4:8] = 0.5
    photograph[..., 8:] = torch.rand(3, 4, 4)
    figure = words_figure(*group_by_words(photograph, (4, 4), torch.ones(1, 48), 0.01), names=["a"])
    seen = torch.tensor(figure.axes[2].images[0].get_array())
    assert (seen[:, :8] == 191).all()
    alone = torch.tensor(figure.axes[0].images[0].get_array())[:, 8:]
    torch.testing.assert_close(seen[:, 8:], alone, atol=1, rtol=0)


def test_a_word_that_one_patch_alone_takes_leaves_it_untouched():
    photograph = torch.ones(1, 3, 4, 8)
    photograph[..., 4:] = torch.rand(3, 4, 4)
    grouped = group_by_words(photograph, (4, 4), torch.ones(1, 48), threshold=0.01)
    shared = shared_words(*grouped)
    assert shared.tolist() == [[[-1, -1]]] and token_counts(*grouped) == [2]
    pixels = photograph.permute(0, 2, 3, 1)
    assert torch.equal(tint(pixels, shared, (4, 4)), pixels)


def test_at_threshold_0_nothing_is_shared_as_in_the_plain_model():
    grouped = group_by_words(torch.ones(1, 3, 8, 8), (4, 4), torch.ones(1, 48), threshold=0)
    assert (shared_words(*grouped) == -1).all() and word_captions(*grouped) == ["4 patches → 4 tokens, 0 words"]


def test_the_most_frequent_words_have_colours_far_apart():
    colors = torch.tensor([word_color(word) for word in range(8)])
    assert torch.pdist(colors).min() > 0.3 and torch.equal(colors[3], torch.tensor(word_color(3)))


def test_the_written_picture_has_untouched_patches_in_the_photographs_own_colours(tmp_path):
    VisualVocabulary(torch.ones(1, 3, PATCH_SIZE, PATCH_SIZE)).save_pretrained(tmp_path / "white", card=False)
    alone = (200, 20, 60)
    photograph = Image.new("RGB", (SIDE, SIDE), "white")
    photograph.paste(alone, (0, SIDE // 2, SIDE, SIDE))
    photograph.save(tmp_path / "flag.png")
    files = [str(tmp_path / "flag.png"), "--output", str(tmp_path / "show.png")]
    assert main(["show", *files, "--vocabulary", str(tmp_path / "white")]) == 0
    with Image.open(tmp_path / "show.png") as image:
        picture = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    before, after, _ = (int((part == torch.tensor(alone)).all(dim=-1).sum()) for part in picture.chunk(3, dim=1))
    assert before > 10_000 and abs(before - after) < 0.2 * before
    white = [int((part == 255).all(dim=-1).sum()) for part in picture.chunk(3, dim=1)]
    assert white[1] < white[0] - 0.9 * before


def test_pictures_that_an_earlier_run_left_among_the_photographs_are_none_of_them(
    photographs, checkpoint, tmp_path, capsys
):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    for _ in range(2):
        assert run_learn(folder, checkpoint, folder / "words") == 0
        assert facts_of(capsys.readouterr().out)["images"] == f"{IMAGES}"
    for _ in range(2):
        assert main(["show", str(folder), "--keep-ratio", "0.5", "--output", str(folder / "vwt-show.png")]) == 0
        assert capsys.readouterr().out.count(" patches") == IMAGES
    assert (folder / "vwt-show.png").exists() and (folder / "words" / "words.png").exists()
    for name in ("--output", "--checkpoint"):
        assert run_learn(folder, checkpoint, tmp_path / "more", name, "") == 2
        assert "No folder is named, but an empty text" in capsys.readouterr().err


def test_show_writes_no_picture_in_place_of_a_photograph_or_beside_those_of_a_folder(photographs, tmp_path, capsys):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    own = next(folder.glob("*.png"))
    before = {file: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "link.png").symlink_to(own)
    is_drawn = "is a photograph to draw, and to be written; name another output"
    for images, output, reason in (
        (folder, own, is_drawn),
        (own, own, is_drawn),
        (folder, tmp_path / "link.png", is_drawn),
        (folder, folder / "new" / "drawn.png", f"would be a picture among the images of {folder}, and one of them in"),
    ):
        assert main(["show", str(images), "--keep-ratio=1", "--output", str(output)]) == 2
        assert f"{output} {reason}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_show_draws_the_kept_patches(photographs, checkpoint, tmp_path, capsys):
    arguments = ["show", str(photographs), "--keep-ratio", "0.25", "--criterion", "grid", "--model", str(checkpoint)]
    assert main([*arguments, "--output", str(tmp_path / "kept.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{PATCHES // 4} of {PATCHES} patches") == IMAGES
    assert printed.splitlines()[-1] == f"picture: {tmp_path / 'kept.png'}"  # which holds all of them
    assert (tmp_path / "kept.png").exists()


@pytest.mark.parametrize(
    ("vwt", "with_model", "kept"),
    [
        ('{"method": "local", "keep_ratio": 0.5}', True, PATCHES // 2),
        ('{"method": "gradual", "num_patches": 24, "join_ratio": 0.2}', True, 24),
        ('{"method": "coarse", "keep_ratio": 0.5}', False, 97),
        ('{"criterion": "grid", "dropped": "merge"}', False, 98),
        ('{"keep_ratio": 1.0}', False, 196),
    ],
)
def test_show_draws_what_is_left_by_any_setting(photographs, checkpoint, tmp_path, capsys, vwt, with_model, kept):
    model = ["--model", str(checkpoint)] if with_model else []
    picture = tmp_path / "left.png"
    assert main(["show", str(photographs), "--vwt", vwt, "--output", str(picture), *model]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.count(f"{kept} of {PATCHES if with_model else 196} patches") == IMAGES
    with Image.open(picture) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("vwt", ['{"method": "inter"}', "true"])
def test_without_a_model_a_setting_is_drawn_by_the_usual_mean_and_deviation(vwt, photographs, tmp_path, capsys, caplog):
    assert main(["show", str(photographs), "--vwt", vwt, "--output", str(tmp_path / "left.png")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and not caplog.records and printed.out.count(" of 196 patches") == IMAGES


def test_show_by_words_draws_as_many_tokens_as_a_model_has(photographs, words, checkpoint, tmp_path, capsys):
    vwt = json.dumps({"method": "inter", "vocabulary": str(words), "threshold": 0.3})
    asked = ["show", str(photographs), "--model", str(checkpoint), "--output", str(tmp_path / "left.png")]
    assert main([*asked, "--vwt", vwt]) == 0
    shown = [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert main([*asked, "--vocabulary", str(words), "--threshold", "0.3"]) == 0
    by_words = [line.split(" → ")[1].split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert shown == by_words and len(shown) == IMAGES and int(shown[0]) < PATCHES
    assert main([*asked, "--vocabulary", str(words), "--threshold", "0"]) == 0
    assert capsys.readouterr().out.count(f"{PATCHES} patches → {PATCHES} ") == IMAGES


def test_show_takes_the_statistics_of_a_vocabulary_that_records_both():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for fields, expected in (
        ({"image_mean": mean, "image_std": std}, (mean, std)),
        ({"image_mean": mean}, ((0.5,) * 3, (0.5,) * 3)),
    ):
        assert default_statistics(VisualVocabulary(torch.rand(2, 3, 4, 4), info=VocabularyInfo(**fields))) == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "learn nowhere/at/all --image-processor {model}",
            "nowhere/at/all does not exist; expected a folder of images",
        ),
        ("learn {photographs} --image-processor nowhere/at-all", "nowhere/at-all"),
        ("learn {photographs} --image-processor {model} --patch-size 0", "patch_size is 0"),
        ("learn {photographs} --image-processor {model} --batch-size 99999999999999999999", "and less than 2**63"),
        ("learn {photographs} --image-processor {model} --patch-size 65", "none of the 12 images could be read"),
        ("learn {photographs} --image-processor {processor}", "give --patch-size"),
        ("learn {photographs} --image-processor {model} --streaming", "--streaming: of data sets alone, and"),
        ("learn {photographs} --image-processor {model} --device abacus", "device is 'abacus'"),
        (
            "learn {photographs} --image-processor {model} --private",
            "--private is of the repository that --push-to-hub",
        ),
        ("vocab {words} --revision v1", "words is a folder; expected a Hub id, which alone has revisions"),
        ("show {photographs} --vocabulary {words} --revision v1", "words is a folder; expected a Hub id, which alone"),
        ("vocab nowhere/at/all", "nowhere/at/all is no folder"),
        ("vocab {photographs}", "holds neither vocabulary.json nor"),
        ("show {photographs} --vocabulary {photographs}", "holds neither vocabulary.json nor"),
        ("show {photographs} --vocabulary {words} --model {other}", "words are 8×8 pixels, the model's patches 16×16"),
        ("show {photographs} --vocabulary {words} --criterion grid", "criterion is 'grid', but method is 'inter'"),
        ("show {photographs} --keep-ratio 0.5 --threshold 0.2", "threshold is 0.2, but method is 'intra'"),
        ("show nowhere.png --vocabulary {words}", "nowhere.png does not exist"),
        ("show {photographs} --vwt false", "--vwt is False, by which nothing is left out"),
        ('show {photographs} --vwt {{"method":"given"}}', "by which nothing is left out; expected a setting"),
        ("show {photographs} --vwt true --threshold 0.2", "--threshold is given beside --vwt; expected all fields"),
    ],
)
def test_what_cannot_be_done_is_status_2_and_one_line(
    photographs, checkpoint, words, tmp_path, monkeypatch, capsys, arguments, reason
):
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path / "processor")
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path / "other")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"patch_size": 16}))
    monkeypatch.chdir(tmp_path)
    folders = {"photographs": photographs, "model": checkpoint, "words": words}
    folders |= {"processor": tmp_path / "processor", "other": tmp_path / "other"}
    capsys.readouterr()
    assert main([word.format(**folders) for word in arguments.split()]) == 2
    printed = capsys.readouterr()
    said = [line for line in printed.err.replace("\r", "\n").splitlines() if not line.startswith("Learning words:")]
    said = [line for line in said if line.strip()]
    assert printed.out == "" and len(said) == 1
    assert said[0].startswith(f"vwt-hf {arguments.split()[0]}: ") and reason in said[0]


@pytest.mark.parametrize("verb", ["learn", "vocab", "show"])
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0 and f"\n  vwt-hf {verb} " in capsys.readouterr().out


def facts_of(printed: str) -> dict[str, str]:
    """The lines "label   value" of an aligned list."""
    pairs = (line.split("   ", 1) for line in printed.splitlines() if "   " in line)
    return {label: value.strip() for label, value in pairs}
