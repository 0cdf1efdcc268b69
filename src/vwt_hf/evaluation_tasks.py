"""The tasks of models: labels, zero-shot labels, captions found or written, and features.

A task says what a model answers to a batch of images, what is kept of the answers, and which figures come of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import warnings
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from .answers import (
    answer,
    are_finite,
    classifies,
    label_ids,
    named_answer,
    require_finite,
    require_label_names,
    require_labels,
    true_labels,
    without_answer,
)
from .checks import require_unhidden
from .families import HOLDERS
from .figures import (
    are_alike,
    cosines,
    divergences,
    first_answers,
    judged_groups,
    mean_interval,
    ranks,
    share_interval,
    token_f1,
    worst_group_interval,
)
from .labelled_images import LabelledImages, Sample
from .printable import composed, printable, shown
from .processes import gathered, place
from .weights import device_of, parameter_of

RECALLED = (1, 5, 10)
"""The k of each recall@k: a right candidate must be among so many of the most similar ones."""
TEXTS = 64
"""Texts in one forward pass."""
QUERIES = 1024
"""Queries whose similarities to all candidates are in memory at once."""
PROMPT = "a photo of a {}."
OF_TEXTS = {*MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, "aimv2"}
"""Types of models that compare images with texts. transformers does not list the last."""


@dataclasses.dataclass
class Figure:
    """A figure over all images, and its 95 % interval if it has one."""

    value: float
    interval: tuple[float, float] | None = None
    count: int | None = None
    """Of how many images it is; `None` for all."""


@dataclasses.dataclass
class Answers:
    """What is known of images, and what is kept of each model's answers."""

    samples: list[Sample]
    answers: list[dict[str, Any]]
    """For each model, by name, a list or a tensor with an entry for each image; the plain model comes first."""


class Task:
    """What models are for; an instance is made for each evaluation."""

    name: ClassVar[str]
    hub_name: ClassVar[str]
    """What the Hub calls it."""
    auto: ClassVar[Any] = AutoModel
    """The Auto class of its models."""

    def __init__(self, model: Any, images: LabelledImages, tokenizer: Any, options: Mapping[str, Any]) -> None:
        """Raises `ValueError` if the model or the images lack what the task needs."""
        self.model, self.tokenizer, self.options, self.seed = model, tokenizer, options, options["seed"]
        self.prepare(images)

    def prepare(self, images: LabelledImages) -> None:
        """Is called once, before the images are seen."""

    def answer(self, model: Any, made: dict[str, torch.Tensor]) -> Any:
        """A model's answers to a batch, one for each image."""
        raise NotImplementedError

    def finite(self, found: Any) -> list[bool]:
        """Whether each image's answer is free of NaN and infinity."""
        return are_finite(found)

    def keep(self, found: Any, plain: Any) -> dict[str, Any]:
        """What is kept of answers to a batch, by name: a list or a tensor with an entry for each image."""
        raise NotImplementedError

    def of_images(self, made: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What is kept of the images of a batch themselves, as of answers; it stands among the plain model's."""
        return {}

    def figures(self, kept: Answers) -> tuple[list[dict[str, Figure]], list[str]]:
        """Each model's figures by name, and sentences about them.

        The plain model has no figures that compare with it.
        """
        own, remarks = self.own(kept)
        plain, *others = kept.answers
        compared = [self.to_plain(answers, plain) for answers in others]
        return [one | more for one, more in zip(own, [{}, *compared], strict=True)], remarks

    def own(self, kept: Answers) -> tuple[list[dict[str, Figure]], list[str]]:
        """As `figures`, only those that compare with labels or captions."""
        return [{} for _ in kept.answers], []

    def to_plain(self, answers: dict[str, Any], plain: dict[str, Any]) -> dict[str, Figure]:
        """The figures that compare a model's answers with the plain model's."""
        raise NotImplementedError

    def share(self, values: Sequence[bool], images: int | None = None) -> Figure:
        """A share of images with its 95 % interval.

        Args:
            values: whether something holds, for each image or each caption.
            images: the number of images, if an image has several values. These are not independent, so the interval is
                that of so many images.
        """
        share, count = sum(values) / len(values), len(values) if images is None else images
        return Figure(share, share_interval(share, min(count, len(values))), images)

    def mean(self, values: torch.Tensor, count: int | None = None) -> Figure:
        """The mean over the images, `count` of them if not all; it does not depend on their order."""
        values = values.double().sort().values
        return Figure(values.mean().item(), mean_interval(values, self.seed), count)


class Classification(Task):
    """The labels that a classifier gives images."""

    name, hub_name = "classification", "image-classification"
    auto: ClassVar[Any] = AutoModelForImageClassification

    def prepare(self, images: LabelledImages) -> None:
        require_labels(self.model)
        require_label_names(self.model)
        self.metrics = _metrics()
        self.unlabelled = (
            "No image has a label that is known, as where those of a split are hidden: there is no accuracy."
            if images.has_labels
            else "No column is known to hold labels, so there is no accuracy: name one by label_column "
            f"(--label-column). The columns are {', '.join(map(printable, images.column_names))}."
        )
        names = images.label_names or ()
        if len(names) > 1 and not label_ids(self.model.config).keys() & set(map(composed, names)):
            warnings.warn(self._unmatched(names[0]), stacklevel=2)  # now, as images may take hours

    def answer(self, model: Any, made: dict[str, torch.Tensor]) -> torch.Tensor:
        kind, logits = named_answer(model, **made)
        if kind != "logits":
            raise ValueError(
                f"the {type(model).__name__} gives no labels but a {kind}; expected an image classifier, such as "
                "ViTForImageClassification. The task 'features' compares what other models make of images."
            )
        return logits.float().cpu()

    def keep(self, found: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
        return {
            "answer": first_answers(found),
            "kl": divergences(found, plain),
            "difference": (found - plain).abs().amax(dim=-1),
        }

    def own(self, kept: Answers) -> tuple[list[dict[str, Figure]], list[str]]:
        truth, remarks = self.truth([sample.label for sample in kept.samples])
        groups = [sample.group for sample in kept.samples]
        grouped = [group is not None for group, right in zip(groups, truth, strict=True) if right]
        if not all(grouped):
            remarks.append(f"{grouped.count(False)} images without a group are left out of the worst group.")
        return [self._right(answers["answer"].tolist(), truth, groups) for answers in kept.answers], remarks

    def truth(self, labels: Sequence[str | int | None]) -> tuple[list[set[int]], list[str]]:
        """The right answers for each image, none if they are not known; and sentences about them."""
        if {str, int} <= {type(label) for label in labels}:  # a stream's quantities, some of which are whole numbers
            labels = [str(float(label)) if isinstance(label, int) else label for label in labels]
        known = [label for label in labels if label is not None]
        config = self.model.config
        if any(isinstance(label, int) for label in known):
            count = max(2, config.num_labels)  # one label alone is no and yes
            truth = [{label} if isinstance(label, int) and 0 <= label < count else set() for label in labels]
            remarks = ["The labels of the images have no names: they are the model's by their numbers."]
            if any(truth):
                remarks += without_answer(labels, truth, f"a label that is none from 0 to {count - 1}")
            else:
                remarks.append(f"None of them is from 0 to {count - 1}: there is no accuracy.")
            return truth, remarks
        truth, remarks = true_labels([None if label is None else str(label) for label in labels], config)
        if not known:
            remarks.append(self.unlabelled)
        elif not any(truth):
            remarks.append(self._unmatched(known[0]))
        return truth, remarks

    def _unmatched(self, label: str | int) -> str:
        """What is said where the model has none of the labels of the images, such as `label`."""
        names = list((self.model.config.id2label or {}).values())
        example = f"such as {shown(names[0])}" if names else "its config names none"
        if names and names == [f"LABEL_{number}" for number in range(len(names))]:
            example += ", which transformers writes where labels have no names"
        return (
            f"No label of the images (such as {shown(label)}) is one of the model's ({example}): they are compared by "
            "name, and there is no accuracy. If the model was trained on these labels, set id2label, in its config, to "
            "their names, in the order of its logits."
        )

    def _right(
        self, answers: Sequence[int], truth: Sequence[set[int]], groups: Sequence[str | None]
    ) -> dict[str, Figure]:
        known = [index for index, right in enumerate(truth) if right]
        if not known:
            return {}
        given = [answers[index] for index in known]
        # Each of several labels of the same name is right.
        right = [at if at in truth[index] else min(truth[index]) for index, at in zip(known, given, strict=True)]
        known_groups = [groups[index] for index in known]
        metrics = [self.metrics.Accuracy, self.metrics.WorstGroup]
        computed = self.metrics.compute(metrics, predictions=given, references=right, groups=known_groups)
        # A metric of `evaluate` tells no interval.
        count, worst = len(known), computed["worst_group"]
        figures = {"accuracy": Figure(computed["accuracy"], share_interval(computed["accuracy"], count), count)}
        if worst is not None:
            correct = are_alike(given, right)
            judged = sum(map(len, judged_groups(correct, known_groups)))
            figures["worst_group"] = Figure(worst, worst_group_interval(correct, known_groups), judged)
        return figures

    def to_plain(self, answers: dict[str, Any], plain: dict[str, Any]) -> dict[str, Figure]:
        given, expected = answers["answer"].tolist(), plain["answer"].tolist()
        agreement = [self.metrics.Agreement]
        computed = self.metrics.compute(agreement, predictions=given, plain_predictions=expected)
        return {
            "agreement": Figure(computed["agreement"], share_interval(computed["agreement"], len(given))),
            "kl": self.mean(answers["kl"]),
            "max_difference": Figure(answers["difference"].max().item()),
        }


def _metrics() -> ModuleType:
    """`metrics`, before anything is measured: what it imports may be hidden, and takes a second."""
    require_unhidden("datasets", "arrow_dataset")
    require_unhidden("evaluate", "evaluation_suite")
    from . import metrics

    return metrics


class ZeroShot(Classification):
    """The labels whose names, in a sentence, a model of images and texts finds most like an image."""

    name, hub_name = "zero-shot", "zero-shot-image-classification"
    auto: ClassVar[Any] = AutoModel

    def prepare(self, images: LabelledImages) -> None:
        if images.label_names is None:
            raise ValueError(
                "the images have no labels with names, of which a zero-shot classifier makes its texts; expected a "
                "folder of folders, a column of datasets.ClassLabel, or a column of names in a data set that is no "
                "stream."
            )
        self.names = [_spoken(name) for name in images.label_names]
        if len(set(self.names)) < 2:
            raise ValueError(
                f"the images have one label alone ({', '.join(map(shown, images.label_names))}), which any model would "
                "find; expected at least two, such as a folder with a folder for each, that differ by more than _ and "
                "a space. Without labels, the task 'features' compares what the model makes of images."
            )
        texts = [self.options["prompt"].replace("{}", name) for name in self.names]
        for text in texts:
            if text.encode(errors="ignore").decode() != text:
                raise ValueError(
                    f"a zero-shot classifier would read {shown(text)}, which is no valid text; expected labels that "
                    "are. Rename the folder or the class."
                )
        self.metrics = _metrics()
        require_told_apart(self.model, self.tokenizer, texts)
        self.texts = text_features(self.model, self.tokenizer, texts)

    def answer(self, model: Any, made: dict[str, torch.Tensor]) -> torch.Tensor:
        similarity = unit(answer(model, **made)) @ self.texts.T
        scale = parameter_of(self.model, "logit_scale").float().cpu().exp()
        if (most := getattr(self.model.config, "max_logit_scale", None)) is not None:  # as in AIMv2
            scale = scale.clamp(1, most)
        # Without SigLIP's bias, which is the same for all labels and so changes no figure.
        return similarity * scale

    def truth(self, labels: Sequence[str | int | None]) -> tuple[list[set[int]], list[str]]:
        numbers: dict[str, set[int]] = {}
        for number, name in enumerate(self.names):
            numbers.setdefault(name, set()).add(number)
        truth = [set() if label is None else numbers.get(_spoken(str(label)), set()) for label in labels]
        return truth, _left_out(truth, "have none of these labels, and are left out of the accuracy")


def _spoken(label: str) -> str:
    """A label's name as it stands in a sentence."""
    return label.replace("_", " ")


class Retrieval(Task):
    """The captions that are most like an image, and the images that are most like a caption."""

    name, hub_name = "retrieval", "image-text-retrieval"

    def prepare(self, images: LabelledImages) -> None:
        if not images.has_captions:
            raise ValueError(
                f"the images have no captions, which {self.name} is about; expected a data set with a column of texts: "
                "name it."
            )
        # Else a tokenizer that does not fit the model would cost the whole run.
        text_features(self.model, self.tokenizer, images.first_captions(TEXTS) or [PROMPT])

    def answer(self, model: Any, made: dict[str, torch.Tensor]) -> torch.Tensor:
        return unit(answer(model, **made))

    def keep(self, found: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
        return {"features": found, "cosine": cosines(found, plain)}

    def of_images(self, made: dict[str, torch.Tensor]) -> dict[str, Any]:
        rows = zip(*made.values(), strict=True)
        return {"image": [hashlib.sha256(b"".join(part.numpy().tobytes() for part in row)).hexdigest() for row in rows]}

    def own(self, kept: Answers) -> tuple[list[dict[str, Figure]], list[str]]:
        by_image = _rows_of(kept.answers[0]["image"])
        captions = [[text for row in rows for text in kept.samples[row].captions] for rows in by_image]
        captioned = [image for image, own in enumerate(captions) if own]
        if not captioned:
            raise ValueError(
                f"none of {len(captions)} images has a caption, which {self.name} is about; expected a column "
                "with a text, or a list of texts, about each image: name it."
            )
        texts = sorted(set(itertools.chain(*captions)))
        numbers = {text: number for number, text in enumerate(texts)}
        of_images = [[numbers[caption] for caption in captions[image]] for image in captioned]
        of_texts: list[list[int]] = [[] for _ in texts]
        for image, own in enumerate(of_images):
            for text in own:
                of_texts[text].append(image)
        features, first = self._encoded(texts), [by_image[image][0] for image in captioned]
        recalls = []
        for answers in kept.answers:
            images = answers["features"][first]
            by_direction = {
                "image_to_text": ranks_of(images, features, of_images),
                "text_to_image": ranks_of(features, images, of_texts),
            }
            recalls.append(
                {
                    f"{name}_recall@{count}": self.share((found < count).tolist(), len(captioned))
                    for name, found in by_direction.items()
                    for count in RECALLED
                }
            )
        remarks = _left_out(captions, "without a caption are left out")
        if len(by_image) < len(kept.samples):
            remarks.append(
                f"{len(kept.samples)} rows show {len(by_image)} images: one in several rows has the captions of all."
            )
        return recalls, remarks

    def _encoded(self, texts: Sequence[str]) -> torch.Tensor:
        """The features of texts, (texts, values), of which each process makes its share."""
        require_told_apart(self.model, self.tokenizer, texts)
        index, processes = place()

        def encoded() -> torch.Tensor:
            share = texts[len(texts) * index // processes : len(texts) * (index + 1) // processes]
            return text_features(self.model, self.tokenizer, share) if share else torch.zeros(0, 1, device="cpu")

        return torch.cat([own for own in gathered(encoded) if len(own)])

    def to_plain(self, answers: dict[str, Any], plain: dict[str, Any]) -> dict[str, Figure]:
        first = [rows[0] for rows in _rows_of(plain["image"])]
        return {"cosine": self.mean(answers["cosine"][first], len(first))}


def _rows_of(images: Sequence[str]) -> list[list[int]]:
    """The rows of each image, of which a data set may have one for each caption."""
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image, []).append(row)
    return list(rows.values())


class Captions(Task):
    """The text that a model writes about an image."""

    name, hub_name = "captions", "image-to-text"
    auto: ClassVar[Any] = AutoModelForImageTextToText

    def prepare(self, images: LabelledImages) -> None:
        if not self.model.can_generate():
            raise ValueError(f"the {type(self.model).__name__} writes no captions; expected a model such as BLIP.")
        if self.model.config.model_type in HOLDERS:
            raise ValueError(
                f"the {type(self.model).__name__} writes about images within a prompt alone; expected a model that "
                "writes captions of images, such as BLIP. Its vision tower may be evaluated by its features."
            )

    def answer(self, model: Any, made: dict[str, torch.Tensor]) -> list[str | None]:
        """As in `Task`; `None` for a caption with a token that was chosen by NaN or infinity."""
        watch = _Watch()
        written = model.generate(
            **made,
            max_new_tokens=self.options["max_new_tokens"],
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([watch]),
        )
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() if finite else None for text, finite in zip(texts, watch.finite(), strict=True)]

    def finite(self, found: list[str | None]) -> list[bool]:
        return [text is not None for text in found]

    def keep(self, found: list[str], plain: list[str]) -> dict[str, Any]:
        return {"text": found}

    def own(self, kept: Answers) -> tuple[list[dict[str, Figure]], list[str]]:
        captions = [sample.captions for sample in kept.samples]
        captioned = [image for image, own in enumerate(captions) if own]
        if not captioned:
            return super().own(kept)
        references = [captions[image] for image in captioned]
        texts = [[answers["text"][image] for image in captioned] for answers in kept.answers]
        remarks = _left_out(captions, "without a caption are left out of token_f1")
        return [{"token_f1": self._f1(written, references)} for written in texts], remarks

    def to_plain(self, answers: dict[str, Any], plain: dict[str, Any]) -> dict[str, Figure]:
        return {
            "same_caption": self.share(are_alike(answers["text"], plain["text"])),
            "plain_f1": self._f1(answers["text"], [(other,) for other in plain["text"]]),
        }

    def _f1(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
        scores = [token_f1(text, others) for text, others in zip(texts, references, strict=True)]
        return self.mean(torch.tensor(scores, dtype=torch.float64, device="cpu"), len(scores))


def _left_out(known: Sequence[Collection[Any]], remark: str) -> list[str]:
    """A list with a sentence about the images of which nothing is known; empty if there are none."""
    others = sum(not own for own in known)
    return [f"{others} images {remark}."] if others else []


class _Watch(LogitsProcessor):
    """Watches the scores by which the tokens of captions are chosen."""

    def __init__(self) -> None:
        self._highest: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._highest.append(scores.amax(dim=-1))  # NaN if there is one; tokens that are ruled out have -inf
        return scores

    def finite(self) -> list[bool]:
        """Whether all tokens of each caption were chosen by finite numbers."""
        return are_finite(torch.stack(self._highest, dim=1))


class Features(Task):
    """The features that a model without a head gives for an image, or the one below a head for labels."""

    name, hub_name = "features", "image-feature-extraction"

    def prepare(self, images: LabelledImages) -> None:
        if self.model.can_generate() and not hasattr(self.model, "get_image_features"):
            raise ValueError(
                f"the {type(self.model).__name__} writes texts and gives no features of images; expected its vision "
                "tower, or another model of images alone."
            )
        if classifies(self.model) and self.model.base_model is self.model:
            raise ValueError(
                f"the {type(self.model).__name__} answers with labels; expected a model of features, such as its "
                "model.vision_model, or the task 'classification'."
            )

    def answer(self, model: Any, made: dict[str, torch.Tensor]) -> torch.Tensor:
        return answer(model.base_model if classifies(model) else model, **made).float().cpu()

    def keep(self, found: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
        return {"cosine": cosines(found, plain)}

    def to_plain(self, answers: dict[str, Any], plain: dict[str, Any]) -> dict[str, Figure]:
        return {"cosine": self.mean(answers["cosine"])}


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, ZeroShot, Retrieval, Captions, Features)}


def task_for(architectures: Sequence[str], model_type: str, images: LabelledImages) -> str:
    """The name of the task that models of an architecture are for.

    Args:
        architectures: names of model classes, as a config has them, or as `class_names` gives them.
        images: by them a model of images and texts is for captions, if they have captions and no labels, or for labels,
            if they have several with names.
    """
    if any("ForImageClassification" in name for name in architectures):
        return Classification.name
    if any("ForConditionalGeneration" in name or "EncoderDecoder" in name for name in architectures):
        return Captions.name
    if model_type in OF_TEXTS:
        if images.has_captions and not images.has_labels:
            return Retrieval.name
        if len(set(map(_spoken, images.label_names or ()))) > 1:
            return ZeroShot.name
    return Features.name


def text_features(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """A model's features of texts, (texts, values) of length 1, float32 on the CPU.

    Raises:
        ValueError: the model answers a text by NaN or infinity.
    """
    parts = []
    for start in range(0, len(texts), TEXTS):
        some = list(texts[start : start + TEXTS])
        output = model.get_text_features(**_tokenized(model, tokenizer, some).to(device_of(model)))
        features = unit(getattr(output, "pooler_output", output))
        require_finite(model, are_finite(features), [shown(text) for text in some])
        parts.append(features)
    return torch.cat(parts)


def require_told_apart(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raises `ValueError` if several different texts all get the same token ids, which make any image alike to all."""
    for start in range(1, len(texts), TEXTS):
        ids = _tokenized(model, tokenizer, [texts[0], *texts[start : start + TEXTS]])["input_ids"]
        if (ids != ids[0]).any():
            return
    other = next((text for text in texts if text != texts[0]), None)
    if other is not None:
        raise ValueError(
            f"the {type(tokenizer).__name__} gives all {len(texts)} texts, such as {shown(texts[0])} and "
            f"{shown(other)}, the same token ids; expected a tokenizer that tells them apart. Give the model's own "
            "by tokenizer=, or texts that do not differ in what it leaves out alone."
        )


def _tokenized(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """What a model's tower for texts takes."""
    # SigLIP was trained on texts of one length.
    padding = "max_length" if model.config.model_type.startswith("siglip") else True
    return tokenizer(texts, padding=padding, truncation=True, max_length=_longest(model), return_tensors="pt")


def _longest(model: Any) -> int:
    """The most tokens of a text that the model has positions for."""
    config = model.config.text_config
    is_roberta = "roberta" in config.model_type or config.model_type == "altclip_text_model"
    # RoBERTa's positions start after that of padding.
    return config.max_position_embeddings - (config.pad_token_id + 1 if is_roberta else 0)


def ranks_of(queries: torch.Tensor, candidates: torch.Tensor, right: Sequence[Sequence[int]]) -> torch.Tensor:
    """As `ranks`, from features, (…, values) of length 1, and the numbers of the candidates `right` for each query."""
    parts = []
    for start in range(0, len(queries), QUERIES):
        similarity = queries[start : start + QUERIES] @ candidates.T
        # For all queries at once it would not fit into memory.
        is_right = torch.zeros(similarity.shape, dtype=torch.bool, device=similarity.device)
        for row, own in enumerate(right[start : start + QUERIES]):
            is_right[row, list(own)] = True
        parts.append(ranks(similarity, is_right))
    return torch.cat(parts)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features, (…, values), scaled to length 1, float32 on the CPU."""
    return torch.nn.functional.normalize(features.float().cpu(), dim=-1)


def require_texts(model: Any) -> None:
    """Raises `ValueError` if a model has no features of texts to compare images with."""
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise ValueError(
            f"the {type(model).__name__} has no tower for texts beside the one for images; expected a model such as "
            "CLIP or SigLIP, as AutoModel loads it."
        )
