"""On a GPU: the answers and plans of the CPU, one wait for each plan whose images differ in length, and CUDA graphs."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import pytest
import torch
from accelerate import dispatch_model
from PIL import Image
from torch._dynamo.utils import counters

from settings import ViTImageProcessor, fixed, gradual, inter, local
from test_families import SETTINGS, sample_images
from tiny import MODELS, answers, forward, sample_pixel_values, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, attention, compress, on_gpu
from vwt_hf.families import family_of, find_layers, find_tower
from vwt_hf.hooks import ONE_GRAPH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs CUDA")
HALF = [torch.float16, torch.bfloat16]
RAGGED = {"inter": inter(), "local": local(), "gradual": gradual()}
EVEN = {
    "variance": VWTConfig(keep_ratio=0.5),
    "merge": VWTConfig(keep_ratio=0.5, dropped="merge"),
    "grid": VWTConfig(criterion="grid"),
    "local": local(num_patches=30),
    "fixed": fixed(),
}
setting = pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))
every = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def images() -> torch.Tensor:
    """Without the white one, whose tokens are equally alike but for rounding, which differs between devices."""
    return sample_images()[1:]


@setting
@every
def test_answers_are_those_of_the_cpu(name, setting, images, plans):
    model = compress(tiny_model(name), setting)
    expected = answers(model, images)
    torch.testing.assert_close(answers(model.cuda(), images.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)
    words = [plan.patch_words(len(images), patches.count).cpu() for plan, patches, _ in plans]
    half = len(words) // 2  # more than one of a forward where rotations ask for the plan, too
    assert half and all(torch.equal(*both) for both in zip(words[:half], words[half:], strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("setting", list(RAGGED.values()), ids=list(RAGGED))
@every
def test_packed_and_padded_batches_answer_as_single_images(name, setting, dtype, images):
    model, images = tiny_model(name).to("cuda", dtype), images.to("cuda", dtype)
    for layout in ("auto", "packed", "padded"):
        compress(model, dataclasses.replace(setting, layout=layout))
        alone = torch.cat([answers(model, image[None]) for image in images])
        torch.testing.assert_close(answers(model, images), alone, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_packs_and_attends_by_the_kernel_that_knows_where_images_end(dtype, images, plans, monkeypatch):
    if not attention._has_flash(torch.device("cuda"), dtype):
        pytest.skip("needs torch 2.10 and compute capability 8.0")
    kernels, calls = on_gpu.kernels_for(images.cuda()), []
    for module, name in ((attention, "varlen_attn"), (kernels, "attend")):
        kernel = getattr(module, name)
        watch = functools.partial(
            lambda name, kernel, *args, **kwargs: calls.append(name) or kernel(*args, **kwargs), name, kernel
        )
        monkeypatch.setattr(module, name, watch)
    model = compress(tiny_model("vit-classifier").to("cuda", dtype), gradual())
    answers(model, images.to("cuda", dtype))
    assert plans[0][0].layout.packed and calls == ["attend"] * len(find_layers(model))
    calls.clear()
    model(pixel_values=images.to("cuda", dtype)).logits.sum().backward()
    assert plans[1][0].layout.packed and calls == ["varlen_attn"] * len(find_layers(model))
    # In float32 there is none.
    answers(model.float(), images.cuda())
    assert not plans[2][0].layout.packed


@pytest.mark.parametrize(
    ("setting", "waits"),
    [
        *((one, 0) for one in EVEN.values()),
        (RAGGED["local"], 1),
        (RAGGED["inter"], 1),
        (RAGGED["gradual"], 2),
    ],
    ids=[*EVEN, *RAGGED],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_waits_for_the_device_once_a_plan(setting, waits, dtype, images):
    model, images = compress(tiny_model("vit-classifier").to("cuda", dtype), setting), images.to("cuda", dtype)
    answers(model, images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers(model, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [str(one.message) + one.filename + str(one.lineno) for one in caught if "synchroniz" in str(one.message)]
    assert len(told) == waits, told


@pytest.mark.parametrize("setting", list(EVEN.values()), ids=list(EVEN))
def test_a_forward_is_captured_as_a_cuda_graph(setting):
    model = compress(tiny_model("vit-classifier").cuda(), setting)
    first, second = sample_pixel_values().cuda(), sample_pixel_values().flip(0, 1).cuda()
    expected = [answers(model, first), answers(model, second)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        answers(model, first)
    torch.cuda.current_stream().wait_stream(stream)
    given, graph = first.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = answers(model, given)
    for pixel_values, known in zip((first, second), expected, strict=True):
        given.copy_(pixel_values)
        graph.replay()
        torch.testing.assert_close(found, known)


@pytest.mark.skipif(not ONE_GRAPH, reason="needs torch 2.11")
@pytest.mark.parametrize("setting", list(EVEN.values()), ids=list(EVEN))
@pytest.mark.parametrize("name", ["vit-classifier", "dinov3", "beit-classifier"])
def test_compiled_for_cuda_graphs_a_model_answers_as_before(name, setting):
    torch._dynamo.reset()
    counters.clear()
    model = compress(tiny_model(name).cuda(), setting)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for turn in range(4):
        pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(turn)).cuda()
        expected = answers(model, pixel_values)
        torch.testing.assert_close(answers(compiled, pixel_values).clone(), expected, atol=1e-4, rtol=1e-4)
    assert not counters["inductor"]["cudagraph_skips"]
    torch._dynamo.reset()


@setting
@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier", "clip", "beit-classifier", "siglip2"])
def test_gradients_are_those_of_the_cpu(name, setting, images):
    def gradients(model, images) -> dict[str, torch.Tensor]:
        forward(model, images).float().square().sum().backward()
        return {name: one.grad.cpu() for name, one in model.named_parameters() if one.grad is not None}

    expected = gradients(compress(tiny_model(name), setting), images)
    found = gradients(compress(tiny_model(name), setting).cuda(), images.cuda())
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@setting
@every
def test_under_autocast_it_answers_as_in_single_images(name, setting, images):
    model, images = compress(tiny_model(name).cuda(), setting), images.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        alone = torch.cat([answers(model, image[None]) for image in images])
        torch.testing.assert_close(answers(model, images).float(), alone.float(), atol=6e-2, rtol=6e-2)


@setting
def test_words_on_the_host_go_to_a_model_on_the_device(setting, images, plans):
    model = compress(tiny_model("vit-classifier"), setting)
    expected = answers(model, images)
    plan, patches, _ = plans[0]
    words = plan.patch_words(len(images), patches.count)
    model.cuda()
    with torch.no_grad():
        found = model(pixel_values=images.cuda(), patch_words=words).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


@setting
@pytest.mark.parametrize("first", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["vit-classifier", "dinov3", "clip-classifier", "data2vec-classifier"])
def test_a_model_lies_on_two_devices(name, first, setting, images):
    model = compress(tiny_model(name), setting)
    expected = answers(model, images)
    last = find_layers(find_tower(model, family_of(model)).module)[-1]
    holders = {id(module) for module in model.modules() if last in list(module.modules())[1:]}
    other = "cuda" if first == "cpu" else "cpu"
    places = {  # devices, not their names: by the name "cpu", accelerate offloads
        f"{name}.{part}".removeprefix("."): torch.device(other if child is last else first)
        for name, module in model.named_modules()
        if id(module) in holders
        for part, child in [*module.named_children(), *module.named_parameters(recurse=False)]
        if id(child) not in holders
    }
    dispatch_model(model, places, main_device=first)
    torch.testing.assert_close(answers(model, images.to(first)).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_words_are_learned_as_on_the_cpu(tmp_path):
    for number, image in enumerate(sample_pixel_values(32, 64, 64)):
        Image.fromarray((image.sigmoid() * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    learned = [
        VisualVocabulary.learn(tmp_path, processor, size=20, patch_size=8, device=device) for device in ("cpu", "cuda")
    ]
    inertia = [vocabulary.info.inertia for vocabulary in learned]
    assert inertia[1] == pytest.approx(inertia[0], rel=0.01)
