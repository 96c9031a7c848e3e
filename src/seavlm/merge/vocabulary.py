"""Tokens of a merge: do the parents' vocabularies agree, and if not, which row of which parent holds what.

`tokenizer_source: base`, `union` or a model; or mergekit's `tokenizer`, with a say for single tokens:

    tokenizer:
      source: union
      tokens:
        <|im_start|>: {source: chatty, force: true}      # its row, in every parent
        <tool>: {source: {kind: model_token, model: base, token: "{"}}     # new: as another's row
        <unused0>: {source: {kind: zero}}
      pad_to_multiple_of: 64
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from seavlm.errors import SeavlmError, nearest
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import FileCheckpoint

Named = Callable[[Any, str], int]  # (a model reference, where it was written) -> the parent's index


@dataclass(frozen=True)
class Given:
    """Where a token's row comes from: a parent's row of `token` (a text or an id); zeros without a parent.
    force: also in parents that have a row of their own.
    """

    parent: int | None
    token: str | int
    force: bool


@dataclass(frozen=True)
class Wish:
    """What a recipe says of tokens. source: "base", "union" or a parent's index; None: rows as they are."""

    source: str | int | None = None
    tokens: dict[str, Given] = field(default_factory=dict)
    multiple: int = 1


@dataclass(frozen=True)
class Vocabulary:
    """Embedding rows by token. rows: for each parent, the row that holds output row i's token, -1 for none;
    base: the parent whose row stands in where another has none; given: output row -> (parent, row) that
    stands in instead, None for zeros; content: of tokenizer.json, None to copy the base's; added, filled:
    figures for the report.
    """

    rows: list[np.ndarray]
    base: int
    given: dict[int, tuple[int, int] | None]
    content: dict[str, Any] | None
    added: int
    filled: list[int]


def check_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """SeavlmError, with the nearest known one, for a key that is not among `known`."""
    known = list(known)
    for key in given:
        if key not in known:
            raise SeavlmError(
                f"{where}: unknown key {key!r}.{nearest(str(key), known)}", hint=f"Known: {', '.join(known)}."
            )


def read_wish(raw: Mapping[str, Any], parent: Named) -> Wish:
    """The keys `tokenizer_source` and `tokenizer` of a recipe."""
    source, wanted = raw.get("tokenizer_source"), raw.get("tokenizer")
    if wanted is None:
        return Wish(_source(source, parent, "tokenizer_source"))
    if source is not None:
        raise SeavlmError("the recipe has tokenizer_source and tokenizer", hint="Write one of them.")
    if not isinstance(wanted, dict):
        raise SeavlmError(f"tokenizer is {wanted!r}", hint="Write tokenizer: {source: union}.")
    check_keys(wanted, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    multiple = wanted.get("pad_to_multiple_of") or 1
    if type(multiple) is not int or multiple < 1:
        raise SeavlmError(f"pad_to_multiple_of is {multiple!r}", hint="It is a whole number above 0.")
    tokens = wanted.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise SeavlmError(f"tokens are {tokens!r}", hint="Write tokens: {TOKEN: {source: MODEL}}.")
    given = {str(token): _given(str(token), entry, parent) for token, entry in tokens.items()}
    return Wish(_source(wanted.get("source", "union"), parent, "tokenizer.source"), given, multiple)


def _source(given: Any, parent: Named, where: str) -> str | int | None:
    return given if given in (None, "base", "union") else parent(given, where)


def _given(token: str, entry: Any, parent: Named) -> Given:
    where, hint = f"tokens: {token}", "Write {source: MODEL}, or {source: {kind: zero}}."
    if not isinstance(entry, dict) or entry.get("source") is None:
        raise SeavlmError(f"{where} has no source", hint=hint)
    check_keys(entry, ("source", "force"), where)
    source, force = entry["source"], entry.get("force", False)
    if not isinstance(force, bool):
        raise SeavlmError(f"{where}: force is {force!r}", hint="It is true or false.")
    if not isinstance(source, dict):
        return Given(parent(source, where), token, force)
    check_keys(source, ("kind", "model", "token", "token_id"), where)
    if source.get("kind") == "zero":
        return Given(None, token, force)
    named = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    if source.get("kind") != "model_token" or len(named) != 1:
        raise SeavlmError(
            f"{where}: {source!r} is no source", hint="Write {kind: model_token, model: MODEL, token: TEXT}."
        )
    return Given(parent(source.get("model"), where), named[0], force)


# --- what lies beside the weights


def same_tokenizer(places: list[Path]) -> bool:
    """Equal vocabularies and special ids, read from tokenizer.json. False when fewer than two parents have
    one.
    """
    homes = [place for place in places if (place / "tokenizer.json").is_file()]
    if len(homes) < 2:
        return False
    first = tokens(_content(homes[0]))
    for place in homes[1:]:
        other = tokens(_content(place))
        hint = (
            "Row i of the embedding must mean the same token in each parent; or set tokenizer_source: base."
        )
        if len(first) != len(other):
            raise SeavlmError(
                f"the tokenizers of {homes[0]} and {place} have {len(first)} and {len(other)} tokens",
                hint=hint,
            )
        differing = sorted(t for t in first.keys() | other.keys() if first.get(t) != other.get(t))
        if differing:
            shown = ", ".join(f"{t!r} ({first.get(t)} and {other.get(t)})" for t in differing[:3])
            raise SeavlmError(
                f"the tokenizers of {homes[0]} and {place} disagree on {len(differing)} tokens: {shown}",
                hint=hint,
            )
    return True


def _content(place: Path) -> dict[str, Any]:
    return _object(place / "tokenizer.json", tokens)


def _object(path: Path, check: Callable[[Any], Any] = dict) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check(content)
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SeavlmError(f"{path} cannot be read: {error!r}", hint="Copy it again.") from error


def tokens(content: dict[str, Any]) -> dict[str, int]:
    """Token -> id of a tokenizer.json's content."""
    return {
        **content["model"]["vocab"],
        **{token["content"]: token["id"] for token in content["added_tokens"]},
    }


def tokenizer_home(places: list[Path], lead: int) -> Path:
    """Where the tokenizer comes from: the leading parent, else the last that has one. Of .gguf files alone
    the leading one, which holds it inside."""
    order = [*(p for i, p in enumerate(places) if i != lead), places[lead]]
    homes = [place for place in order if (place / "tokenizer.json").is_file()]
    found = homes or [place for place in order if place.is_dir()]
    return found[-1] if found else places[lead]


def template_of(place: Path) -> str | None:
    """The chat template that lies in a model's directory."""
    if (place / "chat_template.jinja").is_file():
        return (place / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (place / name).is_file():
            template = _object(place / name).get("chat_template")
            if isinstance(template, str):
                return template
    return None


def read_template(wanted: Any, places: list[Path]) -> str | None:
    """A recipe's `chat_template`: "auto", the commonest of the parents'; or the template itself."""
    if wanted is None:
        return None
    if wanted == "auto":
        found = Counter(text.strip() for text in map(template_of, places) if text)
        return found.most_common(1)[0][0] if found else None
    if not isinstance(wanted, str) or "{" not in wanted:
        raise SeavlmError(
            f"chat_template is {wanted!r}", hint="Write auto (the parents'), or the Jinja template itself."
        )
    return wanted


# --- rows


def map_rows(wish: Wish, lead: int, places: list[Path], parents: Sequence[FileCheckpoint]) -> Vocabulary:
    """Which row of which parent holds each token of the output.

    base: the base's rows stay where they are, spare ones too (row i with row i). union: tokens that only
    others know take the base's spare rows and then rows behind; in tokenizer.json they are added tokens, as
    are those of `tokens` that nobody knows. Where a parent lacks a token, the base's row stands in for it;
    where the base lacks it too, the mean of those that have it. Rows that only pad are the padding token's.
    """
    base = wish.source if isinstance(wish.source, int) else lead
    contents = [_content(place) for place in places]
    sizes = [parent.shape(naming.EMBEDDING)[0] for parent in parents]
    maps = [
        {token: i for token, i in tokens(content).items() if i < size}
        for content, size in zip(contents, sizes, strict=True)
    ]
    out, added = dict(maps[base]), []
    taken = set(out.values())
    free = (i for i in range(10**9) if i not in taken)
    candidates = list(zip(contents, maps, strict=True)) if wish.source == "union" else []
    for content, known in [*candidates, ({"added_tokens": []}, {t: i for i, t in enumerate(wish.tokens)})]:
        special = {token["content"]: token for token in content["added_tokens"]}
        for token in sorted(known, key=known.__getitem__):
            if token not in out:
                out[token] = next(free)
                plain = {"single_word": False, "lstrip": False, "rstrip": False}
                plain |= {"normalized": True, "special": False}
                added.append({**plain, **special.get(token, {}), "id": out[token], "content": token})
    total = max(sizes[base], max(out.values()) + 1)
    padded = -(-total // wish.multiple) * wish.multiple
    given = {
        out[token]: _row(token, one, maps, sizes, places) if one.parent is not None else None
        for token, one in wish.tokens.items()
    }
    forced = [out[token] for token, one in wish.tokens.items() if one.force]
    named = np.zeros(total, dtype=bool)
    named[list(out.values())] = True
    rows = []
    for known, size, parent in zip(maps, sizes, parents, strict=True):
        row = np.full(total, -1, dtype=np.int64)
        row[list(out.values())] = [known.get(token, -1) for token in out]
        spare = np.zeros(total, dtype=bool)
        spare[:size] = True
        spare[[i for i in known.values() if i < total]] = False
        row = np.where(~named & spare, np.arange(total), row)
        row[forced] = -1
        rows.append(np.append(row, np.full(padded - total, parent.config.pad_token_id)))
    merged = contents[base] if added else None
    if merged is not None:
        merged["added_tokens"] = sorted([*merged["added_tokens"], *added], key=lambda token: token["id"])
    return Vocabulary(rows, base, given, merged, len(added), [int((row < 0).sum()) for row in rows])


def _row(
    token: str, one: Given, maps: list[dict[str, int]], sizes: list[int], places: list[Path]
) -> tuple[int, int]:
    assert one.parent is not None
    row = maps[one.parent].get(one.token, -1) if isinstance(one.token, str) else one.token
    if not 0 <= row < sizes[one.parent]:
        raise SeavlmError(
            f"tokens: {token}: {places[one.parent]} has no row for {one.token!r}",
            hint="Name a token, or an id, that the model has.",
        )
    return one.parent, row
