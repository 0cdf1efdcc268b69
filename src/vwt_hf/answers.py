"""A model's answers to a batch of images, and the names of its labels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .compress import setting_of
from .families import family_of
from .printable import composed, printable, shown
from .weights import device_of


def answer(model: Any, **images: torch.Tensor) -> torch.Tensor:
    """Logits, else the image embedding, else the pooled output, else CLS or, without one, the mean of the tokens.

    Args:
        images: what an image processor made of a batch.

    Returns:
        (images, values).
    """
    return named_answer(model, **images)[1]


def named_answer(model: Any, **images: torch.Tensor) -> tuple[str, torch.Tensor]:
    """As `answer`, after its name, such as "logits"."""
    of_images = getattr(model, "get_image_features", None)
    try:
        output = (of_images or model)(**images)
    except Exception as error:  # whatever a model says of a text that it lacks
        if of_images or "input_ids" not in inspect.signature(type(model).forward).parameters:
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
    """`values`, if they are a row for each image; raises `ValueError` if not, as for a segmenter."""
    if isinstance(values, torch.Tensor) and values.dim() == 2:
        return values
    given = tuple(values.shape) if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
    raise _no_rows(model, f"gives {given} for a batch of images")


def _no_rows(model: Any, what: str) -> ValueError:
    return ValueError(
        f"the {type(model).__name__} {what}; expected a row of values for each image, of shape (images, values). Give "
        "a classifier or a model of features, such as its vision tower."
    )


def on_device(made: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What an image processor made, on the device and in the data type of `model`."""
    device = device_of(model)
    return {name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in made.items()}


def are_finite(answers: torch.Tensor) -> list[bool]:
    """Whether each image's answer, (images, ...), is free of NaN and infinity."""
    return answers.isfinite().flatten(1).all(dim=1).tolist()


def require_finite(model: PreTrainedModel, finite: Sequence[bool], images: Sequence[str]) -> None:
    """Refuses a model's answers if one is not finite: NaN would agree with NaN.

    Args:
        finite: whether each image's answer is.
        images: their names.
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


def class_names(model: PreTrainedModel) -> list[str]:
    """The names of the class of `model` and of its base classes."""
    return [base.__name__ for base in type(model).__mro__]


def classifies(model: PreTrainedModel) -> bool:
    """Whether the model gives logits, so that its answers are labels."""
    return any("ForImageClassification" in name for name in class_names(model))


def require_labels(model: PreTrainedModel, several: bool = False) -> None:
    """Refuses a classifier that was trained to give images quantities, or several labels unless `several` allows it."""
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
    """Refuses a classifier without a name for some labels: the numbers in `config.id2label` must be those from 0 on."""
    named = sorted(int(number) for number in model.config.id2label or {})
    unnamed = sorted(set(range(len(named))) - set(named))
    if unnamed:
        raise ValueError(
            f"label {unnamed[0]} of the {type(model).__name__} has no name: its config.id2label names the labels "
            f"{shown(named)}; expected {len(named)} numbers from 0 on, one for each logit. Set config.id2label and "
            "config.label2id, which are saved in config.json."
        )


def label_ids(config: Any) -> dict[str, set[int]]:
    """The numbers of a classifier's labels, by name; several if labels share a name.

    They are those of `id2label`, and those of `label2id` for names that it lacks.
    """
    ids: dict[str, set[int]] = {}
    for index, name in (config.id2label or {}).items():
        ids.setdefault(composed(name), set()).add(int(index))
    for name, index in (config.label2id or {}).items():
        if composed(name) not in ids and str(index).isdecimal():
            ids[composed(name)] = {int(index)}
    return ids


def true_labels(names: Sequence[str | None], config: Any) -> tuple[list[set[int]], list[str]]:
    """The right answers for images whose labels a data set or folders name; `None` is the name of no label.

    Returns:
        For each image the right answers, as `first_answers` gives them, none if no label has the name; and sentences
        about what is unclear.
    """
    names = [None if name is None else composed(name) for name in names]
    ids, given = label_ids(config), {name for name in names if name is not None}
    truth = [set() if name is None else ids.get(name, set()) for name in names]
    remarks = [
        f"Labels {', '.join(map(str, sorted(ids[name])))} are all called {name!r}: each is right for it."
        for name in sorted(given)
        if len(ids.get(name, ())) > 1
    ]
    for name, index in (config.label2id or {}).items():
        name = composed(name)
        if name in given and name in ids and str(index) not in map(str, ids[name]):
            remarks.append(f"{name!r} is label {index} by label2id; id2label, which says otherwise, is trusted.")
    if len(config.id2label or ()) == 1:  # then 1 is the right answer for an image that has the label
        truth = [{1} if right else right for right in truth]
    if any(truth):
        remarks += without_answer(names, truth, "a label that is none of the model's")
    return truth, remarks


def without_answer(labels: Sequence[Any], truth: Sequence[set[int]], unknown: str) -> list[str]:
    """Sentences about the images without a right answer, of which some may have no label (`None`).

    Args:
        unknown: what the others have.
    """
    none = sum(label is None for label in labels)
    counts = {"no label": none, unknown: sum(not right for right in truth) - none}
    images = f"of {len(truth)} images have"
    return [f"{count} {images} {what}: top-1 is of the others." for what, count in counts.items() if count]
