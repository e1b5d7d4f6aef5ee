"""The routes over real sockets, without Ray: results, refusals, limits, batches, shutdown."""

import contextlib
import dataclasses
import io
import random
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from impure_fast import Engine, zoo
from impure_fast.errors import ConfigError, InputError
from impure_fast.images import read_image
from impure_fast.purify import to_float

from .common import (
    PNG,
    Crowd,
    ask,
    besiege,
    decoded,
    encoded,
    form,
    head,
    many_scans,
    mutated,
    pixels,
    png,
    post,
    raw,
    sources,
    zeros,
)

uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("python_multipart", reason="the extra serve is not installed")

from starlette.exceptions import HTTPException  # noqa: E402

from impure_fast.serving.app import Metrics, Service, _decode, make_app  # noqa: E402
from impure_fast.serving.settings import Settings  # noqa: E402


class Brightness(nn.Module):
    """Class 1 where the mean is above a half, at 16 pixels a side."""

    side = 16

    def forward(self, images):
        bright = images.mean(dim=(1, 2, 3))
        return torch.stack((0.5 - bright, bright - 0.5), dim=1) * 10


class Recorded(Metrics):
    def __init__(self):
        self.requests, self.batches, self.queues = [], [], []

    def request(self, route, status, seconds):
        self.requests.append((route, status))

    def batch(self, images):
        self.batches.append(images)

    def queue(self, requests):
        self.queues.append(requests)


@pytest.fixture(scope="module")
def engine(weights):
    return Engine(zoo.load(weights), precision="fp32")


def alone(engine, rgb, seed):
    """What ``Engine.purify`` makes of one picture [H, W, 3]."""
    return engine.purify(torch.from_numpy(rgb).permute(2, 0, 1), seed=seed).permute(1, 2, 0).numpy()


class Running:
    def __init__(self, service):
        self.service = service
        options = dict(port=0, log_level="error", timeout_graceful_shutdown=20)
        self.server = uvicorn.Server(uvicorn.Config(make_app(service), **options))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


@contextlib.contextmanager
def serving(**settings):
    service = Service(Settings(**settings), Recorded())
    running = Running(service)
    try:
        yield running
    finally:
        running.stop()


LIMITS = dict(max_bytes=200_000, max_pixels=20_000, upload_timeout=0.5)


@pytest.fixture(scope="module")
def running(weights):
    with serving(model=weights, classifier=f"{__name__}:Brightness", **LIMITS) as running:
        yield running


@pytest.fixture
def port(running):
    return running.port


@contextlib.contextmanager
def held_back(service):
    """Until the end of the block no batch is run."""
    gate, run = threading.Event(), service.engine.purify
    service.engine.purify = lambda *a, **k: (gate.wait(20), run(*a, **k))[1]
    try:
        yield
    finally:
        gate.set()
        service.engine.purify = run


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.005)


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True})])
def test_a_picture_comes_back_purified(port, engine, format, options, tmp_path):
    body = encoded(pixels(40, 70), format, **options)
    (tmp_path / "a.png").write_bytes(body)
    wanted = alone(engine, read_image(tmp_path / "a.png").rgb, 3)
    for sent in (dict(body=body, kind=f"image/{format.lower()}"), dict(body=body, kind="application/octet-stream")):
        answer = post(port, "/purify?seed=3", **sent)
        assert (answer.status, answer.headers["content-type"]) == (200, PNG)
        assert np.array_equal(decoded(answer.body), wanted)
    answer = post(port, "/purify?seed=3", *form(("note", None, b"hello"), ("image", "a.png", body)))
    assert np.array_equal(decoded(answer.body), wanted)


def test_without_a_seed_every_answer_differs(port):
    body = encoded(pixels(20, 20))
    assert post(port, "/purify", body).body != post(port, "/purify", body).body


def test_colour_profile_comes_through(port):
    body = encoded(pixels(20, 20), icc_profile=b"a profile")
    assert Image.open(io.BytesIO(post(port, "/purify", body).body)).info["icc_profile"] == b"a profile"


def test_more_pixels_than_pillow_opens_are_refused_at_the_start():
    with pytest.raises(InputError, match=r"^max_pixels=1,000,000,000: Pillow opens at most "):
        Service(Settings(max_pixels=10**9))


def test_alpha_comes_through(port):
    rgba = pixels(20, 24, channels=4)
    assert np.array_equal(decoded(post(port, "/purify", encoded(rgba)).body)[:, :, 3], rgba[:, :, 3])


def test_labels_before_and_after(port, engine):
    rgb = pixels(30, 30)
    answer = post(port, "/classify?seed=1", encoded(rgb))
    assert answer.status == 200
    model = Brightness()
    for key, picture in (("before", rgb), ("after", alone(engine, rgb, 1))):
        target = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC))
        wanted = model(to_float(target[None])).softmax(dim=1)[0]
        assert answer.json[key]["label"] == int(wanted.argmax())
        assert answer.json[key]["confidence"] == pytest.approx(float(wanted.max()), abs=1e-6)


def test_health_and_info(port, weights):
    assert ask(port, "GET", "/healthz").json == {"status": "ok"}
    assert ask(port, "GET", "/readyz").json == {"status": "ready"}
    info = ask(port, "GET", "/info").json
    assert info["settings"]["model"] == weights
    assert info["settings"]["max_bytes"] == LIMITS["max_bytes"]
    assert {"count", "p99_ms"} <= info["engine"].keys()


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (dict(body=b"x", kind="text/plain"), 415, "Content-Type 'text/plain' is not taken; send one of image/png, "),
        (dict(body=b"hello"), 415, "The upload is none of PNG, JPEG, WEBP."),
        (dict(body=encoded(pixels(8, 8), "GIF")), 415, "The upload is none of PNG, JPEG, WEBP."),
        (dict(body=b""), 400, "The upload is empty; send a picture."),
        (dict(body=encoded(pixels(8, 8))[:-30]), 422, "The picture is damaged: "),
        (dict(body=bytes(200_001)), 413, "The upload is larger than 200,000 bytes, the limit."),
        (dict(body=png(200, 101, zeros(60000))), 413, "The picture unpacks to 200 x 101 pixels; the limit is 20,000."),
        (dict(body=png(20000, 20000, b"")), 413, "The picture unpacks to more than "),
        (dict(body=many_scans(600)), 422, "The picture has more than 100 scans, the limit."),
        (dict(body=b"x", kind="multipart/form-data"), 400, "The form cannot be read: "),
        (dict(zip(("body", "kind"), form(("a", None, b"x")), strict=True)), 400, "The form holds no file; send the"),
        (dict(zip(("body", "kind"), form(("a", "a", bytes(200_001))), strict=True)), 413, "The upload is larger than"),
    ],
)
def test_refusals_say_why(port, sent, status, message):
    answer = post(port, "/purify", **sent)
    assert (answer.status, answer.error[: len(message)]) == (status, message)


@pytest.mark.parametrize("seed", ["-1", "1.5", "", "x", str(2**63), "١"])
def test_a_bad_seed_is_refused(port, seed):
    from urllib.parse import quote

    answer = post(port, f"/purify?seed={quote(seed)}", encoded(pixels(8, 8)))
    assert (answer.status, answer.error) == (400, "seed: wanted an integer from 0 to 2**63 - 1.")


def test_unknown_paths_and_methods(port, weights):
    assert post(port, "/", b"").status == 404
    assert ask(port, "GET", "/purify").status == 405


def test_no_classifier(weights):
    with serving(model=weights) as running:
        answer = post(running.port, "/classify", encoded(pixels(8, 8)))
        assert (answer.status, answer.error[:31]) == (404, "This service has no classifier;")


def test_a_slow_upload_is_ended(port):
    body = encoded(pixels(8, 8))
    began = time.monotonic()
    assert raw(port, head(len(body) + 1) + body) == 408
    assert 0.5 <= time.monotonic() - began < 5


def test_a_late_answer_is_given_up_and_not_computed(weights):
    with serving(model=weights, timeout=2, batch=1) as running:
        service, body = running.service, encoded(pixels(8, 8))
        with held_back(service):
            threads = [threading.Thread(target=post, args=(running.port, "/purify", body)) for _ in range(3)]
            for thread in threads:
                thread.start()
            until(lambda: service.held == 3)
            until(lambda: service.held == 0)
        for thread in threads:
            thread.join()
        assert post(running.port, "/purify", body).status == 200
        assert service.metrics.requests == [("/purify", 504)] * 3 + [("/purify", 200)]
        assert len(service.metrics.batches) == 2, "a request that was given up was computed"


def test_beyond_the_queue_is_503(weights):
    with serving(model=weights, queue=3) as running:
        service, body = running.service, encoded(pixels(8, 8))
        answers = []
        with held_back(service):
            threads = [
                threading.Thread(target=lambda: answers.append(post(running.port, "/purify", body))) for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            until(lambda: service.held == 3)
            refused = post(running.port, "/purify", body)
            assert (refused.status, refused.error) == (503, "3 requests are held, the limit.")
            assert int(refused.headers["retry-after"]) >= 1
            assert ask(running.port, "GET", "/healthz").status == 200
            assert ask(running.port, "GET", "/readyz").status == 503
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200] * 3
        assert max(service.metrics.queues) == 3 and service.metrics.queues[-1] == 0


def test_what_would_come_too_late_is_503_at_once(weights):
    with serving(model=weights, timeout=30) as running:
        service, small, large = running.service, encoded(pixels(8, 8)), encoded(pixels(200, 200))
        assert post(running.port, "/purify", small).status == 200 and 0 < service._pace < 5
        with held_back(service):
            service._pace = 10.0
            held = threading.Thread(target=post, args=(running.port, "/purify", small))
            held.start()
            until(lambda: service._tiles == 1)
            refused = post(running.port, "/purify", large)
            assert refused.status == 503 and "With what is held this picture would take" in refused.error
            assert int(refused.headers["retry-after"]) == 10
        held.join()
        assert service._tiles == 0 and post(running.port, "/purify", large).status == 200


def test_batches_form_by_size_and_seeds_go_alone(weights, engine):
    with serving(model=weights, batch=4, batch_wait=0) as running:
        service = running.service
        with held_back(service):
            first = threading.Thread(target=post, args=(running.port, "/purify", encoded(pixels(8, 8))))
            first.start()
            until(lambda: service.metrics.batches == [1])
            sent = [("/purify", 20, None), ("/purify", 24, None), ("/purify?seed=5", 20, 5)] * 4
            answers = {}

            def client(i, path, side, seed):
                answer = post(running.port, path, encoded(pixels(side, side, seed=i)))
                answers[i] = (answer.status, decoded(answer.body), side, seed)

            threads = [threading.Thread(target=client, args=(i, *one)) for i, one in enumerate(sent)]
            for thread in threads:
                thread.start()
            until(lambda: len(service.batcher._waiting) == 12)
        for thread in (first, *threads):
            thread.join()
        assert sorted(service.metrics.batches) == [1, 1, 1, 1, 1, 4, 4]
        for i, (status, got, side, seed) in answers.items():
            assert (status, got.shape) == (200, (side, side, 3))
            if seed is not None:
                assert np.array_equal(got, alone(engine, pixels(side, side, seed=i), seed))


def test_a_batch_holds_no_more_pixels_than_one_picture_may(weights):
    with serving(model=weights, batch=4, max_pixels=1000, batch_wait=0.2) as running:
        body = encoded(pixels(20, 20))
        threads = [threading.Thread(target=post, args=(running.port, "/purify", body)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(running.service.metrics.batches) == 2


def test_a_crowd_gets_what_it_asked_for(weights, engine):
    cases = []
    for i, side in enumerate((16, 24, 40)):
        rgb = pixels(side, side, seed=i)
        cases.append((f"/purify?seed={i}", encoded(rgb), alone(engine, rgb, i)))
    with serving(model=weights, queue=8) as running:
        crowd = Crowd().run(running.port, cases, clients=12, seconds=2)
    assert crowd.counts.keys() <= {200, 503} and crowd.counts[200] > 20
    assert crowd.wrong == 0


def test_hostile_requests_leave_it_healthy(weights, engine):
    with serving(model=weights, **LIMITS) as running:
        assert besiege(running.port, range(100), LIMITS["max_bytes"]) == []
        until(lambda: running.service.held == 0)
        rgb = pixels(20, 24)
        assert np.array_equal(decoded(post(running.port, "/purify?seed=1", encoded(rgb)).body), alone(engine, rgb, 1))
        assert 500 not in {status for _, status in running.service.metrics.requests}


def test_the_decoder_refuses_whatever_it_cannot_read():
    chance, statuses = random.Random(0), {}
    for source in sources() * 40:
        try:
            status = _decode(mutated(source, chance), 20_000) and 200
        except HTTPException as error:
            status = error.status_code
        statuses[status] = statuses.get(status, 0) + 1
    assert statuses.keys() == {200, 413, 415, 422} | (statuses.keys() & {400})


def test_a_failing_engine_is_a_500_and_the_service_goes_on(weights, monkeypatch, caplog):
    with serving(model=weights) as running:
        body = encoded(pixels(8, 8))
        with monkeypatch.context() as patch:
            patch.setattr(running.service.engine, "purify", lambda *a, **k: 1 / 0)
            answer = post(running.port, "/purify", body)
        assert (answer.status, answer.error) == (500, "The service failed on this request; its log tells why.")
        assert "ZeroDivisionError" in caplog.text
        assert post(running.port, "/purify", body).status == 200


def test_stopping_answers_what_was_accepted(weights):
    with serving(model=weights, batch=1) as running:
        service, answers = running.service, []
        body = encoded(pixels(8, 8))
        with held_back(service):
            threads = [
                threading.Thread(target=lambda: answers.append(post(running.port, "/purify", body).status))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            until(lambda: service.held == 4)
            running.server.should_exit = True
            time.sleep(0.3)
        for thread in threads:
            thread.join()
        running.thread.join()
        assert answers == [200] * 4


def test_a_lost_device_is_unhealthy(weights, monkeypatch):
    def fail(*args, **options):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with serving(model=weights) as running:
        assert ask(running.port, "GET", "/healthz").status == 200
        monkeypatch.setattr(running.service.engine, "purify", fail)
        assert post(running.port, "/purify", encoded(pixels(8, 8))).status == 500
        assert ask(running.port, "GET", "/healthz").status == 500


def test_a_dead_loop_is_unhealthy(weights):
    with serving(model=weights) as running:
        running.service.batcher._task.get_loop().call_soon_threadsafe(running.service.batcher._task.cancel)
        until(lambda: not running.service.batcher.running)
        assert ask(running.port, "GET", "/healthz").status == 500
        assert ask(running.port, "GET", "/readyz").status == 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(queue=0), "queue=0: wanted an integer of at least 1."),
        (dict(batch="8"), "batch='8': must be int."),
        (dict(timeout=0), "timeout=0: wanted seconds."),
        (dict(batch_wait=float("nan")), "batch_wait=nan: wanted seconds."),
        (dict(image_step=1000), "image_step=1000: wanted an integer from 0 to 999, or none."),
        (dict(size=3), r"Unknown settings \['size'\]; known are \['batch', "),
    ],
)
def test_impossible_settings_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        Settings.of(given)


def test_settings_come_back_from_a_mapping():
    settings = Settings(model="a", queue=3)
    assert Settings.of(dataclasses.asdict(settings)) == settings
