"""`VWTConfig`, the setting that a user asks for: validated when it is made, written to JSON and read from it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from .checks import checked_statistics, is_number
from .evidence import checked_evidence
from .printable import LONGEST, shown

if TYPE_CHECKING:
    import torch

    from .patches import Patches
    from .plans import Grouped, Kept
    from .vocabulary import VisualVocabulary

CRITERIA = ("variance", "random", "grid")
OUTPUTS = ("compressed", "full")
RECOMMENDED = "gradual"
"""The method that `vwt=True` stands for, with its defaults."""
_MEANT = {"true": True, "false": False, "none": None}
"""Texts that name no vocabulary, and what their writer meant by each."""
_DEEPEST = 8
"""How many lists within each other a field may hold."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a method may ask about the model whose sequences it will shorten."""

    source: str
    """Hub id or folder that the model was loaded from; empty if from nowhere."""
    patch_size: tuple[int, int]
    """Height and width of a patch, in pixels."""
    channels: int
    """Colour channels of its images: 3 for RGB."""
    present: VWTConfig | None = None
    """The setting that it is compressed by already; `None` for a plain model."""
    trusted: bool = True
    """Whether a user wrote the setting. One that a config.json holds may name no folder of this machine."""
    hub_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How `source` is read: `token`, `cache_dir`, `local_files_only`, and its `revision` and `subfolder`."""
    words_folder: str | None = None
    """The name of the folder in `source` that holds the words; `None` for that of a model's words."""
    image_processor: Any = None
    """The image processor that makes the model's images; `None`: the one that lies in `source`."""


@dataclasses.dataclass(frozen=True, repr=False)
class VWTConfig:
    """How a vision transformer's patch sequence is shortened, before its first layer (arXiv 2411.15397) or also later.

    `VWTConfig(method=..., ...)` is an instance of the method's own class in `vwt_hf.methods`, which has the fields that
    the method adds: `IntraConfig`, `InterConfig`, `LocalConfig`, `GradualConfig`, `CoarseConfig` or `GivenConfig`.

    Args:
        method (`str`, default `"intra"`):
            `"intra"` keeps a subset of an image's own patches. `"inter"` replaces patches that are near one word of a
            vocabulary by one token, the average of their embeddings. `"local"` leaves a patch that looks like its
            neighbour to it, which stays as it is and stands for both. `"gradual"`, which `vwt=True` stands for, does so
            and joins alike tokens after some layers. `"coarse"` shows blocks of 2 × 2 patches with little detail at
            half the size, as one patch. `"given"` groups patches as the `patch_words` say that each call of the model
            is given.
        output (`str`, *optional*):
            `"full"`: `last_hidden_state` has its usual length, each patch with the hidden state of its token, so heads
            and decoders that read every patch work and means weigh tokens by their sizes. `"compressed"`: it has
            prefix + kept patches. Default: `"compressed"` for intra with `dropped="discard"`, and for `"given"`
            if words leave patches out; else `"full"`. A value that the setting cannot have is refused.
        proportional_attention (`bool`, default `True`):
            Whether log s is added to the attention logits of a token that stands for s patches, so that it draws as
            much attention as its patches would; under `"gradual"` nine tenths of log s, and under `"coarse"` two
            thirds.
        evidence (`dict`, *optional*):
            Written by `vwt_hf.calibrate`: on how many images the setting was chosen, and what was measured there. It
            says nothing of a setting that is changed afterwards.

    Raises:
        ValueError: a field holds a value that is not allowed; the message names the field, the value and what is.

    Example:
        >>> VWTConfig(keep_ratio=0.7).patches_kept(196)
        137
    """

    usual_exponent: ClassVar[float] = 1
    """`size_exponent` with `proportional_attention`; without, it is 0."""
    chooses_as: ClassVar[str | None] = None
    """The name of another method that finds the same words by the same fields; `None` if none does."""
    beside_choice: ClassVar[frozenset[str]] = frozenset({"evidence", "output", "proportional_attention"})
    """Fields that have no part in which words patches get."""

    statistics: ClassVar[dict[str, bool]] = {}
    """Fields that hold a number for each channel, or `None`, and whether these must be positive."""

    method: str = "intra"
    output: str | None = None
    proportional_attention: bool = True
    evidence: dict[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __new__(cls, /, method: Any = "intra", *args: Any, **fields: Any) -> VWTConfig:
        if cls is VWTConfig:
            from .methods import METHODS

            require_choice("method", method, tuple(METHODS))
            cls = METHODS[method]
            _require_fields(cls, method, fields)
        return object.__new__(cls)

    if TYPE_CHECKING:  # the fields are the method's

        def __init__(self, method: str = ..., **fields: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        from .methods import METHODS

        for name in _field_names(type(self)):
            object.__setattr__(self, name, _without_numpy(getattr(self, name)))
        for name, positive in self.statistics.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, per_channel(name, getattr(self, name), positive=positive))
        require_choice("method", self.method, tuple(METHODS))
        if not isinstance(self, METHODS[self.method]):
            raise ValueError(
                f"VWTConfig.method is {self.method!r}, but the other fields are those of another method; make a "
                f"VWTConfig(method={self.method!r}, ...) of its own."
            )
        if self.output is not None:
            require_choice("output", self.output, OUTPUTS)
        if not isinstance(self.proportional_attention, bool):
            raise ValueError(
                f"VWTConfig.proportional_attention is {shown(self.proportional_attention)}; expected True or False."
            )
        if self.evidence is not None:
            object.__setattr__(self, "evidence", checked_evidence(self.evidence))

    def __repr__(self) -> str:
        return f"VWTConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @property
    def choice(self) -> dict[str, Any]:
        """The method and the fields that decide which words patches get: settings of one choice find the same."""
        fields = self.to_dict().items()
        chosen_by = {name: value for name, value in fields if value is not None and name not in self.beside_choice}
        return chosen_by | {"method": self.chooses_as or self.method}

    @property
    def size_exponent(self) -> float:
        """A token of s patches draws s to this power as much attention as a token of one."""
        return self.usual_exponent if self.proportional_attention else 0

    @property
    def groups(self) -> bool:
        """Whether no patch is left out: each is part of a token, and tokens stand for different numbers of patches."""
        raise NotImplementedError

    @property
    def shortens(self) -> bool:
        """Whether any image may get fewer tokens; if not, the model runs as the plain one."""
        return True

    @property
    def even(self) -> bool:
        """Whether images with the same number of patches have the same number of tokens, in every layer."""
        return False

    @property
    def searches(self) -> bool:
        """Whether it decides by itself what becomes of the patches, so that an image processor may do so."""
        return True

    @property
    def restores(self) -> bool:
        """Whether `last_hidden_state` has a row for every patch of the image, not for every token alone."""
        return self.groups if self.output is None else self.output == "full"

    @property
    def drops(self) -> bool:
        """Whether some patches have no row in `last_hidden_state`."""
        return self.shortens and not self.restores

    def require_sane(self) -> None:
        """Refuses numbers that are valid but make no sense, such as a standard deviation of 1e-30.

        It is called for a setting that is given as a dict, as by a config.json.

        Raises:
            ValueError: the message names the field, the value and what is expected.
        """
        for name, positive in self.statistics.items():
            if getattr(self, name) is not None:
                checked_statistics(f"VWTConfig.{name}", getattr(self, name), positive=positive)

    def prepared(self, model: ModelFacts) -> VWTConfig:
        """The setting with everything it needs to run `model`, such as words that are read from the Hub.

        Raises:
            ValueError: it cannot serve this model.
            OSError: something that it needs cannot be read.
        """
        return self

    def ready(self, name: str) -> Any:
        """A field that `prepared` fills in where it is not given; raises `ValueError` if that has not been done."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"VWTConfig.{name} is None, and is found where a model is compressed; expected a setting that a model "
                "runs by. Take it from one: `from vwt_hf.compress import setting_of`, setting_of(model)."
            )
        return value

    def plan(self, patches: Patches) -> Kept | Grouped | None:
        """Decides which patches of a batch stay, or which become one token; `None`: all stay as they are."""
        raise NotImplementedError

    def patch_words(self, patches: Patches) -> torch.Tensor | None:
        """The word of each patch, as an image processor gives it; `None`: all patches stay as they are.

        The same as `patch_words` of the plan. Methods override it where it can be found without a layout of tokens.

        Returns:
            (batch, patches), int64: as `Kept.patch_words` or `Grouped.patch_words`.
        """
        plan = self.plan(patches)
        return None if plan is None else plan.patch_words(len(patches.pixel_values), patches.count)

    def plan_of(self, patches: Patches, words: torch.Tensor) -> Kept | Grouped:
        """The plan that is told by words of a caller, as `Kept.patch_words` or `Grouped.patch_words` gives them.

        Args:
            words: (batch, patches) int64, −1 for a patch that is left out.

        Raises:
            ValueError: no plan of this setting has such words.
        """
        raise NotImplementedError

    @property
    def repaints(self) -> bool:
        """Whether the setting changes what some patches show, before they are embedded.

        Such a setting also chooses words before patches are embedded (`repainted`), and it `groups`.
        """
        return False

    def repainted(
        self, patches: Patches, words: torch.Tensor | None = None, enlarged: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses the words of the patches and changes the pixels that the model will embed, if the setting `repaints`.

        Args:
            words: (batch, patches) int64: what a caller said becomes of the patches; `None`: the setting chooses.
            enlarged: whether a block is shown at its full size, as for a picture, and not in each of its patches, as
                for the model.

        Returns:
            The words, (batch, patches) int64, for `plan_repainted`; and the changed `patches.pixel_values`, of the
            same shape and dtype.
        """
        raise NotImplementedError

    def plan_repainted(self, patches: Patches, words: torch.Tensor) -> Grouped:
        """The plan that is told by the words of `repainted`, if the setting `repaints`."""
        raise NotImplementedError

    def seen(self, patches: Patches, plan: Kept | Grouped) -> torch.Tensor:
        """What is left of each patch, for pictures: (batch, patches, channels · patch height · patch width).

        Args:
            plan: one that this setting made of these patches.
        """
        return patches.seen(plan)

    def joins(self, layers: int) -> dict[int, float]:
        """After which layers of a model tokens are joined, ascending, and for each the `wanted` of `seek`.

        Args:
            layers: how many the model has. They are counted from 1, and after the last one no tokens are joined.
        """
        return {}

    def seek(self, plan: Grouped, hidden_states: torch.Tensor, wanted: float) -> tuple[torch.Tensor, int | None] | None:
        """Decides which tokens become part of others after a layer of `joins`; `None`: none does.

        Args:
            plan: the one by which the layer ran.
            hidden_states: (sequences, tokens, hidden): what the layer gave.
            wanted: what `joins` says of the layer.

        Returns:
            `into` and `number`, as `Grouped.joined` takes them.
        """
        raise NotImplementedError

    def words_to_save(self) -> VisualVocabulary | None:
        """The words to save beside a model's weights; `None` if there are none, or they are on the Hub."""
        return None

    def is_saved_as(self, vwt: Any) -> bool:
        """Whether `vwt`, of a config, is this setting, wherever its words lie."""
        return isinstance(vwt, dict) and vwt | {"saved_as": None} == self.to_dict() | {"saved_as": None}

    def with_saved(self, saved: dict[str, Any]) -> VWTConfig:
        """This setting of a user, with the fields that it leaves open taken from what the checkpoint was saved with.

        Args:
            saved: the checkpoint's setting, as `to_dict` made it.
        """
        return self

    @classmethod
    def parse(cls, value: Any) -> VWTConfig | None:
        """Reads what users write as `vwt=...`.

        That is a `VWTConfig`, a dict of its fields, `True` (the recommended setting), a vocabulary (its Hub id, its
        folder or itself), or `False` or `None` (no compression, returns `None`).

        Raises:
            ValueError: a field is unknown or its value is not allowed.
            TypeError: `value` is of another type.
        """
        from .methods import METHODS

        value = _without_numpy(value)
        if value is None or value is False:
            return None
        if value is True:
            return VWTConfig(RECOMMENDED)
        if isinstance(value, VWTConfig):
            return value
        if isinstance(value, dict):
            setting = VWTConfig(**{str(name): field for name, field in value.items()})
            setting.require_sane()
            return setting
        if isinstance(value, str) and (value in METHODS or value.lower() in _MEANT) and not os.path.isdir(value):
            instead = _MEANT.get(value.lower(), {"method": value})
            raise ValueError(f"vwt is {shown(value)}, which as text would name a vocabulary; give {instead}.")
        if isinstance(value, str) and value.lstrip().startswith("{") and not os.path.isdir(value):
            raise ValueError(f"vwt is {shown(value)}, a text; give the dict itself, as vwt={{'keep_ratio': 0.5}}.")
        if is_vocabulary(value):
            return VWTConfig(method="inter", vocabulary=value)
        raise TypeError(
            f"vwt is {shown(value)}; expected True, False, None, a VWTConfig, a dict of its fields, or a vocabulary: "
            "its Hub id, its folder or a VisualVocabulary."
        )

    def to_dict(self) -> dict[str, Any]:
        """The setting as a JSON-ready dict; `VWTConfig.parse` reads it back.

        A vocabulary in memory becomes `None`: it is saved beside the weights of a model, and in this process `saved_as`
        names it. `evidence` is left out where there is none.
        """
        fields = {name: getattr(self, name) for name in _field_names(type(self))}
        if self.evidence is None:
            del fields["evidence"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _field_names(method_class: type[VWTConfig]) -> list[str]:
    """The names of the fields that a user gives, and config.json holds."""
    return [field.name for field in dataclasses.fields(method_class) if field.compare]


def _without_numpy(value: Any, depth: int = 0) -> Any:
    """`value` with numbers of numpy, also within lists and tuples, as Python's, which JSON can hold."""
    if type(value).__module__ == "numpy":  # asked by name, as importing numpy takes long
        return value.tolist()
    if type(value) not in (list, tuple):
        return value
    if depth > _DEEPEST:
        raise ValueError(f"a field of VWTConfig holds lists within {depth} lists; expected numbers, or a list of them.")
    return type(value)(_without_numpy(one, depth + 1) for one in value)


def _require_fields(method_class: type[VWTConfig], method: str, fields: dict[str, Any]) -> None:
    """Refuses fields that a method does not have, and says whose they are."""
    from .methods import METHODS

    names = _field_names(method_class)
    name = next((name for name in fields if name not in names), None)
    if name is None:
        return
    owners = [repr(other) for other, other_class in METHODS.items() if name in _field_names(other_class)]
    if owners:
        raise ValueError(
            f"VWTConfig.{name} is {shown(fields[name])}, but method is {method!r}; the field belongs to "
            f"method={' or '.join(owners)}."
        )
    hint = nearest_hint(name, names)
    if name == "patch_size":
        hint = " Image processors alone take patch_size, as a model has its own: leave it out."
    its_own = ", ".join(sorted(names))
    raise ValueError(f"VWTConfig has no field {shown(name)}; the fields of method={method!r} are {its_own}.{hint}")


@contextlib.contextmanager
def naming_file(holder: str, what: str) -> Iterator[None]:
    """Has errors say in which file a setting is (`holder`), and how to load what that file is of without it."""
    try:
        yield
    except (FileNotFoundError, TypeError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"`vwt` {holder}: {error} `vwt=False` loads the plain {what}.") from error


def is_vocabulary(value: object) -> bool:
    """Whether `value` names a vocabulary or is one."""
    if isinstance(value, (str, os.PathLike)):
        return bool(os.fspath(value))
    return hasattr(value, "words") and hasattr(value, "normalized")


def require_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuses a value of `VWTConfig.field` that is none of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        hint = nearest_hint(value, allowed)
        raise ValueError(f"VWTConfig.{field} is {shown(value)}; expected one of {', '.join(map(repr, allowed))}.{hint}")


def per_channel(field: str, values: object, *, positive: bool) -> tuple[float, ...]:
    """The value of `VWTConfig.field`, one number for each colour channel, as floats; refuses anything else."""
    least = sys.float_info.min if positive else -sys.float_info.max
    if not isinstance(values, (list, tuple)) or not values or not all(is_number(value, least) for value in values):
        kind = "positive numbers" if positive else "numbers"
        raise ValueError(f"VWTConfig.{field} is {shown(values)}; expected None or {kind}, one for each channel.")
    return tuple(map(float, values))


def nearest_hint(given: object, allowed: Any) -> str:
    """The sentence "Did you mean ...?" with the allowed word most like the one given; empty if none is like it."""
    near = difflib.get_close_matches(given[:LONGEST], allowed, 1) if isinstance(given, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""
