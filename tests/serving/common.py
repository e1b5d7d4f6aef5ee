"""Clients of the service: plain ones, a crowd, and hostile ones.  Used against the routes alone and against Ray."""

import functools
import http.client
import io
import json
import random
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

PNG = "image/png"


def pixels(height, width, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(values, format="PNG", **options):
    buffer = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values.squeeze())).save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


def ask(port, method, path, body=None, kind=PNG, timeout=120, **headers):
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        given = {"Content-Type": kind} if kind is not None else {}
        connection.request(method, path, body, {**given, **headers})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def post(port, path, body, kind=PNG, **options):
    return ask(port, "POST", path, body, kind, **options)


def form(*fields, boundary="edge"):
    """(body, content type) of a form; a field: (name, file name or None, content)."""
    parts = []
    for name, file, content in fields:
        filename = f'; filename="{file}"' if file else ""
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode())
        parts.append(content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


@dataclass
class Crowd:
    """Many clients at once, each asking again and again for ``seconds``; what they met."""

    counts: dict = field(default_factory=dict)  # status -> requests; "broken" for a connection that broke
    wrong: int = 0  # answers 200 with other pixels than wanted
    failed_at: list = field(default_factory=list)  # times of answers that were neither 200 nor 503

    def run(self, port, cases, clients, seconds, during=None):
        """cases: (path, body, pixels wanted, or their shape); during: called once beside the clients."""
        lock, end = threading.Lock(), time.monotonic() + seconds

        def client(number):
            chosen = random.Random(number)
            while time.monotonic() < end:
                path, body, wanted = chosen.choice(cases)
                try:
                    answer = post(port, path, body)
                    status, wrong = answer.status, False
                    if status == 200:
                        got = decoded(answer.body)
                        wrong = got.shape != wanted if isinstance(wanted, tuple) else not np.array_equal(got, wanted)
                except (OSError, http.client.HTTPException):
                    status, wrong = "broken", False
                with lock:
                    self.counts[status] = self.counts.get(status, 0) + 1
                    self.wrong += wrong
                    if status not in (200, 503):
                        self.failed_at.append(time.monotonic())
                if status == 503:
                    time.sleep(0.05)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        if during is not None:
            during()
        for thread in threads:
            thread.join()
        return self


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=b"", *extra, depth=8, colour=2):
    """A PNG with any header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def many_scans(count):
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(np.zeros((64, 64, 3), np.uint8), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def mutated(data, chance):
    """Cut, changed, doubled or mixed with noise."""
    data = bytearray(data)
    how = chance.randrange(4)
    if how == 0:
        return bytes(data[: chance.randrange(len(data))])
    if how == 1:
        for _ in range(chance.choice((1, 3, 30))):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif how == 2:
        at = chance.randrange(len(data))
        data[at:at] = chance.randbytes(chance.choice((1, 7, 500)))
    else:
        a, b = sorted(chance.randrange(len(data)) for _ in "ab")
        data[a:b] = data[a:b] * chance.choice((0, 2, 5))
    return bytes(data)


def sources():
    """Small valid files of every kind that is taken."""
    rgba = pixels(20, 24, channels=4)
    return [
        encoded(pixels(20, 24)),
        encoded(pixels(20, 24), "JPEG"),
        encoded(pixels(20, 24), "JPEG", progressive=True),
        encoded(pixels(20, 24), "WEBP", lossless=True),
        encoded(pixels(20, 24), "WEBP"),
        encoded(rgba),
        encoded(rgba, "WEBP", lossless=True),
        encoded(pixels(20, 24, channels=1)),
        encoded(Image.fromarray(pixels(20, 24)).convert("P")),
        encoded(Image.fromarray(pixels(20, 24)).convert("CMYK"), "JPEG"),
        encoded(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100),
        encoded(Image.fromarray(pixels(9, 7)), save_all=True, append_images=[Image.fromarray(pixels(9, 7, 1))]),
        encoded(pixels(1, 1)),
        encoded(pixels(1, 300)),
    ]


def raw(port, data, answer=True, reset=False, pause=0.0, timeout=60):
    """Send bytes as they are, perhaps slowly, perhaps cut off; the status, or None without an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            for at in range(0, len(data), max(1, len(data) // 4)) if pause else (0,):
                connection.sendall(data[at : at + len(data) // 4] if pause else data)
                time.sleep(pause)
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if not answer:
                return None
            head = connection.recv(4096).split()
        except (ConnectionError, BrokenPipeError):
            return None
        return int(head[1]) if len(head) > 1 and head[1].isdigit() else None


def head(length=None, extra=""):
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return f"POST /purify HTTP/1.1\r\nHost: x\r\nContent-Type: {PNG}\r\n{size}{extra}\r\n".encode()


@functools.cache
def zeros(count):
    return zlib.compress(bytes(count), 9)


REFUSED = {400, 413, 415, 422}


def hostile(port, seed, most):
    """One odd request: (what it was, the status or None, the statuses that are right).  most: bytes of an upload."""
    chance = random.Random(seed)
    valid = chance.choice(sources())

    def send(body, kind=PNG, path="/purify"):
        return lambda: post(port, path, body(), kind).status

    def bare(data, **options):
        return lambda: raw(port, data(), **options)

    def half():
        return head(len(valid)) + valid[: len(valid) // 2]

    bad_form = (lambda: mutated(form(("image", "a.png", valid))[0], chance)), "multipart/form-data; boundary=edge"
    other_type = chance.choice(("text/plain", "image/gif", "a" * 3000))
    other_format = chance.choice(("GIF", "BMP", "TIFF", "PPM"))
    bad_seed = chance.choice(("-1", "x", "1" * 5000, "9" * 19))
    block = b"10000\r\n" + bytes(65536) + b"\r\n"
    kinds = {
        "mutated": (send(lambda: mutated(valid, chance)), REFUSED | {200}),
        "mutated twice": (send(lambda: mutated(mutated(valid, chance) or b"x", chance)), REFUSED | {200}),
        "valid": (send(lambda: valid), {200}),
        "noise": (send(lambda: chance.randbytes(chance.randrange(2000))), {400, 415}),
        "bomb": (send(lambda: png(3000, 3000, zeros(3000 * 9001))), {413}),
        "promise": (send(lambda: png(2 ** chance.randrange(10, 31), 60000, b"x")), {413}),
        "text bomb": (send(lambda: png(8, 8, zeros(200), chunk(b"zTXt", b"a\0\0" + zeros(10**8)))), {200, 422}),
        "scans": (send(lambda: many_scans(3000)), {422}),
        "wrong type": (send(lambda: valid, other_type), {415}),
        "other format": (send(lambda: encoded(pixels(8, 8), other_format)), {415}),
        "huge": (bare(lambda: head(chance.choice((most + 1, 10**12)))), {413}),
        "endless": (
            bare(lambda: head(None, "Transfer-Encoding: chunked\r\n") + block * (most // 65536 + 2)),
            {413, None},
        ),
        "slow": (bare(lambda: head(1000) + valid[:100], pause=0.1), {408}),
        "stopped": (bare(lambda: head(len(valid) + 50) + valid), {408}),
        "cut": (bare(half, answer=False), {None}),
        "reset": (bare(half, answer=False, reset=True), {None}),
        "gone": (bare(lambda: head(len(valid)) + valid, answer=False, reset=chance.random() < 0.5), {None}),
        "garbage": (bare(lambda: chance.randbytes(300) + b"\r\n\r\n"), {400, None}),
        "half a head": (bare(lambda: head(10)[: chance.randrange(1, 40)], answer=False), {None}),
        "bad form": (send(*bad_form), REFUSED | {200}),
        "no boundary": (send(lambda: valid, "multipart/form-data"), {400}),
        "many files": (send(lambda: form(*[("image", "a.png", valid)] * 40)[0], bad_form[1]), {400}),
        "bad seed": (send(lambda: valid, path=f"/purify?seed={bad_seed}"), {400}),
        "elsewhere": (send(lambda: valid, path=chance.choice(("/", "/purify/x", "/../etc", "/classify"))), {404}),
        "wrong method": (lambda: ask(port, chance.choice(("GET", "PUT", "DELETE")), "/purify").status, {405}),
    }
    names = list(kinds)
    what = names[seed % len(names)]
    run, right = kinds[what]
    try:
        return what, run(), right
    except (OSError, http.client.HTTPException):
        return what, None, right


def besiege(port, seeds, most, clients=8):
    """Hostile requests from several clients at once; what was answered wrongly."""
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda seed: (seed, *hostile(port, seed, most)), seeds))
    broken_by_closing = {"huge", "wrong type"}  # an answer before the body has come may meet a closed connection
    return [
        (seed, what, status)
        for seed, what, status, right in answers
        if status not in right and not (status is None and what in broken_by_closing)
    ]
