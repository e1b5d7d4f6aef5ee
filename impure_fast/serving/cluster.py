"""Connecting to Ray."""

from __future__ import annotations

import logging
import os
from typing import Any

from ..errors import BackendError, needs_extra

OBJECT_STORE = 256 * 2**20  # bytes; pictures never lie in it


def first_line(error: Exception) -> str:
    """Ray's errors carry the traceback and the log of another process behind it."""
    return str(error).strip().partition("\n")[0]


def connect(address: str | None, cpus: int | None = None, metrics_port: int | None = None) -> None:
    """Connect to a Ray cluster, or start one on this machine.

    address: of a cluster; "auto" takes one that runs on this machine, or starts one; "local" always starts one.
    cpus: that a new one hands out, None for all; metrics_port: where a new one shows its metrics to Prometheus.
    Raises MissingExtraError or BackendError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    with needs_extra("Ray", "serve"):
        import ray
    own: dict[str, Any] = dict(num_cpus=cpus, object_store_memory=OBJECT_STORE, include_dashboard=False)
    own["_metrics_export_port"] = metrics_port
    attempts: list[dict[str, Any]] = [dict(address=address)]
    if address == "auto":
        attempts.append(dict(address="local", **own))
    elif address == "local":
        attempts = [dict(address="local", **own)]
    for attempt in attempts:
        try:
            ray.init(logging_level=logging.WARNING, **attempt)
            return
        except Exception as error:  # Ray raises many kinds, and bare ones
            reason = first_line(error)
            if not isinstance(error, ConnectionError):  # there is a cluster, and something is wrong with it
                break
    raise BackendError(f"No connection to Ray at {address}: {reason}")
