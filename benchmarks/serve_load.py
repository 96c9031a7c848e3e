"""64 clients at once, with pictures, against `seavlm serve`: what each waits for, and what HTTP costs.

    python benchmarks/serve_load.py --minutes 5 --out benchmarks/serve_load.json

Each client asks, reads its stream to the end and asks again; half of the pictures have been seen before, one
request in five is dropped by its client, half of these before the first token. The server is a process of
its own; the clients share this one, and read no more of HTTP than they need. At the end all hang up at once.
The same requests then go to the engine alone, in a process without HTTP. Writes JSON and a plot beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from seavlm.data.pictures import FAMILIES, load_pictures
from seavlm.engine.bench import machine
from seavlm.text.tokenizer import Tokenizer
from seavlm.weights.refs import resolve

DOCS = Path(__file__).parents[1] / "docs"
QUESTIONS = ("What is this?", "ນີ້ແມ່ນຫຍັງ?", "นี่คืออะไร", "Apa ini?", "Đây là gì?", "What colour is it?")
LEAST, MOST = 32, 256  # tokens of a reply
TEXT = re.compile(rb'"delta": ?\{"content"')
FINISH = re.compile(rb'"finish_reason": ?"(\w+)"')
WRITTEN = re.compile(rb'"completion_tokens": ?(\d+)')


# --- what is asked


@dataclass(frozen=True)
class Ask:
    """picture: encoded. leave: the client goes after so many pieces of text; leave_in: or so many seconds."""

    picture: bytes
    text: str
    max_tokens: int
    seed: int
    leave: int | None = None
    leave_in: float | None = None

    def body(self, silent: tuple[int, ...]) -> bytes:
        kind = {b"\x89P": "png", b"\xff\xd8": "jpeg"}.get(self.picture[:2], "webp")
        url = f"data:image/{kind};base64,{base64.b64encode(self.picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.text}]
        asked = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 1,
            "seed": self.seed,
            "logit_bias": {str(token): -100 for token in silent},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(asked).encode()


class Asks:
    """An endless row of requests. drop: the share that is left early."""

    def __init__(self, seed: int, drop: float) -> None:
        self._random, self._drop, shipped = np.random.default_rng(seed), drop, load_pictures()
        drawings = [
            shipped.image_bytes(concept, family) for concept in shipped.concepts for family in FAMILIES
        ]
        self._drawings = [drawings[i] for i in self._random.permutation(len(drawings))]
        self._seen = [path.read_bytes() for path in sorted(DOCS.glob("*.png"))] + self._drawings[:13]
        self._next = len(self._seen)

    def _fresh(self) -> bytes:
        """A drawing on a ground that no other request has."""
        random, number = self._random, self._next
        self._next += 1
        drawing = Image.open(io.BytesIO(self._drawings[number % len(self._drawings)])).convert("RGB")
        width, height = (int(side) for side in random.integers(130, 480, 2))
        ground = Image.new("RGB", (width, height), tuple(int(c) for c in random.integers(0, 256, 3)))
        ground.paste(drawing, (int(random.integers(width - 128)), int(random.integers(height - 128))))
        file = io.BytesIO()
        ground.save(file, ("PNG", "JPEG", "WEBP")[number % 3])
        return file.getvalue()

    def __iter__(self) -> Iterator[Ask]:
        random = self._random
        while True:
            old = random.random() < 0.5
            picture = self._seen[int(random.integers(len(self._seen)))] if old else self._fresh()
            length, leave, leave_in = int(random.integers(LEAST, MOST + 1)), None, None
            if random.random() < self._drop:
                if random.random() < 0.5:
                    leave = int(random.integers(1, length))
                else:
                    leave_in = float(random.uniform(0, 0.3))
            text = QUESTIONS[int(random.integers(len(QUESTIONS)))]
            yield Ask(picture, text, length, int(random.integers(2**31)), leave, leave_in)


def mute(model: str) -> tuple[int, ...]:
    """Tokens without text, kept out of replies: they have the length that was asked for, and show it."""
    return tuple(sorted(Tokenizer.from_dir(resolve(model)).specials.values()))


# --- a client


class Connection(asyncio.Protocol):
    """One connection, kept for the next request. Of a reply it counts pieces of text and when they came."""

    def __init__(self) -> None:
        self.open = False

    def connection_made(self, transport: Any) -> None:
        self.transport, self.open = transport, True
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ask(self, request: bytes, leave: int | None) -> asyncio.Future[None]:
        self.done = asyncio.get_running_loop().create_future()
        self.leave, self.tail, self.status, self.text = leave, b"", 0, 0
        self.length: int | None = None  # bytes still to come, where the head says so
        self.first_at, self.last_at, self.gaps = 0.0, 0.0, list[float]()
        self.sent_at = time.perf_counter()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.status:
            data = self.tail + data
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self.tail = head
                return
            self.status, self.tail = int(head[9:12]), b""
            if found := re.search(rb"content-length: *(\d+)", head, re.IGNORECASE):
                self.length = int(found[1])
        if news := len(TEXT.findall(data)):
            self.text += news
            if self.first_at:
                self.gaps.append(now - self.last_at)
            else:
                self.first_at = now
            self.last_at = now
        self.tail = (self.tail + data)[-8192:]
        if self.length is not None:
            self.length -= len(data)
        left = self.leave is not None and self.text >= self.leave
        over = self.length == 0 if self.length is not None else self.tail.endswith(b"0\r\n\r\n")
        if (left or over) and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if not self.done.done():
            self.done.set_result(None)


@dataclass
class Seen:
    """What the clients saw."""

    clients: int
    ends: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    gaps_at: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # of each whole reply, tokens/s after its first
    health: list[float] = field(default_factory=list)
    per_client: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.per_client = [0] * self.clients

    def end(self, client: int, ask: Ask, connection: Connection, left: bool) -> None:
        """A request is over, one way or another."""
        c, what = connection, "whole"
        if c.status == 429:
            what = "429"
        elif left:
            what = "left" if c.text else "left before the first token"
        else:
            reason, written = FINISH.search(c.tail), WRITTEN.search(c.tail)
            told = (c.status, reason and reason[1], written and int(written[1]), b"[DONE]" in c.tail)
            if told != (200, b"length", ask.max_tokens, True):
                what = "error"
                self.errors.append(f"{told} {c.tail[-300:]!r}")
        self.ends[what] = self.ends.get(what, 0) + 1
        self.per_client[client] += ask.max_tokens if what == "whole" else c.text
        if c.first_at:
            self.first.append(c.first_at - c.sent_at)
            self.gaps += c.gaps
            self.gaps_at += list(np.cumsum(c.gaps) + c.first_at)
        if what == "whole" and c.last_at > c.first_at:
            self.rates.append((c.text - 1) / (c.last_at - c.first_at))


async def client(
    number: int, seen: Seen, asks: Iterator[Ask], head: bytes, silent: tuple[int, ...], url: Any
) -> None:
    """Ask, and ask again, until cancelled."""
    loop, connection = asyncio.get_running_loop(), Connection()
    try:
        while True:
            ask = next(asks)
            body = ask.body(silent)
            if not connection.open:
                _, connection = await loop.create_connection(Connection, url.hostname, url.port)
            done = connection.ask(head % len(body) + body, ask.leave)
            await asyncio.wait({done}, timeout=ask.leave_in or 120)
            left = not done.done() or (ask.leave is not None and connection.text >= ask.leave)
            if not done.done() and ask.leave_in is None:
                seen.errors.append("nothing for two minutes")
            seen.end(number, ask, connection, left)
            if left:
                connection.transport.abort()
                connection.open = False
    finally:
        if connection.open:
            connection.transport.abort()


async def load_it(
    url: str, clients: int, seconds: float, asks: Iterator[Ask], silent: tuple[int, ...], pid: int | None
) -> tuple[Seen, list[dict[str, float]]]:
    """So many clients for so long; then all hang up."""
    place, seen, samples = urlsplit(url), Seen(clients), list[dict[str, float]]()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\n".encode()
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    tasks = [
        asyncio.create_task(client(number, seen, asks, head, silent, place)) for number in range(clients)
    ]

    async def probe() -> None:
        """How long the event loop lets a trifle wait."""
        connection, request = Connection(), f"GET /health/live HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n"
        while True:
            if not connection.open:
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, place.hostname, place.port
                )
            began = time.perf_counter()
            await connection.ask(request.encode(), None)
            seen.health.append(time.perf_counter() - began)
            await asyncio.sleep(0.2)

    tasks.append(asyncio.create_task(probe()))
    began = last = time.perf_counter()
    before, tokens, mine = usage(pid), count(await metrics(url)), time.process_time()
    while (now := time.perf_counter()) - began < seconds and not all(t.done() for t in tasks):
        await asyncio.sleep(min(2, seconds))
        now, after, told, own = (
            time.perf_counter(),
            usage(pid),
            count(await metrics(url)),
            time.process_time(),
        )
        passed = now - last
        samples.append(
            {
                "seconds": round(now - began, 2),
                "resident MiB": round(after["resident"] / 2**20, 1),
                "loop cores": round((after["loop"] - before["loop"]) / passed, 3),
                "other cores": round((after["other"] - before["other"]) / passed, 3),
                "client cores": round((own - mine) / passed, 3),
                "requests done": told["requests"],
                "generated": told["generated"] - tokens["generated"],
                "running": told["running"],
                "waiting": told["waiting"],
            }
        )
        last, before, mine = now, after, own
    for task in tasks:
        if task.done():
            seen.errors.append(f"a client broke: {task.exception()!r}")
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen, samples


def figures(seen: Seen, samples: list[dict[str, float]], tokens: float, seconds: float) -> dict[str, Any]:
    """What a run comes to."""
    shares = np.array(seen.per_client, float)
    cores = {
        name: statistics.mean(sample[f"{name} cores"] for sample in samples)
        for name in ("loop", "other", "client")
    }
    return {
        "seconds": round(seconds, 1),
        "requests": {**dict(sorted(seen.ends.items())), "cut off at the end": seen.clients},
        "requests/s": round(sum(seen.ends.values()) / seconds, 2),
        "errors": len(seen.errors),
        "told": seen.errors[:5],
        "tokens/s": round(tokens / seconds, 1),
        "first token ms": percentiles(seen.first),
        "between tokens ms": percentiles(seen.gaps),
        "a reply's tokens/s": percentiles(seen.rates, 1),
        "health ms": percentiles(seen.health),
        "fairness": {
            "jain": round(float(shares.sum() ** 2 / (len(shares) * (shares**2).sum() or 1)), 4),
            "slowest client / fastest": round(float(shares.min() / max(shares.max(), 1)), 3),
        },
        "resident MiB": {
            "first": samples[0]["resident MiB"],
            "last": samples[-1]["resident MiB"],
            "most": max(sample["resident MiB"] for sample in samples),
        },
        "event loop's microseconds a token": round(1e6 * cores["loop"] * seconds / max(tokens, 1), 1),
        "tokens a second of one core": round(
            tokens / seconds / max(0.001, cores["loop"] + cores["other"]), 1
        ),
        "cores": {name: round(value, 2) for name, value in cores.items()},
    }


def percentiles(values: list[float], factor: float = 1000) -> dict[str, float]:
    if not values:
        return {}
    at = (50, 95, 99, 100)
    return {
        f"p{p}" if p < 100 else "most": round(float(v) * factor, 1)
        for p, v in zip(at, np.percentile(values, at), strict=True)
    }


# --- the server


@contextlib.contextmanager
def serving(model: str, *options: str, url: str | None = None) -> Iterator[tuple[str, int | None, Path]]:
    """A server of its own process: (URL, process, its log); or the one that is there."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        if url is not None:
            yield url.rstrip("/"), None, log
            return
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        command = [sys.executable, "-m", "seavlm.cli", "serve", model, "--port", str(port), *options]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health/ready").read()
                    break
                if process.poll() is not None:
                    raise SystemExit(f"the server does not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield url, process.pid, log
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


def usage(pid: int | None) -> dict[str, float]:
    """Resident bytes of a process, and the processor's seconds of its first thread and of the others."""
    if pid is None:
        return {"resident": 0, "loop": 0, "other": 0}
    resident, seconds = 0, dict[int, float]()
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            resident = int(line.split()[1]) * 1024
    for name in (str(pid), *(f"{pid}/task/{pid}",)):
        ticks = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        seconds[len(seconds)] = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    return {"resident": resident, "loop": seconds[1], "other": seconds[0] - seconds[1]}


async def metrics(url: str) -> str:
    return await asyncio.to_thread(get, f"{url}/metrics")


def get(url: str) -> str:
    return str(urllib.request.urlopen(url, timeout=60).read().decode())


def count(text: str) -> dict[str, float]:
    """Of the server's own figures, a few."""

    def total(name: str) -> float:
        return sum(float(v) for v in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))

    return {
        "generated": total("seavlm_generated_tokens_total"),
        "requests": total("seavlm_replies_total"),
        "running": total(r'seavlm_requests\{state="running"\}'),
        "waiting": total(r'seavlm_requests\{state="waiting"\}'),
        "pages": total("seavlm_cache_pages"),
    }


def afterwards(url: str, ask: Ask, silent: tuple[int, ...]) -> dict[str, Any]:
    """How soon nothing is left of those that hung up; and one request more."""
    began, left = time.perf_counter(), {"running": -1.0}
    while time.perf_counter() - began < 30:
        told = count(get(f"{url}/metrics"))
        left = {name: told[name] for name in ("running", "waiting", "pages")}
        if not any(left.values()):
            break
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", ask.body(silent), {"Content-Type": "application/json"}
    )
    try:
        answer = urllib.request.urlopen(request, timeout=60).read()
        good = b"[DONE]" in answer and len(TEXT.findall(answer)) > 1
    except urllib.error.URLError:
        good = False
    return {"left": left, "seconds until nothing is left": round(seconds, 3), "one more is served": good}


# --- the engine alone


def alone(
    model: str, quantize: str, clients: int, seconds: float, seed: int, drop: float
) -> dict[str, float]:
    """Tokens per second of the same requests, prepared before, with so many always under way."""
    from seavlm.engine.sequence import Sequence
    from seavlm.engine.vlm import load

    vlm = load(model, quantize=quantize or None)
    asks, prepared = iter(Asks(seed, drop)), []
    bias = dict.fromkeys(mute(model), -100.0)
    for _ in range(int(clients + seconds * 25)):
        ask = next(asks)
        parts = [{"type": "image", "image": ask.picture}, {"type": "text", "text": ask.text}]

        sampling = vlm.sampling(temperature=1, seed=ask.seed, logit_bias=bias)
        prepared.append((ask, vlm.prompt([{"role": "user", "content": parts}]), sampling))
    under_way = dict[Sequence, Ask]()
    began, used, tokens, number = time.perf_counter(), time.process_time(), 0, 0
    while (now := time.perf_counter()) - began < seconds:
        while len(under_way) < clients:
            ask, prompt, sampling = prepared[number % len(prepared)]
            number += 1
            under_way[vlm.engine.add(prompt, sampling, max_new_tokens=ask.max_tokens)] = ask
        vlm.engine.step()
        for one, ask in list(under_way.items()):
            late = ask.leave_in is not None and now - one.started > ask.leave_in
            if late or (ask.leave is not None and len(one.ids) >= ask.leave):
                vlm.engine.cancel(one)
            if one.finished:
                tokens += len(one.ids)
                del under_way[one]
    tokens += sum(len(one.ids) for one in under_way)
    passed = time.perf_counter() - began
    return {
        "seconds": round(passed, 1),
        "requests": number,
        "prepared": len(prepared),
        "tokens/s": round(tokens / passed, 1),
        "steps/s": round(vlm.engine.steps / passed, 1),
        "tokens a second of one core": round(tokens / (time.process_time() - used), 1),
        "cores": round((time.process_time() - used) / passed, 2),
    }


# --- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--drop", type=float, default=0.2, help="the share of requests that clients leave")
    parser.add_argument("--base-seconds", type=float, default=30, help="of one client before; 0: none")
    parser.add_argument("--alone-seconds", type=float, default=60, help="of the engine alone; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--note", default="", help="on the machine, say, for the JSON")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("serve_load.json"))
    args = parser.parse_args()
    if args.alone:
        given = (args.model, args.quantize, args.clients, args.alone_seconds, args.seed, args.drop)
        print(json.dumps(alone(*given)))
        return
    silent = mute(args.model)
    quantize = ["--quantize", args.quantize] if args.quantize else []
    told: dict[str, Any] = {
        "machine": machine(),
        "note": args.note,
        "model": args.model,
        "quantize": args.quantize,
        "clients": args.clients,
        "share of requests dropped": args.drop,
    }
    with serving(args.model, *quantize, "--max-queue", "1024", url=args.url) as (url, pid, log):
        asyncio.run(load_it(url, 2, 2, iter(Asks(args.seed + 2, 0)), silent, pid))  # what is made only once
        for name, clients, seconds, drop in (
            ("one client", 1, args.base_seconds, 0.0),
            ("load", args.clients, 60 * args.minutes, args.drop),
        ):
            if seconds:
                asks = iter(Asks(args.seed + (clients == 1), drop))
                seen, samples = asyncio.run(load_it(url, clients, seconds, asks, silent, pid))
                passed = samples[-1]["seconds"]
                told[name] = figures(seen, samples, samples[-1]["generated"], passed)
                print(name, json.dumps(told[name]), flush=True)
        told["afterwards"] = afterwards(url, next(iter(Asks(args.seed + 3, 0))), silent)
        told["lines of errors in the log"] = len(re.findall("Traceback|unexpected|CRITICAL", log.read_text()))
        print("afterwards", told["afterwards"], flush=True)
    if args.alone_seconds:
        command = [sys.executable, *sys.argv, "--alone"]
        told["engine alone"] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        part = told["load"]["tokens/s"] / told["engine alone"]["tokens/s"]
        told["tokens/s over HTTP / of the engine alone"] = round(part, 3)
        key = "tokens a second of one core"  # says more where other work takes the cores
        told[f"{key}, over HTTP / of the engine alone"] = round(
            told["load"][key] / told["engine alone"][key], 3
        )
        print("engine alone", told["engine alone"], f"{part:.0%} of it over HTTP")
    told["samples"] = samples
    args.out.write_text(json.dumps(told, indent=1) + "\n")
    plot(told, seen, args.out.with_suffix(".png"))
    bad = told["load"]["errors"] or any(told["afterwards"]["left"].values())
    if bad or not told["afterwards"]["one more is served"]:
        raise SystemExit("not as it should be")


def plot(told: dict[str, Any], seen: Seen, path: Path) -> None:
    """Speed, waiting, memory and the processor over time."""
    from matplotlib.figure import Figure

    samples, load = told["samples"], told["load"]
    at = np.array([0, *(sample["seconds"] for sample in samples)])
    generated = np.array([0, *(sample["generated"] for sample in samples)])
    figure = Figure(figsize=(10, 6), layout="constrained")
    (speed, gaps), (memory, cores) = figure.subplots(2, 2)
    figure.suptitle(
        f"{told['model']} {told['quantize']} over HTTP: {told['clients']} clients, "
        f"{sum(load['requests'].values()):,} requests, {load['errors']} errors"
    )
    speed.plot(at[1:], np.diff(generated) / np.diff(at), color="#264653", label="over HTTP")
    if "engine alone" in told:
        speed.axhline(told["engine alone"]["tokens/s"], color="#e76f51", linestyle="--", label="engine alone")
    speed.set_ylabel("tokens/s")
    speed.legend(frameon=False)
    came, gap = np.array(seen.gaps_at), 1000 * np.array(seen.gaps)
    edges = np.linspace(came.min(), came.max(), 31)
    spans = [gap[(came >= a) & (came < b)] for a, b in itertools.pairwise(edges)]
    middle = (edges[:-1] + edges[1:]) / 2 - came.min()
    for p, color in ((50, "#2a9d8f"), (95, "#e9c46a"), (99, "#e76f51")):
        values = [np.percentile(span, p) if len(span) else np.nan for span in spans]
        gaps.plot(middle, values, color=color, label=f"p{p}")
    gaps.set_ylabel("ms between tokens")
    gaps.legend(frameon=False)
    memory.plot(at[1:], [sample["resident MiB"] for sample in samples], color="#264653")
    memory.set_ylabel("resident MiB")
    for name, color in (("loop", "#e76f51"), ("other", "#264653"), ("client", "#8d99ae")):
        label = {"loop": "server, event loop", "other": "server, the rest", "client": "clients"}[name]
        cores.plot(at[1:], [sample[f"{name} cores"] for sample in samples], color=color, label=label)
    cores.set_ylabel("cores")
    cores.legend(frameon=False)
    for axis in (speed, gaps, memory, cores):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_xlabel("seconds")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
