"""What a figure was measured with, and what a run that goes on from another must have in common with it; for JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from . import __version__
from .compress import lexicon_of, setting_of
from .weights import device_of, fingerprint_of


def cpu_name() -> str:
    """The CPU of this machine, as the system calls it; with the machine's name where only its architecture is known."""
    about, known = Path("/proc/cpuinfo"), ""
    told: dict[str, list[str]] = {}
    for line in about.read_text(encoding="utf-8").splitlines() if about.is_file() else []:
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), []).append(value.strip())
    if "model name" in told:
        known = told["model name"][0]
    elif "CPU part" in told:  # of each core of an ARM CPU, which may have several kinds
        cores = zip(*(told.get(f"CPU {name}", ()) for name in ("implementer", "part", "variant")), strict=False)
        known = ", ".join(f"ARM {maker} part {part} variant {variant}" for maker, part, variant in dict.fromkeys(cores))
    elif platform.system() == "Darwin":  # `platform.processor()` is "arm" for every chip
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError):
            known = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    elif platform.system() == "Windows":
        known = platform.processor()
    return known or f"{platform.machine()} of {platform.node()}"


def made_with(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's answers depend on beside weights and setting: versions, and how it runs."""
    kind = device_of(model).type
    return {
        "vwt_hf": __version__,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "device": kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        "float32": _float32_products(),
    }


def run_of(model: PreTrainedModel, form: int, **more: Any) -> dict[str, Any]:
    """What two runs must have in common for one to go on from the other, as JSON holds it.

    Args:
        model: whose answers are kept.
        form: version of the format of the file that keeps them.
        more: what else it depends on; of a name of `made_with`, in place of that.
    """
    common = {"format": form, "model": fingerprint_of(model), **made_with(model), **more}
    return json.loads(json.dumps(common))


def _float32_products() -> list[str]:
    """The precision of float32 products: of matrices and convolutions on CUDA, and of matrices on a CPU."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        return [torch.get_float32_matmul_precision()]
    # get_float32_matmul_precision raises an error if a program has set these.
    backends: Any = torch.backends
    kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    return [kind.fp32_precision.replace("none", "ieee") for kind in kinds]


def compression_of(model: PreTrainedModel) -> dict[str, Any]:
    """The setting of `model`, and a hash of its words; `None` for what it does not have."""
    setting, lexicon = setting_of(model), lexicon_of(model)
    words = None if lexicon is None else hashlib.sha256(lexicon.vocabulary.words.numpy().tobytes()).hexdigest()[:16]
    told = None if setting is None else setting.to_dict()
    if told is not None and "saved_as" in told:  # without a name in memory, as `words` says more
        told["saved_as"] = getattr(setting, "saved_as", None)
    return {"vwt": told, "words": words}
