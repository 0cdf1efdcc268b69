"""Whether kernels of our own, or numpy, may do what torch's operations would do."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch._guards import TracingContext
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad

SWITCH = "VWT_HF_KERNELS"
"""The environment variable that turns the kernels off, if it is 0 before the first batch."""
logger = logging.getLogger(__name__)


def kernels_for(*tensors: torch.Tensor) -> ModuleType | None:
    """`vwt_hf.kernels`, if it may be used on these tensors, else `None`.

    They must be plain tensors on an NVIDIA GPU, that no gradient is taken of, outside of what is compiled, exported or
    traced. It needs Triton, which torch for CUDA brings along, a C compiler and Python's headers.
    """
    if not all(_takes(tensor) for tensor in tensors) or is_followed():
        return None
    return _kernels(tensors[0].device)


def has_kernels(device: torch.device) -> bool:
    """Whether `kernels_for` has them for plain tensors on a device."""
    return device.type == "cuda" and _kernels(device) is not None


def is_compiling() -> bool:
    """Whether `torch.compile` or `torch.export` traces what runs here.

    `torch.compiler.is_compiling()` by itself is true in all threads of a process while one of them compiles.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    if not torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() > 0 or TracingContext.try_get() is not None


def is_recorded() -> bool:
    """Whether what runs is recorded as a program: by `torch.compile`, export, tracing or `make_fx`."""
    if is_compiling() or torch.jit.is_tracing():
        return True
    if not _has_modes():  # which spares the import below, that takes long
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def is_exported() -> bool:
    """Whether `torch.export` or `torch.jit.trace` records what runs in this thread, other than by dynamo."""
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch._C._len_torch_dispatch_stack() > 0)


def is_followed() -> bool:
    """Whether only torch's own operations may run, because something records or replaces them: `torch.compile`, export,
    tracing, `vmap`, other ways to differentiate than autograd, and modes that count or keep operations."""
    if is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or _has_modes()


def is_one_of_many(tensor: torch.Tensor) -> bool:
    """Whether `torch.func.vmap` runs this code once for many tensors, of which `tensor` stands for each."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _has_modes() -> bool:
    """Whether a dispatch mode sees each operation before torch does it, or before autograd does."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    # Those before autograd are shared by all threads. While one thread exports, they are taken for its own.
    return _len_torch_dispatch_stack_pre_dispatch() > 0 and not torch.compiler.is_compiling()


def _takes(tensor: torch.Tensor) -> bool:
    differentiable = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.is_cuda and type(tensor) is torch.Tensor and not differentiable


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    spec = importlib.util.find_spec("triton")
    if os.environ.get(SWITCH) == "0" or spec is None or spec.origin is None:  # a folder of that name has no origin
        return None
    try:
        kernels = importlib.import_module(".kernels", __package__)
        kernels.try_out(device)
    except Exception as error:  # whatever a machine lacks
        logger.warning(
            f"Triton cannot run a kernel on {device} ({type(error).__name__}: {error}). It takes a C compiler (gcc, "
            "clang or what the environment variable CC names), Python's headers (python3-dev), and a folder to write "
            "to (TRITON_CACHE_DIR). Patches are chosen and joined by torch's operations, which takes several times as "
            f"long. Install what is missing, or set {SWITCH}=0 to be told no more."
        )
        return None
    return kernels
