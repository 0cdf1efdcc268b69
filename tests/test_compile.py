"""`torch.compile`: one graph where all images have the same number of tokens, and few, whatever the lengths, where they
have not; and what keeps a device waiting."""

from __future__ import annotations

import collections
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

from names import COMMON
from settings import SETTINGS, coarse, fixed, inter, local
from tiny import TINY, answers, inputs, sample_pixel_values, tiny_model
from vwt_hf import VWTConfig, compress, count_tokens, hooks, restore
from vwt_hf.families import find_layers
from vwt_hf.forward import current_forward

EVEN = {
    "local": local(num_patches=30),
    "gradual": fixed(),
    "coarse": coarse(num_patches=40),
    "merge": SETTINGS["merge"],
    "discard": SETTINGS["discard"],
}
"""Settings by which all images have the same number of tokens."""
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


newest = functools.partial(pytest.param, marks=pytest.mark.newest)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        *(
            (name, "variance") if name in ("vit", "clip-vision", "dinov3") else newest(name, "variance")
            for name in TOWERS
        ),
        ("vit", "random"),
        newest("vit", "grid"),
    ],
)
def test_intra_is_one_graph(name, criterion):
    layers = 2 if name in ("vit", "dinov3") else 1
    model = compress(tiny_model(name, num_hidden_layers=layers), {"criterion": criterion})
    pixel_values = sample_pixel_values()
    expected = answers(model, pixel_values)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(answers(compiled, pixel_values), expected)


@pytest.mark.parametrize(
    ("name", "setting", "batches"),
    [
        ("vit-classifier", "gradual", (3, 2)),
        newest("vit-classifier", "local", (3, 2)),
        newest("dinov2-classifier", "merge", (3,)),
        newest("clip", "gradual", (3,)),
        newest("siglip", "local", (3,)),
        newest("dinov3", "gradual", (3,)),
        newest("beit", "gradual", (3,)),
        ("beit", "discard", (4, 3)),
        newest("vit", "coarse", (3, 2)),
        newest("beit", "coarse", (4,)),
        newest("dinov3", "coarse", (3,)),
        newest("data2vec-classifier", "merge", (4, 3)),
        newest("blip-vision", "gradual", (3,)),
        newest("aimv2-vision", "local", (3,)),
    ],
)
def test_the_same_number_of_tokens_of_every_image_is_one_graph(name, setting, batches):
    # Tokens are joined between two layers, and a bias is shared by two.
    layers = 2 if setting == "gradual" or name.startswith("data2vec") else 1
    model = compress(tiny_model(name, num_hidden_layers=layers), EVEN[setting])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in batches:
        pixel_values = sample_pixel_values(batch)
        torch.testing.assert_close(answers(compiled, pixel_values), answers(model, pixel_values))


@pytest.mark.newest
@pytest.mark.parametrize(
    ("setting", "dynamic"),
    [
        (VWTConfig(method="local", keep_ratio=0.6, image_std=[0.5] * 3), None),
        (VWTConfig(criterion="grid"), None),
        (VWTConfig(criterion="random", dropped="merge"), True),
    ],
    ids=["local", "grid", "random-merge"],
)
def test_images_of_each_size_are_one_graph(setting, dynamic):
    model = compress(tiny_model("dinov2", num_hidden_layers=1), setting)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    for side in (32, 48):
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        torch.testing.assert_close(answers(compiled, images), answers(model, images))


@pytest.mark.newest
def test_graphs_of_models_with_other_settings_are_told_apart():
    models = [compress(tiny_model("vit-classifier"), EVEN[name]) for name in ("local", "gradual")]
    compiled = [torch.compile(model, fullgraph=True, backend="eager") for model in models]
    pixel_values = sample_pixel_values()
    for model, own in zip(models, compiled, strict=True):
        torch.testing.assert_close(answers(own, pixel_values), answers(model, pixel_values))


def test_plain_models_of_two_classes_have_as_many_graphs_as_without_us():
    """Torch limits the graphs of a function; models of two classes have two forwards."""
    count = CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for name in ("vit-classifier", "clip-vision"):
            compiled = torch.compile(tiny_model(name, num_hidden_layers=1), backend=count, dynamic=False)
            for batch in (1, 2):
                answers(compiled, sample_pixel_values(batch))
    assert count.frame_count == 4


@pytest.mark.parametrize("setting", [None, EVEN["discard"]], ids=["plain", "discard"])
def test_sizes_of_another_models_images_leave_a_graph_of_one_size(setting):
    """Torch makes a graph for any size where a function has met two."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    for name, batch in (("vit-classifier", 2), ("clip-vision", 4)):
        compiled = torch.compile(compress(tiny_model(name, num_hidden_layers=1), setting or False), backend=backend)
        answers(compiled, sample_pixel_values(batch))
    given = [node.meta["example_value"] for node in graphs[-1].graph.find_nodes(op="placeholder")]
    (images,) = (value for value in given if isinstance(value, torch.Tensor) and value.shape[1:] == (3, 32, 32))
    assert all(type(size) is int for size in images.shape)


@pytest.mark.newest
def test_each_compressed_model_has_its_own_number_of_graphs():
    """As where a server loads a new model and drops the old one, again and again."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            model = compress(tiny_model("vit-classifier", num_hidden_layers=1), EVEN["local"])
            answers(torch.compile(model, fullgraph=True, backend="eager"), sample_pixel_values())


@pytest.mark.newest
def test_with_an_older_torch_the_graph_breaks(monkeypatch):
    monkeypatch.setattr(hooks, "ONE_GRAPH", False)
    model = compress(tiny_model("vit-classifier", num_hidden_layers=1), EVEN["local"])
    pixel_values = sample_pixel_values()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        answers(torch.compile(model, backend="eager", fullgraph=True), pixel_values)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(answers(compiled, pixel_values), answers(model, pixel_values))


@pytest.mark.newest
def test_a_graph_that_is_left_in_a_layer_goes_by_the_same_plan():
    """And threads that run the pieces at once have plans of their own."""
    model = compress(tiny_model("vit-classifier"), EVEN["gradual"])
    batches = [sample_pixel_values(3), sample_pixel_values(3).flip(0)]
    expected = [answers(model, pixel_values) for pixel_values in batches]
    both = threading.Barrier(1)

    @torch.compiler.disable
    def meet(*_) -> None:
        both.wait(60)

    for module in (find_layers(model)[0], find_layers(model)[0].attention):
        module.register_forward_hook(meet)
    compiled = torch.compile(model, backend="eager")
    for pixel_values, known in zip(batches, expected, strict=True):
        torch.testing.assert_close(answers(compiled, pixel_values), known)
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        torch.testing.assert_close(list(threads.map(lambda batch: answers(compiled, batch), batches)), expected)
    assert current_forward() is None


@pytest.mark.newest
def test_a_compiled_model_follows_another_setting_and_autocast():
    model = compress(tiny_model("vit-classifier", num_hidden_layers=1), EVEN["local"])
    pixel_values = sample_pixel_values()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found, expected = [], []
    for change in (
        lambda: None,
        lambda: compress(model, local(num_patches=40)),
        lambda: restore(model),
    ):
        change()
        found.append(answers(compiled, pixel_values))
        expected.append(answers(model, pixel_values))
    torch.testing.assert_close(found, expected)
    compress(model, EVEN["local"])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(answers(compiled, pixel_values), answers(model, pixel_values))
    assert len({tuple(one.flatten().tolist()) for one in found}) == 3


@pytest.mark.newest
@pytest.mark.parametrize("put", [True, False], ids=["put in its place", "in place"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_part_that_is_compiled_follows_the_settings_of_the_whole(name, put):
    """Torch guards no hooks; without patches that are grouped, nothing but hooks would change in the part."""
    pixel_values = sample_pixel_values()
    whole, expected = tiny_model(name, num_hidden_layers=1), []
    for setting in (False, EVEN["discard"]):
        expected.append(answers(compress(tiny_model(name, num_hidden_layers=1), setting), pixel_values))
    assert not torch.allclose(*expected)
    if put:
        whole.vision_model = torch.compile(whole.vision_model, backend="eager")
    else:
        whole.vision_model.compile(backend="eager")
    for short in (False, True, False, True):
        found = answers(compress(whole, EVEN["discard"] if short else False), pixel_values)
        torch.testing.assert_close(found, expected[short])


@pytest.mark.newest
def test_tokens_of_a_compiled_model_are_counted():
    model, pixel_values = compress(tiny_model("vit-classifier"), EVEN["gradual"]), sample_pixel_values()
    compiled, counts = torch.compile(model, fullgraph=True, backend="eager"), []
    for way in (model, compiled):
        with count_tokens(model) as count:
            answers(way, pixel_values)
        counts.append((count.images, count.by_layer))
    assert counts[0] == counts[1]


def test_tokens_of_what_torch_makes_of_a_model_are_counted_on_the_model():
    model = tiny_model("vit")
    for wrapped in (torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        with pytest.raises(TypeError, match=r"expected a transformers\.PreTrainedModel"), count_tokens(wrapped):
            pass


@pytest.mark.newest
@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("kind", ["merge", "inter", "local", "coarse"])
def test_layers_that_are_compiled_one_by_one_answer_as_before(kind, compiled_first):
    pixel_values = sample_pixel_values()
    expected = answers(compress(tiny_model("vit"), SETTINGS[kind]), pixel_values)
    model = tiny_model("vit")
    if not compiled_first:
        compress(model, SETTINGS[kind])
    layers = find_layers(model)
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if child in layers:
                setattr(holder, name, torch.compile(child, backend="eager"))
    if compiled_first:
        compress(model, SETTINGS[kind])
    assert sum(isinstance(module, OptimizedModule) for module in model.modules()) == len(layers)
    torch.testing.assert_close(answers(model, pixel_values), expected)


@pytest.mark.newest
def test_maps_of_layers_that_are_wrapped_one_by_one_are_those_of_a_backbone():
    pixel_values = sample_pixel_values()
    fields = TINY | {"patch_size": 4, "out_indices": [1, 2]}
    model = transformers.Dinov2Backbone(transformers.Dinov2Config(**fields)).eval()
    expected = compress(copy.deepcopy(model), SETTINGS["merge"])(pixel_values).feature_maps
    stack = model.encoder.layer
    for index, layer in enumerate(stack):
        stack[index] = checkpoint_wrapper(layer)
    for one, other in zip(compress(model, SETTINGS["merge"])(pixel_values).feature_maps, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.newest
def test_an_error_within_a_compiled_layer_leaves_nothing_behind():
    model = compress(tiny_model("vit-classifier", num_hidden_layers=1), EVEN["local"])
    pixel_values = sample_pixel_values()
    expected = answers(model, pixel_values)
    errors = [KeyError("first"), KeyError("second")]

    @torch.compiler.disable
    def fail(*_) -> None:
        if errors:
            raise errors.pop()

    find_layers(model)[0].attention.register_forward_hook(fail)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with pytest.raises(KeyError):
            answers(compiled, pixel_values)
        assert current_forward() is None
    torch.testing.assert_close(answers(compiled, pixel_values), expected)


@pytest.mark.newest
def test_an_interrupt_of_a_model_that_a_compiled_one_calls_changes_nothing():
    class Stopped(BaseException):
        pass

    def stop(*_) -> None:
        raise Stopped

    pixel_values = sample_pixel_values()
    inner = compress(tiny_model("vit", num_hidden_layers=1), inter())
    find_layers(inner)[0].register_forward_hook(stop)
    model = compress(tiny_model("vit-classifier", num_hidden_layers=1), EVEN["local"])
    expected = answers(model, pixel_values)

    @torch.compiler.disable
    def call(*_) -> None:
        with pytest.raises(Stopped):
            answers(inner, pixel_values)

    find_layers(model)[0].attention.register_forward_pre_hook(call)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(answers(compiled, pixel_values), expected)
        assert current_forward() is None


@pytest.mark.newest
def test_a_compiled_model_is_called_within_its_own_forward():
    model = compress(tiny_model("vit-classifier", num_hidden_layers=1), EVEN["local"])
    pixel_values = sample_pixel_values()
    expected, inner, found = answers(model, pixel_values), answers(model, -pixel_values), []
    compiled = torch.compile(model, backend="eager")

    @torch.compiler.disable  # torch cannot trace a model within itself
    def call(*_) -> None:
        if not found:
            found.append(None)
            found[0] = compiled(pixel_values=-pixel_values)[0]

    find_layers(model)[0].attention.register_forward_pre_hook(call)
    torch.testing.assert_close(answers(compiled, pixel_values), expected)
    torch.testing.assert_close(found[0], inner)
    assert current_forward() is None


@pytest.mark.newest
@pytest.mark.parametrize(
    ("outer", "within"),
    [(inter(), (EVEN["merge"], inter())), (EVEN["local"], (EVEN["merge"],)), (EVEN["local"], (inter(),))],
    ids=["both in inter", "merge in local", "inter in local"],
)
def test_a_compiled_model_is_called_within_the_forward_of_another(outer, within):
    """One whose images have the same number of tokens, and one whose have not."""
    pixel_values = sample_pixel_values()
    inner = [compress(tiny_model("vit-classifier", num_hidden_layers=1), setting) for setting in within]
    compiled = [torch.compile(model, backend="eager") for model in inner]
    model = compress(tiny_model("dinov2-classifier", num_hidden_layers=1), outer)
    expected, found = answers(model, pixel_values), []
    for one in compiled:
        find_layers(model)[0].register_forward_hook(lambda *_, one=one: found.append(one(pixel_values=pixel_values)[0]))
    for way in (model, torch.compile(model, backend="eager")):
        torch.testing.assert_close(answers(way, pixel_values), expected)
        torch.testing.assert_close(found, [answers(one, pixel_values) for one in inner])
        found.clear()
    assert current_forward() is None


def test_a_compiled_model_goes_by_words_and_then_by_itself_again():
    model, pixel_values = compress(tiny_model("vit-classifier"), EVEN["local"]), sample_pixel_values()
    compiled = torch.compile(model, backend="eager")
    expected = answers(model, pixel_values)
    # Every second patch stands for the one after it.
    words = (torch.arange(64) // 2 * 2).expand(len(pixel_values), -1)
    for _ in range(2):
        torch.testing.assert_close(answers(compiled, pixel_values), expected)
        torch.testing.assert_close(
            compiled(pixel_values=pixel_values, patch_words=words).logits,
            model(pixel_values=pixel_values, patch_words=words).logits,
        )
        with pytest.raises(ValueError, match="of 1 images"):
            compiled(pixel_values=pixel_values, patch_words=words[:1])
    graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(answers(graph, pixel_values), expected)


@pytest.mark.newest
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_compiled_model_has_the_gradients_of_the_model(checkpoints):
    model, pixel_values = compress(tiny_model("vit-classifier"), EVEN["gradual"]).train(), sample_pixel_values()
    if checkpoints:
        model.gradient_checkpointing_enable()

    def gradients(way) -> list[torch.Tensor]:
        model.zero_grad()
        way(pixel_values=pixel_values).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    # Layers are repeated outside of graphs, where what a forward knows is at hand.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not checkpoints)
    torch.testing.assert_close(gradients(compiled), gradients(model))


def test_a_compiled_model_refuses_an_attention_that_knows_no_sizes():
    model = compress(tiny_model("vit-classifier"), EVEN["gradual"])
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        answers(torch.compile(model, backend="eager"), sample_pixel_values())
    assert current_forward() is None


@pytest.mark.parametrize("criterion", ["random", "grid"])
@pytest.mark.parametrize("tool", ["torch.export", "torch.jit.trace", "torch.compile"])
def test_a_model_traced_before_its_first_call_keeps_the_patches_that_it_keeps_eagerly(tool, criterion, monkeypatch):
    """And so does the model itself, after it was traced."""
    monkeypatch.setattr("vwt_hf.words._cache", collections.OrderedDict())

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
@pytest.mark.parametrize(("setting", "mode", "layers"), [("discard", "reduce-overhead", 1), ("gradual", "default", 2)])
def test_one_graph_compiled_by_inductor_answers_as_it_does_eagerly(setting, mode, layers):
    model = compress(tiny_model("dinov2-classifier", num_hidden_layers=layers), EVEN[setting])
    pixel_values = sample_pixel_values()
    expected = answers(model, pixel_values)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    torch.testing.assert_close(answers(compiled, pixel_values), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "words"), [("dinov2-classifier", "packed"), ("clip-vision", "padded")], indirect=["words"]
)
def test_inter_compiles_no_more_once_it_has_seen_a_few_batches(name, words):
    model = compress(tiny_model(name, num_hidden_layers=1), words)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    frames = []
    for batch in (4, 5, 1, 2, 6, 3, 8, 1, 7, 5):
        pixel_values = ragged(batch)
        torch.testing.assert_close(answers(compiled, pixel_values), answers(model, pixel_values))
        frames.append(counter.frame_count)
    assert 0 < frames[0] < frames[2] == frames[-1]


@pytest.mark.newest
@pytest.mark.parametrize("name", ["beit", "dinov3"])
def test_relative_and_rotary_positions_are_the_same_compiled(name):
    model = compress(tiny_model(name, num_hidden_layers=1), SETTINGS["inter"])
    compiled = torch.compile(model, backend="eager")
    for batch in (4, 3):
        torch.testing.assert_close(answers(compiled, ragged(batch)), answers(model, ragged(batch)))


@pytest.mark.newest
def test_inter_compiled_by_inductor_answers_as_it_does_eagerly(words):
    model = compress(tiny_model("vit-classifier", num_hidden_layers=1), words)
    compiled = torch.compile(model, dynamic=True)  # at once for all sizes, which the test above comes to by steps
    for batch in (4, 5, 3):
        pixel_values = ragged(batch)
        torch.testing.assert_close(answers(compiled, pixel_values), answers(model, pixel_values), atol=1e-5, rtol=1e-5)


class Waits(TorchDispatchMode):
    """Counts what the host would wait for a device for: operations whose result or shape depends on data, and those
    that make a tensor there of what the host has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        # Reading a list from a CPU tensor goes past the dispatcher.
        original = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (self._add(), original(tensor))[1])
        for name in ("tensor", "as_tensor"):
            monkeypatch.setattr(torch, name, functools.partial(self._make, getattr(torch, name)))
        new = torch.Tensor.new_tensor
        monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *args, **kwargs: self._make(new, *args, **kwargs))

    def _add(self) -> None:
        self.count += 1

    def _make(self, make, *args, device=None, **kwargs) -> torch.Tensor:
        if device != "cpu":  # by its name: what is made on the host and is copied without waiting
            self._add()
        return make(*args, device=device, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if by_mask or (depends and not indices):
            self._add()
        return func(*args, **(kwargs or {}))


def waits(model, pixel_values, monkeypatch) -> int:
    answers(model, pixel_values)  # what is made once is made
    given = inputs(model, pixel_values)
    with torch.no_grad(), Waits(monkeypatch) as mode:
        model(**given)
    monkeypatch.undo()
    return mode.count


def test_what_makes_a_host_wait_is_counted(monkeypatch):
    def waiting(pixel_values):
        return pixel_values[pixel_values > 0].sum().item(), pixel_values.nonzero(), pixel_values.tolist()

    with Waits(monkeypatch) as mode:
        waiting(sample_pixel_values())
        assert mode.count == 4
        torch.tensor([1], device=torch.device("cpu"))
    assert mode.count == 5


@pytest.mark.parametrize("model", [*COMMON, "beit", "data2vec"], indirect=True)
def test_a_forward_waits_for_its_device_once_with_words_and_never_without(model, words, monkeypatch):
    pixel_values = ragged(3)
    for criterion in ("variance", "random", "grid"):
        assert waits(compress(model, {"criterion": criterion}), pixel_values, monkeypatch) == 0
    for setting in (fixed(), local(num_patches=30)):
        assert waits(compress(model, setting), pixel_values, monkeypatch) == 0
    assert waits(compress(model, local()), pixel_values, monkeypatch) == 1
    assert waits(compress(model, words), pixel_values, monkeypatch) == 1


@pytest.mark.parametrize("setting", [local(num_patches=30), local(), inter()], ids=["number", "local", "inter"])
def test_padded_images_wait_no_more_often_than_in_the_plain_model(setting, monkeypatch):
    model, pixel_values = tiny_model("siglip2-vision"), ragged(3)
    plain = waits(model, pixel_values, monkeypatch)
    assert waits(compress(model, setting), pixel_values, monkeypatch) <= plain
