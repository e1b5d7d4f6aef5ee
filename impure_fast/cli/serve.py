"""``impure-fast serve``."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..serving.settings import Settings
from .common import Device, FeatureStep, ImageStep, Model, Precision, check_device, own_modules, say

DEFAULTS = Settings()


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="For Prometheus: /metrics.")] = 8001,
    replicas: Annotated[int, typer.Option(min=1, help="Processes, each with the model; with cuda, a GPU each.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="A replica; unset: the CPUs shared out.")] = None,
    model: Model = DEFAULTS.model,
    precision: Precision = "fp32",
    device: Device = DEFAULTS.device,
    image_step: ImageStep = None,
    feature_step: FeatureStep = None,
    classifier: Annotated[str | None, typer.Option(help="For /classify; a name of evaluate's, or NAME=FILE.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of one size that go through together.")] = DEFAULTS.batch,
    batch_wait: Annotated[
        float, typer.Option(min=0, help="Seconds that a picture waits for others.")
    ] = DEFAULTS.batch_wait,
    queue: Annotated[int, typer.Option(min=1, help="Requests a replica holds; the next gets 503.")] = DEFAULTS.queue,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of an upload.")] = DEFAULTS.max_bytes,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture.")] = DEFAULTS.max_pixels,
    upload_timeout: Annotated[float, typer.Option(help="Seconds for the upload.")] = DEFAULTS.upload_timeout,
    timeout: Annotated[float, typer.Option(help="Seconds for the whole answer.")] = DEFAULTS.timeout,
) -> None:
    """Purify over HTTP: POST a picture to /purify; Ctrl-C answers what was accepted and ends.

    docs/serving.md tells of the routes, the limits and of many machines.
    """
    given: dict[str, Any] = dict(model=model, precision=precision, device=device)
    given |= dict(image_step=image_step, feature_step=feature_step, classifier=classifier)
    given |= dict(batch=batch, batch_wait=batch_wait, queue=queue, max_bytes=max_bytes, max_pixels=max_pixels)
    settings = Settings(**given, upload_timeout=upload_timeout, timeout=timeout)
    _check(settings, host, port, metrics_port)

    from ..serving.cluster import connect

    threads = threads or max(1, (os.cpu_count() or 1) // replicas)
    connect("local", cpus=max(replicas * threads, os.cpu_count() or 1), metrics_port=metrics_port)
    from ..serving import deployment

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    deployment.start(deployment.application(settings, replicas, threads), host, port)
    say(f"purifying at http://{host}:{port}/purify, metrics at :{metrics_port}/metrics; Ctrl-C ends.")
    stop.wait()
    say("answering what was accepted.")
    deployment.stop()


def _check(settings: Settings, host: str, port: int, metrics_port: int) -> None:
    """What would otherwise fail far from here, in a replica, with a traceback."""
    from .. import zoo
    from ..engine import Engine

    check_device(settings.device)
    Engine(zoo.load(settings.model), precision=settings.precision, device=settings.device)
    if settings.classifier is not None:
        from ..evaluation.targets import load_target

        own_modules()
        load_target(settings.classifier)
    if port == metrics_port:
        raise InputError(f"--port and --metrics-port are both {port}; they must differ.")
    for at, number, option in ((host, port, "--port"), ("", metrics_port, "--metrics-port")):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((at, number))
            except OSError as error:
                said = f"{at}:{number} cannot be listened at: {error.strerror}; choose another {option}."
                raise InputError(said) from error
