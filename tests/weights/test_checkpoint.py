"""Checkpoints in and out: the same numbers on both sides, and errors that say which file and what to do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.weights import checkpoint as ckpt
from seavlm.weights.checkpoint import load_into, open_checkpoint, save_checkpoint
from seavlm.weights.names import EMBEDDING, shapes

IMAGE = [288, 290, 290, 290, 290, 289]
FFN = "language_model.layers.1.mlp.up_proj.weight"


def inputs(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if kind == "text":
        return {"input_ids": torch.randint(4, 280, (2, 20))}
    ids = torch.tensor([[2, 5, *IMAGE, 9, *IMAGE, *range(20, 26)]])
    return {"input_ids": ids, "pixel_values": torch.rand(2, 3, 28, 28) * 2 - 1}


def their_logits(model: Any, kind: str) -> torch.Tensor:
    given = inputs(kind)
    if kind == "vl":
        given["token_type_ids"] = (given["input_ids"] == 290).long()
    with torch.no_grad():
        return model(**given).logits


def our_logits(directory: Path, kind: str) -> torch.Tensor:
    checkpoint = open_checkpoint(directory)
    model = Gemma3(checkpoint.config, device="meta")
    load_into(model, checkpoint)
    with torch.no_grad():
        return model.eval()(**inputs(kind))


def reload(directory: Path, kind: str) -> Any:
    import transformers

    cls = transformers.AutoModelForImageTextToText if kind == "vl" else transformers.AutoModelForCausalLM
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def tensors_of(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    checkpoint = open_checkpoint(directory)
    return ((name, checkpoint.get(name)) for name in checkpoint.names())


def rewrite(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> Path:
    """A copy of the directory `source` with its tensors, under their names on disk, changed."""
    shutil.copytree(source, out)
    save_file(change(load_file(out / ckpt.SINGLE)), out / ckpt.SINGLE, {"format": "pt"})
    return out


def refused(call: Callable[[], Any], *words: str) -> SeavlmError:
    with pytest.raises(SeavlmError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and error.value.hint, text
    for word in words:
        assert word in text, text
    return error.value


# --- the same numbers on both sides


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_theirs_loads_here(references: dict[str, Any], kind: str, shard: str, tmp_path: Path) -> None:
    references[kind].save_pretrained(tmp_path / "m", max_shard_size=shard)
    assert (tmp_path / "m" / ckpt.INDEX).exists() == (shard == "40KB")
    difference = our_logits(tmp_path / "m", kind) - their_logits(references[kind], kind)
    assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("shard", [5e9, 40e3])
def test_ours_loads_there(
    references: dict[str, Any], originals: dict[str, Path], kind: str, shard: float, tmp_path: Path
) -> None:
    config = open_checkpoint(originals[kind]).config
    save_checkpoint(tmp_path / "m", config, tensors_of(originals[kind]), max_shard_bytes=shard)
    assert (tmp_path / "m" / ckpt.INDEX).exists() == (shard == 40e3)
    again = reload(tmp_path / "m", kind)
    assert torch.equal(their_logits(again, kind), their_logits(references[kind], kind))
    assert (our_logits(tmp_path / "m", kind) - their_logits(again, kind)).abs().max() <= 1e-4
    ours, theirs = (m.config.get_text_config().to_dict() for m in (again, references[kind]))
    # The pattern only names the layer types, which are compared, for older readers.
    compared = {key for key in ours if "sliding_window_pattern" not in key}
    compared -= {"eos_token_id", "architectures", "dtype", "_name_or_path"}
    assert {key: ours.get(key) for key in compared} == {key: theirs.get(key) for key in compared}


def test_index_is_transformers_and_names_are_googles(
    references: dict[str, Any], originals: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    references[kind].save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    config = open_checkpoint(originals[kind]).config
    save_checkpoint(tmp_path / "ours", config, tensors_of(originals[kind]), max_shard_bytes=40e3)
    theirs, ours = (json.loads((tmp_path / d / ckpt.INDEX).read_text()) for d in ("theirs", "ours"))
    assert theirs["metadata"] == ours["metadata"]
    # transformers 5 drops the `vision_model.` that Google's files have, and that every reader knows.
    named = [name.replace("vision_tower.", "vision_tower.vision_model.", 1) for name in theirs["weight_map"]]
    assert named == list(ours["weight_map"])
    for file in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(ours["weight_map"][name] == file.name for name in opened.keys())  # noqa: SIM118
            assert file.stat().st_size < 40e3 + 5000 or len(opened.keys()) == 1


@pytest.mark.parametrize("family", ["published", "nested", "nested, flat tower"])
def test_every_prefix_family(originals: dict[str, Path], family: str, tmp_path: Path) -> None:
    def spelled(name: str) -> str:
        if family != "nested, flat tower":
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if family == "published":
            return name
        return "model." + name.replace("language_model.model.", "language_model.", 1)

    directory = rewrite(
        originals["vl"], tmp_path / "m", lambda tensors: {spelled(n): t for n, t in tensors.items()}
    )
    wanted = dict(tensors_of(originals["vl"]))
    found = dict(tensors_of(directory))
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_bfloat16(originals: dict[str, Path], kind: str, tmp_path: Path) -> None:
    config = open_checkpoint(originals[kind]).config
    save_checkpoint(tmp_path / "m", config, tensors_of(originals[kind]), dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config.dtype == "bfloat16" and checkpoint.dtype(EMBEDDING) == torch.bfloat16
    for name, tensor in tensors_of(originals[kind]):
        assert torch.equal(checkpoint.get(name), tensor.bfloat16())
    assert reload(tmp_path / "m", kind).dtype == torch.bfloat16
    model = Gemma3(checkpoint.config, device="meta")
    load_into(model, checkpoint, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_processor_and_generate(material: Any, tmp_path: Path) -> None:
    """The real tokenizer, a tiny model: transformers' processor and `generate` need our directory alone."""
    import transformers
    from PIL import Image

    from seavlm.model.config import TextConfig, VisionConfig

    config = Gemma3Config(
        text=TextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=8, sliding_window=8),
        vision=VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                            image_size=28, patch_size=7),
        mm_tokens_per_image=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3(config).eval()
    out = tmp_path / "m"
    save_checkpoint(out, config, model.state_dict().items(), copy_from=material.tokenizer_dir)
    processor = transformers.AutoProcessor.from_pretrained(out)
    picture = Image.effect_noise((50, 30), 80).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert (batch["input_ids"] == config.image_token_index).sum() == 4
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    theirs = reload(out, "vl")
    with torch.no_grad():
        wanted = theirs(**batch).logits
        ours = model(batch["input_ids"], pixel_values=batch["pixel_values"])
    assert (ours - wanted).abs().max() <= 1e-4
    assert theirs.generation_config.eos_token_id == [1, 106]
    assert theirs.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] <= ours.shape[1] + 2


# --- reading


def test_reading_is_lazy(tmp_path: Path) -> None:
    """2 GB are opened, and a norm is read, without their bytes (a hole in the file)."""
    config = Gemma3Config.named("1b")
    header, offset = {}, 0
    for name, shape in shapes(config).items():
        size = 2 * torch.Size(shape).numel()
        header["model." + name.removeprefix("language_model.")] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(header).encode()
    with open(tmp_path / ckpt.SINGLE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    before = _resident()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape(EMBEDDING) == (262_144, 1152)
    assert checkpoint.get(EMBEDDING)[100:110].sum() == 0
    assert checkpoint.get("language_model.norm.weight").shape == (1152,)
    assert offset > 1.9e9 and _resident() - before < 100e6


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_tied_head_stored_twice(originals: dict[str, Path], tmp_path: Path) -> None:
    key = "language_model.model.embed_tokens.weight"
    same = rewrite(originals["vl"], tmp_path / "same", lambda t: t | {"lm_head.weight": t[key].clone()})
    assert [n for n, _ in tensors_of(same)] == [n for n, _ in tensors_of(originals["vl"])]
    other = rewrite(
        originals["vl"], tmp_path / "other", lambda t: t | {"language_model.lm_head.weight": t[key] + 1}
    )
    checkpoint = open_checkpoint(other)
    for _ in range(2):
        refused(lambda: checkpoint.get(EMBEDDING), "language_model.lm_head.weight", "Tie")


def test_stored_dtype_wins_over_the_configs(originals: dict[str, Path], tmp_path: Path) -> None:
    half = rewrite(originals["text"], tmp_path / "m", lambda t: {n: x.bfloat16() for n, x in t.items()})
    assert json.loads((half / "config.json").read_text())["dtype"] == "float32"
    assert open_checkpoint(half).config.dtype == "bfloat16"


# --- broken checkpoints


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    config = open_checkpoint(originals["vl"]).config
    save_checkpoint(tmp_path / "sharded", config, tensors_of(originals["vl"]), max_shard_bytes=60e3)
    return tmp_path / "sharded"


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refused(lambda: open_checkpoint(sharded), victim.name, "missing files")


def test_shard_without_a_promised_tensor(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    tensors = load_file(victim)
    gone = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != gone}, victim)
    refused(lambda: open_checkpoint(sharded), gone, victim.name)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    refused(lambda: open_checkpoint(sharded), "twice", name, first.name, second.name)


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "..", "x.bin", 3],
)
def test_index_stays_in_its_directory(sharded: Path, file: Any) -> None:
    path = sharded / ckpt.INDEX
    index = json.loads(path.read_text())
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    index["weight_map"][next(iter(index["weight_map"]))] = file
    path.write_text(json.dumps(index))
    refused(lambda: open_checkpoint(sharded), repr(file))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', "\x00"])
def test_broken_index(sharded: Path, content: str) -> None:
    (sharded / ckpt.INDEX).write_text(content)
    refused(lambda: open_checkpoint(sharded), ckpt.INDEX)


def test_missing_unexpected_and_misshapen(originals: dict[str, Path], tmp_path: Path) -> None:
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    lacking = rewrite(originals["vl"], tmp_path / "a", lambda t: {n: x for n, x in t.items() if n != key})
    refused(lambda: open_checkpoint(lacking), "1 missing", FFN)
    extra = rewrite(originals["vl"], tmp_path / "b", lambda t: t | {"adapter.weight": torch.zeros(2)})
    refused(lambda: open_checkpoint(extra), "1 unexpected", "adapter.weight")
    shaped = rewrite(originals["vl"], tmp_path / "c", lambda t: t | {key: torch.zeros(64, 47)})
    refused(lambda: open_checkpoint(shaped), FFN, "[64, 47]", "[64, 48]")


def test_a_file_beside_the_shards(originals: dict[str, Path], tmp_path: Path) -> None:
    """transformers would load the file, others what the index names."""
    shutil.copytree(originals["text"], tmp_path / "m")
    names = list(load_file(tmp_path / "m" / ckpt.SINGLE))
    shutil.copy(tmp_path / "m" / ckpt.SINGLE, tmp_path / "m" / "model-00001-of-00001.safetensors")
    for file in ("model-00001-of-00001.safetensors", ckpt.SINGLE):
        (tmp_path / "m" / ckpt.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
        if file == ckpt.SINGLE:
            open_checkpoint(tmp_path / "m")
        else:
            refused(lambda: open_checkpoint(tmp_path / "m"), ckpt.SINGLE, "by", ckpt.INDEX)


def test_one_tensor_under_two_names(originals: dict[str, Path], tmp_path: Path) -> None:
    key = "language_model.model.norm.weight"
    double = rewrite(
        originals["vl"], tmp_path / "m", lambda t: t | {"model.language_model.norm.weight": t[key].clone()}
    )
    refused(lambda: open_checkpoint(double), "twice", key, "model.language_model.norm.weight")


def test_truncated_at_every_kind_of_place(originals: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(originals["vl"], tmp_path / "m")
    path = tmp_path / "m" / ckpt.SINGLE
    data = path.read_bytes()
    for keep in (0, 4, 8, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        refused(lambda: open_checkpoint(tmp_path / "m"), ckpt.SINGLE, "cut off", "Copy or download")


def _with_header(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"not json", "broken header"),
        (b"[]", "broken header"),
        (b'{"model.norm.weight": 3}', "broken header"),
        (b'{"model.norm.weight": {"dtype": "F32", "shape": [2]}}', "broken header"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', "twice"),
        (b'{"a\\u001b[2J": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', r"'a\x1b[2J'"),
        (b'{"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}', "8 bytes"),
        (b'{"model.norm.weight": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}', "F8_E4M3"),
        (b'{"model.norm.weight": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}', "bytes"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
            "'b' is at byte 4, where 'a' ends at 8",
        ),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "the end is at byte 64"),
    ],
)
def test_broken_header(originals: dict[str, Path], tmp_path: Path, header: bytes, word: str) -> None:
    shutil.copytree(originals["text"], tmp_path / "m")
    _with_header(tmp_path / "m" / ckpt.SINGLE, header)
    refused(lambda: open_checkpoint(tmp_path / "m"), ckpt.SINGLE, word)


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(originals: dict[str, Path], tmp_path: Path, file: str) -> None:
    shutil.copytree(originals["text"], tmp_path / "m")
    (tmp_path / "m" / ckpt.SINGLE).unlink()
    trap = pickle.dumps(Trap(str(tmp_path / "trapped")))
    (tmp_path / "m" / file).write_bytes(trap)
    refused(lambda: open_checkpoint(tmp_path / "m"), file, "pickle", "safetensors")
    assert not (tmp_path / "trapped").exists()
    pickle.loads(trap)  # it would have worked
    assert (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": "x"}, "quantised"),
        ({"model_type": "llama"}, "llama"),
    ],
)
def test_configs_that_are_not_plain_gemma(
    originals: dict[str, Path], tmp_path: Path, extra: dict[str, Any], word: str
) -> None:
    shutil.copytree(originals["text"], tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    refused(lambda: open_checkpoint(tmp_path / "m"), word)


def test_places_that_hold_no_checkpoint(originals: dict[str, Path], tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(tmp_path / "none"), "none", "directory")
    refused(lambda: open_checkpoint(originals["text"] / ckpt.SINGLE), "directory")
    refused(lambda: open_checkpoint(tmp_path), "config.json")
    shutil.copy(originals["text"] / "config.json", tmp_path)
    refused(lambda: open_checkpoint(tmp_path), ckpt.SINGLE, ckpt.INDEX)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(lambda: open_checkpoint(tmp_path), "x.gguf")


# --- into a model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_refused_by_name(originals: dict[str, Path], tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = value
        return tensors

    checkpoint = open_checkpoint(rewrite(originals["vl"], tmp_path / "m", spoil))
    for device in ("meta", "cpu"):
        model = Gemma3(checkpoint.config, device=device)
        refused(lambda model=model: load_into(model, checkpoint), FFN, "NaN or infinity")


def test_float16_is_refused(originals: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(originals["text"])
    model = Gemma3(checkpoint.config, device="meta")
    refused(lambda: load_into(model, checkpoint, dtype=torch.float16), "float16", "bfloat16")


def test_stored_float16_is_widened(originals: dict[str, Path], tmp_path: Path) -> None:
    half = rewrite(originals["text"], tmp_path / "m", lambda t: {n: x.half() for n, x in t.items()})
    checkpoint = open_checkpoint(half)
    model = Gemma3(checkpoint.config, device="meta")
    load_into(model, checkpoint, dtype=torch.float32)
    for name, tensor in tensors_of(originals["text"]):
        assert torch.equal(model.get_parameter(name), tensor.half().float())


def test_another_model_is_refused(originals: dict[str, Path]) -> None:
    text, vl = open_checkpoint(originals["text"]), open_checkpoint(originals["vl"])
    refused(lambda: load_into(Gemma3(vl.config, device="meta"), text), "missing", "vision_tower.")
    refused(lambda: load_into(Gemma3(text.config, device="meta"), vl), "unexpected", "vision_tower.")


def test_parameters_own_their_memory(originals: dict[str, Path], tmp_path: Path) -> None:
    """Training a loaded model leaves the file, and what else reads it, alone."""
    shutil.copytree(originals["text"], tmp_path / "m")
    before = (tmp_path / "m" / ckpt.SINGLE).read_bytes()
    checkpoint = open_checkpoint(tmp_path / "m")
    for device in ("meta", "cpu"):
        model = Gemma3(checkpoint.config, device=device)
        frozen = model.language_model.norm.weight.requires_grad_(False)
        load_into(model, checkpoint)
        assert model.language_model.norm.weight.requires_grad == frozen.requires_grad
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert checkpoint.get(EMBEDDING).abs().sum() > 0
    assert (tmp_path / "m" / ckpt.SINGLE).read_bytes() == before


# --- writing


@pytest.fixture
def small(originals: dict[str, Path]) -> tuple[Gemma3Config, dict[str, torch.Tensor]]:
    return open_checkpoint(originals["text"]).config, dict(tensors_of(originals["text"]))


def test_any_order_gives_the_same_bytes(small: Any, tmp_path: Path) -> None:
    config, tensors = small
    for place, items in (("a", list(tensors.items())), ("b", list(tensors.items())[::-1])):
        save_checkpoint(tmp_path / place, config, iter(items), max_shard_bytes=50e3)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir()) and len(files) > 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_one_tensor_at_a_time(small: Any, tmp_path: Path) -> None:
    """Each tensor can be dropped once it is given: the writer keeps none."""
    import weakref

    config, tensors = small
    alive: list[weakref.ref] = []

    def fresh() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy
            assert sum(ref() is not None for ref in alive) <= 1

    save_checkpoint(tmp_path / "m", config, fresh())
    assert len(alive) == len(tensors)


def _fail_at(tensors: dict[str, torch.Tensor], error: Exception) -> Iterator[tuple[str, torch.Tensor]]:
    for i, item in enumerate(tensors.items()):
        if i == 7:
            raise error
        yield item


def _spoiled(tensors: dict[str, torch.Tensor], how: str) -> Any:
    names = list(tensors)
    if how == "missing":
        return list(tensors.items())[:-1]
    if how == "twice":
        return [*tensors.items(), (names[3], tensors[names[3]])]
    change = {
        "unknown": {"model.norm.weight": torch.zeros(48)},
        "shape": {names[1]: torch.zeros(3)},
        "nan": {names[5]: tensors[names[5]] * float("nan")},
    }[how]
    return (tensors | change).items()


@pytest.mark.parametrize("how", ["missing", "twice", "unknown", "shape", "nan", "interrupted", "disk full"])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_nothing(small: Any, tmp_path: Path, how: str, existing: bool) -> None:
    config, tensors = small
    out = tmp_path / "m"
    if existing:
        save_checkpoint(out, config, tensors.items())
    before = {p.name: p.read_bytes() for p in out.iterdir()} if existing else None
    given: Any
    if how == "interrupted":
        given = _fail_at(tensors, KeyboardInterrupt())  # type: ignore[arg-type]
    elif how == "disk full":
        given = _fail_at(tensors, OSError(errno.ENOSPC, "No space left on device"))
    else:
        given = _spoiled(tensors, how)
    with pytest.raises(KeyboardInterrupt if how == "interrupted" else SeavlmError) as error:
        save_checkpoint(out, config, given)
    if how != "interrupted":
        assert "\n" not in str(error.value)
        assert {"nan": "NaN", "disk full": "full", "shape": "[3]"}.get(how, "") in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == ({"m"} if existing else set())
    if existing:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_no_room_is_known_before_writing(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = small
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(lambda: save_checkpoint(tmp_path / "m", config, tensors.items()), "1,000 bytes free")
    assert not list(tmp_path.iterdir())


def test_existing_directory_keeps_its_other_files(small: Any, tmp_path: Path) -> None:
    config, tensors = small
    out = tmp_path / "m"
    save_checkpoint(out, config, tensors.items(), max_shard_bytes=50e3)
    (out / "README.md").write_text("mine")
    save_checkpoint(out, config, ((n, open_checkpoint(out).get(n)) for n in tensors))  # from itself
    assert {p.name for p in out.iterdir()} == {"README.md", "config.json", ckpt.GENERATION, ckpt.SINGLE}
    assert (out / "README.md").read_text() == "mine"
    assert all(torch.equal(open_checkpoint(out).get(n), t) for n, t in tensors.items())


def test_places_not_written_to(small: Any, tmp_path: Path) -> None:
    config, tensors = small
    (tmp_path / "file").write_text("x")
    refused(lambda: save_checkpoint(tmp_path / "file", config, tensors.items()), "is a file")
    (tmp_path / "d" / "sub").mkdir(parents=True)
    refused(lambda: save_checkpoint(tmp_path / "d", config, tensors.items()), "directories")
    refused(lambda: save_checkpoint(tmp_path / "m", config, tensors.items(), dtype=torch.float16), "float16")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "d"}


def test_copied_files(small: Any, tmp_path: Path) -> None:
    config, tensors = small
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", ckpt.GENERATION, "weights.bin", "README.md"):
        (source / name).write_text(f'"{name}"')
    save_checkpoint(tmp_path / "m", config, tensors.items(), copy_from=source)
    copied = {p.name for p in (tmp_path / "m").iterdir()}
    assert copied == {
        "config.json", ckpt.GENERATION, ckpt.SINGLE, "tokenizer.json", "chat_template.jinja"
    }  # fmt: skip
    assert (tmp_path / "m" / ckpt.GENERATION).read_text() == f'"{ckpt.GENERATION}"'


def test_shards_of_a_large_model() -> None:
    wanted = shapes(Gemma3Config.named("27b"))
    plan = ckpt.plan_shards(wanted, torch.bfloat16, 5e9)
    assert next(iter(plan)) == "model-00001-of-00012.safetensors" and len(plan) == 12
    sizes = [sum(2 * torch.Size(wanted[name]).numel() for name in group) for group in plan.values()]
    assert max(sizes) <= 5e9 and sum(sizes) == 2 * 27_432_406_640
