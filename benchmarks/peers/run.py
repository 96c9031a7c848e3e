"""seavlm beside its peers: the same work on the same weights, in one sitting, in turn.

    python benchmarks/peers/run.py --out results.json
    python benchmarks/peers/run.py --only llama.cpp,openvino --setup-only

Each engine runs in a fresh process of its own environment, `--repeats` times, the engines taking turns; a row
holds the median and every repeat, and another what other processes took of the machine meanwhile: leave out
a sitting where that is much above 0. Then the divergences of `quality.py`. See `measure.py` for the work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from engines import ENGINES, Places, choose, run_engine, set_up, versions
from quality import LANGUAGES, declaration, divergences

from seavlm.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", help="engines, with commas: llama.cpp or llama.cpp:q8_0 (default: all)")
    parser.add_argument("--setup-only", action="store_true", help="make environments and weights, then stop")
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    parser.add_argument("--repeats", type=int, default=5, help="0: the divergences only")
    parser.add_argument("--no-kl", action="store_true", help="the speeds only")
    add_places(parser)
    options = parser.parse_args()
    names, places = choose(options.only), places_of(options)
    set_up(names, places)
    if options.setup_only:
        return
    rows = speeds(names, places, options.threads, options.repeats) if options.repeats else []
    if not options.no_kl:
        rows += divergences(names, places, options.threads)
    machine = describe_machine() | {"threads": options.threads, "versions": versions(names, places)}
    options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(options.out)


def speeds(names: list[str], places: Places, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Medians over the rounds. A round before them warms the page cache and is thrown away."""
    tokenizer = Tokenizer.from_gguf(places.gguf)
    texts = [declaration(places.udhr, language) for language in LANGUAGES]
    tokens = [token for ids in tokenizer.encode_batch(texts) for token in ids]
    found: dict[tuple[Any, ...], list[float]] = {}
    for turn in range(repeats + 1):
        for name in names:
            job = {"mode": "speed" if turn else "cold", "tokens": tokens}
            began, others = time.monotonic(), others_cpu_seconds()
            rows = run_engine(name, job, places, threads)
            took = time.monotonic() - began
            busy = (others_cpu_seconds() - others) / took
            if turn:
                what = {"work": "cores taken by others", "batch": 0, "context": 0, "unit": "cores"}
                rows.append({"engine": ENGINES[name].label, **what, "value": busy})
                note = f"{turn}/{repeats} {name}: {took:.0f} s, others took {busy:.2f} cores"
                print(note, file=sys.stderr, flush=True)
            for row in rows:
                value = row.pop("value")
                if turn:
                    found.setdefault(tuple(row.items()), []).append(value)
    return [dict(row) | {"value": statistics.median(v), "repeats": v} for row, v in found.items()]


def others_cpu_seconds() -> float:
    """CPU time of everything on the machine but this process and its finished children, since the start.

    A number measured while others compute is no number. /proc/stat: user, nice, system, idle, iowait, irq,
    softirq, steal (another guest of the same host).
    """
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system - own.children_user - own.children_system


def add_places(parser: argparse.ArgumentParser) -> None:
    material = ROOT / ".material"
    parser.add_argument("--envs", type=Path, default=Path("~/.cache/seavlm/peers"))
    parser.add_argument("--model", type=Path, default=material / "gemma-3-270m-q4_k_m.gguf")
    parser.add_argument("--tokenizer", type=Path, default=material / "tokenizer", help="its directory")
    parser.add_argument("--threads", type=int, default=2)


def places_of(options: argparse.Namespace) -> Places:
    return Places(options.envs.expanduser().resolve(), options.model.resolve(), options.tokenizer.resolve())


def describe_machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in values.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": values.get("model name", platform.machine()),
        "flags": " ".join(sorted(flags)),
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
