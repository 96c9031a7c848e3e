"""Fixtures that every room of the tests may use."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # the kernels for a GPU then run on the CPU, slowly (`test_gpu_kernels.py`)
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Material:
    """The real things that `make material` fetches."""

    tokenizer_dir: Path  # Gemma 3's tokenizer.json and tokenizer_config.json
    gguf_270m: Path  # Gemma 3 270M base, Q4_K_M


@pytest.fixture(scope="session")
def material() -> Material:
    root = Path(os.environ.get("SEAVLM_MATERIAL", ROOT / ".material"))
    found = Material(root / "tokenizer", root / "gemma-3-270m-q4_k_m.gguf")
    for path in (found.tokenizer_dir / "tokenizer.json", found.gguf_270m):
        if not path.exists():
            pytest.fail(f"{path} is missing: run `make material`")
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run `seavlm ARGS...` in this process: cli("ask", "p.png", "What?", stdin=b"...")."""

    def run(*args: object, stdin: bytes = b"") -> Done:
        from seavlm.cli import main

        monkeypatch.setattr("sys.argv", ["seavlm", *map(str, args)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


TEXTS = [
    "What is this? a cat, a dog, a mango; the answer is yes, no or 123.",
    "ນີ້ແມ່ນຫຍັງ? ແມວ ໝາ",
    "នេះជាអ្វី? ឆ្មា",
    "ဒါဘာလဲ။ ကြောင်",
    "இது என்ன? பூனை",
    "这是什么？猫",
    "Đây là cái gì? con mèo",
]
MM_TOKENS = 4


def write_model(
    folder: Path, words: Path, *, seed: int, vision: bool = True, spare_rows: int = 64, **sizes: int
) -> Path:
    """A checkpoint of random weights with the tokens of TEXTS and, as in 4B, rows that no token has."""
    import torch

    from seavlm.model.config import Gemma3Config, TextConfig, VisionConfig
    from seavlm.model.gemma3 import Gemma3
    from seavlm.text.tokenizer import Tokenizer
    from seavlm.weights.checkpoint import save_checkpoint

    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_dir(words)
    tower = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    config = Gemma3Config(
        text=TextConfig(
            vocab_size=tokenizer.vocab_size + spare_rows,
            hidden_size=sizes.get("hidden_size", 48),
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=sizes.get("head_dim", 16),
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=("sliding_attention", "full_attention"),
            max_position_embeddings=256,
            initializer_range=0.3,
        ),
        vision=tower if vision else None,
        mm_tokens_per_image=MM_TOKENS,
        image_token_index=tokenizer.image_id,
        boi_token_index=tokenizer.boi_id,
        eoi_token_index=tokenizer.eoi_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=(tokenizer.eos_id, tokenizer.end_of_turn_id),
    )
    model = Gemma3(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.normal_(std=0.05)  # small, so that what came before outweighs the last token
            elif parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    save_checkpoint(folder, config, model.state_dict().items(), copy_from=words)
    generation = {"eos_token_id": list(config.eos_token_ids), "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory, material: Material) -> Path:
    """The real tokenizer, cut down to TEXTS."""
    from seavlm.text.trim import trim_tokenizer

    folder = tmp_path_factory.mktemp("words")
    trim_tokenizer(material.tokenizer_dir, folder, TEXTS)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """A small random model behind the real tokenizer, cut down: to be asked, with nonsense for answers."""
    return write_model(tmp_path_factory.mktemp("engine") / "model", words, seed=3)


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """A second one of the same shape: the other parent of a merge."""
    return write_model(tmp_path_factory.mktemp("engine") / "other", words, seed=5)


@pytest.fixture(scope="session")
def text_model_dir(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("engine") / "text", words, seed=4, vision=False)


@pytest.fixture(scope="session")
def even_model_dir(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """Text only, and of sizes that the CPU's kernels take: multiples of 32."""
    folder = tmp_path_factory.mktemp("engine") / "even"
    return write_model(folder, words, seed=6, vision=False, hidden_size=64, head_dim=32)
