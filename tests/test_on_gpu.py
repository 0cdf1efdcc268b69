"""Where kernels of our own run in place of torch's operations."""

from __future__ import annotations

import importlib.util
import threading
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from settings import gradual, local
from tiny import answers, sample_pixel_values, tiny_model
from vwt_hf import compress, on_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def found(monkeypatch):
    """A GPU that can run them, with all that it takes, by pretence; what would be imported."""
    imported = SimpleNamespace(try_out=lambda device: None)
    monkeypatch.setattr(on_gpu.importlib, "import_module", lambda name, package: imported)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin="triton/__init__.py"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv(on_gpu.SWITCH, raising=False)
    on_gpu._kernels.cache_clear()
    yield imported
    on_gpu._kernels.cache_clear()


def test_they_run_on_an_nvidia_gpu_with_triton(found):
    assert on_gpu._kernels(GPU) is found


@pytest.mark.parametrize("lacks", ["triton", "more than a folder", "capability", "nvidia", "switch"])
def test_without_what_they_take_they_do_not_run(found, lacks, monkeypatch, caplog):
    if lacks == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif lacks == "more than a folder":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    elif lacks == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    elif lacks == "nvidia":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    else:
        monkeypatch.setenv(on_gpu.SWITCH, "0")
    assert on_gpu._kernels(GPU) is None and not caplog.records


@pytest.mark.parametrize("lacks", ["a compiler", "its import"])
def test_where_no_kernel_can_be_made_it_is_said_why_and_what_to_do(found, lacks, monkeypatch):
    def fail(*args):
        raise RuntimeError("Failed to find C compiler.")

    if lacks == "a compiler":
        found.try_out = fail
    else:
        monkeypatch.setattr(on_gpu.importlib, "import_module", fail)
    told = []
    monkeypatch.setattr(on_gpu.logger, "warning", told.append)
    assert on_gpu._kernels(GPU) is None and on_gpu._kernels(GPU) is None
    assert len(told) == 1
    for part in ("Failed to find C compiler", "gcc", "python3-dev", "TRITON_CACHE_DIR", f"{on_gpu.SWITCH}=0"):
        assert part in told[0]


@pytest.fixture
def everywhere(monkeypatch):
    """As if all tensors were on such a GPU."""
    imported = object()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(on_gpu, "_kernels", lambda device: imported)
    return imported


def test_they_take_plain_tensors_that_no_gradient_is_taken_of(everywhere):
    plain, weight = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert on_gpu.kernels_for(plain, plain) is everywhere
    assert on_gpu.kernels_for(plain, weight) is None
    with torch.no_grad():
        assert on_gpu.kernels_for(plain, weight) is everywhere
    assert on_gpu.kernels_for(torch.nn.Parameter(plain, requires_grad=False)) is None


def test_other_ways_to_differentiate_graphs_and_counters_go_by_operations_of_torch(everywhere):
    seen = []

    def watched(value):
        seen.append(on_gpu.kernels_for(torch.zeros(2)))
        return value * 2

    watched(torch.ones(2))
    torch.func.vmap(watched)(torch.ones(3, 2))
    torch.func.jvp(watched, (torch.ones(2),), (torch.ones(2),))
    with forward_ad.dual_level():
        watched(torch.ones(2))
    torch.jit.trace(watched, torch.ones(2), check_trace=False)
    with FlopCounterMode(display=False):  # as calibrate counts them
        watched(torch.ones(2))
    assert seen[0] is everywhere and seen[1:] == [None] * 5
    compiled = torch.compile(lambda value: value + (on_gpu.kernels_for(value) is None), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [1, 1]


def test_on_a_cpu_none_is_imported(monkeypatch):
    monkeypatch.setattr(on_gpu, "_kernels", lambda device: pytest.fail("asked for kernels"))
    answers(compress(tiny_model("vit-classifier"), {"method": "gradual"}), sample_pixel_values())


@pytest.mark.parametrize("made", ["exported", "compiled"])
def test_while_another_thread_makes_a_program_calls_are_what_they_are(made):
    images, entered, answered = sample_pixel_values(), threading.Event(), threading.Event()
    images[:, :, :16] = 0.7
    models = [compress(tiny_model("vit"), setting) for setting in (local(), gradual(), {"keep_ratio": 0.5})]
    first = torch.arange(32).expand(len(images), -1)
    words = torch.full((len(images), 64), -1).scatter(1, first, first)  # not those that vary most
    expected = [answers(model, images) for model in models]
    by_words = answers(models[2], images, patch_words=words)
    assert (expected[2] - by_words).abs().max() > 1e-3
    other, seen = compress(tiny_model("dinov2"), {"keep_ratio": 0.5}), []

    def stop(program: Any, *_: Any) -> Any:
        seen.append((torch.compiler.is_compiling(), on_gpu.is_compiling()))
        entered.set()
        assert answered.wait(60)
        return program

    def make() -> None:
        with torch.no_grad():
            if made == "compiled":
                torch.compile(other, backend=stop)(pixel_values=images)
            else:
                other.layernorm.register_forward_pre_hook(lambda *_: stop(None))
                torch.export.export(other, (), {"pixel_values": images}, strict=False)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        assert entered.wait(60) and torch.compiler.is_compiling()
        assert not on_gpu.is_compiling() and not on_gpu.is_recorded() and not on_gpu.is_followed()
        for model, right in zip(models, expected, strict=True):
            torch.testing.assert_close(answers(model, images), right)
        torch.testing.assert_close(answers(models[2], images, patch_words=words), by_words)
    finally:
        answered.set()
        thread.join()
    assert seen[0] == (True, True)


def test_the_exporter_that_makes_no_valid_program_of_groups_is_refused(tmp_path):
    model = compress(tiny_model("vit"), local(num_patches=30))
    with pytest.raises(
        ValueError, match=r"makes no program that onnxruntime takes of a model that groups patches; leave"
    ):
        torch.onnx.export(model, (sample_pixel_values(),), tmp_path / "model.onnx", dynamo=False)
    assert not list(tmp_path.iterdir())
