"""Processes that are killed while they save: what they were writing over is found whole, old or new, never a mixture.

Each one is forked, so that a kill takes milliseconds. The short form kills at every step of each kind of save and at a
few random times, VWT_LONG=1 a thousand times, by a seed that failing tests print; VWT_SEED gives that seed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from settings import STATISTICS
from tiny import tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, compress, model_saving
from vwt_hf.compress import lexicon_of
from vwt_hf.vocabulary.files import VocabularyInfo
from vwt_hf.vocabulary.kmeans import MiniBatchKMeans
from vwt_hf.vocabulary.learning import Progress, load_checkpoint, save_checkpoint

if not hasattr(os, "fork"):
    pytest.skip("needs os.fork", allow_module_level=True)
resource = pytest.importorskip("resource")

LONG = os.environ.get("VWT_LONG") == "1"
SEED = int(os.environ.get("VWT_SEED", random.randrange(2**32) if LONG else 0))
AT_RANDOM = 200 if LONG else 4
"""Kills of each kind of save at a random time."""
TOGETHER = 60 if LONG else 4
"""Pairs of processes that save at once."""

State = Any
"""What is read of a folder, as values that can be compared."""


@dataclasses.dataclass(frozen=True)
class Save:
    """A kind of save."""

    write: Callable[[Path, str], None]
    """Saves into a folder what is called "old", "new" or "other"."""
    read: Callable[[Path], State]
    refuses: tuple[type[Exception], ...] = ()
    """What `read` may raise of a mixture. Where it is nothing, there must be none."""


def digest(tensor: torch.Tensor) -> tuple[tuple[int, ...], float]:
    return tuple(tensor.shape), tensor.double().flatten().mul(torch.arange(tensor.numel()).cos()).sum().item()


@functools.cache
def vocabulary(which: str, other_shapes: bool) -> VisualVocabulary:
    seed = ("old", "new", "other").index(which)
    size = 40 - 10 * seed if other_shapes else 300
    words = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return VisualVocabulary(words, torch.arange(size) + seed, VocabularyInfo(dataset=which))


def write_vocabulary(folder: Path, which: str, other_shapes: bool = False, card: bool = False) -> None:
    vocabulary(which, other_shapes).save_pretrained(folder, card=card)


def read_vocabulary(folder: Path) -> State:
    found = VisualVocabulary.from_pretrained(folder)
    assert found.frequencies is not None
    return digest(found.words), digest(found.frequencies), found.info.dataset


@functools.cache
def model(which: str) -> Any:
    """Weights, words and threshold of its own for each name."""
    seed = ("old", "new", "other").index(which)
    generator = torch.Generator().manual_seed(seed)
    made = tiny_model("vit", num_hidden_layers=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    words = VisualVocabulary(torch.rand(20, 3, 4, 4, generator=generator))
    return compress(made, VWTConfig(method="inter", vocabulary=words, threshold=(0.1, 0.5, 0.9)[seed], **STATISTICS))


def write_model(folder: Path, which: str) -> None:
    model(which).save_pretrained(folder)


def read_model(folder: Path) -> State:
    loaded = type(model("old")).from_pretrained(folder)
    lexicon = lexicon_of(loaded)
    assert lexicon is not None
    weights = [digest(parameter.detach()) for parameter in loaded.parameters()]
    return weights, digest(lexicon.vocabulary.words), loaded.config.vwt["threshold"]


SETTINGS = {"size": 20, "patch_size": 2}


@functools.cache
def learning(which: str) -> tuple[MiniBatchKMeans, Progress]:
    seed = ("old", "new", "other").index(which)
    kmeans = MiniBatchKMeans(20, 12, seed=seed)
    kmeans.update(torch.rand(1000 + seed, 12, generator=torch.Generator().manual_seed(seed)))
    return kmeans, Progress(images=10 + seed)


def write_checkpoint(folder: Path, which: str) -> None:
    kmeans, done = learning(which)
    save_checkpoint(folder / "learning.safetensors", kmeans, SETTINGS, done)


def read_checkpoint(folder: Path) -> State:
    kmeans = MiniBatchKMeans(20, 12, seed=9)
    done = load_checkpoint(folder / "learning.safetensors", kmeans, SETTINGS)
    return [digest(value) for value in kmeans.state_dict().values() if isinstance(value, torch.Tensor)], done


SAVES = {
    "vocabulary": Save(write_vocabulary, read_vocabulary),
    "vocabulary of another shape": Save(
        functools.partial(write_vocabulary, other_shapes=True, card=True), read_vocabulary
    ),
    "checkpoint": Save(write_checkpoint, read_checkpoint),
    # Transformers writes a model's files one by one; what does not belong together is noticed when it is loaded.
    "model": Save(write_model, read_model, (ValueError, OSError)),
}
save = pytest.mark.parametrize(
    "save",
    # What is not a model's is written without transformers.
    [pytest.param(of, id=name, marks=() if name == "model" else pytest.mark.newest) for name, of in SAVES.items()],
)

FOREIGN = {
    "notes.txt": b"mine",
    ".hidden": b"mine, too",
    "mine/data.bin": b"\0" * 9,
    "mine.safetensors": b"no tensors",
    "visual_words/notes.txt": b"mine, beside the words",
}
"""Files that somebody else put into the folder."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked process has none of its parent's threads to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    if LONG:
        print(f"VWT_SEED={SEED}")
    yield
    transformers.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a process dies: all are `None` for never. No handler runs, no buffer is flushed."""

    step: int | None = None
    """Before the so manieth time that it opens a file to write, flushes it to disk, renames, deletes or makes one."""
    size: int | None = None
    """While it writes a file longer than so many bytes, of which these are written."""
    seconds: float | None = None

    def arm(self) -> None:
        """Of the process that calls this."""
        if self.step is not None:
            _count_down(self.step)
        if self.size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
        if self.seconds is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 1e-6))


STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def _count_down(step: int) -> None:
    steps = itertools.count(1)

    def count() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def look(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in STEPS or writes:
            count()

    def flush(file: Any, fsync: Callable[[Any], None] = os.fsync) -> None:
        count()
        fsync(file)

    os.fsync = flush
    sys.addaudithook(look)


def start(write: Callable[[], None], kill: Kill, gate: tuple[int, int] | None = None) -> int:
    """Starts a process that writes and is killed; its id. It waits until `gate`, a pipe, is closed for writing."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if gate is not None:
            os.close(gate[1])
            os.read(gate[0], 1)
        kill.arm()
        write()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int) -> bool:
    """Waits for a process; whether it ended by itself, which must be without an error."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the process that saves raised an error"
    return not os.WIFSIGNALED(status)


def every_kill(folder: Path, save: Save, reset: Callable[[], None], apart: int = 1) -> Iterator[Kill]:
    """Kills the saving of "new" over "old" at every step, or at steps so far `apart`, in the midst of writing, and at
    random times; yields when it is dead."""

    def die(kill: Kill) -> bool:
        reset()
        return not ended(start(lambda: save.write(folder, "new"), kill))

    step = 1
    while die(Kill(step=step)):
        yield Kill(step=step)
        step += apart
    assert step > 2, "hardly a step was seen"
    for size in (0, 1, 100, 1000, 4096, 20_000):
        if die(Kill(size=size)):
            yield Kill(size=size)
    began = time.monotonic()
    die(Kill())
    seconds = time.monotonic() - began
    chance = random.Random(SEED)
    for _ in range(AT_RANDOM):
        kill = Kill(seconds=chance.random() * seconds)
        if die(kill):
            yield kill


def require_whole(folder: Path, save: Save, states: dict[str, State]) -> str:
    """Reads a folder, which must be as one of `states`, or refused if this kind of save may leave what is."""
    try:
        found = save.read(folder)
    except Exception as error:
        if not isinstance(error, save.refuses):
            return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[-150:]})"
        return "" if str(folder) in str(error) else f"is refused by what does not name it: {error}"
    return "" if found in states.values() else "is a mixture"


def states_of(save: Save, at: Path, names: tuple[str, ...]) -> dict[str, State]:
    found = {}
    for name in names:
        save.write(at / name, name)
        found[name] = save.read(at / name)
    assert len({repr(state) for state in found.values()}) == len(names)
    return found


def files_in(folder: Path) -> list[str]:
    """But for what safetensors leaves beside a model's weights where it is killed, which is not ours to delete.

    Folders of words, which every save names anew, go by one name.
    """
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    ours = [name for name in found if not re.fullmatch(r"\.tmp\w{6}", name)]
    return sorted(re.sub(r"^visual_words-\w{16}/", "visual_words-*/", name) for name in ours)


@save
def test_a_killed_save_leaves_the_old_or_the_new(save: Save, tmp_path: Path) -> None:
    states = states_of(save, tmp_path, ("old", "new"))
    folder = tmp_path / "folder"

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)

    bad = [(kill, why) for kill in every_kill(folder, save, reset) if (why := require_whole(folder, save, states))]
    assert not bad, "\n".join(f"{kill}: the folder {why}" for kill, why in bad)


@save
def test_a_whole_save_leaves_nothing_of_killed_ones_and_all_files_of_others(save: Save, tmp_path: Path) -> None:
    states = states_of(save, tmp_path, ("old", "new", "other"))
    folder = tmp_path / "folder"
    save.write(folder, "old")
    for name, content in FOREIGN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    assert list(every_kill(folder, save, lambda: None, apart=1 if LONG else 3))
    save.write(folder, "other")
    assert save.read(folder) == states["other"]
    assert files_in(folder) == sorted([*files_in(tmp_path / "other"), *FOREIGN])
    assert {name: (folder / name).read_bytes() for name in FOREIGN} == FOREIGN


@save
def test_two_that_save_at_once_leave_what_one_of_them_saved(save: Save, tmp_path: Path) -> None:
    states = states_of(save, tmp_path, ("old", "new", "other"))
    folder = tmp_path / "folder"
    save.write(folder, "old")
    began = time.monotonic()
    ended(start(lambda: save.write(folder, "old"), Kill()))
    seconds = time.monotonic() - began
    chance = random.Random(SEED)
    bad = []
    for turn in range(TOGETHER):
        # One of them is killed every other time.
        kills = {"new": Kill(), "other": Kill(seconds=chance.random() * seconds) if turn % 2 else Kill()}
        gate = os.pipe()
        pids = [start(functools.partial(repeat, save, folder, name), kill, gate) for name, kill in kills.items()]
        for end in gate:
            os.close(end)
        for pid in pids:
            ended(pid)
        if why := require_whole(folder, save, states):
            bad.append((kills["other"], why))
    assert not bad, "\n".join(f"{kill} of the second: the folder {why}" for kill, why in bad)
    save.write(folder, "new")
    assert files_in(folder) == files_in(tmp_path / "new")


def test_the_seal_of_a_model_tells_of_the_weights_that_its_own_save_wrote(tmp_path: Path, monkeypatch) -> None:
    """Another save into the folder, which begins before it is sealed, waits for its turn."""
    folder = tmp_path / "folder"
    seal, weights, others = model_saving.seal_words, [], []

    def sealed_late(*of: Any, **named: Any) -> None:
        if not others:
            others.append(threading.Thread(target=write_model, args=(folder, "other")))
            others[0].start()
            others[0].join(1)
            weights.append((folder / "model.safetensors").read_bytes())
        seal(*of, **named)

    monkeypatch.setattr(model_saving, "seal_words", sealed_late)
    write_model(folder, "new")
    others[0].join()
    monkeypatch.undo()
    for which in ("new", "other"):
        write_model(tmp_path / which, which)
    assert weights == [(tmp_path / "new" / "model.safetensors").read_bytes()]
    assert read_model(folder) == read_model(tmp_path / "other")


def repeat(save: Save, folder: Path, which: str) -> None:
    """Saves some times, so that two processes meet."""
    for _ in range(3):
        save.write(folder, which)
