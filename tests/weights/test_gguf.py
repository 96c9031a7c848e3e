"""GGUF: a small file of known numbers in every common type, and the real Gemma 3 270M."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config, TextConfig
from seavlm.model.gemma3 import Gemma3
from seavlm.weights.checkpoint import load_into, open_checkpoint, save_checkpoint
from seavlm.weights.gguf import GGUFCheckpoint
from seavlm.weights.names import EMBEDDING, is_text_norm, shapes, to_gguf

Kind = gguf.GGMLQuantizationType
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_image>", "<end_of_image>", "<end_of_turn>", "a"]
ROWS = 70
TEXT = TextConfig(
    vocab_size=128,  # 70 rows and the one for <image_soft_token>, up to a multiple of 64
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=16,
    rope_factor=8.0,
    max_position_embeddings=512,
)


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = sum(name.encode())
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_gguf(
    path: Path,
    kind: Kind = Kind.F32,
    *,
    architecture: str = "gemma3",
    head: bool = False,
    leave_out: str = "",
    **values: Any,
) -> Path:
    """The small model as llama.cpp's converter writes it; `values` are further metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(TEXT.max_position_embeddings)
    writer.add_embedding_length(TEXT.hidden_size)
    writer.add_block_count(TEXT.num_hidden_layers)
    writer.add_feed_forward_length(TEXT.intermediate_size)
    writer.add_head_count(TEXT.num_attention_heads)
    writer.add_head_count_kv(TEXT.num_key_value_heads)
    writer.add_key_length(TEXT.head_dim)
    writer.add_layer_norm_rms_eps(TEXT.rms_norm_eps)
    writer.add_sliding_window(TEXT.sliding_window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(TEXT.rope_factor)
    writer.add_token_list(TOKENS + [f"t{i}" for i in range(ROWS - len(TOKENS))])
    writer.add_token_scores([0.0] * ROWS)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for key, value in values.items():
        writer.add_key_value(
            key.replace("__", "."),
            value,
            gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32,
        )
    for name, shape in stored_shapes().items():
        tensor = numbers(name, shape)
        if name != leave_out:
            add(writer, to_gguf(name), tensor + 1 if is_text_norm(name) else tensor, kind)
    if head:
        add(writer, "output.weight", numbers(EMBEDDING, stored_shapes()[EMBEDDING]), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: Kind) -> None:
    if tensor.ndim == 1 or kind == Kind.F32:
        writer.add_tensor(name, tensor)
    else:
        writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)


def stored_shapes() -> dict[str, tuple[int, ...]]:
    return shapes(Gemma3Config(text=TEXT)) | {EMBEDDING: (ROWS, TEXT.hidden_size)}


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(SeavlmError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q4_0])
def test_every_tensor(tmp_path: Path, kind: Kind) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", kind))
    assert checkpoint.config.text == TEXT
    assert checkpoint.names() == list(shapes(checkpoint.config))
    for name, shape in stored_shapes().items():
        got, original = checkpoint.get(name), numbers(name, shape)
        wanted = original
        if len(shape) > 1 and kind != Kind.F32:
            wanted = dequantize(quantize(original, kind), kind).astype(np.float32)
        assert got.dtype == checkpoint.dtype(name) == torch.float32
        assert tuple(got.shape) == checkpoint.shape(name)
        np.testing.assert_allclose(got[: shape[0]].numpy(), wanted, atol=1e-6)
        assert np.abs(wanted - original).max() < 0.6


def test_added_rows_are_never_the_greedy_choice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf"))
    table = checkpoint.get(EMBEDDING)
    assert table.shape == (128, 64)
    torch.testing.assert_close(table[ROWS:], table[:ROWS].mean(0).expand(128 - ROWS, 64))
    hidden = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert int((hidden @ table.T).argmax(1).max()) < ROWS


def test_ids_come_from_the_vocabulary(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf")).config
    assert (config.boi_token_index, config.eoi_token_index, config.image_token_index) == (4, 5, ROWS)
    assert config.eos_token_ids == (1, 6)
    assert (config.pad_token_id, config.bos_token_id) == (0, 2)
    assert config.vision is None and config.dtype == "float32"


def test_a_head_of_its_own_is_left_out(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", head=True))
    assert checkpoint.names() == list(shapes(checkpoint.config))


def test_what_is_not_gemma_3(tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(write_gguf(tmp_path / "a.gguf", architecture="llama")), "llama")
    refused(lambda: open_checkpoint(write_gguf(tmp_path / "b.gguf", architecture="clip")), "mmproj")
    capped = write_gguf(tmp_path / "c.gguf", gemma3__final_logit_softcapping=30.0)
    refused(lambda: open_checkpoint(capped), "final_logit_softcapping")
    part = write_gguf(tmp_path / "d.gguf", split__count=3)
    refused(lambda: open_checkpoint(part), "one part of 3")
    name = "language_model.layers.1.mlp.up_proj.weight"
    lacking = write_gguf(tmp_path / "e.gguf", leave_out=name)
    refused(lambda: open_checkpoint(lacking), "1 missing", name)
    text = tmp_path / "f.gguf"
    text.write_text("buy mangoes")
    refused(lambda: open_checkpoint(text), "not a GGUF file")
    text.write_bytes(b"")
    refused(lambda: open_checkpoint(text), "empty")
    text.write_bytes(b"GGUF\x01\0\0\0")
    refused(lambda: open_checkpoint(text), "version 1")


def test_cut_off_anywhere(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (*range(4, 3000, 61), len(data) // 2, len(data) - 40):
        path.write_bytes(data[:keep])
        refused(lambda: open_checkpoint(path), "cut.gguf", "Copy or download it again")


def test_damaged_header_never_crashes(tmp_path: Path) -> None:
    """A byte changed anywhere in the header: an error users can read, or a file that still makes sense."""
    data = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    errors = 0
    for at in rng.integers(4, 4000, 300):
        path.write_bytes(data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :])
        try:
            open_checkpoint(path)
        except SeavlmError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 50


# --- the real one


@pytest.fixture(scope="module")
def real(material: Any) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(material.gguf_270m)
    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint


def test_real_config_is_googles(real: GGUFCheckpoint) -> None:
    wanted = Gemma3Config.named("270m")
    assert real.config.text == TextConfig(**{**vars(wanted.text), "vocab_size": 262_208})
    ids = ("image_token_index", "boi_token_index", "eoi_token_index", "pad_token_id", "bos_token_id")
    assert all(getattr(real.config, key) == getattr(wanted, key) for key in ids)
    assert real.config.eos_token_ids == (1, 106)


def test_real_weights_speak(real: GGUFCheckpoint, material: Any) -> None:
    """Loaded whole, the model goes on counting and naming days and places."""
    from seavlm.text.tokenizer import Tokenizer

    model = Gemma3(real.config, device="meta")
    load_into(model, real)
    tokenizer = Tokenizer.from_gguf(material.gguf_270m)
    for text, wanted in (
        ("one, two, three, four, five, six,", " seven"),
        ("星期一、星期二、星期三、星期", "四"),
        ("Hanoi là thủ đô của Việt", " Nam"),
    ):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            logits = model.eval()(ids, last_only=True)[0, -1]
        assert tokenizer.decode([int(logits.argmax())]) == wanted
        assert logits.argmax() < 262_144


def test_saved_as_a_directory_it_is_the_same(tmp_path: Path) -> None:
    """GGUF -> Hugging Face directory -> here: equal tensors (small file, quantised)."""
    source = open_checkpoint(write_gguf(tmp_path / "m.gguf", Kind.Q8_0))
    save_checkpoint(tmp_path / "m", source.config, ((n, source.get(n)) for n in source.names()))
    again = open_checkpoint(tmp_path / "m")
    assert again.config.text == source.config.text and again.config.eos_token_ids == (1, 6)
    assert all(torch.equal(again.get(n), source.get(n)) for n in source.names())
