"""Measure how much of its training data a vision encoder remembers: déjà vu memorization, with cheap references.

From Python:

    import dejavu_exp

    found = dejavu_exp.measure("model=clip_vitb32", "reference=naive_bayes", out="outputs/mine")
    print(found.verdict, found.corrected_gap)

What `__all__` names is the public API; everything else may change between two versions.
"""

import importlib
from typing import TYPE_CHECKING

from dejavu_exp.errors import ConfigError, DataError, DejavuError, WeightsError

if TYPE_CHECKING:
    from dejavu_exp.api import Measurement, measure
    from dejavu_exp.tables import Estimate

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DataError",
    "DejavuError",
    "Estimate",
    "Measurement",
    "WeightsError",
    "__version__",
    "measure",
]

_HOMES = {"Estimate": "dejavu_exp.tables", "Measurement": "dejavu_exp.api", "measure": "dejavu_exp.api"}
"""Imported when they are first asked for: what they need takes seconds, and `--help` must not."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
