"""Thousands of pictures and of JSON schemas, none sent twice: the server's memory stays flat.

    python benchmarks/serve_memory.py --images 10000 --schemas 10000 --out benchmarks/serve_memory.json

One request for each, of a few tokens, several at once, to a `seavlm serve` in a process of its own, whose
resident memory is read every second. Flat means: over the last quarter of the pictures (of the schemas) the
median is at most 16 MiB above that of the second quarter. Writes JSON and a plot beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from serve_load import Connection, serving, usage

from seavlm.engine.bench import machine

FLAT = 16  # MiB
KINDS = ("string", "integer", "boolean", "number", "null")


def picture(number: int, seed: int) -> dict[str, Any]:
    """A request with a picture of its own: size, format and pixels."""
    random = np.random.default_rng((seed, 0, number))
    width, height = (int(side) for side in random.integers(16, 640, 2))
    small = random.integers(0, 256, (int(random.integers(2, 12)), int(random.integers(2, 12)), 3), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    kind = ("png", "jpeg", "webp")[number % 3]
    file = io.BytesIO()
    image.save(file, kind, **{"png": {"compress_level": 1}, "webp": {"method": 0}}.get(kind, {}))
    url = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "seed": number}


def schema(number: int, seed: int) -> dict[str, Any]:
    """A request with a schema of its own: names, types, choices, lists and an object inside."""
    random = np.random.default_rng((seed, 1, number))

    def value(depth: int) -> dict[str, Any]:
        what = int(random.integers(8 if depth else 6))
        if what < 5:
            return {"type": KINDS[what]}
        if what == 5:
            return {"enum": [f"{word}{number}" for word in ("a", "b", "c")[: int(random.integers(1, 4))]]}
        if what == 6:
            return {"type": "array", "items": value(depth - 1), "maxItems": int(random.integers(1, 9))}
        return thing(depth - 1)

    def thing(depth: int) -> dict[str, Any]:
        names = [
            f"{chr(97 + int(random.integers(26)))}{number}_{i}" for i in range(int(random.integers(1, 9)))
        ]
        return {"type": "object", "properties": {n: value(depth) for n in names}, "required": names}

    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": thing(2)}}
    content = f"Fill in form {number}."
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "seed": number}
    return asked | {"response_format": form}


async def send(
    url: str, clients: int, count: int, make: Callable[[int], dict[str, Any]], pid: int
) -> tuple[list[dict[str, float]], dict[str, int], list[str]]:
    """All requests of a kind; returns memory over requests, the statuses and the first complaints."""
    place, loop = urlsplit(url), asyncio.get_running_loop()
    numbers: Iterator[int] = iter(range(count))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\n".encode()
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    statuses, told, samples, done = dict[str, int](), list[str](), list[dict[str, float]](), 0

    async def one() -> None:
        nonlocal done
        connection = Connection()
        for number in numbers:
            body = json.dumps(make(number)).encode()
            if not connection.open:
                _, connection = await loop.create_connection(Connection, place.hostname, place.port)
            await connection.ask(head % len(body) + body, None)
            status = str(connection.status)
            statuses[status] = statuses.get(status, 0) + 1
            if status != "200" and len(told) < 5:
                told.append(connection.tail.decode(errors="replace")[:300])
            done += 1
        connection.transport.close()

    tasks, began = [asyncio.create_task(one()) for _ in range(clients)], time.perf_counter()
    while not all(task.done() for task in tasks):
        resident = usage(pid)["resident"] / 2**20
        passed = time.perf_counter() - began
        samples.append({"requests": done, "seconds": round(passed, 1), "resident MiB": round(resident, 1)})
        await asyncio.wait(tasks, timeout=1)
    await asyncio.gather(*tasks)
    return samples, statuses, told


def verdict(samples: list[dict[str, float]], count: int) -> dict[str, Any]:
    def quarter(number: int) -> float:
        values = [s["resident MiB"] for s in samples if number <= 4 * s["requests"] / count < number + 1]
        return statistics.median(values or [samples[-1]["resident MiB"]])

    second, last = quarter(1), quarter(3)
    return {
        "second quarter MiB": round(second, 1),
        "last quarter MiB": round(last, 1),
        "flat": last - second <= FLAT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--schemas", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="on the machine, say, for the JSON")
    parser.add_argument("--out", type=Path, default=Path("serve_memory.json"))
    args = parser.parse_args()
    told: dict[str, Any] = {
        "machine": machine(),
        "note": args.note,
        "model": args.model,
        "quantize": args.quantize,
        "clients": args.clients,
    }
    good = True
    with serving(args.model, *(["--quantize", args.quantize] if args.quantize else [])) as (url, pid, _):
        assert pid is not None
        for name, count, make in (("images", args.images, picture), ("schemas", args.schemas, schema)):
            if not count:
                continue
            sending = send(url, args.clients, count, lambda number, make=make: make(number, args.seed), pid)
            samples, statuses, complaints = asyncio.run(sending)
            told[name] = {"count": count, "statuses": statuses, "told": complaints, **verdict(samples, count)}
            told[name] |= {"seconds": samples[-1]["seconds"], "samples": samples}
            print(name, {key: value for key, value in told[name].items() if key != "samples"}, flush=True)
            good = good and told[name]["flat"] and set(statuses) == {"200"}
    args.out.write_text(json.dumps(told, indent=1) + "\n")
    plot(told, args.out.with_suffix(".png"))
    if not good:
        raise SystemExit("not as it should be")


def plot(told: dict[str, Any], path: Path) -> None:
    """Memory over requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis, before = figure.subplots(), 0
    for name, color in (("images", "#2a9d8f"), ("schemas", "#e76f51")):
        if name in told:
            part = told[name]
            at = [before + sample["requests"] for sample in part["samples"]]
            label = f"{part['count']:,} {name}, none twice"
            axis.plot(at, [sample["resident MiB"] for sample in part["samples"]], color=color, label=label)
            before += part["count"]
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.set_xlabel("requests")
    axis.set_ylabel("resident MiB of the server")
    axis.set_title(f"{told['model']} {told['quantize']}", loc="left")
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
