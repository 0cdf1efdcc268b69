"""Processes that learn words together: the words of one process, whatever happens to one of them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import torch
import transformers

from settings import ViTImageProcessor
from vwt_hf import VisualVocabulary, processed_images, processes
from vwt_hf.processes import everywhere, gathered, in_main, joined, place, summed
from vwt_hf.vocabulary import kmeans, learning

pytestmark = pytest.mark.newest

if not hasattr(os, "fork"):
    pytest.skip("needs os.fork", allow_module_level=True)

SRC = Path(learning.__file__).parents[2]
IMAGES, SIDE, PATCH_SIZE, SIZE = 45, 32, 8, 12
LONGEST = 300
"""Seconds that processes may take to end. A hang fails by it."""


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    made: Any
    """What its work gave; `None` where it was killed or raised an error."""
    error: str
    warned: list[str]
    printed: str


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked process has none of its parent's threads to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few images would not fill it, nor have words that start again."""
    monkeypatch.setattr(kmeans, "RARE", 0.9)
    monkeypatch.setattr(kmeans, "BUFFERED_AT_LEAST", 150)
    monkeypatch.setattr(kmeans, "BUFFERED", 1)
    monkeypatch.setattr(learning, "CHECKPOINT_EVERY", 2)


@pytest.fixture(scope="module")
def processor() -> Any:
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def photographs(number: int, seed: int = 0) -> list[PIL.Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(number, 3, 6, 8, generator=generator)
    pixels = (torch.nn.functional.interpolate(small, (36, 48), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def write(folder: Path, number: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(photographs(number, seed)):
        image.save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, and one file that is none."""
    folder = write(tmp_path_factory.mktemp("together") / "photographs", IMAGES)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def environment(index: int, number: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    return {
        "RANK": f"{index}", "LOCAL_RANK": f"{index}", "WORLD_SIZE": f"{number}", "LOCAL_WORLD_SIZE": f"{number}",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def by_accelerate(index: int, number: int, port: int) -> None:
    """Joins a process to the others as a program does that has an `Accelerator`."""
    from accelerate import PartialState

    by_a_launcher(index, number, port)
    PartialState(cpu=True)


def by_a_launcher(index: int, number: int, port: int) -> None:
    """Leaves it to what the program calls."""
    os.environ.update(environment(index, number, port))


def by_torch(index: int, number: int, port: int) -> None:
    """As `torch.multiprocessing.spawn` is used, without a launcher."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=index, world_size=number)


def by_torch_after_accelerate(index: int, number: int, port: int) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    by_torch(index, number, port)


def together(
    number: int, work: Callable[[int], Any], at: Path, join: Callable[[int, int, int], None] = by_accelerate
) -> list[Ended]:
    """Forks so many processes, joined by `join`, that do `work`, which is told their index."""
    from accelerate import PartialState

    port, barrier = free_port(), multiprocessing.get_context("fork").Barrier(number)
    at.mkdir(parents=True, exist_ok=True)

    def run(index: int) -> None:
        PartialState._reset_state()  # of another test's, if any
        join(index, number, port)
        barrier.wait(LONGEST)  # else one might find another gone before it has joined it
        made, error = None, ""
        with warnings.catch_warnings(record=True) as warned, open(at / f"{index}.txt", "w") as printed:
            sys.stderr = printed
            warnings.simplefilter("always")
            try:
                made = work(index)
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
        said = [str(one.message) for one in warned if one.category is UserWarning]
        torch.save((made, error, said), at / f"{index}.pt")

    running = [multiprocessing.get_context("fork").Process(target=run, args=(index,)) for index in range(number)]
    for process in running:
        process.start()
    end = time.monotonic() + LONGEST
    for process in running:
        process.join(max(0, end - time.monotonic()))
    hung = [index for index, process in enumerate(running) if process.is_alive()]
    for process in running:
        process.kill()
    assert not hung, f"processes {hung} hang"
    found = []
    for index in range(number):
        file = at / f"{index}.pt"
        made = torch.load(file, weights_only=False) if file.exists() else (None, "killed", [])
        found.append(Ended(*made, (at / f"{index}.txt").read_text()))
        file.unlink(missing_ok=True)
    return found


def learn(images: Any, processor: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    settings = {"size": SIZE, "patch_size": PATCH_SIZE, "batch_size": 8, "progress": False, "device": "cpu", **changes}
    learned = VisualVocabulary.learn(images, processor, **settings)
    return learned.words, learned.frequencies, learned.info


def alone(images: Any, processor: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return learn(images, processor, **changes)


def assert_same(found: Any, expected: Any, *, exact: bool) -> None:
    """The same words, for as many patches, of as many images; but for rounding, or bit for bit."""
    words, counts, info = found
    counted = dataclasses.replace(info, inertia=expected[2].inertia)
    assert counted == expected[2]
    rounding = 0.0 if exact else 1e-5
    assert info.inertia == pytest.approx(expected[2].inertia, rel=rounding, abs=0)
    torch.testing.assert_close(words, expected[0], atol=rounding, rtol=0)
    assert torch.equal(counts, expected[1])


def stored(folder: Path) -> datasets.Dataset:
    paths = sorted(map(str, folder.iterdir()))
    return datasets.Dataset.from_dict({"photograph": paths}).cast_column("photograph", datasets.Image())


@pytest.mark.parametrize("kind", ["folder", "data set", "stream", "iterable"])
def test_two_and_four_processes_learn_the_words_of_one(kind: str, folder: Path, processor: Any, tmp_path: Path) -> None:
    whole = {"folder": folder, "data set": stored(folder), "stream": stored(folder).to_iterable_dataset(),
             "iterable": [*photographs(21), "broken.png", *photographs(18, seed=1)]}[kind]  # fmt: skip
    for max_images in (None, 27):
        one = alone(whole, processor, max_images=max_images)
        for number in (2, 4):
            # Of an iterable each process gives its own share.
            shares = [whole[index::number] if kind == "iterable" else whole for index in range(number)]
            work = lambda index: learn(shares[index], processor, max_images=max_images)  # noqa: B023, E731
            first, *others = together(number, work, tmp_path / "first")
            assert first.error == "" and first.made is not None
            assert_same(first.made, one, exact=False)
            for other in others:
                assert_same(other.made, first.made, exact=True)
    again, _, _, _ = together(4, work, tmp_path / "again")
    assert_same(again.made, first.made, exact=True)


def test_a_number_that_does_not_divide_the_batch_learns_from_all_images(
    folder: Path, processor: Any, tmp_path: Path
) -> None:
    for ended in together(3, lambda _: learn(folder, processor), tmp_path):
        info = ended.made[2]
        assert (info.images, info.unreadable, info.patches) == (IMAGES, 1, IMAGES * 16)


def test_the_shards_of_a_stream_are_divided(processor: Any, tmp_path: Path) -> None:
    sharded = stored(write(tmp_path / "photographs", IMAGES)).to_iterable_dataset(num_shards=4)
    reads = [0, 0]

    def count(row: dict[str, Any], index: int) -> dict[str, Any]:
        reads[index] += 1
        return row

    def work(index: int) -> Any:
        counted = sharded.map(count, fn_kwargs={"index": index}, features=sharded.features)
        return learn(counted, processor)[2], reads[index]

    ended = together(2, work, tmp_path / "ends")
    assert [one.error for one in ended] == [""] * 2
    assert [one.made[0].images for one in ended] == [IMAGES] * 2
    # Each process reads its own shards alone, and before that the first row, by which streams are told apart.
    assert sum(one.made[1] for one in ended) == IMAGES + 2


def test_folders_that_differ_are_each_read_whole(processor: Any, tmp_path: Path) -> None:
    """As where machines have a disk each: two with two processes, of which one has many more images."""
    disks = [write(tmp_path / "a" / "photographs", 41), write(tmp_path / "b" / "photographs", 7, seed=1)]
    progress = tmp_path / "progress"
    save, saves = learning.save_checkpoint, []

    def count(*args: Any) -> None:
        saves.append(1)
        save(*args)

    def work(index: int) -> Any:
        learning.save_checkpoint = count  # of this process, which ends
        return *learn(disks[index // 2], processor, checkpoint=progress / f"{index}", progress=True), len(saves)

    ends = together(4, work, tmp_path / "ends")
    first, *others = [dataclasses.replace(ended, made=ended.made[:3]) for ended in ends]
    assert first.error == "" and first.made[2].images == 48
    # Of 11 steps every other whole one, and before the three in which processes come to their ends.
    assert [ended.made[3] for ended in ends] == [7, 0, 0, 0]
    assert "(4 processes, 2 different folders or data sets)" in first.printed
    for other in others:
        assert_same(other.made, first.made, exact=True)
        assert other.printed == ""
    # Only the main one's disk has the progress.
    assert [path.name for path in progress.iterdir()] == ["0"]


def test_the_main_process_alone_warns_and_shows_progress(folder: Path, processor: Any, tmp_path: Path) -> None:
    first, second = together(2, lambda _: learn(folder, processor, progress=True), tmp_path)
    assert "1 of 46 images could not be read" in first.warned[0] and "broken.png" in first.warned[0]
    assert "(2 processes share the images)" in first.printed and "46/46" in first.printed
    assert second.warned == [] and second.printed == ""


def test_an_error_in_one_process_is_raised_in_all(folder: Path, processor: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    def broken() -> Iterator[Any]:
        yield from photographs(9)
        raise OSError("the disk is gone")

    cases: list[tuple[str, Callable[[int], Any]]] = [
        ("ValueError: {}.*empty holds no image files", lambda index: learn(empty if index else folder, processor)),
        ("ValueError: .*none of the 46 images", lambda _: learn(folder, processor, patch_size=33)),
        (
            "OSError: {}the disk is gone",
            lambda index: learn(broken() if index else photographs(30), processor),
        ),
        (
            r"ValueError: process 1 has other settings than process 0 \(batch_size 7 there, 8 here\)",
            lambda index: learn(folder, processor, batch_size=8 - index),
        ),
        ("ValueError: .*1000 words were asked for, but", lambda _: learn(folder, processor, size=1000)),
        ("ValueError: images holds no images", lambda _: learn([], processor)),
    ]
    for message, work in cases:
        for index, ended in enumerate(together(2, work, tmp_path / "ends")):
            # Each that did not meet it itself is told which one did.
            expected = message.replace("{}", "" if index else "process 1 of 2: ")
            assert re.match(expected, ended.error), ended.error


@pytest.mark.parametrize("join", [by_a_launcher, by_torch])
def test_processes_without_an_accelerator_learn_together(
    join: Callable[[int, int, int], None], folder: Path, processor: Any, tmp_path: Path
) -> None:
    one = alone(folder, processor)
    work = lambda _: (learn(folder, processor, checkpoint=tmp_path / "progress"), place())  # noqa: E731
    for index, ended in enumerate(together(2, work, tmp_path / "ends", join)):
        assert ended.error == ""
        assert ended.made[1] == (index, 2)
        assert_same(ended.made[0], one, exact=False)


def test_processes_that_accelerate_cannot_count_are_refused(folder: Path, processor: Any, tmp_path: Path) -> None:
    for ended in together(2, lambda _: learn(folder, processor), tmp_path, by_torch_after_accelerate):
        assert re.match("RuntimeError: there are 2 processes, and accelerate.* knows of 1; join", ended.error)


def fail(message: str = "mine") -> None:
    raise ValueError(message)


def fail_alone(index: int) -> None:
    if index == 1:
        fail()
    everywhere(lambda: None)


def fail_by_what_main_tells(_: int) -> None:
    try:
        in_main(fail)
    except ValueError as error:
        raise FileExistsError("as all know") from error


def fail_untold(index: int, lost: int) -> None:
    if index == lost:
        os._exit(1)
    time.sleep(0.5)
    everywhere(fail) if lost == 0 else in_main(fail)


@pytest.mark.parametrize(
    ("work", "ends"),
    [
        (fail_alone, ["ProcessLost: process 0 of 2 has lost another one", "ValueError: mine"]),
        (lambda index: everywhere(lambda: index and fail()), ["ValueError: process 1 of 2: mine", "silent"]),
        (lambda index: gathered(lambda: fail(f"of {index}")), ["ValueError: of 0", "silent"]),
        (lambda index: in_main(fail), ["ValueError: mine", "silent"]),
        (fail_by_what_main_tells, ["FileExistsError: as all know", "silent"]),
        (lambda index: fail_untold(index, 0), ["killed", "ValueError: mine"]),
        (lambda index: fail_untold(index, 1), ["ValueError: mine", "killed"]),
    ],
)
def test_a_process_is_silent_only_of_what_the_main_one_tells(
    work: Callable[[int], Any], ends: list[str], tmp_path: Path
) -> None:
    def command(index: int) -> None:
        try:
            with joined("cpu"):
                work(index)
        except SystemExit as end:
            raise RuntimeError("silent") from end

    for ended, expected in zip(together(2, command, tmp_path), ends, strict=True):
        assert ended.error.removeprefix("RuntimeError: ").startswith(expected), ended.error


@pytest.mark.parametrize("kind", ["folder", "stream", "different folders"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_resume_goes_on_to_the_same_words(
    kind: str, victim: int, folder: Path, processor: Any, tmp_path: Path
) -> None:
    images = {
        "folder": [folder, folder],
        "stream": [stored(folder).to_iterable_dataset()] * 2,
        "different folders": [folder, write(tmp_path / "other", 10, seed=1)],
    }[kind]
    read = processed_images.patch_batches

    def work(index: int, kill: bool, resume: bool) -> Any:
        def killed(*args: Any) -> Iterator[Any]:
            for step, batch in enumerate(read(*args)):
                if kill and index == victim and step == (2 if kind == "different folders" and victim else 5):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        learning.patch_batches = killed  # of this process, which ends
        # Each on a disk of its own.
        return learn(images[index], processor, checkpoint=tmp_path / f"disk{index}", resume=resume)

    whole = together(2, lambda index: learn(images[index], processor), tmp_path / "whole")
    started = time.monotonic()
    ends = together(2, lambda index: work(index, True, False), tmp_path / "killed")
    assert time.monotonic() - started < 30
    assert ends[victim].error == "killed"
    assert re.match(rf"ProcessLost: process {1 - victim} of 2 has lost another one", ends[1 - victim].error)
    assert (tmp_path / "disk0" / learning.CHECKPOINT).exists() and not (tmp_path / "disk1").exists()
    resumed = together(2, lambda index: work(index, False, True), tmp_path / "resumed")
    for ended in resumed:
        assert ended.error == ""
        assert_same(ended.made, whole[0].made, exact=True)


def test_another_number_of_processes_does_not_resume(folder: Path, processor: Any, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    together(2, lambda _: learn(folder, processor, checkpoint=progress), tmp_path / "ends")
    with pytest.raises(ValueError, match="a run with processes=2, this one has processes=1"):
        learn(folder, processor, checkpoint=progress, resume=True)
    for ended in together(3, lambda _: learn(folder, processor, checkpoint=progress, resume=True), tmp_path / "ends"):
        assert re.match("ValueError: .*a run with processes=2, this one has processes=3", ended.error)


def test_a_finished_run_goes_on_with_more_images_as_if_it_had_them_from_the_start(
    folder: Path, processor: Any, tmp_path: Path
) -> None:
    def work(_: int) -> Any:
        for number in (10, 24, 25, None):
            whole = learn(folder, processor, max_images=number)
            grown = learn(folder, processor, max_images=number, checkpoint=tmp_path / "progress", resume=True)
            assert_same(grown, whole, exact=True)
        return True

    for ended in together(2, work, tmp_path / "ends"):
        assert ended.made is True, ended.error


def test_a_checkpoint_over_other_images_in_one_process_is_refused(processor: Any, tmp_path: Path) -> None:
    disks = [write(tmp_path / name, 10, seed) for seed, name in enumerate(("a", "b", "c"))]
    progress = tmp_path / "progress"
    together(2, lambda index: learn(disks[index], processor, checkpoint=progress), tmp_path / "ends")
    others = [disks[0], disks[2]]
    for ended in together(
        2, lambda index: learn(others[index], processor, checkpoint=progress, resume=True), tmp_path / "ends"
    ):
        assert re.match("ValueError: .*10 image files .* in process 1, and images is", ended.error), ended.error


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    def work(index: int) -> Any:
        mine, told = everywhere(lambda: object(), lambda _: index * 10)
        sums = summed((torch.tensor([1.0, index]), torch.tensor(index)))
        return type(mine), told, in_main(lambda: f"from {index}"), sums, gathered(lambda: index)

    for ended in together(3, work, tmp_path):
        kind, told, said, sums, all_ = ended.made
        assert (kind, told, said, all_) == (object, [0, 10, 20], "from 0", [0, 1, 2])
        assert sums[0].tolist() == [3.0, 3.0] and sums[1].item() == 3


def test_an_error_of_its_own_is_raised_by_a_process_that_has_lost_another():
    def exchange(outcomes):
        raise RuntimeError("Connection closed by peer. More of it.")

    def work():
        raise KeyError("mine")

    with pytest.raises(processes.ProcessLost, match=r"lost another one, .*\(Connection closed by peer\)$"):
        processes._exchanged(lambda: None, exchange)
    with pytest.raises(KeyError, match="mine"):
        processes._exchanged(work, exchange)


def test_an_error_without_a_message_is_told_by_its_kind_and_known_by_its_cause():
    assert processes._described(ValueError()) == (ValueError, "ValueError: ")
    assert processes._described(KeyError("x")) == (RuntimeError, "KeyError: 'x'")
    with pytest.raises(ValueError, match=r"^process 1 of 1: bad$") as told:
        processes._exchanged(lambda: None, lambda mine: [*mine, (None, (ValueError, "bad"))])
    with pytest.raises(TypeError) as raised:
        raise TypeError("worse") from told.value
    assert processes._is_known(raised.value) and not processes._is_known(TypeError("worse"))


def test_what_a_launcher_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "5"})
    processes._tell_environment(cpu=True)
    assert os.environ == {"RANK": "5", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_one_process_makes_no_group_and_asks_accelerate_for_nothing(
    folder: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("PartialState decides on a device for the whole program")

    monkeypatch.setattr("accelerate.PartialState.__init__", refuse)
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    assert alone(folder, processor)[2].images == IMAGES
    assert everywhere(lambda: 3, lambda made: made) == (3, [3]) and in_main(lambda: 4) == 4
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu"):
        assert place() == (0, 1)


@pytest.fixture(scope="module")
def checkpoint(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and an image processor: of a model, that is all that the command needs."""
    folder = tmp_path_factory.mktemp("model")
    transformers.ViTConfig(image_size=SIDE, patch_size=PATCH_SIZE).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def command(images: Path, checkpoint: Path, output: Path) -> list[str]:
    arguments = ["learn", str(images), "--image-processor", str(checkpoint), "--output", str(output)]
    return ["-m", "vwt_hf.cli", *arguments, "--size", f"{SIZE}", "--device", "cpu"]


def paths() -> str:
    return os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")])


def test_accelerate_launches_two_that_write_the_words_of_one_and_print_once(
    folder: Path, checkpoint: Path, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the processes launched have the full buffer
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, *command(folder, checkpoint, tmp_path / "words")],
        env=os.environ | {"PYTHONPATH": paths(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{SIZE} words of 8×8 pixels") == 1
    assert f"(2 processes share the images): 100%|██████████| {IMAGES + 1}/{IMAGES + 1}" in done.stderr
    assert done.stderr.count("could not be read") == 1
    found = VisualVocabulary.from_pretrained(tmp_path / "words")
    one = alone(folder, processor, batch_size=32)
    assert_same((found.words, found.frequencies, found.info), one, exact=False)
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == [
        "README.md", "vocabulary.json", "vocabulary.safetensors", "words.png"
    ]  # fmt: skip


def test_what_goes_wrong_in_one_process_is_printed_once_and_ends_all(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Without a launcher that would end the others; on machines with a disk each, of which one lacks the images."""
    port, empty = free_port(), tmp_path / "empty"
    empty.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, *command(images, checkpoint, tmp_path / "words")],
            env=os.environ | {"PYTHONPATH": paths()} | environment(index, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, images in enumerate((folder, empty))
    ]
    ends = [(*process.communicate(timeout=LONGEST), process.returncode) for process in running]
    assert [status for _, _, status in ends] == [2, 2]
    assert f"vwt-hf learn: process 1 of 2: {empty} holds no image files; expected" in ends[0][1]
    assert "vwt-hf learn" not in ends[1][1] and "Traceback" not in ends[0][1] + ends[1][1]
    assert not (tmp_path / "words").exists()
