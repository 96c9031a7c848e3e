"""The whole model: sizes, packing, what forward returns, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seavlm.engine.cache import KVCache
from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.parity import IMAGE, SIX_TO_ONE, pad, random_model, small_config, text_ids, with_images


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return random_model(small_config(SIX_TO_ONE))


@pytest.fixture(scope="module")
def prompt() -> tuple[Tensor, Tensor]:
    """ids [3, 40] and the 2, 0 and 1 pictures of its rows."""
    return with_images(text_ids(3, 40), (0, 3), (0, 15), (2, 6))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("270m", 268_098_176),
        ("1b", 999_885_952),
        ("4b", 4_300_079_472),
        ("12b", 12_187_325_040),
        ("27b", 27_432_406_640),
    ],
)
def test_sizes_without_memory(size: str, parameters: int) -> None:
    """Google's sizes, counted on the meta device; the tied head counts once."""
    model = Gemma3(Gemma3Config.named(size), device="meta", dtype=torch.bfloat16)
    weights = dict(model.named_parameters())
    assert sum(w.numel() for w in weights.values()) == parameters
    assert {(w.device.type, w.dtype) for w in weights.values()} == {("meta", torch.bfloat16)}
    assert not dict(model.named_buffers())  # nothing that a checkpoint would not fill
    if size == "27b":
        vision = sum(w.numel() for n, w in weights.items() if n.startswith("vision_tower."))
        embedding = weights["language_model.embed_tokens.weight"].numel()
        assert vision == 416_866_032
        assert embedding == 262_208 * 5376 == 1_409_630_208


def test_meta_model_can_be_filled(model: Gemma3) -> None:
    """What was built on meta answers the same once the weights are in: nothing else is needed."""
    empty = Gemma3(model.config, device="meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = text_ids(1, 20)
    with torch.no_grad():
        assert torch.equal(empty(ids), model(ids))


def test_forward_on_meta_gives_shapes() -> None:
    """Even 27B says what it would return, and leaves no trace of having been asked."""
    model = Gemma3(Gemma3Config.named("27b"), device="meta", dtype=torch.bfloat16)
    ids = torch.empty(2, 300, dtype=torch.int64, device="meta")
    logits = model(ids, pixel_values=torch.empty(1, 3, 896, 896, device="meta"))
    assert logits.shape == (2, 300, 262_208) and logits.dtype == torch.bfloat16
    assert model.encode_images(torch.empty(1, 3, 896, 896, device="meta")).shape == (1, 256, 5376)


def test_parameter_names(model: Gemma3) -> None:
    names = set(model.state_dict())
    for name in (
        "language_model.embed_tokens.weight",
        "language_model.layers.6.self_attn.q_norm.weight",
        "language_model.layers.0.self_attn.o_proj.weight",
        "language_model.layers.0.mlp.gate_proj.weight",
        "language_model.layers.0.pre_feedforward_layernorm.weight",
        "language_model.norm.weight",
        "vision_tower.embeddings.patch_embedding.bias",
        "vision_tower.embeddings.position_embedding.weight",
        "vision_tower.encoder.layers.1.self_attn.out_proj.bias",
        "vision_tower.encoder.layers.0.mlp.fc2.weight",
        "vision_tower.post_layernorm.bias",
        "multi_modal_projector.mm_input_projection_weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
    ):
        assert name in names
    assert not any(name.endswith("proj.bias") for name in names if name.startswith("language_model"))
    assert not any("head" in name for name in names)


def test_fresh_weights_train() -> None:
    """A new model starts at the entropy of a guess, and every parameter gets a gradient."""
    torch.manual_seed(0)
    model = Gemma3(small_config(SIX_TO_ONE))
    ids, pixels = with_images(text_ids(3, 40), (0, 3), (0, 15), (2, 6))
    target = torch.where(ids == IMAGE, -100, ids).flatten()
    logits = model(ids, pixel_values=pixels)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, target.view(3, 40)[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(300.0).log().item()) < 0.5
    loss.backward()
    still = [n for n, w in model.named_parameters() if w.grad is None or not w.grad.abs().sum() > 0]
    assert [n for n in still if not n.endswith("k_proj.bias")] == []  # softmax ignores a bias of all keys


def test_packed_is_unpacked_with_gradients(model: Gemma3, prompt: tuple[Tensor, Tensor]) -> None:
    """Three samples in one row: the logits, and the gradients of the embeddings, of each of them alone."""
    ids, pixels = prompt
    rows, owned = [ids[0], ids[1, :17], ids[2, :28]], [pixels[:2], None, pixels[2:]]
    segments = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)])[None]
    table = model.language_model.embed_tokens.weight
    packed = model(torch.cat(rows)[None], pixel_values=pixels, segment_ids=segments)
    alone = torch.cat([model(r[None], pixel_values=own) for r, own in zip(rows, owned, strict=True)], dim=1)
    assert (packed - alone).abs().max() <= 1e-5
    gradients = [torch.autograd.grad(x.logsumexp(-1).sum(), table)[0] for x in (packed, alone)]
    assert torch.allclose(*gradients, atol=1e-4)


def test_padding_of_packed_rows_is_inert(model: Gemma3) -> None:
    """A tail of segment -1, or of any unused number, changes nothing and holds no NaN."""
    ids = text_ids(1, 30)
    for tail in (-1, 7):
        segments = torch.cat([torch.zeros(1, 20), torch.full((1, 10), tail)], dim=1).long()
        with torch.no_grad():
            packed, alone = model(ids, segment_ids=segments), model(ids[:, :20])
        assert packed.isfinite().all()
        assert torch.allclose(packed[:, :20], alone, atol=1e-5)


def test_which_logits(model: Gemma3, prompt: tuple[Tensor, Tensor]) -> None:
    ids, pixels = prompt
    wanted = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    with torch.no_grad():
        every = model(ids, pixel_values=pixels)
        assert every.shape == (3, 40, 300)
        assert torch.allclose(model(ids, pixel_values=pixels, logits_mask=wanted), every[wanted], atol=1e-5)
        assert torch.allclose(model(ids, pixel_values=pixels, last_only=True), every[:, -1:], atol=1e-5)
        hidden = model(ids, pixel_values=pixels, logits_mask=wanted, return_hidden=True)
        assert torch.allclose(hidden @ model.language_model.embed_tokens.weight.T, every[wanted], atol=1e-5)


def test_embeddings_of_pictures_can_be_kept(model: Gemma3, prompt: tuple[Tensor, Tensor]) -> None:
    ids, pixels = prompt
    with torch.no_grad():
        kept = torch.cat([model.encode_images(p[None]) for p in pixels])
        assert torch.allclose(model(ids, image_embeds=kept), model(ids, pixel_values=pixels), atol=1e-5)


def test_placeholder_id_needs_no_row(prompt: tuple[Tensor, Tensor]) -> None:
    """A placeholder past the vocabulary is fine: its embedding is never read."""
    model = random_model(small_config())
    ids, pixels = prompt
    far = Gemma3(Gemma3Config.from_dict(model.config.to_dict() | {"image_token_index": 5000}))
    far.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved = far(torch.where(ids == IMAGE, 5000, ids), pixel_values=pixels)
        assert torch.equal(moved, model(ids, pixel_values=pixels))


def test_rows_past_the_tokenizer_have_logits(model: Gemma3) -> None:
    """Logits cover every row of the table; leaving some out is the sampler's business."""
    logits = model(text_ids(1, 4))
    assert logits.shape[-1] == model.config.text.vocab_size
    assert logits[..., -10:].abs().min() > 0


def test_one_graph(model: Gemma3, prompt: tuple[Tensor, Tensor]) -> None:
    """torch.compile sees the forward as a single graph, pictures and packing included."""
    ids, pixels = prompt
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    segments = torch.zeros_like(ids)
    with torch.no_grad():
        got = compiled(ids, pixel_values=pixels, segment_ids=segments)
        assert torch.allclose(got, model(ids, pixel_values=pixels), atol=1e-5)


def test_fp16_is_refused(model: Gemma3) -> None:
    with pytest.raises(SeavlmError, match=r"float16 .*65504.*bfloat16"):
        Gemma3(model.config, dtype=torch.float16)
    halved = Gemma3(model.config).half()
    with pytest.raises(SeavlmError, match="65504"):
        halved(text_ids(1, 4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, ids, px: m(ids[0], pixel_values=px), ("(40,)", "(batch, tokens)")),
        (lambda m, ids, px: m(ids[:, :0]), ("(3, 0)", "at least one")),
        (lambda m, ids, px: m(ids.float(), pixel_values=px), ("float32",)),
        (lambda m, ids, px: m(ids), ("27 image placeholder", "0 pictures")),
        (lambda m, ids, px: m(ids, pixel_values=px[:2]), ("27", "2 pictures", "18")),
        (lambda m, ids, px: m(ids[1:], pixel_values=px), ("9 image", "3 pictures", "27")),
        (lambda m, ids, px: m(ids, pixel_values=px[:, :, :40]), ("(3, 3, 40, 48)", "(N, 3, 48, 48)")),
        (lambda m, ids, px: m(ids, pixel_values=px[0]), ("(3, 48, 48)", "(N, 3, 48, 48)")),
        (lambda m, ids, px: m(ids, image_embeds=torch.zeros(3, 8, 48)), ("(3, 8, 48)", "(N, 9, 48)")),
        (lambda m, ids, px: m(ids, pixel_values=px, image_embeds=torch.zeros(3, 9, 48)), ("both",)),
        (lambda m, ids, px: m(text_ids(1, 4) + 300), ("outside", "300 rows")),
        (lambda m, ids, px: m(torch.tensor([[5, -3]])), ("-3", "300 rows")),
        (lambda m, ids, px: m(ids, pixel_values=px, segment_ids=ids[:, 1:]), ("segment_ids", "(3, 39)")),
        (lambda m, ids, px: m(ids, pixel_values=px, attention_mask=ids[:1]), ("attention_mask", "(1, 40)")),
        (lambda m, ids, px: m(ids, cache=KVCache(m.config, 3, 39), pixel_values=px), ("39", "40")),
        (lambda m, ids, px: m(ids, cache=KVCache(m.config, 2, 99), pixel_values=px), ("3 rows", "of 2")),
    ],
)
def test_inputs_that_do_not_fit(
    model: Gemma3, prompt: tuple[Tensor, Tensor], call, words: tuple[str, ...]
) -> None:
    """One line that names the numbers."""
    with pytest.raises(SeavlmError) as error:
        call(model, *prompt)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_picture_stays_in_its_row(model: Gemma3, prompt: tuple[Tensor, Tensor]) -> None:
    """27 placeholders in all, but one row holds a part of a picture."""
    ids, pixels = prompt
    ids = ids.clone()
    ids[0, 3], ids[1, 0] = 5, IMAGE
    with pytest.raises(SeavlmError, match=r"row 0 has 17 .*multiple of 9"):
        model(ids, pixel_values=pixels)


def test_text_only_model_takes_no_pictures() -> None:
    model = Gemma3(small_config(vision=False))
    with pytest.raises(SeavlmError, match="text-only"):
        model(text_ids(1, 4), pixel_values=torch.zeros(1, 3, 48, 48))
    with pytest.raises(SeavlmError, match="text-only"):
        model(text_ids(1, 4), image_embeds=torch.zeros(1, 9, 48))


def test_batch_is_rows_alone(model: Gemma3, prompt: tuple[Tensor, Tensor]) -> None:
    """Padding on either side leaves each row as it is alone."""
    ids, pixels = prompt
    rows, owned = [ids[0], ids[1, :17], ids[2, :28]], [pixels[:2], None, pixels[2:]]
    with torch.no_grad():
        alone = torch.cat([model(r[None], pixel_values=own)[0] for r, own in zip(rows, owned, strict=True)])
        for side in ("left", "right"):
            batch, mask = pad(rows, side)
            together = model(batch, pixel_values=pixels, attention_mask=mask)
            assert together.isfinite().all()
            assert torch.allclose(together[mask.bool()], alone, atol=1e-5)
