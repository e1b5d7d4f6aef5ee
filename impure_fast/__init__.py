"""Adversarial purification by information masking (IMPure, arXiv 2311.15339), fast and exact.

    import impure_fast as imp
    purified = imp.load("impure_tiny").purify(images)      # [N, 3, H, W], uint8 or float in [0, 1]

Public names are imported on first use: ``import impure_fast`` itself loads neither torch nor timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .config import IMPureConfig
from .errors import Error

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import ops
    from .checkpoints import LoadReport
    from .draws import Draws
    from .engine import Engine
    from .model import IMPure
    from .ops._dispatch import backend, can_run, last_backends, set_backend
    from .purify import PurifiedClassifier
    from .zoo import create_model, list_models, load, load_official
else:
    _HOMES = {
        "Draws": "draws",
        "Engine": "engine",
        "IMPure": "model",
        "LoadReport": "checkpoints",
        "PurifiedClassifier": "purify",
        "backend": "ops._dispatch",
        "can_run": "ops._dispatch",
        "last_backends": "ops._dispatch",
        "set_backend": "ops._dispatch",
        "create_model": "zoo",
        "list_models": "zoo",
        "load": "zoo",
        "load_official": "zoo",
    }

    def __getattr__(name):
        if name == "ops":
            return import_module(".ops", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module 'impure_fast' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES, "ops"})


__all__ = [
    "Draws",
    "Engine",
    "Error",
    "IMPure",
    "IMPureConfig",
    "LoadReport",
    "PurifiedClassifier",
    "backend",
    "can_run",
    "create_model",
    "last_backends",
    "list_models",
    "load",
    "load_official",
    "ops",
    "set_backend",
]
