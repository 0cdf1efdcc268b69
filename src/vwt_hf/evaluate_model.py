"""`evaluate_model`: what shortening changes in a model's answers, measured on a data set, by one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .answers import class_names, on_device, require_finite
from .batch_log import Batch, BatchLog
from .checks import require_seed, require_whole
from .compress import compress_by, restore, setting_of
from .config import RECOMMENDED, VWTConfig, is_vocabulary
from .decoding import UnreadableImage
from .evaluation_tasks import (
    PROMPT,
    RECALLED,
    TASKS,
    Answers,
    Captions,
    Figure,
    Retrieval,
    Task,
    ZeroShot,
    require_texts,
    task_for,
)
from .families import model_of
from .labelled_images import LabelledImages, Sample, open_labelled
from .printable import printable, shown
from .processed_images import one_batch, processed
from .processes import gathered, join, place
from .processors import (
    described_processor,
    load_beside,
    load_tokenizer,
    processor_of,
    require_vocabulary,
    without_words,
)
from .provenance import compression_of, made_with, run_of
from .timing import stopwatch
from .token_count import TokenCount, count_tokens
from .weights import copy_sharing_weights, device_of
from .whole_saves import require_folder

FORMAT = 8
"""Of what `resume` keeps of a run."""
SHOWN: dict[str, tuple[str, int, int]] = {
    "accuracy": ("top-1 %", 100, 2),
    "worst_group": ("worst group %", 100, 2),
    "agreement": ("agree %", 100, 2),
    "kl": ("kl", 1, 4),
    "max_difference": ("max Δ logit", 1, 1),
    **{f"image_to_text_recall@{count}": (f"image→text @{count} %", 100, 2) for count in RECALLED},
    **{f"text_to_image_recall@{count}": (f"text→image @{count} %", 100, 2) for count in RECALLED},
    "token_f1": ("F1 %", 100, 2),
    "same_caption": ("same caption %", 100, 2),
    "plain_f1": ("F1 to plain %", 100, 2),
    "cosine": ("cosine", 1, 4),
}
"""How a table shows a figure: its title, what it is multiplied by, and how many decimals it has."""


@dataclasses.dataclass
class Row:
    """What was measured of a model under one setting."""

    setting: str
    """As a table shows it."""
    vwt: Any
    """The setting, JSON-ready; `None` for the plain model."""
    tokens: float
    """Of an image: the mean over images and layers."""
    seconds: float
    """That its answers took, without reading, in the process that took longest. What a device does once counts, such
    as compiling kernels, and so does the time before a run was resumed, even on another machine."""
    figures: dict[str, Figure]
    """By name. The plain model has none of those that compare with it."""


@dataclasses.dataclass
class Evaluation:
    """What `evaluate_model` measured."""

    model: str
    """Hub id or folder; empty for a model from nowhere."""
    task: str
    dataset: str
    images: int
    """How many were read."""
    unreadable: list[str]
    """Name and reason of each image that was left out."""
    said: list[str]
    """What is unclear about the figures, such as labels that the model does not have."""
    rows: list[Row]
    """The plain model's first."""
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return dataclasses.asdict(self)

    def table(self) -> list[dict[str, Any]]:
        """Rows as people read them, each figure with its 95 % interval in brackets."""
        names = [name for name in SHOWN if any(name in row.figures for row in self.rows)]
        return [
            {"setting": row.setting, "tokens": round(row.tokens, 1)}
            | {SHOWN[name][0]: _cell(row.figures.get(name), *SHOWN[name][1:]) for name in names}
            | {"seconds": round(row.seconds, 1)}
            for row in self.rows
        ]

    def eval_results(
        self, dataset: str | None = None, split: str | None = None, config: str | None = None
    ) -> list[EvalResult]:
        """The figures for the `model-index` of a model's card, one for each setting and figure.

        `huggingface_hub.ModelCardData(model_name=..., eval_results=...)` takes them. A figure of fewer than all
        `images`, such as those with a label or a caption, says `of` how many it is.

        Args:
            dataset: the data set's Hub id or another name; by default its own.
            split, config: of the data set, if it has several.
        """
        name = printable(dataset or self.dataset)
        return [
            EvalResult(
                task_type=TASKS[self.task].hub_name,
                dataset_type=name,
                dataset_name=name,
                dataset_config=config,
                dataset_split=split,
                metric_type=metric,
                metric_name=printable(f"{metric} ({row.setting})"),
                metric_value=round(figure.value, 6),
                metric_args={"tokens": round(row.tokens, 1), "images": self.images, "unreadable": len(self.unreadable)}
                | ({} if figure.count in (None, self.images) else {"of": figure.count})
                | ({} if row.vwt is None else {"vwt": row.vwt})
                | ({} if figure.interval is None else {"interval": [round(end, 6) for end in figure.interval]}),
            )
            for row in self.rows
            for metric, figure in row.figures.items()
        ]


def _cell(figure: Figure | None, scale: int, decimals: int) -> str | None:
    if figure is None:
        return None
    value, *interval = (round(scale * number, decimals) for number in (figure.value, *(figure.interval or ())))
    return f"{value:g} ({interval[0]:g} to {interval[1]:g})" if interval else f"{value:g}"


@torch.no_grad()  # not inference mode: what a module caches meanwhile is used in training later
def evaluate_model(
    model: PreTrainedModel,
    images: Any,
    *,
    vwt: Any = None,
    task: str | None = None,
    image_processor: Any = None,
    tokenizer: Any = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
    groups: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    prompt: str = PROMPT,
    max_new_tokens: int = 30,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures what a model answers plain and under settings: accuracy, agreement, tokens, with 95 % intervals.

    The plain model has a row of its own, without the figures that compare with it.

    Every image is read once, shown to the model under each setting, and forgotten. Images that cannot be read are left
    out and named. Under `accelerate launch`, or in any program of several processes, all have to make this call, each
    takes its share of the images, and all return the same figures (`vwt_hf.processes.join` says how they are joined).

    Args:
        model: of a supported family, plain or compressed; it is not changed.
        images: a folder, whose images' labels are the names of the folders that they lie in; a `datasets.Dataset`; a
            `datasets.IterableDataset`; or what `open_labelled` made of one of them, with the options there in place of
            those here. The images' labels are matched to the model's by name (`config.id2label`), or by number where
            they are bare numbers.
        vwt: a list of settings, each as `from_pretrained(vwt=...)` takes it, or one of them; by default the model's own
            or, if it is plain, `True`.
        task: "classification"; "zero-shot", by the labels' names; "retrieval" of captions by images and images by
            captions; "captions" that the model writes; or "features", how like the plain model's. By default what the
            model is for.
        image_processor, tokenizer: by default those beside the model's checkpoint.
        image_column, label_column, caption_column, group_column: of a data set; by default the first of images and of
            classes, the one called caption or like it, and the labels.
        groups: of a folder: a JSON file with each image's group, by which the worst one is found.
        limit: look at no more than so many, spread evenly; of a stream the first.
        prompt: what a zero-shot classifier reads, the label in place of {}.
        max_new_tokens: of a caption.
        seed: of the intervals.
        resume: a folder for what was measured of each batch, made if it is not there. A run that was cut off goes on
            from it, also with another number of processes if `images` is no stream; batches with an image that could
            not be read are tried again. Another model, other settings or other images are refused: files are compared
            by their names and sizes, links by where they lead, a stream by its first image. Rows of a data set whose
            files have other sizes now are measured again.
        progress: whether to show a bar.

    Raises:
        ValueError: an argument is not valid, the images do not have what the task needs, none can be read, the model
            answers one by NaN or infinity, plain or under a setting, or `resume` holds another run.
        TypeError: `model` is no transformers model, or `images` or a setting is of another type.
        ImportError: a file of a user's own hides `datasets` or `evaluate`, by which labels are judged.
        OSError: `resume` cannot be read or written.

    Example:
        >>> result = evaluate_model(model, "photographs/", vwt=[True, {"keep_ratio": 0.5}])  # doctest: +SKIP
        >>> result.rows[1].figures["agreement"].value, result.rows[1].tokens  # doctest: +SKIP
        (0.985, 153.1)
    """
    model_of(model)
    vwt = _listed(vwt)
    require_options(vwt, batch_size, max_new_tokens, prompt, seed)
    if resume is not None:
        require_folder(resume)
    if task is not None and task not in TASKS:
        raise ValueError(f"task is {shown(task)}; expected one of {', '.join(map(repr, TASKS))}.")
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "caption_column": caption_column,
        "group_column": group_column,
    }
    opened = _opened(images, **columns, groups=groups, limit=limit)
    task_class = TASKS[task or task_for(class_names(model), model.config.model_type, opened)]
    processor = without_words(processor_of(model, image_processor))  # each setting finds its own
    if task_class in (ZeroShot, Retrieval):
        require_texts(model)  # before a tokenizer is looked for, which such a model has none of
    settings = [None, *([setting_of(model) or True] if vwt is None else vwt)]
    models = _copies(model, settings, processor)
    if task_class in (ZeroShot, Retrieval, Captions):
        if tokenizer is None:
            tokenizer = load_beside(model, load_tokenizer, "text tokenizer", "tokenizer=AutoTokenizer")
        else:
            require_vocabulary(tokenizer)
    names = _names(settings, models)
    options = {"prompt": prompt, "max_new_tokens": max_new_tokens, "seed": seed}
    chosen = task_class(models[0], opened, tokenizer, options)
    join(device_of(model))
    comparison = _Comparison(chosen, models, opened, processor, batch_size)
    parts = gathered(lambda: comparison.measured(resume, progress))
    kept, unreadable = _merged([batch for part in parts for batch in part], len(models))
    if not kept.samples:
        raise ValueError(f"no image can be read of {len(unreadable)}: {'; '.join(unreadable[:3]) or 'there are none'}.")
    figures, remarks = chosen.figures(kept)
    return Evaluation(
        model=model.name_or_path or "",
        task=task_class.name,
        dataset=opened.name,
        images=len(kept.samples),
        unreadable=unreadable,
        said=remarks,
        rows=_rows(names, settings, figures, parts),
        machine=_machine(model, len(parts)),
    )


def _rows(
    names: Sequence[str],
    settings: Sequence[Any],
    figures: Sequence[dict[str, Figure]],
    parts: Sequence[Sequence[Batch]],
) -> list[Row]:
    """A row for each setting, from its name, its figures, and the batches of each process."""
    return [
        Row(
            setting=name,
            vwt=json.loads(json.dumps(setting, default=_in_json)),
            tokens=_total([batch.counts[index] for part in parts for batch in part]).mean,
            seconds=max(sum(batch.seconds[index] for batch in part) for part in parts),
            figures=by_name,
        )
        for index, (name, setting, by_name) in enumerate(zip(names, settings, figures, strict=True))
    ]


def _copies(model: PreTrainedModel, settings: Sequence[Any], processor: Any) -> list[PreTrainedModel]:
    """Copies of the model: a plain one for the first setting, `None`, then one under each other setting."""
    plain = restore(copy_sharing_weights(model)).eval()
    models = [plain]
    for setting in settings[1:]:
        parsed: Any = VWTConfig.parse(setting)
        models.append(compress_by(copy_sharing_weights(plain), parsed, trusted=True, image_processor=processor))
    return models


def _listed(vwt: Any) -> list[Any] | None:
    """The settings that `vwt` holds, or is."""
    if vwt is None:
        return None
    if isinstance(vwt, (bool, str, os.PathLike, Mapping, VWTConfig)) or is_vocabulary(vwt):
        return [vwt]
    if isinstance(vwt, Iterable):
        return list(vwt)
    raise TypeError(f"vwt is {shown(vwt)}; expected a setting or a list of settings.")


def _opened(images: Any, **options: Any) -> LabelledImages:
    if not isinstance(images, LabelledImages):
        return open_labelled(images, **options)
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is {shown(value)}, and images is opened; give it to open_labelled.")
    return images


def require_shortening(vwt: Sequence[Any]) -> None:
    """Raises `ValueError` if one of the settings leaves the model plain."""
    for setting in vwt:
        if VWTConfig.parse(setting) is None:
            raise ValueError(
                f"vwt holds {shown(setting)}, which leaves the model plain; leave it out: the plain model is measured "
                "in any case."
            )


def require_options(vwt: Sequence[Any] | None, batch_size: Any, max_new_tokens: Any, prompt: Any, seed: Any) -> None:
    """Refuses options that `evaluate_model` cannot work with, whatever the model and the images are."""
    require_shortening(vwt or ())
    for name, number in {"batch_size": batch_size, "max_new_tokens": max_new_tokens}.items():
        require_whole(name, number)
    require_seed(seed)
    if not isinstance(prompt, str) or prompt.count("{}") != 1:
        raise ValueError(f"prompt is {shown(prompt)}; expected a text with one {{}}, where the label goes.")


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """What is compared, and on which images."""

    task: Task
    models: Sequence[PreTrainedModel]
    """The plain one first."""
    images: LabelledImages
    processor: Any
    batch_size: int

    def measured(self, resume: str | os.PathLike[str] | None, progress: bool) -> list[Batch]:
        """Shows this process's share of the images to all models, except the batches that `resume` has already."""
        index, processes = place()
        log = None if resume is None else BatchLog(Path(resume), index, self._fingerprint())
        before = {} if log is None else log.before
        known = None if log is None else {number: batch.samples for number, batch in before.items()}
        total = None if self.images.total is None else -(-self.images.total // processes)
        hidden = not progress or index > 0
        batches = []
        with (
            contextlib.nullcontext() if log is None else contextlib.closing(log),
            tqdm(total=total, desc="Images", unit="image", disable=hidden, leave=False) as bar,
        ):
            for number, samples in self.images.batches(index, processes, self.batch_size, known):
                batch = before[number] if samples is None else self._batch(number, samples)
                batches.append(batch)
                if log is not None and samples is not None:
                    log.add(batch)
                bar.update(len(batch.samples) + len(batch.unreadable))
        return batches

    def _batch(self, number: int, samples: Sequence[Sample]) -> Batch:
        """What all models answer to a batch of images."""
        read: list[Sample] = []
        made: list[Any] = []
        unreadable: list[str] = []
        for sample in samples:
            try:
                made.append(processed(sample.item, self.processor, sample.name))
                read.append(sample._replace(item=None))
            except UnreadableImage as error:
                unreadable.append(str(error))
        answers: list[dict[str, Any]] = []
        seconds = [0.0] * len(self.models)
        with contextlib.ExitStack() as stack:
            counts = [stack.enter_context(count_tokens(model)) for model in self.models]
            if made:
                names = [sample.name for sample in read]
                answers, seconds = _answers(self.task, self.models, one_batch(made, self.processor), names)
        return Batch(number, read, unreadable, answers, counts, seconds)

    def _fingerprint(self) -> dict[str, Any]:
        """What two evaluations must have in common for one to go on from the other."""
        task, plain = self.task, self.models[0]
        return run_of(
            plain,
            FORMAT,
            settings={str(number): compression_of(model) for number, model in enumerate(self.models)},
            image_processor=described_processor(self.processor),
            tokenizer=_tokenizer_of(task),
            generation=plain.generation_config.to_dict() if isinstance(task, Captions) else None,
            task=task.name,
            options={name: value for name, value in task.options.items() if name != "seed"},
            images=self.images.order(place()[1]),
            batch_size=self.batch_size,
        )


def _answers(
    task: Task, models: Sequence[Any], made: dict[str, torch.Tensor], names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[float]]:
    """What is kept of each model's answers to a batch of images of these names, and the seconds that each took."""
    device = device_of(models[0])
    timed = [stopwatch(functools.partial(task.answer, model, on_device(made, model)), device) for model in models]
    for model, (answers, _) in zip(models, timed, strict=True):
        require_finite(model, task.finite(answers), names)
    plain = timed[0][0]
    kept = [task.keep(answers, plain) for answers, _ in timed]
    kept[0] |= task.of_images(made)
    return kept, [seconds for _, seconds in timed]


def _tokenizer_of(task: Task) -> str | None:
    """The class of a task's text tokenizer, and a hash of its contents, to tell it from others."""
    tokenizer = getattr(task.tokenizer, "tokenizer", task.tokenizer)  # of a processor, its own
    if tokenizer is None:
        return None
    try:
        # Padding and truncation are those of its last call.
        passing = ("padding", "truncation")
        fields = {k: v for k, v in json.loads(tokenizer.backend_tokenizer.to_str()).items() if k not in passing}
    except Exception:  # it has no such backend, or one with a part in Python
        vocabulary = getattr(tokenizer, "get_vocab", None)
        fields = vocabulary() if vocabulary is not None else {"name": getattr(tokenizer, "name_or_path", None)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    return f"{type(tokenizer).__name__} {digest.hexdigest()[:16]}"


def _merged(batches: Sequence[Batch], models: int) -> tuple[Answers, list[str]]:
    """The answers that all processes kept, in the order of the images; and the images that could not be read."""
    batches = sorted(batches, key=lambda batch: batch.number)
    samples = [sample for batch in batches for sample in batch.samples]
    answers = [_joined([batch.answers[index] for batch in batches if batch.samples]) for index in range(models)]
    return Answers(samples, answers), [name for batch in batches for name in batch.unreadable]


def _joined(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in batches[0] if batches else ():
        parts = [batch[name] for batch in batches]
        joined[name] = torch.cat(parts) if isinstance(parts[0], torch.Tensor) else list(itertools.chain(*parts))
    return joined


def _total(counts: Sequence[TokenCount]) -> TokenCount:
    by_layer = [sum(layer) for layer in zip(*(count.by_layer for count in counts), strict=True)]
    return TokenCount(by_layer, sum(count.images for count in counts))


def _machine(model: PreTrainedModel, processes: int) -> dict[str, Any]:
    known = made_with(model) | {"processes": processes, "threads": torch.get_num_threads()}
    names = ("device", "dtype", "attention", "processes", "threads", "torch", "transformers", "vwt_hf")
    return {name: known[name] for name in names}


def fields_of(setting: Any, *, statistics: bool = False) -> dict[str, Any]:
    """The fields that a setting gives a value, `method` first.

    Of a `VWTConfig` these are the fields that differ from the method's defaults, and mean and deviation, which mostly
    come from the image processor, only with `statistics`.
    """
    if setting is True:
        return {"method": RECOMMENDED}
    if isinstance(setting, VWTConfig):
        usual = VWTConfig(setting.method).to_dict()
        left_out = {"evidence", "saved_as", *(() if statistics else setting.statistics)}
        told = {name: value for name, value in setting.to_dict().items() if name not in left_out}
        return {"method": setting.method} | {name: value for name, value in told.items() if value != usual[name]}
    if isinstance(setting, dict):
        method = setting.get("method", None if setting else VWTConfig().method)
        return setting if method is None else {"method": method} | setting
    return {"vocabulary": str(setting)}


def _names(settings: Sequence[Any], models: Sequence[PreTrainedModel]) -> list[str]:
    """Settings as a table shows them. Two that look the same get mean and deviation, or a hash of the words, too.

    Raises:
        ValueError: two are the same.
    """
    names = [name_of(setting) for setting in settings]
    longer = [name_of(setting, statistics=True) for setting in settings]
    names = [longer[i] if names.count(name) > 1 else name for i, name in enumerate(names)]
    words = [compression_of(model)["words"] for model in models]
    names = [
        f"{name}, words {words[i]}" if words[i] and names.count(name) > 1 else name for i, name in enumerate(names)
    ]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"vwt holds {shown(name)} twice; leave one out: their figures could not be told apart.")
    return names


def name_of(setting: Any, *, statistics: bool = False) -> str:
    """A setting as a table shows it, such as "gradual, tolerance 0.03"."""
    if setting is None:
        return "uncompressed"

    def said(name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        several = isinstance(value, (list, tuple))
        return " ".join((name.replace("_", " "), *map(str, value if several else [value])))

    return ", ".join(said(name, value) for name, value in fields_of(setting, statistics=statistics).items())


def _in_json(value: Any) -> Any:
    """As JSON: a setting, or a value in one, that JSON has no type for."""
    return value.to_dict() if isinstance(value, VWTConfig) else str(value)
