"""Images are found in one way, in whatever holds them, and go through image processors within bounds."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import warnings

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from vwt_hf.cli import show, vocab
from vwt_hf.decoding import UnreadableImage, read_image
from vwt_hf.image_source import OWN_PICTURES, find_images, image_rows, open_images, require_apart, spread
from vwt_hf.labelled_images import open_labelled
from vwt_hf.processed_images import patch_batches, pixel_batches


def test_a_link_is_the_same_image_while_the_drive_that_it_leads_to_is_gone(tmp_path):
    drive, photographs = tmp_path / "drive", tmp_path / "photographs"
    for folder in (drive, photographs):
        folder.mkdir()
    PIL.Image.new("RGB", (3, 2)).save(drive / "a.png")
    (photographs / "a.png").symlink_to(drive / "a.png")
    before = image_rows(photographs).order
    drive.rename(tmp_path / "gone")
    assert image_rows(photographs).order == before
    (photographs / "a.png").unlink()
    (photographs / "a.png").symlink_to(drive / "b.png")
    assert image_rows(photographs).order != before


def test_folders_are_searched_through_all_levels_for_what_pillow_decodes_itself(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.webp", "c.tif", "notes.txt", "page.pdf", "drawing.eps", "d.png/inner.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["a.webp", "b/1.png", "b/2.JPG", "c.tif", "d.png/inner.gif"]
    assert find_images([tmp_path], 2) == [tmp_path / "a.webp", tmp_path / "b/2.JPG"]
    three = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path], 3)]
    assert three == ["a.webp", "b/1.png", "c.tif"]  # of five, and not the first three
    assert find_images([tmp_path / "c.tif", str(tmp_path / "b")], 9) == [
        tmp_path / name for name in ("c.tif", "b/1.png", "b/2.JPG")
    ]
    (tmp_path / "empty").mkdir()
    for find in (lambda folder: find_images([folder]), image_rows, open_images, open_labelled):
        with pytest.raises(ValueError, match="empty holds no image"):
            find(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png does not exist"):
        find_images([tmp_path / "nowhere.png"])


def test_photographs_of_formats_that_are_not_read_are_counted_in_a_warning(tmp_path, recwarn):
    for name in ("a.png", "a.CR2", "1.HEIC", "b/2.heic", "b/3.dng", "b/.hidden.heic", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([tmp_path]) == [tmp_path / "a.png"]
    assert [re.search(r"holds (.*), which are left out", str(warned.message))[1] for warned in recwarn] == [
        "2 files that end in .heic",
        "1 files that end in .dng",
    ]


def test_what_is_neither_a_folder_nor_a_data_set_is_refused_by_its_type():
    for images, expected in (
        (datasets.Image(), "a Dataset or an IterableDataset"),
        (7, "a data set of `datasets`, a folder"),
    ):
        with pytest.raises(TypeError, match=rf"images is a {type(images).__name__}; expected {expected}"):
            open_images(images)
    for images in (datasets.Image(), 7):
        with pytest.raises(TypeError, match=rf"images is a {type(images).__name__}; expected a folder or a data set"):
            open_labelled(images)
    with pytest.raises(ValueError, match="file of groups is for folders of images"):
        open_labelled(datasets.Dataset.from_dict({}), groups="groups.json")


def test_other_images_of_as_many_rows_are_told_apart(noise_images):
    def photos(*paths):
        data = datasets.Dataset.from_dict({"photo": list(map(str, paths))})
        return data.cast_column("photo", datasets.Image())

    one, other, away = photos(*noise_images[:2]), photos(*noise_images[1:3]), photos("https://host/a.png")
    assert image_rows(one).order != image_rows(other).order
    assert open_images(one).order != open_images(other).order
    assert open_images(away).order == open_images(photos("https://host/a.png")).order
    assert open_images(photos()).part().total == 0


@pytest.mark.parametrize("text", ["string", "large_string"])
def test_rows_are_named_by_their_key_or_number_and_there_is_one(text, noise_images):
    features = datasets.Features({"photo": datasets.Image(), "__key__": datasets.Value(text)})
    of_a_photo = {"photo": [str(noise_images[0]), None], "__key__": ["cat", None]}
    rows = image_rows(datasets.Dataset.from_dict(of_a_photo, features=features))
    assert [rows[number][0] for number in range(len(rows))] == ["cat", "row 1"]
    with pytest.raises(ValueError, match="the data set has no rows; expected images"):
        image_rows(datasets.Dataset.from_dict({"photo": [], "__key__": []}, features=features))


@pytest.mark.parametrize("form", ["folder", "data set"])
def test_each_process_reads_as_many_images_as_it_is_told_to(form, noise_images, tmp_path):
    photos = datasets.Dataset.from_dict({"photo": list(map(str, noise_images))})
    images = open_images(tmp_path if form == "folder" else photos.cast_column("photo", datasets.Image()))
    names = [name for name, _ in images.part().items]
    part = images.part(index=1, number=2, max_images=2)
    assert part.total == 2 and [name for name, _ in part.items] == names[1:4:2]
    assert [name for name, _ in images.part(index=1, number=2, max_images=2, skip=1).items] == names[3:4]


@pytest.mark.parametrize("opened", [open_images, image_rows])
def test_a_column_of_a_folder_is_refused(opened, noise_images, tmp_path):
    with pytest.raises(ValueError, match=r"column is 'photo'.* data sets"):
        opened(tmp_path, column="photo")


def test_links_are_followed_to_each_folder_once_and_one_to_nothing_is_an_unreadable_image(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for name in ("in/b/1.png", "in/d.png", "out/1.png", "out/deep/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / name)
    links = {"a": "b", "c": "../out", "c2": "../out", "e.png": "nowhere", "f.png": "f.png", "g.png": "d.png", "h": "."}
    for name, target in links.items():
        (inside / name).symlink_to(target)
    (outside / "back").symlink_to(inside)
    os.mkfifo(tmp_path / "pipe")
    (inside / "i.png").symlink_to(tmp_path / "pipe")  # which would be waited for
    expected = ["b/1.png", "c/1.png", "c/deep/2.png", "d.png", "e.png", "f.png", "g.png"]
    assert [path.relative_to(inside).as_posix() for path in find_images([inside])] == expected
    rows = image_rows(inside)
    assert [rows[index][0] for index in range(len(rows))] == expected and len(open_labelled(inside).data) == 7
    for index, name in enumerate(expected):
        if name in ("e.png", "f.png"):
            with pytest.raises(UnreadableImage, match=rf"{name} cannot be read"):
                read_image(rows[index][1], name)
        else:
            assert read_image(rows[index][1]).size == (4, 4)
    assert open_images(inside).part().total == 7


def test_pictures_that_commands_draw_by_names_of_their_own_are_none_of_the_images(tmp_path):
    for name in ("a.png", "b/words.png", *OWN_PICTURES, f"b/{OWN_PICTURES[0]}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([tmp_path]) == [tmp_path / "a.png", tmp_path / "b/words.png"]
    assert find_images([tmp_path / OWN_PICTURES[0]]) == [tmp_path / OWN_PICTURES[0]]  # it is asked for
    for verb in (show, vocab):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        assert parser.get_default("output") in OWN_PICTURES
    assert "kept_patches.png" in OWN_PICTURES  # of `demo`, whose default is a folder


@pytest.mark.parametrize(
    ("picture", "is_among"),
    [
        *(("a.png", True), ("new/a.PNG", True), ("link/a.png", True), ("away/a.png", True)),
        ("../to/a.png", True),
        *(("../a.png", False), ("../photographs-drawn/a.png", False), ("a.pdf", False), ("a", False)),
        *((".a.png", False), (".hidden/a.png", False)),
        (OWN_PICTURES[0], False),
    ],
)
def test_a_picture_to_be_written_is_refused_where_it_would_be_one_of_the_images(picture, is_among, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "link").symlink_to(folder)
    (folder / "away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "to").symlink_to(folder)
    if is_among:
        with pytest.raises(ValueError, match=r"would be a picture among the images of .*, and one of them in"):
            require_apart(folder / picture, folder)
        return
    require_apart(folder / picture, folder)
    (folder / picture).parent.mkdir(exist_ok=True)
    (folder / picture).touch()
    with pytest.raises(ValueError, match="holds no image files"):
        find_images([folder])


def test_what_is_hidden_is_no_image_and_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "b/.a.png", "b/c.png"):
        (tmp_path / ".photographs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".photographs" / name).touch()
    folder = tmp_path / ".photographs"  # itself may be hidden
    assert [path.relative_to(folder).as_posix() for path in find_images([folder])] == ["a.png", "b/c.png"]
    assert len(image_rows(folder)) == 2
    (folder / "linked").symlink_to(folder / ".ipynb_checkpoints")  # by a name that is not hidden
    assert [path.parent.name for path in find_images([folder])] == [".photographs", "b", "linked"]
    (folder / "linked").unlink()
    scan = os.scandir

    def locked(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(
        PermissionError, match=r"photographs/b cannot be searched for images \(Permission denied\); make"
    ):
        find_images([folder])


def test_where_a_limit_divides_every_nth_is_taken_and_else_they_are_as_even_as_can_be():
    for count in range(40):
        assert spread(count, None) == list(range(count))
        for limit in range(1, 45):
            taken = spread(count, limit)
            gaps = np.diff([*taken, count])
            assert len(taken) == min(count, limit) and taken[:1] == [0][:count]
            assert count == 0 or gaps.max() - gaps.min() <= 1
            if count and count % limit == 0:
                assert taken == list(range(0, count, count // limit))


@pytest.mark.parametrize("opened", [open_images, image_rows, open_labelled])
def test_what_holds_no_images_is_refused_in_the_same_words(opened, tmp_path):
    with pytest.raises(ValueError, match=r"nothing', which is no folder; expected a folder of image files"):
        opened(tmp_path / "nothing")
    data = datasets.Dataset.from_dict({"text": ["a"]})
    splits = datasets.DatasetDict({"test": data, "dev": data})
    with pytest.raises(ValueError, match=r"has the splits test, dev; pass one of them, as images\['test'\]"):
        opened(splits)
    with pytest.raises(ValueError, match=r"has the splits ; pass one of them, as images\['train'\]"):
        opened({})
    with pytest.raises(ValueError, match="has no column of images; its columns are text, those with images: none"):
        opened(data)


@pytest.mark.parametrize("opened", [open_images, image_rows, open_labelled])
def test_a_data_set_that_changes_its_images_as_it_decodes_them_is_refused(opened, noise_images):
    rows = {"photo": [str(path) for path in noise_images], "label": [0, 1, 0, 1, 0]}
    data = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
    with pytest.raises(ValueError, match=r"has a transform .* of its column 'photo', which is not applied here;"):
        opened(data.with_transform(lambda batch: batch))
    grey = data.cast_column("photo", datasets.Image(mode="L"))
    for of_grey in (grey, grey.to_iterable_dataset()) if opened is not image_rows else (grey,):
        with pytest.raises(ValueError, match=r"is of datasets.Image\(mode='L'\), and images are read in RGB; expected"):
            opened(of_grey)
    for fine in (
        data.cast_column("photo", datasets.Image(mode="RGB")),
        data.cast_column("photo", datasets.Image(mode="RGBA")),
        data.with_transform(lambda batch: batch, columns=["label"]),
        data.with_format("torch"),
        data.with_transform(lambda batch: batch).with_format(None),
    ):
        opened(fine)


@pytest.mark.parametrize("form", [None, "torch", "numpy", "arrow", "pandas"])
def test_a_format_changes_neither_images_nor_labels(noise_images, form):
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"photo": list(map(str, noise_images)), "label": [1, 0, 1, 0, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    pixels = {np.asarray(PIL.Image.open(path)).tobytes() for path in noise_images}
    for formatted in (data.with_format(form), data.to_iterable_dataset(num_shards=2).with_format(form)):
        samples = [sample for _, batch in open_labelled(formatted).batches(0, 1, 2) for sample in batch]
        assert [sample.label for sample in samples] == ["dog", "cat", "dog", "cat", "dog"]
        for items in ([sample.item for sample in samples], [item for _, item in open_images(formatted).part().items]):
            assert {np.asarray(read_image(item)).tobytes() for item in items} == pixels


@pytest.mark.parametrize("opened", [open_images, open_labelled])
def test_a_stream_that_says_nothing_is_asked_for_its_first_row(opened, noise_images):
    def rows():
        for number, path in enumerate(noise_images):
            yield {"id": number, "photo": PIL.Image.open(path)}

    stream = datasets.IterableDataset.from_generator(rows).with_format("numpy")
    assert stream.features is None
    found = opened(stream)
    if opened is open_images:
        items = [item for _, item in found.part().items]
    else:
        items = [sample.item for _, batch in found.batches(0, 1, 2) for sample in batch]
    assert len(items) == 5 and {read_image(item).size for item in items} == {(50, 40)}
    with pytest.raises(ValueError, match="no column of images 'id'; its columns are id, photo, those with images: pho"):
        opened(stream, **{"column" if opened is open_images else "image_column": "id"})
    with pytest.raises(ValueError, match="the data set has no column of images"):
        opened(datasets.IterableDataset.from_generator(lambda: iter(())))


def test_torchs_defaults_change_neither_the_order_nor_the_patches(noise_images, tmp_path):
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})

    def found() -> tuple[list[str], torch.Tensor, list[dict[str, torch.Tensor]]]:
        items = list(open_images(tmp_path).part().items)
        (batch,) = patch_batches(iter(items), processor, 16, 5)
        return [name for name, _ in items], batch.patches, list(pixel_batches(noise_images, processor, 5))

    names, patches, made = found()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        again = found()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert again[0] == names and torch.equal(again[1], patches)
    assert torch.equal(again[2][0]["pixel_values"], made[0]["pixel_values"])


@pytest.mark.parametrize(("limit", "expected"), [(None, [[0, 1, 2], [3, 4, 5]]), (4, [[0, 2], [1, 3]])])
def test_processes_share_a_stream_by_its_shards_and_one_with_a_limit_row_by_row(limit, expected):
    def rows(starts):
        for start in starts:
            yield from ({"image": PIL.Image.new("RGB", (1, 1), (start + number, 0, 0))} for number in range(3))

    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.IterableDataset.from_generator(rows, features, gen_kwargs={"starts": [0, 3]})
    images = open_labelled(stream, limit=limit)
    batches = [[sample for _, batch in images.batches(process, 2, 8) for sample in batch] for process in range(2)]
    assert [[read_image(sample.item).getpixel((0, 0))[0] for sample in batch] for batch in batches] == expected


def test_images_have_the_same_names_whatever_the_locales_encoding_is(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "ö.png")
    ask = "import sys; from vwt_hf.image_source import image_rows; print(ascii(image_rows(sys.argv[1])[0][0]))"
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.check_output([sys.executable, "-c", ask, os.fspath(tmp_path)], env=plain, text=True)
    assert found.strip() == ascii("ö.png") == ascii(image_rows(tmp_path)[0][0])


def test_a_saved_data_set_in_place_of_a_folder_of_images_is_told_how_to_load(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [PIL.Image.new("RGB", (4, 4))]})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for folder in (tmp_path / "rows", tmp_path / "splits"):
        with pytest.raises(ValueError, match=r"save_to_disk wrote; .* in Python, what datasets\.load_from_disk"):
            image_rows(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_metadata_that_name_images_are_said_to_be_left_out_where_labels_are_folders(encoding, tmp_path):
    (tmp_path / "cat").mkdir()
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "a.png")
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("date,place\n2020,Rome\n", encoding=encoding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_labelled(tmp_path)
    metadata.write_text("file_name,label\ncat/a.png,dog\n", encoding=encoding)
    with pytest.warns(UserWarning, match=r"metadata\.csv is left out, and labels are the names of folders"):
        images = open_labelled(tmp_path)
    assert [sample.label for _, batch in images.batches(0, 1, 2) for sample in batch] == ["cat"]


def test_metadata_that_cannot_be_read_do_not_keep_a_folder_from_being_opened(tmp_path, monkeypatch):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")

    def refused(file, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("pathlib.Path.open", refused)
    assert open_labelled(tmp_path).total == 1


def test_images_of_a_torch_data_set_are_taken_as_the_error_about_it_says():
    pictures = [PIL.Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(3)]
    data = torch.utils.data.Subset([(picture, 5) for picture in pictures], [2, 0])
    with pytest.raises(TypeError, match=r"images is a Subset; expected .* give (.*)\.$") as error:
        open_images(data)
    said = re.search(r"give (.*)\.$", str(error.value))[1]
    found = open_images(eval(said, {"data": data})).part().items
    assert [image for _, image in found] == [pictures[2], pictures[0]]
