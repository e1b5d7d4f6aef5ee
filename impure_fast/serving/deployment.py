"""The service on Ray Serve: ``application`` for ``impure-fast serve``, ``build`` for config files."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve
from ray.serve import metrics
from starlette.applications import Starlette

from ..errors import BackendError
from .app import Metrics, Service, make_app
from .cluster import first_line
from .settings import Settings

NAME = "impure-fast"
SECONDS: list[float] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
SIZES: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]


class RayMetrics(Metrics):
    """Metrics of one replica; every node of Ray shows its own to Prometheus, under names with ``ray_`` in front."""

    def __init__(self) -> None:
        both: Any = ("route", "status")  # Ray annotates a tuple of one
        self._requests = metrics.Counter("impure_fast_requests", description="Requests answered.", tag_keys=both)
        self._seconds = metrics.Histogram(
            "impure_fast_request_seconds", description="Time to answer.", boundaries=SECONDS, tag_keys=("route",)
        )
        self._batch = metrics.Histogram(
            "impure_fast_batch_images", description="Pictures of one call of the engine.", boundaries=SIZES
        )
        self._queue = metrics.Gauge("impure_fast_queue", description="Requests held now.")

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def batch(self, images: int) -> None:
        self._batch.observe(images)

    def queue(self, requests: int) -> None:
        self._queue.set(requests)


@serve.deployment
@serve.ingress()
class Purifier:
    """A replica."""

    def __init__(self, settings: Settings) -> None:
        self._service = Service(settings, RayMetrics())

    def __serve_build_asgi_app__(self) -> Starlette:
        return make_app(self._service)

    def check_health(self) -> None:
        self._service.check_health()


def application(settings: Settings, replicas: int = 1, threads: int = 1) -> serve.Application:
    """The service in so many replicas of so many CPU threads each and, on CUDA, of one GPU."""
    gpus = {"num_gpus": 1} if settings.device.startswith("cuda") else {}
    # A replica itself refuses what is too much, with a sentence; Ray's own limits only bound what may come at once.
    most = 4 * settings.queue + 64
    purifier: Any = Purifier  # Ray's annotation of the decorator hides that it gives a deployment
    return purifier.options(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": threads, **gpus},
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config={"retry_after_s": 1},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.timeout + 10,
    ).bind(settings)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a config file, whose ``args`` are fields of ``Settings``.

    What the file sets for the deployment Purifier (num_replicas, ray_actor_options, ...) goes before what is set here.
    """
    return application(Settings.of(args))


def start(application: serve.Application, host: str, port: int) -> None:
    """Serve on the cluster that Ray is connected to; returns once the replicas are ready.  Raises BackendError."""
    quiet = {"log_level": "WARNING"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)
        serve.run(application, name=NAME, logging_config=quiet)
    except RuntimeError as error:
        raise BackendError(f"The service did not start: {first_line(error)} Ray's log above tells why.") from error


def stop() -> None:
    """Take no more, answer what was accepted, end."""
    serve.delete(NAME)
    serve.shutdown()
