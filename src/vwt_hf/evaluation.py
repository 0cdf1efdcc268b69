"""How a compressed model stands to the plain one: answers, tokens and time, each by one definition."""

from __future__ import annotations

import collections
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import math
import platform
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import __version__
from .compress import joining_layers, lexicon_of, reduce_hook_of, setting_of
from .families import family_of, find_layers, find_tower, model_of
from .forward import forward_within
from .printable import printable, shown
from .processors import loaded_by, remember_load
from .weights import device_of, require_unsharded

Made = TypeVar("Made")

CONFIDENT = 1.959964
"""Standard deviations of a normal distribution within which 95 % of it lie."""
RESAMPLES = 2000
"""Of a bootstrap."""
DRAWN_AT_ONCE = 2**22
"""Images of all resamples that are held in memory."""
FEWEST_TURNS = 5
"""Turns that are timed however long they take."""
FEWEST_OF_GROUP = 5
"""Images of a group whose accuracy says something."""


@dataclasses.dataclass
class TokenCount:
    """Tokens that forwards of a model ran on, padding left out."""

    by_layer: list[int]
    """Tokens that entered each layer, of all images."""
    images: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that entered the first layer, of all images."""
        return self.by_layer[0]

    @property
    def mean(self) -> float:
        """Tokens of an image, the mean over images and layers.

        Raises:
            ValueError: no forward ran.
        """
        if not self.images:
            raise ValueError("no tokens were counted; call the model inside `with count_tokens(model)`.")
        return sum(self.by_layer) / len(self.by_layer) / self.images


@contextlib.contextmanager
def count_tokens(model: PreTrainedModel) -> Iterator[TokenCount]:
    """Counts how many tokens enter the layers of a model, prefix tokens included and padding left out.

    Args:
        model: of a supported family, plain or compressed. All its forwards inside the block count, of any thread.

    Raises:
        ValueError: the family is not supported.
        TypeError: `model` is no transformers model, as what torch.compile and DataParallel make of one.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> from vwt_hf import compress
        >>> model = compress(ViTModel(ViTConfig(num_hidden_layers=1)), {"keep_ratio": 0.25})
        >>> with count_tokens(model) as count:
        ...     _ = model(pixel_values=torch.zeros(2, 3, 224, 224))
        >>> count.tokens, count.images, count.mean  # CLS + 49 of 196 patches
        (100, 2, 50.0)
    """
    tower = find_tower(model_of(model), family_of(model))
    layers = find_layers(tower.module)
    count = TokenCount([0] * len(layers))

    def add(embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        images, tokens = _images_and_tokens(embeddings, args, kwargs, output)
        count.images += images
        add_from(0, tokens)

    def add_from(layer: int, tokens: int) -> None:
        for number in range(layer, len(layers)):
            count.by_layer[number] += tokens

    def fewer(number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = forward_within(layer)
        if forward is not None and layer in forward.after:
            before = forward.plan_of_shape(*args[0].shape[:2])
            if before is not None:
                add_from(number, forward.after[layer].layout.tokens - before.layout.tokens)

    # After the hook that reduces: what torch.compile made of the embeddings may have it, or they within that.
    reduced = (part for part in tower.embeddings.modules() if reduce_hook_of(part))
    hooks = [next(reduced, tower.embeddings).register_forward_hook(add, with_kwargs=True)]
    for number in joining_layers(tower.module):
        hooks.append(layers[number - 1].register_forward_hook(functools.partial(fewer, number)))
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def _images_and_tokens(
    embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[int, int]:
    """How many images the embeddings were given, and how many tokens they made of them."""
    forward = forward_within(embeddings)
    plan = None if forward is None else forward.grouped
    if plan is not None:
        tokens = plan.layout.tokens if plan.layout.real is None else int((plan.layout.sizes > 0).sum())
        return len(plan.layout.rows), tokens
    output = output[0] if isinstance(output, tuple) else output  # some embeddings give more than tokens
    shapes = kwargs.get("spatial_shapes", args[1] if len(args) > 1 else None)
    if isinstance(shapes, torch.Tensor) and shapes.shape == (len(output), 2):  # patches that come padded
        return len(output), int(shapes.prod(dim=1).sum())
    return output.shape[0], output.shape[0] * output.shape[1]


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with modules of its own and the same weights, that reads the same files beside them.

    Raises:
        ValueError: its weights lie in parts in several processes.
    """
    require_unsharded(model)
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    remember_load(copied, loaded_by(model))
    return copied


def cpu_name() -> str:
    """The CPU of this machine, as the system calls it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def made_with(model: PreTrainedModel) -> dict[str, Any]:
    """What answers of `model` depend on beside weights and setting: versions, and how it runs; as JSON holds it."""
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


def _float32_products() -> list[str]:
    """How exact products of float32 are: of matrices and of convolutions on CUDA, and of matrices on a CPU."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        return [torch.get_float32_matmul_precision()]
    # Asked for the one number of before, torch raises an error where a program set these.
    backends: Any = torch.backends
    kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    return [kind.fp32_precision.replace("none", "ieee") for kind in kinds]


def compression_of(model: PreTrainedModel) -> dict[str, Any]:
    """The setting of `model`, and a hash of the words that it was given, as JSON holds them; `None` for none."""
    setting, lexicon = setting_of(model), lexicon_of(model)
    words = None if lexicon is None else hashlib.sha256(lexicon.vocabulary.words.numpy().tobytes()).hexdigest()[:16]
    return {"vwt": None if setting is None else setting.to_dict(), "words": words}


def on_device(made: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What an image processor made, where and as `model` wants it."""
    device = device_of(model)
    return {name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in made.items()}


def class_names(model: PreTrainedModel) -> list[str]:
    """The names of the class of `model` and of those that it is derived from."""
    return [base.__name__ for base in type(model).__mro__]


def classifies(model: PreTrainedModel) -> bool:
    """Whether the model gives logits, so that its answers are labels."""
    return any("ForImageClassification" in name for name in class_names(model))


def require_labels(model: PreTrainedModel, several: bool = False) -> None:
    """Refuses a classifier whose answer for an image is not one label.

    Args:
        several: whether it may be several labels.

    Raises:
        ValueError: it was trained to give quantities, or several labels.
    """
    answers = {"regression": "quantities, which are no labels"}
    if not several:
        answers["multi_label_classification"] = "each image any number of labels, of which only the first is compared"
    kind = model.config.problem_type
    if kind in answers:
        raise ValueError(
            f"the {type(model).__name__} has problem_type {kind!r}: it gives {answers[kind]}; expected a classifier "
            "that gives each image one label. Load it by AutoModel to compare features, or correct problem_type in its "
            "config.json."
        )


def require_label_names(model: PreTrainedModel) -> None:
    """Refuses a classifier that has no name for some of its labels.

    Raises:
        ValueError: the labels that `config.id2label` names are not those from 0 on.
    """
    named = sorted(int(number) for number in model.config.id2label or {})
    unnamed = sorted(set(range(len(named))) - set(named))
    if unnamed:
        raise ValueError(
            f"label {unnamed[0]} of the {type(model).__name__} has no name: its config.id2label names the labels "
            f"{shown(named)}; expected {len(named)} numbers from 0 on, one for each logit. Set config.id2label and "
            "config.label2id, which are saved in config.json."
        )


def answer(model: Any, **images: torch.Tensor) -> torch.Tensor:
    """Logits, else the image embedding, else the pooled output, else CLS or, without one, the mean of the tokens.

    Args:
        images: what an image processor made of a batch.

    Returns:
        (images, values).
    """
    return named_answer(model, **images)[1]


def named_answer(model: Any, **images: torch.Tensor) -> tuple[str, torch.Tensor]:
    """As `answer`, with what it is called."""
    of_images, forward = getattr(model, "get_image_features", None), getattr(type(model), "forward", None)
    try:
        output = (of_images or model)(**images)
    except Exception as error:  # whatever a model says of a text that it lacks
        if of_images or forward is None or "input_ids" not in inspect.signature(forward).parameters:
            raise
        raise _no_rows(model, f"answers about a text beside the image ({type(error).__name__}: {error})") from error
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return name, _rows(model, getattr(output, name))
    tokens = getattr(output, "last_hidden_state", None)
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 3:
        return "answer", _rows(model, tokens if isinstance(tokens, torch.Tensor) else output)
    if "CLS" in family_of(model).prefix:
        return "CLS token", tokens[:, 0]
    return "mean of the tokens", tokens.mean(dim=1)


def _rows(model: Any, values: Any) -> torch.Tensor:
    """`values`, if they are a row for each image; raises `ValueError` if they are not, as a segmenter's."""
    if isinstance(values, torch.Tensor) and values.dim() == 2:
        return values
    given = tuple(values.shape) if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
    raise _no_rows(model, f"gives {given} for a batch of images")


def _no_rows(model: Any, what: str) -> ValueError:
    return ValueError(
        f"the {type(model).__name__} {what}; expected a row of values for each image, of shape (images, values). Give "
        "a classifier or a model of features, such as its vision tower."
    )


def are_finite(answers: torch.Tensor) -> list[bool]:
    """Whether each image's answer, (images, ...), is free of NaN and infinity."""
    return answers.isfinite().flatten(1).all(dim=1).tolist()


def require_finite(model: PreTrainedModel, finite: Sequence[bool], images: Sequence[str]) -> None:
    """Refuses answers that nothing can be compared with: NaN would agree with NaN.

    Args:
        model: that gave them.
        finite: of each image, whether its answer is.
        images: their names.

    Raises:
        ValueError: one is not; the message names the image.
    """
    if all(finite):
        return
    setting = setting_of(model)
    whose = "plain model" if setting is None else f"model shortened by {shown(setting)}"
    dtype = str(model.dtype).removeprefix("torch.")
    raise ValueError(
        f"the {whose}, in {dtype}, answers {printable(images[list(finite).index(False)])} by NaN or infinity; expected "
        "finite numbers. Load the model in float32 or bfloat16, or check its weights."
    )


def _of_answers(logits: torch.Tensor) -> torch.Tensor:
    """Logits, one for each answer, (images, answers): a single logit z is that of yes, and 0 that of no."""
    return nn.functional.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def first_answers(logits: torch.Tensor) -> torch.Tensor:
    """The number of the label that each image gets, (images,); of one label alone whether it gets it, 0 or 1.

    Args:
        logits: (images, labels).
    """
    return _of_answers(logits).argmax(-1)


def agreement(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the images with the same first answer as `expected`, in [0, 1]; both (images, labels)."""
    return share_alike(first_answers(logits).tolist(), first_answers(expected).tolist())


def share_alike(answers: Sequence[Any], expected: Sequence[Any]) -> float:
    """Share of the images with the same answer as `expected`, in [0, 1]; both one for each image."""
    return torch.tensor(are_alike(answers, expected), dtype=torch.float64, device="cpu").mean().item()


def are_alike(answers: Sequence[Any], expected: Sequence[Any]) -> list[bool]:
    """Whether each image has the answer expected."""
    return [answer == other for answer, other in zip(answers, expected, strict=True)]


def divergence(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean KL divergence from `expected`, in nats; both (images, labels)."""
    return divergences(logits, expected).mean().item()


def divergences(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL divergence of each image's answer from the one expected, in nats, (images,); both (images, labels)."""
    wanted, given = (_of_answers(own).double().log_softmax(-1) for own in (expected, logits))
    return (wanted.exp() * (wanted - given)).sum(-1)


def are_right(answers: Sequence[int], truth: Sequence[Collection[int]]) -> list[bool | None]:
    """Whether the answer for each image is right; `None` where its label is not known.

    Args:
        answers: a label for each image, as `first_answers` gives them.
        truth: for each image the labels that are right; none if that is not known.
    """
    return [answer in right if right else None for answer, right in zip(answers, truth, strict=True)]


def accuracy(correct: Sequence[bool | None]) -> float | None:
    """Share of the images that are answered right, in [0, 1]; `None` where no image's label is known.

    Args:
        correct: of each image, as `are_right` says; those of unknown labels do not count.
    """
    known = [own for own in correct if own is not None]
    return sum(known) / len(known) if known else None


def worst_group(correct: Sequence[bool | None], groups: Sequence[str]) -> float | None:
    """The accuracy within the group that has the lowest, in [0, 1]; `None` where no group is large enough.

    A group with fewer than `FEWEST_OF_GROUP` images of known label is left out: one image more or less that is right
    would decide.

    Args:
        correct: of each image, as `are_right` says.
        groups: the name of each image's group.
    """
    return min((sum(own) / len(own) for own in _judged_groups(correct, groups)), default=None)


def _judged_groups(correct: Sequence[bool | None], groups: Sequence[str]) -> list[list[bool]]:
    """What is known of the images of each group that is large enough, in the order of the groups' names."""
    members: dict[str, list[bool]] = {}
    for own, group in zip(correct, groups, strict=True):
        if own is not None:
            members.setdefault(group, []).append(own)
    return [own for _, own in sorted(members.items()) if len(own) >= FEWEST_OF_GROUP]


def token_f1(text: str, references: Sequence[str]) -> float:
    """How much a text's words are those of the reference that is nearest, in [0, 1], as SQuAD's F1 counts them.

    Case, punctuation and English articles do not count, and neither does the order. Two texts without words are equal.
    """
    return max(_f1(_words(text), _words(reference)) for reference in references)


def _words(text: str) -> collections.Counter[str]:
    plain = "".join(filter(_counts, text.lower()))
    return collections.Counter(word for word in plain.split() if word not in ("a", "an", "the"))


def _counts(character: str) -> bool:
    """Whether it is no punctuation, symbol or format character, of any script; vowel signs and marks are none."""
    category = unicodedata.category(character)
    return category[0] not in "PS" and category != "Cf"


def _f1(words: collections.Counter[str], expected: collections.Counter[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    return 2 * (words & expected).total() / (words.total() + expected.total())


def ranks(similarity: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How many wrong candidates stand before the best right one of each query, (queries,) int64.

    A wrong candidate that is as similar as the right one stands before it, so that a model to which all is alike finds
    nothing.

    Args:
        similarity: (queries, candidates).
        right: of the same shape, whether a candidate is right; at least one is for each query.
    """
    best = similarity.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~right).sum(dim=1)


def cosines(features: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Cosine of each image's features with those expected, (images,); both (images, values)."""
    return torch.cosine_similarity(features.float(), expected.float(), dim=-1)


def share_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Wilson's score interval) of a share in [0, 1] that was found among `count` images."""
    spread = CONFIDENT**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = CONFIDENT * math.sqrt((share * (1 - share) + spread / 4) / count) / (1 + spread)
    # It holds the share and ends within [0, 1], but for rounding.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(values: torch.Tensor, seed: int) -> tuple[float, float]:
    """The 95 % interval (percentiles of a bootstrap) of the mean of values, (images,)."""
    values, count = values.double(), len(values)
    generator = torch.Generator().manual_seed(seed)
    # Some resamples at a time: those of many images would not fit into memory.
    at_once = max(1, DRAWN_AT_ONCE // count)
    means = [
        values[torch.randint(count, (some, count), generator=generator, device="cpu")].mean(dim=1)
        for some in (min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once))
    ]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device=values.device)
    low, high = torch.cat(means).quantile(ends).tolist()
    return low, high


def worst_group_interval(correct: Sequence[bool | None], groups: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of the lowest accuracy of any group, which `worst_group` estimates.

    Of many groups one does badly by chance, so the interval of that group alone, as that of a bootstrap, would lie too
    low. This one ends where the lowest of the groups' own intervals end (Clopper and Pearson's), whose upper ends hold
    for all groups at once (Bonferroni).

    Raises:
        ValueError: no group is large enough.
    """
    members = _judged_groups(correct, groups)
    if not members:
        raise ValueError(f"no group has {FEWEST_OF_GROUP} images of known label; expected one that has.")
    counts = {(sum(own), len(own)) for own in members}
    low = min(1 - _highest_share(size - right, size, 0.025) for right, size in counts)
    return low, min(_highest_share(right, size, 0.025 / len(members)) for right, size in counts)


def _highest_share(right: int, count: int, chance: float) -> float:
    """The upper end of Clopper and Pearson's interval: the largest share in [0, 1] of images answered right by which
    `right` of `count`, or fewer, would still come out with the given chance."""
    if right == count:
        return 1.0
    fewer = np.arange(right + 1)
    ways = np.array([math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in fewer])
    low, high = right / count, 1.0
    for _ in range(50):  # halvings: to the last digits of a float
        middle = (low + high) / 2
        found = np.exp(ways + fewer * math.log(middle) + (count - fewer) * math.log1p(-middle)).sum()
        low, high = (middle, high) if found > chance else (low, middle)
    return high


def label_ids(config: Any) -> dict[str, set[int]]:
    """The answers of a classifier that have a name, by name: several where classes share it.

    Its `id2label` says; `label2id` only for names that are not there.
    """
    ids: dict[str, set[int]] = {}
    for index, name in (config.id2label or {}).items():
        ids.setdefault(str(name), set()).add(int(index))
    for name, index in (config.label2id or {}).items():
        if str(name) not in ids and str(index).isdecimal():
            ids[str(name)] = {int(index)}
    return ids


def true_labels(names: Sequence[str], config: Any) -> tuple[list[set[int]], list[str]]:
    """The labels of images by the names that a data set or their folders give them, and what has to be said of them.

    Returns:
        For each image the right answers, as `first_answers` has them, none where the name is no label's; and sentences.
    """
    ids, given = label_ids(config), set(names)
    truth = [ids.get(name, set()) for name in names]
    said = [
        f"Labels {', '.join(map(str, sorted(ids[name])))} are all called {name!r}: each is right for it."
        for name in sorted(given)
        if len(ids.get(name, ())) > 1
    ]
    for name, index in (config.label2id or {}).items():
        if name in given and name in ids and str(index) not in map(str, ids[name]):
            said.append(f"{name!r} is label {index} by label2id; id2label, which says otherwise, is trusted.")
    if len(config.id2label or ()) == 1:  # who has it is answered right by 1
        truth = [{1} if right else right for right in truth]
    unknown = sum(not right for right in truth)
    if 0 < unknown < len(truth):
        said.append(
            f"{unknown} of {len(truth)} images have a label that is none of the model's: top-1 is of the others."
        )
    return truth, said


def usable_device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA where there is one, else the CPU.

    Raises:
        ValueError: this torch cannot use it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device is {name!r}, which torch {torch.__version__} cannot use here; expected cpu, cuda, cuda:1, ... "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def return_memory() -> None:
    """Has the C library give back to the system what it keeps free, where it can be asked to (glibc).

    Tensors of changing sizes leave gaps in its memory, by which a process would grow that runs for long on batches of
    different lengths.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: on Windows
        ctypes.CDLL(None).malloc_trim(0)


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of one call."""
    # The counter sees the matrix products of this attention, and not what fused kernels do on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
        run()
    return operations.get_total_flops()


def stopwatch(run: Callable[[], Made], device: torch.device) -> tuple[Made, float]:
    """What one call gives, and its seconds."""
    synchronize(device)
    start = time.perf_counter()
    made = run()
    synchronize(device)
    return made, time.perf_counter() - start


def time_in_turn(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    turns: int,
    *,
    warm_up: int = 1,
    fewest: int = FEWEST_TURNS,
    seconds: float = math.inf,
    label: str | None = None,
) -> list[list[float]]:
    """Seconds of each call, by run; runs take turns, so that a machine that slows down slows them all.

    Args:
        turns: how often each is called, after `warm_up` calls that do not count.
        fewest: turns that there are however long they take, if not fewer are wanted.
        seconds: no turn starts later than this, if there were the `fewest`.
        label: of a progress bar; `None` for none.
    """
    taken: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    with tqdm(range(-warm_up, turns), desc=label, leave=False, disable=label is None) as bar:
        for turn in bar:
            if turn == 0:
                begun = time.perf_counter()
            if turn >= fewest and time.perf_counter() - begun > seconds:
                break
            for run, own in zip(runs, taken, strict=True):
                spent = stopwatch(run, device)[1]
                if turn >= 0:
                    own.append(spent)
    return taken
