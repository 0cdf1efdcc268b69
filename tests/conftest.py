"""Fixtures: tiny models, checkpoints of the other end of the transformers range, and where the shared data is."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from names import COMMON, LONGEST

if TYPE_CHECKING:  # the process that hands tests out to others reads this, too, and waits for no torch
    import torch
    import transformers

    from loopback_hub import LoopbackHub

SHARED = Path(os.environ.get("VWT_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests that are marked `newest` to the newest transformers, where `scripts/test.sh` runs both, and puts
    the files first that take longest."""
    if os.environ.get("VWT_OTHER_END") == "":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("newest")])
        items[:] = [item for item in items if not item.get_closest_marker("newest")]
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """Has Python look for garbage less often, and never among what lives as long as the process.

    Each search goes through all objects of torch, transformers and the tests themselves.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(params=COMMON)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    from tiny import tiny_model

    return tiny_model(request.param)


@pytest.fixture
def noise_images(tmp_path: Path) -> list[Path]:
    """Five images of noise, 50 × 40 pixels, in the test's folder."""
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 255, (5, 40, 50, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, pixels in zip(paths, values, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def pixel_values() -> torch.Tensor:
    from tiny import sample_pixel_values

    return sample_pixel_values()


@pytest.fixture
def plans(monkeypatch) -> list:
    """For each batch that a model embeds: the plan, the patches, and the words that it was given, if any."""
    from vwt_hf.hooks import Reduce

    plan, made = Reduce.plan, []

    def watch(self, patches, given, words=None):
        made.append((plan(self, patches, given, words), patches, given))
        return made[-1][0]

    monkeypatch.setattr(Reduce, "plan", watch)
    return made


@pytest.fixture(scope="session")
def other_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the common tiny models, written by the transformers at the other end of the declared range."""
    import transformers

    if "VWT_OTHER_END" not in os.environ:
        pytest.skip("needs VWT_OTHER_END, the PYTHONPATH of another transformers version; scripts/test.sh sets it")
    folder = tmp_path_factory.mktemp("other-end")
    script = f"import plain_process; print(plain_process.write_checkpoints({str(folder)!r}))"
    env = dict(os.environ, PYTHONPATH=os.environ["VWT_OTHER_END"])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] != transformers.__version__
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the trained classifiers and photographs in {SHARED}")
    return SHARED


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub that huggingface_hub and transformers use for this test, as user `me`, with an empty cache."""
    import huggingface_hub

    from loopback_hub import LoopbackHub, connect_client, loopback_only

    with loopback_only(monkeypatch), LoopbackHub() as hub:
        connect_client(hub, tmp_path / "hf_home", monkeypatch)
        yield hub
    huggingface_hub.close_session()
