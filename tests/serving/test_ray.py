"""The service and the bulk command on a real Ray of their own: load, killed processes, hostile clients, the end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from impure_fast import Engine, zoo

from .common import Crowd, ask, besiege, decoded, encoded, pixels, post

pytest.importorskip("ray", reason="the extra serve is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LOAD_SECONDS = 120
CLIENTS = 32
MOST = 200_000  # bytes of an upload


def processes(root):
    """{pid: command line} of all that descend from a process."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles[pid] for pid in found if pid in titles}


def named(root, name):
    return sorted(pid for pid, title in processes(root).items() if name in title)


def resident(pid):
    """MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def environment():
    """Of a Ray that meets no other one on this machine; its sockets' names must be short."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        yield {**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(line, environment, log, sign):
    """The process, in a group of its own, once its log shows the sign."""
    for _ in range(4):  # Ray gives itself 30 s to start, which a busy machine may exceed
        with open(log, "w") as file:
            options = dict(cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            process = subprocess.Popen([str(part) for part in line], **options)
        until(lambda process=process: sign in log.read_text() or process.poll() is not None)
        if process.poll() is None:
            return process
    return pytest.fail(log.read_text())


class Served:
    """``impure-fast serve``."""

    def __init__(self, environment, log, *options):
        self.port, self.metrics_port, self.log = free_port(), free_port(), log
        ports = ("--port", self.port, "--metrics-port", self.metrics_port)
        line = [sys.executable, "-m", "impure_fast.cli", "serve", *ports, *options]
        self.process = started(line, environment, log, "purifying at")

    def replicas(self):
        return named(self.process.pid, "ray::ServeReplica")

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
        try:
            return self.process.wait(120)
        finally:
            for pid in processes(self.process.pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def served(environment, tmp_path_factory):
    limits = ("--queue", 12, "--max-bytes", MOST, "--max-pixels", 20_000, "--upload-timeout", 2)
    options = (*limits, "--replicas", 2, "--threads", 1)
    served = Served(environment, tmp_path_factory.mktemp("served") / "log", *options)
    yield served
    assert served.end() == 0, served.log.read_text()


@pytest.fixture(scope="module")
def cases():
    """(path, body, pixels wanted) of pictures that go through in one tile or several."""
    model = zoo.load("impure_tiny")
    engine, found = Engine(model, precision="fp32"), []
    for i, side in enumerate((8, 16, 24, 70)):
        rgb = pixels(side, side, seed=i)
        image = torch.from_numpy(rgb).permute(2, 0, 1)
        wanted = engine.purify(image, seed=i)
        assert (wanted.int() - model.purify(image, seed=i).int()).abs().max() <= 1
        found.append((f"/purify?seed={i}", encoded(rgb), wanted.permute(1, 2, 0).numpy()))
    return found


def test_load(served, cases):
    sizes = {}

    def watch():  # every second, since what is in work at a moment comes and goes
        time.sleep(LOAD_SECONDS / 4)
        watched = served.replicas() + named(served.process.pid, "ray::ProxyActor")
        for _ in range(int(LOAD_SECONDS * 0.7)):
            for pid in watched:
                sizes.setdefault(pid, []).append(resident(pid))
            time.sleep(1)

    unseeded = [("/purify", body, wanted.shape) for _, body, wanted in cases]  # which may go through together
    crowd = Crowd().run(served.port, cases + unseeded, CLIENTS, LOAD_SECONDS, watch)
    peaks = {pid: [max(half) for half in np.array_split(found, 2)] for pid, found in sizes.items()}
    print(crowd.counts, peaks)
    assert crowd.counts.keys() == {200, 503}, crowd.counts

    def several_at_once():  # Ray's sum of a histogram is made of the middles of its buckets
        shown = [line for line in metrics(served) if "ray_impure_fast_batch_images_" in line and line[0] != "#"]
        alone, all_calls = (
            sum(float(line.rpartition(" ")[2]) for line in shown if sign in line) for sign in ('le="1.0"', "_count{")
        )
        return alone < all_calls

    until(several_at_once, 60)
    assert crowd.wrong == 0
    assert len(peaks) == 3 and all(after < before + 40 for before, after in peaks.values()), peaks


def metrics(served):
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics_port}/metrics") as page:
        return page.read().decode().splitlines()


def test_metrics(served, cases):
    for path, body, _ in cases:
        assert post(served.port, path, body).status == 200

    def shown():
        text = "\n".join(metrics(served))
        names = ("requests_total", "request_seconds_bucket", "batch_images_bucket", "queue")
        return all(f"ray_impure_fast_{name}{{" in text for name in names) and 'route="/purify"' in text

    until(shown, 60)


def test_a_killed_replica_loses_only_what_it_held(served, cases):
    killed = []

    def kill():
        time.sleep(3)
        os.kill(served.replicas()[0], signal.SIGKILL)
        killed.append(time.monotonic())

    crowd = Crowd().run(served.port, cases, 8, 25, kill)
    lost = {status: count for status, count in crowd.counts.items() if status not in (200, 503)}
    print(crowd.counts, [round(at - killed[0], 2) for at in crowd.failed_at])
    assert crowd.wrong == 0
    assert all(500 <= status < 600 for status in lost)
    assert 1 <= sum(lost.values()) <= 8, "a client has one request under way"
    assert all(at - killed[0] < 5 for at in crowd.failed_at)
    until(lambda: len(served.replicas()) == 2)
    path, body, wanted = cases[0]
    assert np.array_equal(decoded(post(served.port, path, body).body), wanted)


def test_a_thousand_hostile_requests_leave_it_healthy(served, cases):
    before = served.replicas()
    wrong = besiege(served.port, range(1000), MOST)
    assert wrong == []
    assert served.replicas() == before, "a replica was replaced"
    assert ask(served.port, "GET", "/healthz").status == 200
    until(lambda: ask(served.port, "GET", "/info").json["held"] == 0, 30)
    for path, body, wanted in cases:
        assert np.array_equal(decoded(post(served.port, path, body).body), wanted)


def test_the_end_answers_what_was_accepted(served):
    body, statuses = encoded(pixels(140, 140)), []
    threads = [
        threading.Thread(target=lambda: statuses.append(post(served.port, "/purify", body).status)) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    until(lambda: sum(ask(served.port, "GET", "/info").json["held"] for _ in range(4)) >= 4, 30)
    assert served.end() == 0
    for thread in threads:
        thread.join()
    assert statuses == [200] * 12


def purify(environment, *arguments, during=lambda process: None):
    """(stdout, stderr) of the command; during: called beside it."""
    line = [sys.executable, "-m", "impure_fast.cli", "purify", *map(str, arguments)]
    for _ in range(4):  # as above
        process = subprocess.Popen(line, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=-1)
        during(process)
        text, errors = process.communicate()
        if "timed out during startup" not in errors:
            break
    return text, errors


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_cluster_writes_what_the_local_command_writes(environment, tmp_path):
    count, source = 2000, tmp_path / "in"
    source.mkdir()
    for i in range(count):
        Image.fromarray(pixels(8, 8, seed=i)).save(source / f"{i:04}.png")
    (source / "broken.png").write_bytes(b"no picture")
    all_threads = {key: value for key, value in environment.items() if key != "OMP_NUM_THREADS"}
    text, errors = purify(all_threads, source, "-o", tmp_path / "local", "--seed", 1)
    assert text.startswith(f"purified {count}, skipped 0, failed 1; "), errors

    target, killed = tmp_path / "cluster", []

    def kill(process):
        until(lambda: process.poll() is not None or (target.is_dir() and len(os.listdir(target)) > count // 4), 900)
        if process.poll() is None:
            workers = named(process.pid, "ray::MapWorker")
            assert len(workers) == 2, processes(process.pid)
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])

    on_ray = (source, "-o", target, "--seed", 1, "--ray", "auto", "--workers", 2)
    text, errors = purify(environment, *on_ray, during=kill)
    assert killed, errors
    summary = f"purified {count}, skipped 0, failed 1; "
    assert [line for line in text.splitlines() if line.startswith(summary)], text + errors  # Ray speaks of the dead
    assert f"{source / 'broken.png'} is not an image of a known kind" in errors
    assert contents(target) == contents(tmp_path / "local")

    for name in ("0000.png", "1999.png"):
        (target / name).unlink()
    text, errors = purify(environment, *on_ray)
    assert f"purified 2, skipped {count - 2} " in text, errors
    assert contents(target) == contents(tmp_path / "local")


def test_the_config_file_runs(environment, tmp_path, cases):
    port, log = free_port(), tmp_path / "log"
    text = (ROOT / "docs" / "serving.yaml").read_text()
    for old, new in (("port: 8000", f"port: {port}"), ("num_replicas: 4", "num_replicas: 1")):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "serving.yaml").write_text(text)
    line = [Path(sys.executable).parent / "serve", "run", tmp_path / "serving.yaml"]
    process = started(line, environment, log, "Submitted deploy config successfully")

    def ready():
        with contextlib.suppress(OSError):
            return ask(port, "GET", "/readyz").status == 200

    try:
        until(ready)
        path, body, wanted = cases[0]
        assert np.array_equal(decoded(post(port, path, body).body), wanted)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
