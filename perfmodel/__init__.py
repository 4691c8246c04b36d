"""perfmodel: an analytical roofline and cost model for large language models.

Verbs are imported on first use, so that ``import perfmodel`` stays cheap:

    perfmodel.estimate(model="llama-3.1-8b", hardware="h100-sxm", batch=16, isl=1024, osl=256)
    perfmodel.Estimator(model="llama-3.1-8b", hardware="h100-sxm").decode(batch, context)
    perfmodel.plan("examples/azure-chat-70b.yaml")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "estimate": "perfmodel.estimates",
    "Estimator": "perfmodel.estimator",
    "plan": "perfmodel.planner.run",
    "load_model": "perfmodel.catalog",
    "load_hardware": "perfmodel.catalog",
}

__all__ = ["Estimator", "__version__", "estimate", "load_hardware", "load_model", "plan"]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'perfmodel' has no attribute {name!r}")
