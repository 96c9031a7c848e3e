"""A smaller vocabulary: the tokens that some texts need, with everything that keeps the rest working.

Byte-pair encoding replays merges. A text comes out as before if every piece that its merging passes through
is still there with its merge; pieces that are gone only take competitors away. So the kept set holds, besides
the tokens of the texts, the pieces each of them is built from, and all merges among kept pieces in their old
order. Any other text falls back to bytes.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seavlm.errors import SeavlmError
from seavlm.text.chat import OWN_TEXTS
from seavlm.text.language import LANGUAGES
from seavlm.text.tokenizer import BOS, MASK, SPACE, Tokenizer

_TEXTS_AT_ONCE = 4096
# The option letters and digits of every language: answers are made of them, whatever the texts hold.
_ALWAYS = (
    *string.printable,
    *OWN_TEXTS,
    *("".join((*lang.option_letters, *lang.digits)) for lang in LANGUAGES.values()),
)


def trim_tokenizer(src_dir: str | Path, out_dir: str | Path, texts: Iterable[str]) -> list[int]:
    """Writes to `out_dir` the tokenizer of `src_dir` (or of a .gguf file) cut down to what `texts` need.

    Returns the kept old ids, in the order of the new ones: new id i was `kept[i]`, so an embedding is trimmed
    by `embedding[kept]`. The order is the old one; <pad>, <eos>, <bos>, <unk> stay 0 to 3. Kept beside the
    tokens of `texts`: control tokens, the 256 bytes, ASCII characters, runs of newlines, and what chat
    prompts need.
    """
    source = Path(src_dir)
    tokenizer = Tokenizer.from_gguf(source) if source.suffix == ".gguf" else Tokenizer.from_dir(source)
    spec = tokenizer.spec()
    kept = kept_ids(tokenizer, spec, texts)
    trimmed = Tokenizer(
        json.dumps(_trim_spec(spec, kept), ensure_ascii=False),
        config=tokenizer.config,
        chat_template=tokenizer.chat_template,
    )
    trimmed.save(out_dir)
    return kept


def kept_ids(tokenizer: Tokenizer, spec: Mapping[str, Any], texts: Iterable[str]) -> list[int]:
    """The ids, ascending, of the tokens that `texts` need (see the module's text)."""
    vocab: dict[str, int] = spec["model"]["vocab"]
    used: set[int] = {i for ids in tokenizer.encode_batch(_ALWAYS) for i in ids}
    for batch in _batches(texts):
        for ids in tokenizer.encode_batch(batch):
            used.update(ids)

    ranks = {(left, right): rank for rank, (left, right) in enumerate(spec["model"]["merges"])}
    pieces = {i: piece for piece, i in vocab.items()} | {t["id"]: t["content"] for t in spec["added_tokens"]}
    for token_id in tuple(used):
        used.update(vocab[piece] for piece in _ancestors(pieces[token_id], ranks) if piece in vocab)
    used.update(tokenizer.specials.values())
    used.update(i for piece, i in vocab.items() if piece == MASK or piece.startswith("<0x"))
    used.update(vocab[piece] for letter in string.printable if (piece := letter.replace(" ", SPACE)) in vocab)
    used.update(i for piece, i in vocab.items() if not piece.strip("\n"))
    return sorted(used)


def _ancestors(piece: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """All pieces that byte-pair encoding passes through while it makes `piece` out of characters.

    Inside a text the same merges happen: none crosses the border of a token that came out whole.
    """
    parts = list(piece)
    seen = set(parts)
    while len(parts) > 1:
        rank, at = min((ranks.get((parts[i], parts[i + 1]), len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break  # an added token (<table>): matched as a whole, never merged
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return seen


def _trim_spec(spec: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """`spec` with only the rows `kept`, renumbered."""
    new_id = {old: new for new, old in enumerate(kept)}
    model = spec["model"]
    vocab = {piece: new_id[old] for piece, old in model["vocab"].items() if old in new_id}
    merges = [[a, b] for a, b in model["merges"] if a in vocab and b in vocab and a + b in vocab]
    added = [{**token, "id": new_id[token["id"]]} for token in spec["added_tokens"] if token["id"] in new_id]
    post = json.loads(json.dumps(spec.get("post_processor")))
    for name, token in (post or {}).get("special_tokens", {}).items():
        token["ids"] = [vocab[piece] for piece in token["tokens"]]
        if name == BOS and token["ids"] != [vocab[BOS]]:
            raise SeavlmError(
                "The tokenizer puts something else than <bos> in front", hint="Use a Gemma 3 tokenizer."
            )
    return {
        **spec,
        "added_tokens": added,
        "post_processor": post,
        "model": {**model, "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": merges},
    }


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _TEXTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
