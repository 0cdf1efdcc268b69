"""`calibrate`: finds a setting for a model on a user's own images, without labels, with evidence."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import statistics
import warnings
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .answers import answer, are_finite, classifies, on_device, require_finite, require_labels
from .attention import is_slow_for_new_lengths
from .checks import is_number, require_seed, require_whole
from .compress import compress, restore
from .config import VWTConfig
from .decoding import UnreadableImage
from .families import family_of, find_tower, model_of
from .figures import cosines, first_answers, mean_interval, share_interval
from .image_source import ImagePart, open_images
from .on_gpu import has_kernels
from .printable import difference, shown
from .processed_images import one_batch, processed
from .processors import processor_of, processor_statistics, without_words
from .provenance import cpu_name, run_of
from .timing import FEWEST_TURNS, count_flops, stopwatch
from .token_count import count_tokens
from .weights import copy_sharing_weights, device_of
from .whole_saves import require_writable, write_file


class Choice(NamedTuple):
    """What a setting is chosen by."""

    method: str
    tolerance: float
    similarity: float

    @property
    def label(self) -> str:
        """The setting, for people to read."""
        return f"{self.method}, tolerance {self.tolerance:g}, similarity {self.similarity:g}"


CHOICES = (
    Choice("gradual", 0.006, 0.84),
    Choice("gradual", 0.01, 0.78),
    Choice("gradual", 0.0136, 0.73),
    Choice("gradual", 0.0165, 0.69),
    Choice("gradual", 0.019, 0.65),
    Choice("gradual", 0.022, 0.61),
    Choice("gradual", 0.025, 0.57),
    Choice("gradual", 0.03, 0.53),
    Choice("gradual", 0.038, 0.47),
    Choice("gradual", 0.052, 0.38),
    Choice("coarse", 0.08, 0.61),
    Choice("coarse", 0.1, 0.5),
)
"""Settings from light to heavy: each usually leaves fewer tokens."""
FEWEST = 50
"""Images: with fewer, the 95 % interval would reach below 0.93 even if all answers agreed."""
MOST = 500
BY = ("time", "flops")
FORMAT = 6
"""Of the files of `resume`."""


@dataclasses.dataclass(frozen=True)
class Level:
    """What a setting costs and gains on the images that it was tried on."""

    method: str
    tolerance: float
    similarity: float
    value: float
    """Share of the images with the plain model's first answer, or mean cosine of the outputs."""
    interval: tuple[float, float]
    """The 95 % interval of `value`."""
    tokens: float
    """Of an image, mean over images and layers, prefix tokens included."""
    of_tokens: float
    """The same for the plain model."""
    speed: float
    """Time, or operations, of the plain model over those of the compressed one."""

    @property
    def choice(self) -> Choice:
        """What the setting was chosen by."""
        return Choice(self.method, self.tolerance, self.similarity)


def calibrate(
    model: PreTrainedModel,
    images: Any,
    *,
    agreement: float | None = None,
    speed: float | None = None,
    tokens: float | None = None,
    image_processor: Any = None,
    batch_size: int = 32,
    by: str = "time",
    seed: int = 0,
    max_images: int = MOST,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> VWTConfig:
    """Finds how far a model may be compressed on a user's own images, by comparing it with itself.

    No labels are needed, and the model stays as it is: `vwt_hf.compress(model, setting)` compresses it. Give exactly
    one target: `agreement`, `speed` or `tokens`. The search is among twelve settings (`CHOICES`), from light to heavy:
    ten of `method="gradual"` and, for the fewest tokens, two of `method="coarse"`.

    Args:
        model: a transformers model of a supported family, plain or compressed, on the device and in the data type that
            it is to run in.
        images: at least 50, like those that the model is for: a folder, a `datasets` data set, or PIL images or paths.
            Those that cannot be read are left out, with a warning.
        agreement: asks for the fastest setting, of those that are tried, with which at least this share of the images,
            in (0, 1], gets the plain model's first answer. For a model without a classifier, at least this mean cosine
            of its output (the image embedding, else the pooled output, else CLS or the mean of the tokens).
        speed: asks for the lightest setting that is at least so many times as fast as the plain model.
        tokens: asks for the lightest setting with at most so many tokens of an image (mean over images and layers,
            prefix tokens included).
        image_processor: the model's; by default that of the checkpoint it was loaded from.
        batch_size: images in one forward pass, also when speed is measured.
        by: how speed is measured: as `"time"` on this machine, in turn with the plain model; or as `"flops"`, floating
            point operations of the first batch.
        seed: of the choice among more images than `max_images`, and of the interval of a mean cosine.
        max_images: most images to look at.
        resume: a JSON file for what was measured, made if it is not there. A search that was cut off goes on from it,
            and one with another target measures nothing twice. With `by="time"` on a CPU, only on the same CPU with as
            many threads.
        progress: whether to show a bar.

    Returns:
        A setting. Its `evidence` says what was measured, on what, and the 95 % interval. It was chosen on the same
        images, so it may do a little worse on others like them.

    Raises:
        ValueError: an argument is not valid, there are too few images, the model is not supported or answers by NaN or
            infinity, plain or shortened, the file to resume is of another search, or no setting reaches the target;
            the message says which comes nearest.
        OSError: `resume` cannot be read or written.
        TypeError: `model` is no transformers model, or `images` no images.

    Example:
        >>> setting = calibrate(model, "photographs/", agreement=0.98)  # doctest: +SKIP
        >>> setting.evidence["value"], setting.evidence["interval"]  # doctest: +SKIP
        (0.985, [0.956834, 0.994886])
    """
    target_of(agreement=agreement, speed=speed, tokens=tokens)  # refused before images are read
    search = Calibration(
        model,
        images,
        image_processor=image_processor,
        batch_size=batch_size,
        by=by,
        seed=seed,
        max_images=max_images,
        resume=resume,
        progress=progress,
    )
    return search.find(agreement=agreement, speed=speed, tokens=tokens)


class Calibration:
    """What settings cost and gain on a user's images. Each is tried when it is first needed.

    Its arguments are those of `calibrate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        images: Any,
        *,
        image_processor: Any = None,
        batch_size: int = 32,
        by: str = "time",
        seed: int = 0,
        max_images: int = MOST,
        resume: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        require_whole("batch_size", batch_size)
        require_whole("max_images", max_images, FEWEST)
        require_seed(seed)
        if by not in BY:
            raise ValueError(f"by is {shown(by)}; expected one of {', '.join(map(repr, BY))}.")
        self._file = None if resume is None else Path(resume)
        if self._file is not None:
            require_writable(self._file.resolve())
        channels = find_tower(model_of(model), family_of(model)).channels
        processor = without_words(processor_of(model, image_processor))  # each setting finds its own
        self.measure = "agreement" if classifies(model) else "cosine"
        if self.measure == "agreement":
            require_labels(model)
        self._by, self._seed, self._progress = by, seed, progress
        # Copies, so that the user's model stays as it is, whatever happens.
        self._plain = restore(copy_sharing_weights(model)).eval()
        _, self._image_std = processor_statistics(processor, channels)
        items, total = _choose(images, seed, max_images)
        named, unreadable = [], []
        with tqdm(items, "Reading images", total, unit="image", disable=not progress) as bar:
            for name, item in bar:
                try:
                    named.append((name, processed(item, processor, name)))
                except UnreadableImage as error:
                    unreadable.append(str(error))
        left_out = (
            f"Of {len(named) + len(unreadable)} images {len(unreadable)} could not be read and were left out. The "
            f"first: {'; '.join(unreadable[:3])}."
        )
        if len(named) < FEWEST:
            advice = f" {left_out} If there are more, raise max_images." if unreadable else ""
            raise ValueError(
                f"images holds {len(named)} images; expected at least {FEWEST}: of fewer that all agree, the 95 % "
                f"interval of agreement would still reach below 92.8 %.{advice}"
            )
        if unreadable:
            warnings.warn(left_out, stacklevel=3)
        self.images, self._batch_size = len(named), min(batch_size, len(named))
        parts = [named[start : start + batch_size] for start in range(0, len(named), batch_size)]
        self._names = [[name for name, _ in part] for part in parts]
        self._batches = [one_batch([pixels for _, pixels in part], processor) for part in parts]
        self._of = self._fingerprint()
        self._tried: dict[Choice, Level] = {}
        if self._file is not None and self._file.exists():
            self._tried = {level.choice: level for level in _read(self._file, self._of)}

    @property
    def tried(self) -> list[Level]:
        """What was tried, from light to heavy."""
        return [self._tried[choice] for choice in CHOICES if choice in self._tried]

    def find(
        self, *, agreement: float | None = None, speed: float | None = None, tokens: float | None = None
    ) -> VWTConfig:
        """As `calibrate`."""
        target, wanted = target_of(agreement=agreement, speed=speed, tokens=tokens)
        with tqdm(
            # At most: some searches end one setting earlier, and some settings are known.
            total=len(CHOICES).bit_length() * self.images,
            desc="Trying settings",
            unit="image",
            disable=not self._progress,
        ) as bar:
            first = bisect.bisect_left(
                CHOICES, True, key=lambda choice: _is_beyond(target, wanted, self._measured(choice, bar))
            )
            bar.total = bar.n
        # All settings from `first` on agree too little, or are fast or short enough.
        reached = [self._tried[choice] for choice in CHOICES[first : first + 1]]
        if target == "agreement":  # of these the heaviest need not be the fastest
            enough = [level for level in self.tried if not _is_beyond(target, wanted, level)]
            reached = sorted(enough, key=lambda level: level.speed)
        if not reached:
            nearest = {
                "agreement": self.tried[0],
                "speed": max(self.tried, key=lambda level: level.speed),
                "tokens": min(self.tried, key=lambda level: level.tokens),
            }[target]
            raise ValueError(self._refusal(target, wanted, nearest))
        best = reached[-1]
        evidence = self._evidence(best, f"{target}={wanted:g}")
        return dataclasses.replace(self._setting(best.choice), evidence=evidence)

    def _setting(self, choice: Choice) -> VWTConfig:
        return VWTConfig(**choice._asdict(), image_std=self._image_std)

    def _measured(self, choice: Choice, bar: Any) -> Level:
        """What a setting costs and gains, measured if it is not known."""
        if choice not in self._tried:
            self._tried[choice] = self._measure(choice, bar)
            if self._file is not None:
                content = {"of": self._of, "levels": [dataclasses.asdict(known) for known in self.tried]}
                write_file(self._file, json.dumps(content, indent=1))
        return self._tried[choice]

    @torch.no_grad()  # not inference mode: what a module caches meanwhile is used in training later
    def _measure(self, choice: Choice, bar: Any) -> Level:
        pair = (self._plain, compress(copy_sharing_weights(self._plain), self._setting(choice)))
        bar.set_postfix_str(choice.label)
        turns = []
        # If kernels are made ready for each shape when it first comes, batches are shown once before they are timed.
        slow_at_first = is_slow_for_new_lengths(device_of(self._plain), self._plain.dtype)
        shows = 2 if self._by == "time" and slow_at_first else 1
        with count_tokens(pair[0]) as of_tokens, count_tokens(pair[1]) as tokens:
            for batch, names in zip(self._batches, self._names, strict=True):
                for _ in range(shows):
                    turn = [_timed(model, batch) for model in pair]
                for model, (answers, _) in zip(pair, turn, strict=True):
                    require_finite(model, are_finite(answers), names)
                turns.append(turn)
                bar.update(len(names))
        expected, found = (torch.cat([turn[which][0] for turn in turns]) for which in (0, 1))
        if self.measure == "agreement":
            values = (first_answers(found) == first_answers(expected)).double()
            interval = share_interval(values.mean().item(), len(values))
        else:
            values = cosines(found, expected).double()
            interval = mean_interval(values, self._seed)
        whole = [turn for turn, names in zip(turns, self._names, strict=True) if len(names) == len(self._names[0])]
        speed = self._speed(pair, [(turn[0][1], turn[1][1]) for turn in whole])
        return Level(*choice, values.mean().item(), interval, tokens.mean, of_tokens.mean, speed)

    def _speed(self, pair: tuple[PreTrainedModel, PreTrainedModel], seconds: list[tuple[float, float]]) -> float:
        """How many times as fast the second model is, from `seconds` of both for each batch as large as the first."""
        if self._by == "flops":
            batch = on_device(self._batches[0], self._plain)
            plain, short = (count_flops(functools.partial(answer, model, **batch)) for model in pair)
            return plain / short
        again = itertools.cycle(self._batches[: len(seconds)])  # the last, of fewer images, left out
        more = itertools.islice(again, max(0, FEWEST_TURNS - len(seconds)))
        seconds = seconds + [(_timed(pair[0], batch)[1], _timed(pair[1], batch)[1]) for batch in more]
        # The median of the turns' own ratios: a first call, or bursts of other work on the machine, hardly move it.
        return statistics.median(plain / short for plain, short in seconds)

    def _evidence(self, level: Level, target: str) -> dict[str, Any]:
        return {
            **level.choice._asdict(),
            "images": self.images,
            "measure": self.measure,
            "value": round(level.value, 6),
            "interval": [round(end, 6) for end in level.interval],
            "tokens": round(level.tokens, 1),
            "of_tokens": round(level.of_tokens, 1),
            "speed": round(level.speed, 3),
            "by": self._by,
            "target": target,
            **{name: self._of[name] for name in ("batch_size", "device", "dtype", "attention", "seed", "threads")},
            **{name: self._of[name] for name in ("vwt_hf", "transformers", "torch")},
        }

    def _refusal(self, target: str, wanted: float, nearest: Level) -> str:
        low, high = nearest.interval
        # Rounded away from the target, which it would seem to reach otherwise.
        value = f"{self.measure} {_below(nearest.value, 4):.4f} (95 % interval {_below(low, 4):.4f} to {high:.4f})"
        reached, ask, possible = {
            "agreement": (
                f"reaches {value}",
                f"agreement={_below(nearest.value, 3):g} at most",
                nearest.value >= 0.001,
            ),
            "speed": (
                f"is {_below(nearest.speed, 2):.2f} times as fast, with {value}",
                f"speed={_below(nearest.speed, 2):g} at most",
                nearest.speed >= 1,
            ),
            "tokens": (
                f"leaves {-_below(-nearest.tokens, 1):.1f} of {nearest.of_tokens:g} tokens, with {value}",
                f"tokens={math.ceil(nearest.tokens)} at least",
                True,
            ),
        }[target]
        # A target that makes nothing faster, or keeps nothing, would be refused.
        advice = f"Ask for {ask}, or leave the model plain." if possible else "Leave the model plain."
        return (
            f"{target} is {wanted:g}, and the nearest setting that was tried ({nearest.choice.label}) {reached} on "
            f"{self.images} images. {advice}"
        )

    def _fingerprint(self) -> dict[str, Any]:
        """What two searches must have in common for one to go on from the other."""
        pixels = hashlib.sha256()
        for batch in self._batches:
            for _, values in sorted(batch.items()):
                pixels.update(values.contiguous().numpy().tobytes())
        device = device_of(self._plain)
        is_timed_on_cpu = self._by == "time" and device.type == "cpu"
        return run_of(
            self._plain,
            FORMAT,
            images=f"{self.images} {pixels.hexdigest()[:16]}",
            batch_size=self._batch_size,
            by=self._by,
            seed=self._seed,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            processor=cpu_name() if is_timed_on_cpu else None,
            threads=torch.get_num_threads() if is_timed_on_cpu else None,
            kernels=has_kernels(device) if self._by == "time" else None,
        )


def _below(value: float, decimals: int) -> float:
    """A number rounded down to so many decimals."""
    return float(Decimal(str(value)).quantize(Decimal(10) ** -decimals, ROUND_FLOOR))  # 0.57 · 100 is below 57


def target_of(**targets: float | None) -> tuple[str, float]:
    """The name and value of the target; raises `ValueError` unless there is one alone, with a value that is allowed."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        said = " and ".join(f"{name} is {shown(value)}" for name, value in given.items()) or "no target is given"
        raise ValueError(f"{said}; expected exactly one of {', '.join(targets)}.")
    ((name, value),) = given.items()
    least, most = {"agreement": (0.0, 1.0), "speed": (1.0, math.inf), "tokens": (1.0, math.inf)}[name]
    if not is_number(value, least) or value > most or value == 0:
        allowed = {"agreement": "a share in (0, 1]", "speed": "a ratio from 1 on", "tokens": "a number from 1 on"}[name]
        raise ValueError(f"{name} is {shown(value)}; expected {allowed}.")
    return name, value


def _is_beyond(target: str, wanted: float, level: Level) -> bool:
    """Whether a setting agrees too little, or is fast or short enough. If so, (nearly) all heavier ones are, too."""
    if target == "agreement":
        return level.value < wanted
    return level.speed >= wanted if target == "speed" else level.tokens <= wanted


def _choose(images: Any, seed: int, most: int) -> ImagePart:
    """At most `most` images, chosen by `seed`."""
    if isinstance(images, Sequence) and not isinstance(images, str):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu")[:most]
        return ImagePart(((f"image {i}", images[i]) for i in order.tolist()), len(order))
    return open_images(images, seed=seed).part(max_images=most)


def _timed(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Answers to a batch, (images, values) float32 on the CPU, and the seconds that they took."""
    answers, seconds = stopwatch(functools.partial(answer, model, **on_device(batch, model)), device_of(model))
    return answers.float().cpu(), seconds


def _read(file: Path, of: dict[str, Any]) -> list[Level]:
    """The settings that an earlier search tried; raises `ValueError` if the file is damaged, or of another search."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        earlier = content["of"]
        different = difference({name: earlier.get(name) for name in of}, of)
        levels = [] if different else [_level(row) for row in content["levels"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is no file of a search ({error}), which `resume` alone writes; name another file, or delete it."
        ) from error
    if different:
        raise ValueError(f"{file} is of another search ({different}); name another file, or delete it to start again.")
    return levels


def _level(row: dict[str, Any]) -> Level:
    """What was tried, from JSON; raises `ValueError` if the figures are impossible."""
    level = Level(**row | {"interval": tuple(row["interval"])})
    numbers = (level.tokens, level.of_tokens, level.speed, level.tolerance, *level.interval, level.value)
    are_numbers = len(level.interval) == 2 and all(map(is_number, numbers))
    if not are_numbers or min(numbers[:3]) <= 0 or abs(level.value) > 1.001:
        raise ValueError(f"these are no figures of a setting: {shown(row)}")
    return level
