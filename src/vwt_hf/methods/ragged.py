"""The base of methods that may give each image of a batch its own number of tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..config import VWTConfig, require_choice
from ..on_gpu import is_recorded
from ..patches import Patches

LAYOUTS = ("auto", "packed", "padded")


@dataclasses.dataclass(frozen=True, repr=False)
class RaggedConfig(VWTConfig):
    """A method by which images of a batch may have different numbers of tokens.

    Args:
        layout (`str`, default `"auto"`):
            How such a batch is run. `"packed"`: as one sequence, of which only attention knows where images end.
            `"padded"`: each image as long as the longest. `"auto"`: packed on a CPU, and on CUDA in half precision by
            flash_attention_2 or, from compute capability 8.0 and torch 2.11 on, by sdpa; else padded, as BEiT and
            Data2Vec are there, and training with stochastic depth. The answers are the same.
    """

    beside_choice: ClassVar[frozenset[str]] = VWTConfig.beside_choice | {"layout"}

    layout: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("layout", self.layout, LAYOUTS)
        if self.output == "compressed":
            raise ValueError(
                f"VWTConfig.output is 'compressed', but under method={self.method!r} the images of a batch may have "
                "different numbers of tokens, which no one tensor holds; use output='full'."
            )

    groups = True

    def require_untraced(self) -> None:
        """Raises `ValueError` while a program is exported or traced, which cannot hold images of different lengths."""
        if is_recorded():  # not by torch.compile, which leaves this out of its graphs
            raise ValueError(
                f"method={self.method!r} gives every image its own number of tokens, which an exported or traced "
                "program cannot hold. Export a model compressed with method='intra', 'local' or 'coarse' with "
                "num_patches and no similarity, or 'gradual' with num_patches and join_ratio; keep_ratio in place of "
                "num_patches will do, too."
            )

    def packs(self, patches: Patches) -> bool:
        """Whether a batch becomes one sequence.

        Raises:
            ValueError: an exported program cannot hold such a batch, this training cannot pack it, or the images are on
                the meta device.
        """
        self.require_untraced()
        if patches.device.type == "meta":
            raise ValueError(
                f"method={self.method!r} gives every image as many tokens as it needs, which nobody knows of images on "
                "the meta device. Take a setting by which all have the same number, as method='local' with num_patches."
            )
        if patches.draws and self.layout == "packed":
            raise ValueError(
                "layout is 'packed' and the model is in training with stochastic depth (drop_path_rate), which draws "
                "once for each sequence: all images would skip the same layers. Use layout='auto' or 'padded', or load "
                "the model with drop_path_rate=0."
            )
        return self.layout == "packed" or (self.layout == "auto" and patches.packs and not patches.draws)
