"""The rules by which patches become tokens, by the name that `VWTConfig(method=...)` gives.

A method is a file: a subclass of `VWTConfig` with the method's own fields, their checks, and `plan`. Nothing else in
the package asks which method it is.
"""

from __future__ import annotations

from ..config import VWTConfig
from .coarse import CoarseConfig
from .given import GivenConfig
from .gradual import GradualConfig
from .inter import InterConfig
from .intra import IntraConfig
from .local import LocalConfig

METHODS: dict[str, type[VWTConfig]] = {
    own.method: own for own in (IntraConfig, InterConfig, GivenConfig, LocalConfig, GradualConfig, CoarseConfig)
}
