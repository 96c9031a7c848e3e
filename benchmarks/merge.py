"""Linear merge of two checkpoints of Gemma 3 1B's geometry (2.0 GB each, bf16), beside mergekit's and a copy.

    python benchmarks/merge.py --mergekit-python VENV/bin/python --work DIR --out benchmarks/merge.json

Everything runs in one go on one machine, in turns, each in a process of its own: seconds of wall time and of
the processor, and the process's largest resident memory. "cold": the parents' pages are dropped from the
cache first and the output is written through to the disk, by fsync, within the time. The copy is the limit:
it reads one parent's bytes and writes them, as `cat` does; a merge reads two and writes one, and is compared
by bytes moved in a second. A 27B-shaped merge is shown on a slice of true width with four layers, and planned
for all 62: memory does not depend on their number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

TEXT_27B = {"layers": 4, "size": "27b"}
BEYOND = {"layers": 8, "size": "27b"}  # 9.4 GB each: two parents and what is written are more than 24 GB


def make(root: Path, name: str, seed: int, size: str = "1b", layers: int | None = None) -> Path:
    """A checkpoint of random bf16 numbers, made tensor by tensor."""
    from dataclasses import replace

    import torch

    from seavlm.model.config import Gemma3Config
    from seavlm.weights import names as naming
    from seavlm.weights.checkpoint import save_checkpoint

    config = Gemma3Config.named(size)
    config = replace(config, vision=None)
    if layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=layers, layer_types=()))
    draw = torch.Generator().manual_seed(seed)
    block = torch.randn(1 << 22, generator=draw).mul_(0.02).bfloat16()

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // len(block)))[:count].reshape(shape)

    place = root / name
    if not place.exists():
        save_checkpoint(place, config, ((n, tensor(s)) for n, s in naming.shapes(config).items()))
    return place


def drop(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


CHILD = """
import json, os, resource, sys, time
from pathlib import Path
began = time.perf_counter()
what, root, out, sync = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1"
if what == "copy":
    out.mkdir()
    for file in (root / "a").glob("*.safetensors"):
        with open(file, "rb", buffering=0) as source, open(out / file.name, "wb", buffering=0) as target:
            while data := source.read(1 << 21):
                target.write(data)
elif what == "mergekit":
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    options = json.loads(sys.argv[5])
    recipe = {"merge_method": "linear", "dtype": "bfloat16", "models": [
        {"model": str(root / "a"), "parameters": {"weight": 0.1}},
        {"model": str(root / "b"), "parameters": {"weight": 0.9}}]}
    plain = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, **options)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options=plain)
else:
    from seavlm.merge.stream import merge_recipe
    recipe = {"regional": str(root / "a"), "global": str(root / "b"), "beta": 0.1}
    merge_recipe(recipe, out, hash_inputs=json.loads(sys.argv[5])["hash_inputs"])
if sync:
    for file in out.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
wall = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which a child inherits from the process that started it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps({"s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": int(peak) / 1024}))
"""

CASES: dict[str, tuple[str, dict]] = {
    "copy": ("copy", {}),
    "seavlm": ("seavlm", {"hash_inputs": False}),
    "seavlm, parents hashed": ("seavlm", {"hash_inputs": True}),
    "mergekit": ("mergekit", {}),
    "mergekit, lazy unpickle": ("mergekit", {"lazy_unpickle": True}),
    "mergekit, low cpu memory": ("mergekit", {"lazy_unpickle": True, "low_cpu_memory": True}),
    "mergekit, async write": ("mergekit", {"lazy_unpickle": True, "async_write": True, "write_threads": 2}),
}


def timed(case: str, root: Path, python: Path, *, cold: bool) -> dict:
    kind, options = CASES[case]
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    for name in ("a", "b"):
        if cold:
            drop(root / name)
        else:
            subprocess.run(f"cat {root / name}/*.safetensors >/dev/null", shell=True, check=True)
    interpreter = str(python) if kind == "mergekit" else sys.executable
    command = [interpreter, "-c", CHILD, kind, str(root), str(out), "1" if cold else "0", json.dumps(options)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    root = given.work / "merge-bench"
    make(root, "a", 1)
    make(root, "b", 2)
    size = (root / "a" / "model.safetensors").stat().st_size
    rows: dict[str, dict] = {}
    for state, cold in (("warm", False), ("cold", True)):
        cases = [c for c in CASES if given.only in c and not (cold and c.startswith("mergekit,"))]
        runs: dict[str, list[dict]] = {case: [] for case in cases}
        for _ in range(given.runs):
            for case in cases:  # in turns, so that a busy minute meets all alike
                runs[case].append(timed(case, root, given.mergekit_python, cold=cold))
        for case, found in runs.items():
            row = {key: statistics.median(r[key] for r in found) for key in ("s", "cpu_s", "peak_mb")}
            row["runs_s"] = [round(r["s"], 2) for r in found]
            row["best_s"] = min(row["runs_s"])
            row["moved_gb_s"] = (2 if case == "copy" else 3) * size / row["s"] / 1e9
            rows[f"{case} ({state})"] = row
            print(f"{case} ({state})", json.dumps(row))
    result = {
        "what": "linear merge, beta 0.1, of two checkpoints of Gemma 3 1B's geometry, bf16",
        "bytes_each": size,
        "mergekit": "0.1.5",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with others",
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    shutil.rmtree(root)
    if given.only == "":
        result["beyond_cache"] = beyond_cache(given.work, given.mergekit_python, given.runs)
        result["27b"] = slice_of_27b(given.work)
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def beyond_cache(work: Path, python: Path, runs: int) -> dict:
    """Bytes moved in a second where the files do not fit the cache: a merge beside a copy, to the disk."""
    root = work / "merge-bench-beyond"
    make(root, "a", 1, **BEYOND)
    make(root, "b", 2, **BEYOND)
    size = sum(file.stat().st_size for file in (root / "a").glob("*.safetensors"))
    found: dict = {
        "bytes_each": size,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    for _ in range(runs):
        for case in ("copy", "seavlm"):
            row = timed(case, root, python, cold=True)
            moved = (2 if case == "copy" else 3) * size / row["s"] / 1e9
            found.setdefault(case, []).append({**row, "moved_gb_s": round(moved, 3)})
            print("beyond the cache,", case, found[case][-1])
    rates = [
        merge["moved_gb_s"] / copy["moved_gb_s"]
        for merge, copy in zip(found["seavlm"], found["copy"], strict=True)
    ]
    found["of_copy_speed"] = round(statistics.median(rates), 3)
    shutil.rmtree(root)
    return found


def slice_of_27b(work: Path) -> dict:
    """Peak memory of merges of a slice of the 27B's width, and the plan of the whole."""
    from seavlm.model.config import Gemma3Config
    from seavlm.weights import names as naming

    root = work / "merge-bench-27b"
    make(root, "a", 1, **TEXT_27B)
    make(root, "b", 2, **TEXT_27B)
    shapes = naming.shapes(Gemma3Config.named("27b")).values()
    numbers = [math.prod(shape) for shape in shapes]
    found = {
        "slice": "4 of 62 layers, full width and vocabulary, text only",
        "slice_bytes_each": sum(file.stat().st_size for file in (root / "a").glob("*.safetensors")),
        "largest_tensor_bytes": 2 * max(numbers),
        "whole_bytes": 2 * sum(numbers),
        "whole_tensors": len(numbers),
    }
    script = (
        "import sys, json, time; from seavlm.merge.stream import merge_recipe\n"
        "began = time.perf_counter(); merge_recipe(json.loads(sys.argv[1]), sys.argv[2], hash_inputs=False)\n"
        "peak = int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]) / 1024\n"
        "print(json.dumps({'s': round(time.perf_counter() - began, 1), 'peak_mb': round(peak)}))"
    )
    a, b = str(root / "a"), str(root / "b")
    both = {"models": [{"model": a, "parameters": {"weight": 1.0, "density": 0.5}}], "base_model": b}
    recipes = {"linear": {"regional": a, "global": b, "beta": 0.1}, "ties": {"merge_method": "ties", **both}}
    for name, recipe in recipes.items():
        command = [sys.executable, "-c", script, json.dumps(recipe), str(root / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print("27B slice,", name, found[name])
        shutil.rmtree(root / "out")
    shutil.rmtree(root)
    return found


if __name__ == "__main__":
    main()
