"""`embed` writes what the model makes of each image, whole files in the images' order, whatever cuts it off."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import psutil
import pyarrow.parquet
import pytest
import requests
import safetensors.torch
import torch
import transformers
from PIL import Image, ImageFile
from torch.utils.data import DataLoader
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import vwt_hf.embedding
from settings import FAST, ViTImageProcessor
from tiny import TEXT, TINY, sample_pixel_values, tiny_model
from vwt_hf import VisualVocabulary, compress, embed, token_lengths
from vwt_hf.answers import answer
from vwt_hf.cli import main
from vwt_hf.decoding import UnreadableImage, read_image
from vwt_hf.embedded_files import FORMATS, MANIFEST, Shard, Shards
from vwt_hf.embedding import Reader
from vwt_hf.image_source import find_images, image_rows
from vwt_hf.processes import everywhere
from vwt_hf.provenance import made_with

pytestmark = pytest.mark.newest

COUNT, SHARD = 23, 5
BROKEN = "b/broken.jpg"
PADDED = {"method": "gradual", "layout": "padded", "tolerance": 0.02, "image_std": (0.5,) * 3}


def drawn(index: int, side: int = 32) -> Image.Image:
    """An image that is flat but for a part of its own size, so that images leave different numbers of tokens."""
    values = np.full((side, side, 3), 90, dtype=np.uint8)
    busy = 1 + index % (side - 1)
    values[:busy] = np.random.default_rng(index).integers(0, 255, (busy, side, 3))
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in folders whose order is not that in which a walk finds them; one cannot be read."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(COUNT - 1):
        path = folder / ("b", "a", "a/c", ".")[index % 4] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        drawn(index).save(path)
    (folder / BROKEN).write_text("no image")
    return folder


@pytest.fixture(scope="module")
def processor() -> Any:
    return ViTImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return compress(tiny_model("dinov2").requires_grad_(False), PADDED)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model, processor) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, processor, folder, tmp_path) -> Callable[..., Any]:
    """`embed` in short files, by default of the folder, into a folder of this test."""

    def call(output: str = "out", **changed: Any) -> Any:
        given = {"model": model, "images": folder, "image_processor": processor, "batch_size": 2, "shard_size": SHARD}
        given |= {"workers": 0, "progress": False} | changed
        return embed(given.pop("model"), given.pop("images"), tmp_path / output, **given)

    return call


@pytest.fixture(scope="module")
def whole(model, processor, folder, tmp_path_factory) -> dict[str, bytes]:
    """What a run leaves that nothing cuts off."""
    output = tmp_path_factory.mktemp("whole")
    options = {"image_processor": processor, "batch_size": 2, "shard_size": SHARD, "workers": 0, "progress": False}
    embed(model, folder, output, **options)
    return contents(output)


class Content(bytes):
    """A file's bytes. Those of features are equal if all but the last bits of the features is, which on some processors
    depends on where weights lie in memory."""

    def __eq__(self, other: object) -> bool:
        if super().__eq__(other) is True:
            return True
        return isinstance(other, Content) and self[:4] == other[:4] == b"PAR1" and self._near(other)

    __hash__ = bytes.__hash__

    def _near(self, other: Content) -> bool:
        mine, theirs = (pyarrow.parquet.read_table(io.BytesIO(content)) for content in (self, other))
        if mine.schema.metadata != theirs.schema.metadata or len(mine) != len(theirs):
            return False
        features = [np.array(each["embedding"].to_pylist()) for each in (mine, theirs)]
        return mine.drop(["embedding"]).equals(theirs.drop(["embedding"])) and np.allclose(*features, rtol=0, atol=1e-6)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: Content(path.read_bytes()) for path in output.iterdir() if path.is_file()}


def table(files: list[Path]) -> pandas.DataFrame:
    return pandas.concat([pandas.read_parquet(file) for file in files], ignore_index=True)


def alone(model: Any, processor: Any, image: Any) -> torch.Tensor:
    with torch.inference_mode():
        return answer(model, **processor(images=[read_image(image)], return_tensors="pt"))[0]


@pytest.mark.parametrize("vwt", [None, PADDED, PADDED | {"layout": "auto"}, {"keep_ratio": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["dinov2", "clip", "siglip-vision"])
def test_each_image_has_the_features_that_the_model_gives_of_it_alone(name, vwt, run, folder, processor):
    own = tiny_model(name).requires_grad_(False)
    if vwt is not None:
        compress(own, vwt)
    made = run(model=own, batch_size=4)
    found = table(made.files)
    expected = [path for path in sorted(folder.rglob("*.png"))]
    assert found.name.tolist() == [path.relative_to(folder).as_posix() for path in expected]
    features = torch.tensor(np.stack(found.embedding))
    assert features.shape == (made.images, made.values) and len(features) == COUNT - 1
    singly = torch.stack([alone(own, processor, path) for path in expected])
    torch.testing.assert_close(features, singly, atol=1e-4, rtol=1e-4)
    assert (singly[0] - singly[1]).abs().max() > 1e-2  # else any order would do


def test_an_image_that_cannot_be_read_is_named_and_has_no_row(run, folder):
    made = run()
    (image,) = made.unreadable
    every = [path.relative_to(folder).as_posix() for path in [*find_images([folder]), folder / BROKEN]]
    assert image["row"] == sorted(set(every), key=lambda name: name.split("/")).index(BROKEN)
    assert image["name"] == BROKEN and "UnidentifiedImageError" in image["reason"]
    assert made.made == COUNT and made.embedded == COUNT - 1 == round(made.rate * made.elapsed)
    manifest = json.loads((made.files[0].parent / MANIFEST).read_text())
    assert manifest["unreadable"] == made.unreadable and manifest["images"] == made.images == COUNT - 1
    rows = table(made.files).row.tolist()
    assert rows == [row for row in range(COUNT) if row != image["row"]]


def out_of_reach(monkeypatch, names: Sequence[str], error: Exception) -> None:
    """Has images of these names not be had."""
    original = vwt_hf.embedding.processed

    def processed(item, image_processor, name):
        if name not in names:
            return original(item, image_processor, name)
        raise UnreadableImage(f"{name} cannot be read ({error})") from error

    monkeypatch.setattr(vwt_hf.embedding, "processed", processed)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ESTALE, "Stale file handle"), MemoryError(), TimeoutError(), requests.ConnectionError("no route")],
)
def test_images_that_were_out_of_reach_are_read_by_the_next_run(run, folder, monkeypatch, error):
    lost = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))][1]
    with monkeypatch.context() as patched:
        out_of_reach(patched, [lost], error)
        made = run(shard_size=5, workers=0)
    assert {image["name"]: image.get("again", False) for image in made.unreadable} == {lost: True, BROKEN: False}
    again = run(shard_size=5, workers=0)
    assert again.made == 5 and [image["name"] for image in again.unreadable] == [BROKEN]
    assert run(shard_size=5, workers=0).made == 0  # what is broken is not read again


def test_a_file_of_which_all_images_are_out_of_reach_is_not_made_and_the_others_are(run, folder, tmp_path, monkeypatch):
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    with monkeypatch.context() as patched:
        out_of_reach(patched, names[:16], OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match=r"^16 images could not be had, from .*Once they are in reach, the same call"):
            run(shard_size=16, workers=0)
        made = run("longer", shard_size=17)  # of which the last image is there, or can never be had
        assert len(made.unreadable) >= 16 and made.made == COUNT
    assert [path.name[:11] for path in (tmp_path / "out").glob("train-*")] == ["train-00001"]
    made = run(shard_size=16, workers=0)
    assert made.images == COUNT - 1 and made.made == 16


def test_images_that_a_data_set_names_are_read_once_they_are_there(run, tmp_path):
    photos = [str(tmp_path / "drive" / f"{number}.png") for number in range(3)]
    (tmp_path / "drive").mkdir()
    for number, path in enumerate(photos):
        drawn(number).save(path)
    rows = datasets.Dataset.from_dict({"photo": photos}).cast_column("photo", datasets.Image())
    (tmp_path / "drive").rename(tmp_path / "gone")
    assert run(images=rows, workers=0).images == 0
    assert run(images=rows, workers=0).made == 0  # still gone: no file is made again
    (tmp_path / "gone").rename(tmp_path / "drive")
    Path(photos[1]).write_text("no image")
    made = run(images=rows, workers=0)
    assert made.images == 2 and [image.get("again") for image in made.unreadable] == [None]
    assert run(images=rows, workers=0).made == 0


def test_an_image_that_is_there_again_and_damaged_is_named_as_that(run, tmp_path):
    photos = [str(tmp_path / f"{number}.png") for number in range(2)]
    drawn(0).save(photos[0])
    rows = datasets.Dataset.from_dict({"photo": photos}).cast_column("photo", datasets.Image())
    assert [image["again"] for image in run(images=rows, workers=0).unreadable] == [True]
    Path(photos[1]).write_text("no image")
    (image,) = run(images=rows, workers=0).unreadable
    assert "again" not in image and "UnidentifiedImageError" in image["reason"]


def test_a_file_is_not_replaced_by_one_of_fewer_images(run, folder, tmp_path, monkeypatch):
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    with monkeypatch.context() as patched:
        out_of_reach(patched, names[:1], OSError(errno.EIO, "Input/output error"))
        run(shard_size=100, workers=0)
    with monkeypatch.context() as patched:  # it is there again, and then others are gone
        out_of_reach(patched, names[1:4], OSError(errno.EIO, "Input/output error"))
        told = rf"has {COUNT - 2} images, of which {COUNT - 4} alone could be had now"
        with pytest.warns(UserWarning, match=told) as warned:
            run(shard_size=100, workers=0)
        assert __file__ in [one.filename for one in warned if "alone could be had now" in str(one.message)]
    assert len(table([tmp_path / "out" / "train-00000-of-00001.parquet"])) == COUNT - 2
    assert run(shard_size=100, workers=0).images == COUNT - 1


@pytest.mark.parametrize("changed", ["device", "attention", "transformers", "torch", "truncated", "most_pixels"])
def test_features_of_another_kind_of_device_or_version_are_not_gone_on_with(changed, run, model, monkeypatch):
    run()
    if changed == "attention":
        monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    elif changed == "truncated":
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    elif changed == "most_pixels":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    elif changed == "device":
        made_with = vwt_hf.provenance.made_with
        monkeypatch.setattr(vwt_hf.provenance, "made_with", lambda model: made_with(model) | {"device": "meta"})
    else:
        monkeypatch.setattr(sys.modules[changed], "__version__", "0.1")
    with pytest.raises(ValueError, match=rf"features of another run \({changed}"):
        run()


def test_features_by_autocast_or_coarser_products_are_not_gone_on_with_without(run):
    with torch.autocast("cpu", torch.bfloat16):
        run()
    with pytest.raises(ValueError, match=r"features of another run \(autocast 'torch.bfloat16' there, None here\)"):
        run()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"run \(float32"):
            run()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs torch 2.9")
def test_how_exact_products_are_is_told_however_it_was_set(model):
    """As transformers' `TrainingArguments(tf32=True)` sets it, upon which torch refuses to be asked as before."""
    before, products = made_with(model)["float32"], torch.backends.mkldnn.matmul
    products.fp32_precision = "bf16"
    try:
        assert made_with(model)["float32"] == [*before[:2], "bf16"] != before
    finally:
        products.fp32_precision = "ieee"
    assert made_with(model)["float32"] == before


def test_files_without_a_readable_image_are_read_like_the_others(run, tmp_path):
    (tmp_path / "broken").mkdir()
    for index in range(4):
        (tmp_path / "broken" / f"{index}.png").write_text("no image")
    drawn(3).save(tmp_path / "broken" / "4.png")
    made = run(images=tmp_path / "broken", shard_size=2)
    assert len(made.files) == 3 and made.images == 1 and len(made.unreadable) == 4
    assert datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train")["name"][:] == ["4.png"]


def test_datasets_load_the_files_beside_all_else_in_the_folder(run, tmp_path):
    made = run()
    left = tmp_path / "out" / ".vwt-save-abcdefgh"  # of a run that was killed
    left.mkdir()
    (left / made.files[0].name).write_bytes(b"half a file")
    loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train")
    assert loaded["name"][:] == table(made.files).name.tolist()
    features = loaded.with_format("torch")["embedding"][:]
    assert features.shape == (made.images, made.values) and features.dtype == torch.float32


def test_safetensors_hold_what_parquet_does(run):
    expected, found = run("parquet"), run("safetensors", format="safetensors")
    assert [file.suffix for file in found.files] == [".safetensors"] * len(expected.files)
    for one, other in zip(expected.files, found.files, strict=True):
        columns = pandas.read_parquet(one)
        with safetensors.safe_open(other, "pt") as opened:
            assert json.loads(opened.metadata()["vwt_hf"])["names"] == columns.name.tolist()
            assert opened.get_tensor("row").tolist() == columns.row.tolist()
            assert np.array_equal(opened.get_tensor("embedding").numpy(), np.stack(columns.embedding))
    assert found.unreadable == expected.unreadable
    assert contents(found.files[0].parent) == contents(run("again", format="safetensors").files[0].parent)


def test_a_data_sets_images_are_named_by_key_by_path_and_by_row(run, tmp_path, processor, model):
    drawn(1).save(tmp_path / "one.png")
    drawn(2).save(encoded := io.BytesIO(), format="png")
    images = [
        {"path": str(tmp_path / "one.png"), "bytes": None},
        {"path": None, "bytes": encoded.getvalue()},
        {"path": None, "bytes": b"no image"},
    ]
    rows = datasets.Dataset.from_dict({"text": list("abc"), "photo": images}).cast_column("photo", datasets.Image())
    found = table(run("by-path", images=rows, column="photo").files)
    assert found.name.tolist() == [str(tmp_path / "one.png"), "row 1"] and found.row.tolist() == [0, 1]
    torch.testing.assert_close(torch.tensor(found.embedding[1]), alone(model, processor, drawn(2)), atol=1e-4, rtol=0)
    keyed = rows.add_column("__key__", ["k0", "k1", "k2"])
    made = run("by-key", images=keyed)
    assert table(made.files).name.tolist() == ["k0", "k1"]
    assert [image["name"] for image in made.unreadable] == ["k2"]
    numbered = rows.add_column("__key__", [5, 6, 7])  # which is no name
    assert table(run("by-number", images=numbered).files).name.tolist() == found.name.tolist()
    itself = rows.rename_column("photo", "__key__")
    assert table(run("by-itself", images=itself).files).name.tolist() == found.name.tolist()


class CutOff(Exception):
    """What ends a run as a kill would."""


def cut_after(monkeypatch: pytest.MonkeyPatch, writes: int, end: Callable[[], None]) -> list[int]:
    """Has `end` called in place of what follows so many writes; gives the numbers of the files that are written."""
    write, written = Shards.write, []

    def write_or_end(self, number, shard):
        if len(written) == writes:
            end()
        write(self, number, shard)
        written.append(number)

    monkeypatch.setattr(Shards, "write", write_or_end)
    return written


def raise_cut_off() -> None:
    raise CutOff


def test_a_run_that_is_cut_off_again_and_again_ends_with_the_same_files_and_makes_none_twice(
    run, whole, tmp_path, monkeypatch
):
    draw = random.Random(0)
    written: list[int] = []
    made, cuts = None, 0
    while made is None and cuts < 20:
        with monkeypatch.context() as patch:
            some = cut_after(patch, draw.choice((0, 1, 1, 2)), raise_cut_off)
            try:
                made = run()
            except CutOff:
                cuts += 1
            finally:
                written += some
    assert made is not None and cuts > 2 and sorted(written) == list(range(-(-COUNT // SHARD)))
    assert contents(tmp_path / "out") == whole
    assert made.made < COUNT and made.images == COUNT - 1  # what was there is not read again
    again = run()
    assert again.made == 0 and again.images == COUNT - 1 and contents(tmp_path / "out") == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("at", ["replace", "fsync"])
def test_a_killed_process_leaves_whole_files_and_loses_one(at, run, whole, tmp_path, monkeypatch):
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)
            call, left = getattr(os, at), [5]

            def call_or_die(*given: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given)

            setattr(os, at, call_or_die)
            run()
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    left = contents(tmp_path / "out")
    files = {name for name in left if name != MANIFEST}
    assert 0 < len(files) < len(whole) - 1 and all(left[name] == whole[name] for name in files)
    made = run()
    assert contents(tmp_path / "out") == whole
    assert made.made == COUNT - SHARD * len(files)
    assert not list((tmp_path / "out").glob(".vwt-save-*"))


def test_workers_read_the_same(run, whole, tmp_path):
    run(workers=2)
    assert contents(tmp_path / "out") == whole


def test_there_are_no_more_workers_than_cores_that_may_be_used(run, monkeypatch):
    asked = []
    loader = vwt_hf.embedding.DataLoader
    monkeypatch.setattr(
        vwt_hf.embedding, "DataLoader", lambda *of, **how: asked.append(how["num_workers"]) or loader(*of, **how)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)  # as by taskset
    assert run(workers=None).made == COUNT and asked == [1]


def is_running(process: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(("begun_by", "count"), [("fork", 2), pytest.param("forkserver", 1, marks=pytest.mark.newest)])
def test_workers_end_once_their_process_is_killed(begun_by, count, run, tmp_path):
    """Also while they wait for their images to be taken, which fill a pipe."""
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)

            def die(*given: Any, **named: Any) -> Any:
                workers = [worker.pid for worker in multiprocessing.active_children()]
                (tmp_path / "workers").write_text(json.dumps(workers))
                os.kill(os.getpid(), signal.SIGKILL)

            vwt_hf.embedding._Run._features = die
            begun = functools.partial(vwt_hf.embedding.DataLoader, multiprocessing_context=begun_by)
            vwt_hf.embedding.DataLoader = begun
            run(workers=count, image_processor=ViTImageProcessor(size={"height": 224, "width": 224}))
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    workers = json.loads((tmp_path / "workers").read_text())
    assert len(workers) == count
    for _ in range(100):
        left = list(filter(is_running, workers))
        if not left:
            break
        time.sleep(0.1)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def test_workers_that_are_not_forked_read_by_the_limits_of_the_program(run, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name, side in {"cut": 64, "large": 400, "usual": 64}.items():
        drawn(60, side).save(tmp_path / f"images/{name}.jpg")
    cut = tmp_path / "images/cut.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    spawned = functools.partial(vwt_hf.embedding.DataLoader, multiprocessing_context="spawn")
    unreadable = {}
    for workers, loader in {0: vwt_hf.embedding.DataLoader, 1: spawned}.items():
        monkeypatch.setattr(vwt_hf.embedding, "DataLoader", loader)
        unreadable[workers] = run(str(workers), images=tmp_path / "images", workers=workers).unreadable
    assert [image["name"] for image in unreadable[0]] == ["large.jpg"] and unreadable[1] == unreadable[0]


def test_a_program_that_its_workers_run_again_is_told_so(run, monkeypatch):
    """Python marks a process that was not forked while it runs the file of the program that started it."""
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
        with pytest.raises(RuntimeError, match=r"each runs the program's file again: .* or give workers=0"):
            run("again", workers=None)
        assert run("alone", workers=0).made == COUNT

    class Ended:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __iter__(self) -> Iterator[object]:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from RuntimeError(self.cause)
            yield

        cause = "DataLoader worker (pid 7) exited unexpectedly with exit code 1."

    monkeypatch.setattr(vwt_hf.embedding, "DataLoader", Ended)
    for method, told in (("fork", r"unexpectedly$"), ("spawn", r"unexpectedly\. embed starts processes")):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda method=method: method)
        with pytest.raises(RuntimeError, match=told):
            run(method, workers=1)
    Ended.cause = "DataLoader worker (pid 7) is killed by signal: Killed. "  # as where memory runs out
    with pytest.raises(RuntimeError, match=r"unexpectedly$"):
        run("killed", workers=1)


def test_a_worker_that_is_killed_is_told_so_in_threads_too(run, monkeypatch):
    """Where torch does not say that it was."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    monkeypatch.setattr(vwt_hf.embedding, "_begin_worker", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(vwt_hf.embedding, "DataLoader", functools.partial(DataLoader, multiprocessing_context="fork"))
    with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match=r"exited unexpectedly$"):
        thread.submit(run, "killed", workers=1).result()


def test_what_workers_send_needs_no_shared_memory(folder, processor, monkeypatch):
    shared: list[torch.Tensor] = []

    def reduce(tensor: torch.Tensor) -> tuple[type, tuple[()]]:
        shared.append(tensor)
        return str, ()

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, reduce)
    ForkingPickler.dumps([torch.zeros(1)])  # as a worker's queue does, which shares the memory of tensors
    assert len(shared) == 1
    made = Reader(image_rows(folder), processor)[range(4)]
    assert sum(len(values["pixel_values"]) for _, values in made.batches) == 4
    ForkingPickler.dumps(made)
    assert len(shared) == 1


NOTHING = Shard([], [], torch.zeros(0, 2), [])


def test_what_is_missing_is_shared_out_and_not_the_files(tmp_path, monkeypatch):
    """By the list of the main process, while others write files already."""
    lists: list[list[int]] = []

    def of_main(work: Callable[[], list[int]]) -> list[int]:
        lists.append(work())
        return lists[0]

    monkeypatch.setattr(vwt_hf.embedded_files, "in_main", of_main)
    shards = Shards(tmp_path, "parquet", images=8, size=1)
    for number in (1, 3, 5, 7):
        shards.write(number, NOTHING)
    shares = []
    for index in range(2):
        monkeypatch.setattr(vwt_hf.embedded_files, "place", lambda index=index: (index, 2))
        shares.append(shards.missing(bool))
        shards.write(shares[-1][0], NOTHING)
    assert shares == [[0, 4], [2, 6]]


@pytest.mark.parametrize("index", [0, 1])
def test_the_main_process_warns_where_others_have_nothing_to_do(index, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(vwt_hf.embedded_files, "place", lambda: (index, 3))
    shards = Shards(tmp_path, "parquet", images=11, size=10)
    assert shards.missing(bool) == [index]
    said = ["11 images make 2 files of up to 10, fewer than the 3 processes, of which the others have nothing to do"]
    assert [str(one.message).partition(";")[0] for one in recwarn] == (said if index == 0 else [])
    recwarn.clear()
    for number in range(2):
        shards.write(number, NOTHING)
    assert shards.missing(bool) == [] and not len(recwarn)


@pytest.mark.parametrize("changed", [{"batch_size": 0}, {"images": "nowhere"}, {"image_processor": "none"}], ids=str)
def test_of_what_one_process_cannot_do_the_others_are_told(changed, run, monkeypatch):
    told: list[Exception] = []

    def telling(work: Callable[[], Any], *tell: Any) -> Any:
        try:
            return everywhere(work, *tell)
        except Exception as error:
            told.append(error)
            raise

    monkeypatch.setattr(vwt_hf.embedding, "everywhere", telling)
    with pytest.raises(Exception) as raised:
        run(**changed)
    assert told == [raised.value]


def another_model() -> transformers.PreTrainedModel:
    other = tiny_model("dinov2").requires_grad_(False)
    other.encoder.layer[0].mlp.fc1.weight += 0.1
    return compress(other, PADDED)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda: {"model": another_model()}, "(model 'Dinov2Model"),
        (lambda: {"model": tiny_model("dinov2")}, "vwt"),
        (lambda: {"model": compress(tiny_model("dinov2"), PADDED | {"tolerance": 0.03})}, "vwt: tolerance 0.02 there"),
        (lambda: {"model": compress(tiny_model("dinov2"), PADDED).double()}, "dtype 'float32' there, 'float64' here"),
        (lambda: {"shard_size": SHARD + 1}, "shard_size 5 there, 6 here"),
        (lambda: {"format": "safetensors"}, "files 'parquet' there"),
        (lambda: {"image_processor": ViTImageProcessor(resample=0)}, "image_processor: resample"),
    ],
)
def test_files_of_another_run_are_refused_with_the_reason(changed, reason, run, whole, tmp_path, monkeypatch):
    cut_after(monkeypatch, 2, raise_cut_off)
    with pytest.raises(CutOff):
        run()
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="features of another run") as raised:
        run(**changed())
    assert reason in str(raised.value) and str(tmp_path / "out") in str(raised.value)
    assert contents(tmp_path / "out") == before


def test_of_two_runs_that_begin_at_once_one_is_refused(run, tmp_path, monkeypatch):
    """Both find no manifest; the other writes its own before this one does."""
    claim = Shards._claim

    def other_first(self, of):
        monkeypatch.setattr(Shards, "_claim", claim)
        run(model=another_model())
        claim(self, of)

    monkeypatch.setattr(Shards, "_claim", other_first)
    with pytest.raises(ValueError, match="holds features of another run"):
        run()
    assert run(model=another_model()).made == 0


@pytest.mark.parametrize("changed", [{}, {"layout": "packed"}, {"tolerance": None, "num_patches": 40}])
def test_the_setting_is_that_of_the_model_whatever_that_of_the_image_processor_is(changed, run, checkpoint, tmp_path):
    given = compress(tiny_model("dinov2").requires_grad_(False), PADDED | changed)
    other = AutoImageProcessor.from_pretrained(checkpoint, vwt={"method": "local", "tolerance": 0.9})
    assert run("other", model=given, image_processor=other).tokens == run(model=given).tokens
    one, two = (contents(tmp_path / name) for name in ("other", "out"))
    assert len(one) > 1 and one == two


def test_a_model_that_goes_by_words_gets_those_of_the_image_processor(checkpoint, run, folder):
    processor = AutoImageProcessor.from_pretrained(checkpoint, vwt={"dropped": "merge", "num_patches": 9})
    model = compress(tiny_model("dinov2"), {"method": "given"})
    made = run(model=model, image_processor=processor)
    embedded, name = table(made.files), "a/1.png"
    (found,) = embedded[embedded["name"] == name]["embedding"]
    torch.testing.assert_close(torch.tensor(found), alone(model, processor, folder / name))
    assert made.tokens == 10


def test_the_image_processor_stays_as_it_was(run):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    run(image_processor=processor)
    assert processor.vwt is None


def test_a_run_that_makes_lost_files_again_says_nothing_of_all_before_it_ends(run, tmp_path, monkeypatch):
    run()
    (tmp_path / "out" / "train-00001-of-00005.parquet").unlink()
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        cut_after(patch, 0, raise_cut_off)
        run()
    assert "images" not in json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert run().made == SHARD


def test_other_words_of_the_same_setting_are_refused(run):
    def with_words(seed: int) -> transformers.PreTrainedModel:
        words = VisualVocabulary(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(seed)))
        setting = {"method": "inter", "vocabulary": words, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
        return compress(tiny_model("dinov2").requires_grad_(False), setting)

    run(model=with_words(0))
    with pytest.raises(ValueError, match=r"another run \(words"):
        run(model=with_words(1))


def test_other_images_are_refused_and_another_batch_size_is_not(run, folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        drawn(index).save(images / f"{index}.png")
    run(images=images)
    assert run(images=images, batch_size=3, workers=1).images == 3
    drawn(4).save(images / "4.png")
    with pytest.raises(ValueError, match=r"a folder of 3 image files .* there, 'a folder of 4 image files"):
        run(images=images)


def test_a_folder_that_holds_something_else_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds train-\* files and no embed.json"):
        run()
    for content in ("[]", "[" * 100_000):
        (tmp_path / "out" / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match="no manifest of features"):
            run()


@pytest.mark.parametrize(
    ("changed", "kind", "reason"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected"),
        ({"shard_size": True}, ValueError, "shard_size is True; expected"),
        ({"workers": -1}, ValueError, "workers is -1; expected"),
        ({"format": "csv"}, ValueError, "format is 'csv'; expected one of 'parquet', 'safetensors'"),
        ({"images": "nowhere"}, ValueError, "no folder"),
        ({"images": ""}, ValueError, "images is '', which is no folder"),
        ({"column": "image"}, ValueError, "columns are of data sets"),
        ({"images": []}, TypeError, "Dataset.from_dict"),
        ({"model": 3}, TypeError, "int"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(changed, kind, reason, run, tmp_path):
    with pytest.raises(kind, match=reason):
        run(**changed)
    assert not (tmp_path / "out").exists()


def test_models_that_classify_train_or_leave_patches_out_at_random_are_refused(run):
    with pytest.raises(ValueError, match="answers with labels"):
        run(model=tiny_model("vit-classifier"))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        run(model=tiny_model("vit").train())
    at_random = tiny_model("vit-mae")
    at_random.config.mask_ratio = 0.75
    with pytest.raises(ValueError, match=r"ViT-MAE drops 75% of the patches at random .* mask_ratio=0\.0"):
        run(model=at_random)


def test_random_numbers_of_the_program_stay_as_they_were(run):
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_can_be_trained_after_it_has_embedded(run, folder):
    """BEiT keeps the index of its relative positions, which no tensor of inference mode may be then."""
    model = tiny_model("beit")
    run(model=model, workers=0)
    model.train()(pixel_values=sample_pixel_values())[0].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.embeddings.parameters() if weight.grad is not None)


def test_a_model_that_answers_about_a_text_is_refused(run):
    config = transformers.BlipConfig(vision_config=TINY, text_config=TEXT | {"encoder_hidden_size": 32})
    for kind in (transformers.BlipForConditionalGeneration, transformers.BlipForQuestionAnswering):
        with pytest.raises(
            ValueError, match=r"answers about a text beside the image \(.*; expected .* such as its vision tower"
        ):
            run(model=kind(config).eval())


def test_a_model_that_gives_several_features_for_an_image_is_refused(run):
    vision, text = tiny_model("clip-vision").config, {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 99}
    text = transformers.LlamaConfig(**text, num_attention_heads=2, intermediate_size=16)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=98)
    with pytest.raises(
        ValueError, match=r"the LlavaModel gives a (list|tuple) for a batch of images; expected a row of values"
    ):
        run(model=transformers.LlavaModel(config).eval())


class Twofold(transformers.ViTModel):
    """A model that gives two rows for an image."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.pooler_output = output.pooler_output.repeat(2, 1)
        return output


def test_a_model_that_gives_several_rows_for_an_image_is_refused(run):
    with pytest.raises(ValueError, match=r"the Twofold gives \(2, 32\) for an image; expected features of shape"):
        run(model=Twofold(tiny_model("vit").config).eval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_of_nan_or_infinity_are_refused_with_the_image_and_not_written(value, run, tmp_path):
    own = tiny_model("dinov2").requires_grad_(False)
    own.layernorm.bias[:] = value
    with pytest.raises(ValueError, match=r"in float32, answers .*\.png by NaN or infinity; .* check its weights"):
        run(model=own)
    assert not list((tmp_path / "out").glob("train-*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_defaults_change_no_file(workers, run, whole, tmp_path):
    torch.set_default_device("meta")  # as "cuda" would be, where there is one
    torch.set_default_dtype(torch.float64)
    try:
        run(workers=workers)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert contents(tmp_path / "out") == whole


def test_the_column_is_float32_also_where_torchs_default_is_not(run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_text("no image")
    torch.set_default_dtype(torch.float64)
    try:
        (file,) = run(images=tmp_path / "broken").files
    finally:
        torch.set_default_dtype(torch.float32)
    assert pyarrow.parquet.read_schema(file).field("embedding").type.value_type == pyarrow.float32()


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_file_that_lost_what_it_says_of_itself_is_named(format, run, tmp_path):
    _, file, *_ = run(format=format).files
    if format == "parquet":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).replace_schema_metadata(None), file)
    else:
        safetensors.torch.save_file(safetensors.torch.load_file(file), file)
    with pytest.raises(ValueError, match=rf"{file.name} does not say what `embed` writes .* delete it, and"):
        run(format=format)
    file.unlink()
    assert run(format=format).images == COUNT - 1


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_file_that_was_cut_short_is_named(format, run):
    _, file, *_ = run(format=format).files
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} does not say what `embed` writes .* delete it, and"):
        run(format=format)


@pytest.fixture
def seen(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What the model is called with, after the blank picture."""
    taken: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        vwt_hf.embedding, "answer", lambda model, **made: (taken.append(made), answer(model, **made))[1]
    )
    return taken


def test_padded_batches_are_of_images_of_like_length(run, seen):
    run(shard_size=COUNT, batch_size=4)
    batches = [token_lengths(made["patch_words"]) for made in seen[1:]]
    lengths = list(itertools.chain(*batches))
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 5
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("vwt", [PADDED | {"layout": "packed"}, {"keep_ratio": 0.5}, None], ids=str)
def test_batches_without_padding_are_as_they_are_read(vwt, run, seen, folder, processor):
    own = tiny_model("dinov2").requires_grad_(False)
    run(model=own if vwt is None else compress(own, vwt), shard_size=COUNT, batch_size=COUNT)
    assert seen[1].keys() == {"pixel_values"}
    paths = sorted(folder.rglob("*.png"))
    expected = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    assert torch.equal(seen[1]["pixel_values"], expected)


def test_images_of_different_sizes_run_with_those_of_their_own(run, seen, tmp_path):
    (tmp_path / "sizes").mkdir()
    for index in range(8):
        drawn(index).resize((32, 48) if index % 2 else (48, 32)).save(tmp_path / "sizes" / f"{index}.png")
    as_they_are = ViTImageProcessor(do_resize=False)
    own = tiny_model("dinov2").requires_grad_(False)
    made = run(model=own, images=tmp_path / "sizes", image_processor=as_they_are, shard_size=8, batch_size=4)
    assert [len(batch["pixel_values"]) for batch in seen[1:]] == [4, 4]
    found = table(made.files)
    for name, features in zip(found.name, found.embedding, strict=True):
        expected = alone(own, as_they_are, tmp_path / "sizes" / name)
        torch.testing.assert_close(torch.tensor(features), expected, atol=1e-4, rtol=1e-4)


def test_the_report_says_where_the_time_went(run, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(vwt_hf.embedding.time, "perf_counter", lambda: float(next(now)))
    made = run(shard_size=COUNT, batch_size=COUNT)
    seconds = made.seconds
    assert seconds["forward"] == seconds["writing"] == seconds["reading"] == 1  # one call, which looks at the clock
    assert made.elapsed == seconds["total"] > seconds["waiting"] > 0
    assert made.rate == (COUNT - 1) / made.elapsed  # one cannot be read
    assert made.rate_without_reading == (COUNT - 1) / (seconds["total"] - seconds["waiting"])


def test_the_rate_without_reading_is_that_of_the_process_with_most_to_do(run, monkeypatch):
    other = dict.fromkeys(("forward", "writing", "reading"), 0.0) | {"total": 1000.0, "waiting": 10.0}

    def of_two(work: Callable[[], Any]) -> list[Any]:
        own = work()
        return [own] if isinstance(own, dict) else [own, (2, 2, 8.0, other)]

    monkeypatch.setattr(vwt_hf.embedding, "gathered", of_two)
    made = run()
    assert made.processes == 2 and made.seconds["total"] > 1000
    assert made.rate_without_reading == (COUNT - 1 + 2) / 990


def test_the_folder_is_walked_in_the_order_of_its_paths(tmp_path):
    for name in ("b.png", "a/2.png", "a-b/1.png", "a.png", "a/b/3.PNG", "a/text.txt", "a/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "around").symlink_to(tmp_path)
    rows = image_rows(tmp_path)
    names = [rows[index][0] for index in range(len(rows))]
    assert names == [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert names == sorted((name for name in names), key=lambda name: name.split("/")) and len(names) == 6


def test_a_name_that_is_no_text_has_escapes(run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    try:
        drawn(1).save(os.fsencode(images) + b"/\xff.png", format="png")
    except OSError:
        pytest.skip("this file system has no such names")
    assert table(run(images=images).files).name.tolist() == ["\\udcff.png"]


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_folder_whose_name_is_no_text_holds_features_like_any_other(format, run, tmp_path):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    try:
        os.mkdir(output)
    except OSError:
        pytest.skip("this file system has no such names")
    found = run(output, format=format)
    assert contents(Path(output)) == contents(run("usual", format=format).files[0].parent)
    assert run(output, format=format).images == found.images == COUNT - 1


def command(checkpoint: Path, folder: Path, output: Path, *more: str) -> list[str]:
    given = ["embed", str(folder), "--model", str(checkpoint), "--output", str(output), "--device", "cpu"]
    return [*given, "--shard-size", str(SHARD), "--batch-size", "2", "--workers", "0", *more]


def test_the_command_writes_what_the_function_does(checkpoint, folder, whole, tmp_path, capsys):
    assert main(command(checkpoint, folder, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert contents(tmp_path / "out") == whole  # the setting is the checkpoint's
    assert f"unreadable: {BROKEN} cannot be read" in printed and "22 of 32 values each" in printed
    for line in ("tokens", "images/s", "without reading", "seconds"):
        assert line in printed
    assert main(command(checkpoint, folder, tmp_path / "out")) == 0
    assert "found all files there" in capsys.readouterr().out
    assert main(command(checkpoint, folder, tmp_path / "out", "--vwt", "false")) == 2
    assert "features of another run (vwt" in capsys.readouterr().err
    assert main(command(checkpoint, folder, tmp_path / "plain", "--vwt", "false", "--dtype", "bfloat16")) == 0
    assert "65.0 of an image" in capsys.readouterr().out


def test_the_command_fails_where_no_image_can_be_read(checkpoint, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    for _ in range(2):  # the second finds all files there
        assert main(command(checkpoint, tmp_path / "images", tmp_path / "out")) == 2
        printed = capsys.readouterr()
        assert "unreadable: a.jpg cannot be read" in printed.out
        assert f"none of 1 images of {tmp_path / 'images'} can be read" in printed.err


@pytest.mark.parametrize("name", ["clip-projection", "clip-vision", "vit", "vit-classifier"])
def test_the_command_loads_the_class_of_the_checkpoint_and_of_a_classifier_what_is_below(
    name, run, processor, folder, tmp_path
):
    own = tiny_model(name)
    own.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(command(tmp_path / "model", folder, tmp_path / "by-command", "--batch-size", "2")) == 0
    if name == "vit-classifier":
        own = own.base_model
    run(model=own.eval())
    found, expected = (table(sorted((tmp_path / made).glob("train-*"))) for made in ("by-command", "out"))
    # Where weights lie in memory can change the last bit.
    np.testing.assert_allclose(np.stack(found.embedding), np.stack(expected.embedding), atol=1e-6)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--vwt", "{keep_ratio: 0.5}"], "is no JSON; expected true, false, or fields"),
        (["--vwt", "[" * 100_000], "… is no JSON; expected true, false, or fields"),
        (["--vwt", "gradual"], """, and a method as '{"method": "gradual"}'"""),
        (["--vwt", "[]"], "'[]' is no setting; expected true, false, or fields"),
        (["--vwt", "1"], "'1' is no setting; expected true, false, or fields"),
        (["--vwt", '{"keep": 0.5}'], "keep"),
        (["--column", "image"], "--column"),
    ],
)
def test_the_command_refuses_what_cannot_be_by_a_line(more, reason, checkpoint, folder, tmp_path, capsys):
    try:
        status = main(command(checkpoint, folder, tmp_path / "out", *more))
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr().err
    assert status == 2 and reason in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from accelerate import PartialState
from vwt_hf.cli import main
from vwt_hf.embedded_files import Shards

write, written = Shards.write, []

def write_or_die(self, number, shard):
    if PartialState().process_index == 1 and written:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, number, shard)
    written.append(number)

Shards.write = write_or_die
sys.exit(main())
"""


def launch(*program: str) -> subprocess.CompletedProcess[str]:
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *program], env=env, capture_output=True, text=True, timeout=300)


def test_two_processes_end_with_the_files_of_one_also_if_one_was_killed(checkpoint, folder, whole, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    given = command(checkpoint, folder, tmp_path / "out")
    ended = launch(str(tmp_path / "killed.py"), *given)
    assert ended.returncode != 0 and "Signal 9" in ended.stderr + ended.stdout
    left = contents(tmp_path / "out")
    last = "train-00003-of-00005.parquet"  # the second of the second process
    assert last not in left and "train-00001-of-00005.parquet" in left
    assert all(left[name] == whole[name] for name in left if name != MANIFEST)
    files = sorted(whole.keys() - {MANIFEST})
    broken = {image["row"] for image in json.loads(whole[MANIFEST])["unreadable"]}
    missing = sum(files[row // SHARD] not in left for row in range(COUNT) if row not in broken)
    done = launch("-m", "vwt_hf.cli", *given)
    assert done.returncode == 0, done.stderr
    assert f"{missing} images in" in done.stdout  # shared, and none is made by both
    assert contents(tmp_path / "out") == whole
    assert "processes: 2" in done.stdout and done.stdout.count("22 of 32 values each") == 1


def test_photographs_are_nearest_to_those_of_their_class_by_a_shortened_model(shared, tmp_path):
    classes = sorted((shared / "data/caltech101/validation").iterdir())[::9][:11]
    for path in itertools.chain(*(sorted(name.iterdir())[:2] for name in classes)):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).symlink_to(path)
    model = transformers.AutoModel.from_pretrained(shared / "models/dinov2-small-caltech101", vwt=True, dtype=FAST)
    short = embed(model, tmp_path, tmp_path / "short", workers=0, progress=False)
    found = table(short.files)
    features = torch.nn.functional.normalize(torch.tensor(np.stack(found.embedding)), dim=1)
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
    names = [name.split("/")[0] for name in found.name]
    assert sum(names[i] == name for i, name in zip(nearest.tolist(), names, strict=True)) >= 0.8 * len(names)
    assert short.tokens is not None and 100 < short.tokens < 200


def test_words_for_images_of_one_channel_are_those_of_its_model():
    model = compress(tiny_model("vit", num_channels=1), {"method": "local", "num_patches": 20, "image_std": [0.5]})
    plain = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=0.5, image_std=0.5)
    made = vwt_hf.embedding._with_words(plain, model, finds=True)(drawn(20).convert("L"), return_tensors="pt")
    assert made["pixel_values"].shape == (1, 1, 32, 32) and token_lengths(made["patch_words"]) == [20]
    with torch.no_grad():
        torch.testing.assert_close(model(**made)[0], model(made["pixel_values"])[0])
