"""`torch.compile`: one graph for intra-image words, and few, whatever the lengths, for inter-image words; and what
keeps a device waiting."""

from __future__ import annotations

import collections

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from settings import SETTINGS, fixed, inter
from tiny import COMMON, answers, sample_pixel_values, tiny_model
from vwt_hf import VWTConfig, compress

TOWERS = [*(name for name in COMMON if name != "clip"), "vit-mae", "aimv2-vision", "aimv2-native", "dinov3"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["packed", "padded"])
def words(request) -> VWTConfig:
    return inter(layout=request.param)


def ragged(batch: int) -> torch.Tensor:
    """Images of different lengths: white, noise, nearly flat, noise, ..."""
    pixel_values = sample_pixel_values(batch)
    pixel_values[0] = 1.3
    pixel_values[2:3] = pixel_values[2:3] * 0.1 + 1
    return pixel_values


@pytest.mark.parametrize(
    ("name", "criterion"), [*((name, "variance") for name in TOWERS), ("vit", "random"), ("vit", "grid")]
)
def test_intra_is_one_graph(name, criterion):
    model = compress(tiny_model(name), {"criterion": criterion})
    pixel_values = sample_pixel_values()
    expected = answers(model, pixel_values)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(answers(compiled, pixel_values), expected)


@pytest.mark.parametrize("criterion", ["random", "grid"])
@pytest.mark.parametrize("tool", ["torch.export", "torch.jit.trace", "torch.compile"])
def test_a_model_traced_before_its_first_call_keeps_the_patches_that_it_keeps_eagerly(tool, criterion, monkeypatch):
    """And so does the model itself, after it was traced."""
    monkeypatch.setattr("vwt_hf.words._kept", collections.OrderedDict())

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = compress(tiny_model("vit"), {"criterion": criterion, "seed": 11})

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixel_values)[0]

    tokens, pixel_values = Tokens().eval(), sample_pixel_values()
    with torch.no_grad():
        if tool == "torch.export":
            traced = torch.export.export(tokens, (pixel_values,)).module()
        elif tool == "torch.jit.trace":
            traced = torch.jit.trace(tokens, pixel_values)
        else:
            traced = torch.compile(tokens, fullgraph=True, backend="eager")
        answers = [traced(pixel_values) for _ in range(2)]
        expected = tokens(pixel_values)
    assert torch.equal(answers[0], answers[1])
    torch.testing.assert_close(answers[0], expected)


@pytest.mark.newest
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_intra_compiled_by_inductor_answers_as_it_does_eagerly(mode):
    model = compress(tiny_model("dinov2-classifier", num_hidden_layers=1), {"keep_ratio": 0.5})
    pixel_values = sample_pixel_values()
    expected = answers(model, pixel_values)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    torch.testing.assert_close(answers(compiled, pixel_values), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "words"), [("dinov2-classifier", "packed"), ("clip-vision", "padded")], indirect=["words"]
)
def test_inter_compiles_no_more_once_it_has_seen_a_few_batches(name, words):
    model = compress(tiny_model(name), words)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    frames = []
    for batch in (4, 5, 1, 2, 6, 3, 8, 1, 7, 5):
        pixel_values = ragged(batch)
        torch.testing.assert_close(answers(compiled, pixel_values), answers(model, pixel_values))
        frames.append(counter.frame_count)
    assert 0 < frames[0] < frames[2] == frames[-1]


@pytest.mark.parametrize(
    ("name", "setting"), [("beit", "discard"), ("beit", "inter"), ("data2vec-classifier", "merge"), ("dinov3", "inter")]
)
def test_relative_and_rotary_positions_are_the_same_compiled(name, setting):
    model = compress(tiny_model(name), SETTINGS[setting])
    compiled = torch.compile(model, backend="eager")
    for batch in (4, 3):
        torch.testing.assert_close(answers(compiled, ragged(batch)), answers(model, ragged(batch)))


@pytest.mark.newest
def test_inter_compiled_by_inductor_answers_as_it_does_eagerly(words):
    model = compress(tiny_model("vit-classifier", num_hidden_layers=1), words)
    compiled = torch.compile(model)
    for batch in (4, 5, 3):
        pixel_values = ragged(batch)
        torch.testing.assert_close(answers(compiled, pixel_values), answers(model, pixel_values), atol=1e-5, rtol=1e-5)


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a device: those whose result or shape depends on data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        # Reading a list from a CPU tensor goes past the dispatcher.
        original = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (self._add(), original(tensor))[1])

    def _add(self) -> None:
        self.count += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if by_mask or (depends and not indices):
            self._add()
        return func(*args, **(kwargs or {}))


def waits(model, pixel_values, monkeypatch) -> int:
    answers(model, pixel_values)  # what is made once is made
    with Waits(monkeypatch) as mode:
        answers(model, pixel_values)
    monkeypatch.undo()
    return mode.count


def test_what_makes_a_host_wait_is_counted(monkeypatch):
    def waiting(pixel_values):
        return pixel_values[pixel_values > 0].sum().item(), pixel_values.nonzero(), pixel_values.tolist()

    with Waits(monkeypatch) as mode:
        waiting(sample_pixel_values())
    assert mode.count == 4


@pytest.mark.parametrize("model", [*COMMON, "beit", "data2vec"], indirect=True)
def test_a_forward_waits_for_its_device_once_with_words_and_never_without(model, words, monkeypatch):
    pixel_values = ragged(3)
    for criterion in ("variance", "random", "grid"):
        assert waits(compress(model, {"criterion": criterion}), pixel_values, monkeypatch) == 0
    assert waits(compress(model, fixed()), pixel_values, monkeypatch) == 0
    assert waits(compress(model, words), pixel_values, monkeypatch) == 1
