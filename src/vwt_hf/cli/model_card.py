"""Writes figures into the `model-index` of a model card. All else in the card stays, to the byte."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index, model_index_to_eval_results

from ..checks import is_int
from ..printable import printable, shown
from ..whole_saves import write_file

if TYPE_CHECKING:
    from ..evaluate_model import Evaluation

_METADATA = re.compile(r"(\s*---(?:\r\n|\r|\n))(.*?)((?:\r\n|\r|\n)---[ \t]*(?:[\r\n].*|\Z))", re.DOTALL)
"""A card in three parts: what is before the metadata that huggingface_hub finds, the metadata, and the rest."""
_INDEX = re.compile("(['\"]?)model-index\\1[ \t]*:")
_MARK = "\ufeff"
"""A byte order mark."""


@dataclasses.dataclass
class ModelCard:
    """A model card: its text in three parts, and what its `model-index` says."""

    before: str
    metadata: str
    after: str
    entry: dict[str, Any]
    """The one entry of the `model-index`: `name` of the model, and `results`."""

    def with_results(self, results: list[dict[str, Any]]) -> str:
        """The card's text with these results as its `model-index`; raises `ValueError` if that alone cannot change."""
        line_end = "\r\n" if "\r\n" in self.before else "\n"
        index = [self.entry | {"results": results}]
        written = _dumped({"model-index": index}).rstrip("\n").replace("\n", line_end)
        begin, end = _place_of_index(self.metadata)
        is_new = begin == end
        if is_new and begin:
            written = line_end + written
        metadata = self.metadata[:begin] + written + self.metadata[end:]
        try:
            is_replaced = (
                _all_but_index(metadata) == _all_but_index(self.metadata)
                and is_new == ("model-index" not in (yaml.safe_load(self.metadata) or {}))
                and _dumped(yaml.safe_load(metadata)["model-index"]) == _dumped(index)
            )
        except yaml.YAMLError:
            is_replaced = False
        if not is_replaced:
            raise ValueError(
                "its metadata is written so that the model-index alone cannot be replaced; write one name a line, "
                "beginning at the left margin"
            )
        return self.before + metadata + self.after


def read_card(file: Path, model: str) -> ModelCard:
    """A model card; if there is no file, a new one of the model of this Hub id or folder.

    Raises:
        ValueError: the file is no model card, or one of several models.
        OSError: it cannot be read.
    """
    name = _model_name(model)
    if not file.exists():
        return ModelCard("---\n", "library_name: vwt-hf", f"\n---\n\n# {name}\n", {"name": name, "results": []})
    text = file.read_bytes().decode("utf-8", "surrogateescape")  # what is not ours may be in any encoding
    text = text.removeprefix(_MARK)  # behind which some versions of huggingface_hub find no metadata
    parts = _METADATA.fullmatch(text)
    if parts is None and text.strip() and file.suffix.lower() != ".md":
        raise ValueError(
            f"{file} is no model card: it has no metadata between lines of ---, and its name does not end in .md. Name "
            "another file."
        )
    before, metadata, after = parts.groups() if parts else ("---\n", "", f"\n---\n{text}")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(metadata)):
            raise ValueError("it names a value by an alias, *, which may make it endless; write the value out")
        known = yaml.safe_load(metadata) or {}
        if metadata.strip() in ("{}", "null", "~"):
            metadata = ""
        if not isinstance(known, dict):
            raise ValueError(f"its metadata is a {type(known).__name__}; expected names with values")
        models = known.get("model-index") or [{"name": name, "results": []}]
        _require_index(models)
        card = ModelCard(before, metadata, after, models[0])
        if len(models) == 1:
            _, results = model_index_to_eval_results(models)
            hash(tuple((result.metric_type, result.metric_name) for result in results))
            card.with_results([{}])  # with others than it has
    except Exception as error:  # YAML has errors of its own
        reason = printable(" ".join(str(error).split()))
        raise ValueError(
            f"{file} is no model card ({reason}); mend what stands between its lines of ---, or name another file."
        ) from error
    if len(models) > 1:  # of which one is this
        raise ValueError(
            f"{file} has figures of {len(models)} models in its model-index, {shown([one['name'] for one in models])}; "
            "expected one model. Name another file."
        )
    return card


def _require_index(models: Any) -> None:
    """Raises `ValueError` unless a `model-index` has the form that the Hub asks for, as far as it is read here."""
    _require_list(models, "its model-index")
    for model in models:
        _require_table(model, "an entry of its model-index", "name", "results")
        _require_list(model["results"], "'results' in its model-index")
        for result in model["results"]:
            _require_table(result, "a result in its model-index", "task", "dataset", "metrics")
            _require_table(result["task"], "a task in its model-index", "type")
            _require_table(result["dataset"], "a dataset in its model-index", "type", "name")
            _require_list(result["metrics"], "'metrics' in its model-index")
            for figure in result["metrics"]:
                _require_table(figure, "a metric in its model-index", "type", "value")
            _require_table(result.get("source") or {}, "a source in its model-index")


def _require_list(there: Any, what: str) -> None:
    if not isinstance(there, list):
        raise ValueError(f"{what} is {shown(there)}; expected a list")


def _require_table(there: Any, what: str, *names: str) -> None:
    if not isinstance(there, dict) or not there.keys() >= set(names):
        among = f", among them {', '.join(names)}" if names else ""
        raise ValueError(f"{what} is {shown(there)}; expected names with values{among}")


def _model_name(model: str) -> str:
    """What a card calls the model of a Hub id or folder."""
    path = Path(model)
    return printable(path.resolve().name if path.name in ("", "..") else path.name) or "model"


def warn_of_another(file: Path, card: ModelCard, model: str) -> None:
    """Warns where a card's `model-index` is of another model than the one of this Hub id or folder."""
    there, name = Path(str(card.entry["name"])).name, _model_name(model)
    if there != name:
        warnings.warn(
            f"{printable(file)} has a model-index of {shown(there)}, and what is measured is {shown(name)}: its "
            "figures go in there, in place of those of the same name. If these are two models, name another file by "
            "--card.",
            stacklevel=2,
        )


def write_card(file: Path, result: Evaluation, split: str | None, config: str | None) -> None:
    """Puts figures into the `model-index` of a model card, in place of those of the same task, data set and name.

    Raises:
        ValueError: as `read_card`; or figures would be replaced by those of other images.
        OSError: it cannot be written.
    """
    card = read_card(file, result.model)
    total = result.images + len(result.unreadable)
    (made,) = eval_results_to_model_index(card.entry["name"], result.eval_results(split=split, config=config))
    (new,) = made["results"]
    require_same_images(card, _subject(new), total, exact=True)
    results = card.entry["results"]
    alike = [entry for entry in results if _subject(entry) == _subject(new)]
    replaced = {_name_of(figure) for figure in new["metrics"]}
    for entry in alike:
        entry["metrics"] = [figure for figure in entry["metrics"] if _name_of(figure) not in replaced]
    if alike:
        alike[0]["metrics"] += new["metrics"]
    else:
        results.append(new)
    text = card.with_results(results)
    write_file(file, text.encode("utf-8", "surrogateescape"))


def require_same_images(card: ModelCard, subject: tuple[Any, ...], total: int | None, exact: bool) -> None:
    """Refuses a card with figures of the same subject and another number of images, which would be replaced.

    Args:
        subject: as `subject_of` gives it.
        total: how many images there are; `None` if that is not known.
        exact: whether `total` is exact; if not, as for a stream that may end before its limit, there may be fewer.
    """
    alike = [entry for entry in card.entry["results"] if _subject(entry) == subject]
    for figure in [figure for entry in alike for figure in entry["metrics"]]:
        args = figure.get("args")
        if total is None or not isinstance(args, dict) or not is_int(args.get("images")):
            continue
        unreadable = args.get("unreadable")
        before = args["images"] + (unreadable if is_int(unreadable) else 0)
        if before != total if exact else before > total:
            raise ValueError(
                f"the card has figures of {before} images of {shown(subject[2])}, and there are {total} now: the old "
                "figures would be replaced. Give the new ones another name by --dataset-name, or remove the old ones."
            )


def subject_of(task: str, dataset: str, split: str | None, config: str | None) -> tuple[Any, ...]:
    """What figures are of, to compare with a card's: a task, as the Hub calls it, and a data set."""
    result = EvalResult(task, dataset, dataset, "", 0, dataset_config=config, dataset_split=split)
    (made,) = eval_results_to_model_index("", [result])
    return _subject(made["results"][0])


def _dumped(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _place_of_index(metadata: str) -> tuple[int, int]:
    """Where the lines of `model-index` begin and end; without one, both are the end of the metadata."""
    lines = metadata.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if _INDEX.match(line)), None)
    if first is None:
        return len(metadata), len(metadata)
    last = first
    for i, line in enumerate(lines[first + 1 :], start=first + 1):
        if line[0] in " \t-" and line.strip():  # a list may begin at the margin, as its name does
            last = i
        elif line[0] not in "#\r\n":
            break
    begin = len("".join(lines[:first]))
    return begin, begin + len("".join(lines[first : last + 1]).rstrip("\r\n"))


def _all_but_index(metadata: str) -> dict[str, Any]:
    """The metadata without `model-index`, all values as texts: a number or date may be written in many ways."""
    # With a line end, which the last line may have or lack.
    fields = yaml.load(f"{metadata}\n", Loader=yaml.BaseLoader) or {}
    return {name: value for name, value in fields.items() if name != "model-index"}


def _subject(result: dict[str, Any]) -> tuple[Any, ...]:
    """What the figures of a result are of, and their source."""
    task, dataset = result["task"], result["dataset"]
    fields = ("type", "name", "config", "split", "revision", "args")
    return (task["type"], task.get("name"), *map(dataset.get, fields), result.get("source"))


def _name_of(figure: dict[str, Any]) -> tuple[str, str | None]:
    return figure["type"], figure.get("name")
