"""``Engine``: the purifier for service, as fast as the machine allows; exports for other runtimes."""

from .engine import Engine

__all__ = ["Engine"]
