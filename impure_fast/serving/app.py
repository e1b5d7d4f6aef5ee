"""The routes of the service, without Ray: limits and checks, then ``Batcher``, ``Engine`` and the classifier.

upload -> limits, type -> decode -> Batcher -> Engine (-> classifier) -> PNG or JSON.
Every refusal of a replica is JSON: {"error": sentence}.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import zoo
from ..engine import Engine
from ..errors import Error, ImageTooLargeError
from ..evaluation.targets import Target, load_target
from ..images import Picture, Pixels, check_max_pixels, decode_image, encode_image
from ..ops._dispatch import last_backends
from ..purify import Tiling, to_float
from .batching import Batcher
from .settings import Settings

logger = logging.getLogger(__name__)

TYPES = ("image/png", "image/jpeg", "image/webp", "application/octet-stream", "multipart/form-data")
FORMATS = ("PNG", "JPEG", "WEBP")
FORM_OVERHEAD = 2**16  # bytes of a form around its file
MAX_SCANS = 100  # of a progressive JPEG: each costs a pass over the picture, for a few bytes


class Metrics:
    """Where the service reports to; this one forgets."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered; status 499: its client had gone."""

    def batch(self, images: int) -> None:
        """So many pictures go through together."""

    def queue(self, requests: int) -> None:
        """So many requests are held now."""


class Service:
    """An engine, a classifier if one is set, and the requests that they hold.

    Loads and warms up when constructed.  Raises Error as ``check_max_pixels``, ``zoo.load``, ``Engine`` and
    ``load_target`` do.
    """

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        check_max_pixels(settings.max_pixels)
        self.settings, self.metrics = settings, metrics or Metrics()
        model = zoo.load(settings.model)
        self.engine, self._config = Engine(model, precision=settings.precision, device=settings.device), model.config
        self.target: Target | None = None
        if settings.classifier is not None:
            self.target = load_target(settings.classifier)
            self.target.model.to(settings.device)
        self.steps: dict[str, Any] = dict(image_step=settings.image_step, feature_step=settings.feature_step)
        self.engine.warmup(**self.steps)
        self.batcher = Batcher(self._run, settings.batch_wait)
        self.held = 0
        self._tiles = 0  # of the pictures that wait or are in work
        self._pace = 0.0  # seconds a tile, of the last batch
        self._lost = ""  # what the device failed with: nothing runs on it in this process any more

    def _run(self, kind: tuple[str, tuple[int, ...], int | None], pictures: list[Pixels]) -> list[Any]:
        """In the engine's thread: purified pictures [H, W, 3], or the answers of /classify."""
        route, _, seed = kind
        began = time.perf_counter()
        self.metrics.batch(len(pictures))
        images = torch.stack([torch.from_numpy(rgb) for rgb in pictures]).permute(0, 3, 1, 2)  # [N, 3, H, W]
        try:
            purified = self.engine.purify(images, seed=seed, **self.steps).permute(0, 2, 3, 1).contiguous().numpy()
        except torch.AcceleratorError as error:
            self._lost = str(error).splitlines()[0]
            raise
        results: list[Any] = list(purified)
        if route == "/classify":
            both = zip(self._classify(pictures), self._classify(results), strict=True)
            results = [{"before": before, "after": after} for before, after in both]
        self._pace = (time.perf_counter() - began) / (len(pictures) * self._tiles_of(*images.shape[2:]))
        return results

    def _classify(self, pictures: list[Pixels]) -> list[dict[str, float]]:
        """Label (the class's number) and confidence (softmax) of each."""
        assert self.target is not None
        prepared = torch.stack([to_float(self.target.prepare(rgb)[None])[0] for rgb in pictures])
        with torch.inference_mode():
            probabilities = self.target.model(prepared.to(self.settings.device)).float().softmax(dim=1)
        confidence, label = (values.tolist() for values in probabilities.max(dim=1))
        return [{"label": n, "confidence": p} for n, p in zip(label, confidence, strict=True)]

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """A place among the requests that are held at once, or 503."""
        self.check_room()
        self.held += 1
        self.metrics.queue(self.held)
        try:
            yield
        finally:
            self.held -= 1
            self.metrics.queue(self.held)

    async def process(self, request: Request, route: str) -> tuple[Picture, Any]:
        """The uploaded picture, and what the engine's thread makes of it."""
        seed = _seed(request.query_params.get("seed"))
        try:
            data = await asyncio.wait_for(_upload(request, self.settings.max_bytes), self.settings.upload_timeout)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"The upload took more than {self.settings.upload_timeout:g} s.") from None
        picture = await asyncio.to_thread(_decode, data, self.settings.max_pixels)
        height, width = picture.rgb.shape[:2]
        size = min(self.settings.batch, max(1, self.settings.max_pixels // (height * width)))
        # A given seed promises the same bits again, and the last bits of a product depend on its rows: so alone.
        kind = (route, picture.rgb.shape, seed)
        with self._weigh(self._tiles_of(height, width)):
            return picture, await self.batcher.submit(kind, picture.rgb, size if seed is None else 1)

    def _tiles_of(self, height: int, width: int) -> int:
        return math.prod(Tiling.of(self._config, height, width).count)

    @contextlib.contextmanager
    def _weigh(self, tiles: int) -> Iterator[None]:
        """A place in the engine's line, or 503 where the answer would come too late anyway."""
        wait, limit = (self._tiles + tiles) * self._pace, self.settings.timeout
        if self._tiles and wait > limit:
            after = {"Retry-After": str(self._wait())}
            raise HTTPException(
                503, f"With what is held this picture would take {wait:.0f} s, the limit {limit:g} s.", after
            )
        self._tiles += tiles
        try:
            yield
        finally:
            self._tiles -= tiles

    def _wait(self) -> int:
        return max(1, math.ceil(self._tiles * self._pace))

    async def purify(self, request: Request) -> Response:
        with self.hold():
            picture, rgb = await self.process(request, "/purify")
            png, _ = await asyncio.to_thread(encode_image, "purified.png", rgb, picture.alpha, picture.profile)
            return Response(png, media_type="image/png")

    async def classify(self, request: Request) -> Response:
        if self.target is None:
            raise HTTPException(404, "This service has no classifier; start it with one (--classifier).")
        with self.hold():
            return JSONResponse((await self.process(request, "/classify"))[1])

    def check_room(self) -> None:
        if self.held >= self.settings.queue:
            raise HTTPException(503, f"{self.held} requests are held, the limit.", {"Retry-After": str(self._wait())})

    def check_health(self) -> None:
        """Raises Error where no batch can be run any more."""
        if not self.batcher.running:
            raise Error("The engine's loop has ended.")
        if self._lost:
            raise Error(f"The device is lost to this process: {self._lost}")

    async def healthz(self, request: Request) -> Response:
        self.check_health()
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        self.check_health()
        self.check_room()
        return JSONResponse({"status": "ready"})

    async def info(self, request: Request) -> Response:
        report = {"version": _version(), "settings": asdict(self.settings), "held": self.held}
        return JSONResponse({**report, "backends": last_backends(), "engine": self.engine.stats()})


def make_app(service: Service) -> Starlette:
    """The ASGI application over ``service``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batcher.start()
        yield  # servers let their requests end before they go on
        await service.batcher.stop()

    def route(path: str, method: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            status = 499  # the client has gone
            try:
                response = await _answer(handler, request, service.settings.timeout)
                status = response.status_code
                return response
            finally:
                service.metrics.request(path, status, time.perf_counter() - began)

        return Route(path, answer, methods=[method])

    return Starlette(
        routes=[
            route("/purify", "POST", service.purify),
            route("/classify", "POST", service.classify),
            route("/healthz", "GET", service.healthz),
            route("/readyz", "GET", service.readyz),
            route("/info", "GET", service.info),
        ],
        exception_handlers={HTTPException: _refusal},
        lifespan=lifespan,
    )


def _version() -> str | None:
    try:
        return version("impure-fast")
    except PackageNotFoundError:  # run from a tree
        return None


async def _refusal(request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _answer(handler: Callable[[Request], Awaitable[Response]], request: Request, timeout: float) -> Response:
    try:
        return await asyncio.wait_for(handler(request), timeout)
    except HTTPException as error:
        return await _refusal(request, error)
    except asyncio.TimeoutError:
        return JSONResponse({"error": f"No answer within {timeout:g} s."}, 504)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    except Exception:
        logger.exception("%s %s failed", request.method, request.url.path)
        return JSONResponse({"error": "The service failed on this request; its log tells why."}, 500)


def _seed(given: str | None) -> int | None:
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or len(given) > 19 or int(given) >= 2**63:
        raise HTTPException(400, "seed: wanted an integer from 0 to 2**63 - 1.")
    return int(given)


async def _upload(request: Request, limit: int) -> bytes:
    """The picture's bytes, from a raw body or the file of a form; HTTPException 400, 413 or 415."""
    kind = request.headers.get("content-type", TYPES[0]).partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise HTTPException(415, f"Content-Type {kind[:80]!r} is not taken; send one of {', '.join(TYPES)}.")
    form = kind == "multipart/form-data"
    chunks = _limited(request, limit + FORM_OVERHEAD * form, limit)
    if not form:
        return b"".join([chunk async for chunk in chunks])
    try:
        fields = await MultiPartParser(request.headers, chunks, max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary
        raise HTTPException(400, f"The form cannot be read: {error}.") from error
    try:
        for value in fields.values():
            if not isinstance(value, str):
                data = await value.read(limit + 1)
                if len(data) > limit:
                    raise _too_many_bytes(limit)
                return data
    finally:
        await fields.close()
    raise HTTPException(400, "The form holds no file; send the picture as one (curl -F image=@picture.png).")


async def _limited(request: Request, most: int, limit: int) -> AsyncGenerator[bytes, None]:
    """The body, until it is longer than ``most``; ``limit``: what the refusal names."""
    declared = request.headers.get("content-length", "0")
    count = int(declared) if declared.isdigit() else 0
    if count > most:
        raise _too_many_bytes(limit)
    count = 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > most:
            raise _too_many_bytes(limit)
        yield chunk


def _too_many_bytes(limit: int) -> HTTPException:
    return HTTPException(413, f"The upload is larger than {limit:,} bytes, the limit.")


def _decode(data: bytes, max_pixels: int) -> Picture:
    """The picture in an upload; HTTPException 400, 413, 415 or 422."""
    if not data:
        raise HTTPException(400, "The upload is empty; send a picture.")
    jpeg = data.startswith(b"\xff\xd8\xff")
    webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    if not (jpeg or webp or data.startswith(b"\x89PNG\r\n\x1a\n")):
        raise HTTPException(415, f"The upload is none of {', '.join(FORMATS)}.")
    if jpeg and data.count(b"\xff\xda") > MAX_SCANS:
        raise HTTPException(422, f"The picture has more than {MAX_SCANS} scans, the limit.")
    try:
        return decode_image(data, "The picture", FORMATS, max_pixels)
    except ImageTooLargeError as error:
        raise HTTPException(413, str(error)) from error
    except Error as error:
        raise HTTPException(422, str(error)) from error
