"""The Gemma 3 tokenizer: text to ids and back, on the `tokenizers` library.

Three promises: text never becomes a control id, whatever it spells; decoding works on bytes, so a character
that is split over several tokens is whole or not there; what `save` writes loads in transformers with equal
ids.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import regex
from tokenizers import Tokenizer as Backend

from seavlm.errors import SeavlmError
from seavlm.text.chat import CHAT_TEMPLATE
from seavlm.text.compact import Compact, small_cache

PAD, EOS, BOS, UNK, MASK = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
SPECIALS = (PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT)

SPACE = "\u2581"  # how pieces spell a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Rows that are not flagged special but were never trained on text either; users must not reach them.
_RESERVED = r"<mask>|\[multimodal\]|<unused\d+>"
LONG = 4096  # characters, which take milliseconds
CONTROL_NAMES = re.compile("|".join([*map(re.escape, SPECIALS), _RESERVED]))

_DEFAULT_CONFIG: dict[str, Any] = {
    "tokenizer_class": "GemmaTokenizer",
    "processor_class": "Gemma3Processor",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "unk_token": UNK,
    "boi_token": START_OF_IMAGE,
    "eoi_token": END_OF_IMAGE,
    "image_token": IMAGE_SOFT,
    "extra_special_tokens": {
        "boi_token": START_OF_IMAGE,
        "eoi_token": END_OF_IMAGE,
        "image_token": IMAGE_SOFT,
    },
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "spaces_between_special_tokens": False,
    "model_max_length": 131072,
}


class Tokenizer:
    """A Gemma 3 tokenizer, full or trimmed. All control ids are looked up by name.

    Attributes: `vocab_size` rows including added tokens; `specials` name -> id; `bos_id`, `eos_id`, `pad_id`,
    `start_of_turn_id`, `end_of_turn_id`, `boi_id`, `eoi_id`, `image_id`; `chat_template` jinja text.
    """

    def __init__(
        self,
        spec: str,
        *,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        source: str = "",
        compact: Compact | None = None,
    ) -> None:
        """`spec`: text of a tokenizer.json; `config`: a tokenizer_config.json; `source`: name in errors;
        `compact`: the same tokenizer in a form that is there already."""
        source = source or "tokenizer.json"
        try:
            self._backend: Any = compact or small_cache(Backend.from_str(spec))
        except Exception as error:  # the library raises bare Exception
            raise SeavlmError(
                f"{source} is not a readable tokenizer: {_one_line(error)}", hint="Download the file again."
            ) from error
        self._spec = spec
        self.config = {**(config or _DEFAULT_CONFIG)}
        self.chat_template = chat_template or CHAT_TEMPLATE
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        self.specials: dict[str, int] = {t.content: i for i, t in sorted(added.items()) if t.special}
        missing = [name for name in SPECIALS if name not in self.specials]
        if missing:
            raise SeavlmError(
                f"{source} has no special token {', '.join(missing)}",
                hint="Use a Gemma 3 tokenizer with image tokens.",
            )
        self.pad_id, self.eos_id, self.bos_id = (self.specials[name] for name in (PAD, EOS, BOS))
        self.start_of_turn_id, self.end_of_turn_id = self.specials[START_OF_TURN], self.specials[END_OF_TURN]
        self.boi_id, self.eoi_id = self.specials[START_OF_IMAGE], self.specials[END_OF_IMAGE]
        self.image_id = self.specials[IMAGE_SOFT]
        self._special_ids = frozenset(self.specials.values())
        names = [re.escape(name) for name in self.specials] + [_RESERVED]
        self._control_name = re.compile("|".join(names))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_dir(cls, path: str | Path, *, spec: str | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face directory; without a chat template there, Gemma's own is used.
        spec: the text to take for that of its tokenizer.json."""
        folder = Path(path)
        spec = spec or _read_text(folder / "tokenizer.json")
        if spec is None:
            raise SeavlmError(
                f"{folder} has no tokenizer.json", hint="Give the directory of a Hugging Face checkpoint."
            )
        config = None
        raw_config = _read_text(folder / "tokenizer_config.json")
        if raw_config is not None:
            try:
                config = json.loads(raw_config)
            except ValueError as error:
                raise SeavlmError(
                    f"{folder / 'tokenizer_config.json'} is not JSON: {_one_line(error)}",
                    hint="Download the file again.",
                ) from error
        template = _read_text(folder / "chat_template.jinja")
        if config is not None:
            template = template or config.pop("chat_template", None)
            config.pop("chat_template", None)
            config.pop("added_tokens_decoder", None)  # tokenizer.json says the same
        # An old style list of named templates is not Gemma's; the built-in one is right for the architecture.
        return cls(
            spec,
            config=config,
            chat_template=template if isinstance(template, str) else None,
            source=str(folder / "tokenizer.json"),
            compact=Compact.beside(folder, spec.encode()),
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """The tokenizer inside a GGUF file, its merges rebuilt from the pieces' scores.

        A text-only file has no <image_soft_token>: it is added as the last row, where Gemma 3 has it.
        """
        return cls(json.dumps(spec_from_gguf(path), ensure_ascii=False), source=str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, and never a control id, even where the text spells one."""
        text, ids, at = _without_surrogates(text), [], 0
        for name in self._control_name.finditer(text):
            # Cut behind its first character the name is text; cut off on both sides, nothing new arises.
            for piece in (text[at : name.start()], name[0][0], name[0][1:]):
                ids += self._ids(piece)
            at = name.end()
        return ids + self._ids(text[at:])

    def _ids(self, text: str) -> list[int]:
        """Long texts as a batch of one, which lets other threads run meanwhile."""
        if len(text) < LONG:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for many texts, several at a time."""
        known = [_without_surrogates(text) for text in texts]
        plain = [text for text in known if not self._control_name.search(text)]
        encodings = iter(self._backend.encode_batch_fast(plain, add_special_tokens=False))
        return [
            self.encode(text) if self._control_name.search(text) else next(encodings).ids for text in known
        ]

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for; control tokens stand for their name."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if piece is None:
            raise SeavlmError(
                f"Token id {token_id} is outside the vocabulary of {self.vocab_size}",
                hint="Use the tokenizer that belongs to the model.",
            )
        byte = _BYTE_PIECE.fullmatch(piece)
        data = bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()
        self._bytes[token_id] = data
        return data

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; a character cut at the end is left out."""
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self._special_ids))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)

    def spec(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return json.loads(self._spec)

    def save(self, out_dir: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
        folder = Path(out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config, "chat_template": self.chat_template}
        named = {
            key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)
        }
        _write_text(folder / "tokenizer.json", self._spec)
        _write_text(folder / "tokenizer_config.json", _pretty(config))
        _write_text(folder / "special_tokens_map.json", _pretty(named))
        _write_text(folder / "chat_template.jinja", self.chat_template)


class StreamDecoder:
    """Ids in, text out, in whole graphemes: what a reader sees as one character is never sent in parts.

    The last grapheme is held back until the next one begins (a mark may still join it); `flush` gives it.
    All the pieces together equal `Tokenizer.decode` of all the ids.
    """

    # Signs that stack or join the letter after them, whatever the Unicode version of the segmenter says:
    # Khmer coeng, Burmese virama, Tamil pulli, zero-width joiner.
    _JOINERS = "\u17d2\u1039\u0bcd\u200d"
    # A "grapheme" longer than this is abuse (stacked marks); it is let go so that time and memory stay small.
    _LONGEST = 128

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = frozenset(tokenizer.specials.values()) if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def put(self, token_id: int) -> str:
        """The text that became certain with this token, often empty."""
        if token_id in self._skip:
            return ""
        self._held += self._utf8.decode(self._tokenizer.token_bytes(token_id))
        graphemes = regex.findall(r"\X", self._held)
        keep = 1
        while keep < len(graphemes) and graphemes[-keep - 1][-1] in self._JOINERS:
            keep += 1
        last = sum(map(len, graphemes[-keep:]))
        if last > self._LONGEST:
            last = 0
        ready, self._held = self._held[: len(self._held) - last], self._held[len(self._held) - last :]
        return ready

    def flush(self) -> str:
        """What was held back; a character whose bytes never came is dropped. Starts afresh."""
        ready, self._held = self._held, ""
        self._utf8.reset()
        return ready


# --- from GGUF ----------------------------------------------------------------------------------------------

# Token types of a GGUF vocabulary.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


def spec_from_gguf(path: str | Path) -> dict[str, Any]:
    """The content of a tokenizer.json, rebuilt from the vocabulary in a GGUF file's metadata."""
    metadata = _gguf_metadata(Path(path), "tokenizer.ggml.")
    model = metadata.get("tokenizer.ggml.model")
    if model != "llama":
        raise SeavlmError(
            f"{path} holds a tokenizer of kind {model!r}, not Gemma's ('llama')",
            hint="Use a GGUF file of Gemma 3.",
        )
    pieces, scores, kinds = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    # GGUF spells the runs of spaces (user-defined) with spaces; Gemma's vocabulary with U+2581.
    pieces = [
        p.replace(" ", SPACE) if kind == _USER_DEFINED else p for p, kind in zip(pieces, kinds, strict=True)
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    added = [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece in SPECIALS,
        }
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    if IMAGE_SOFT not in vocab:
        added.append({**added[0], "id": len(pieces), "content": IMAGE_SOFT, "special": True})
    return tokenizer_spec(vocab, _merges_from_scores(vocab, pieces, scores, kinds), added)


def _merges_from_scores(
    vocab: dict[str, int], pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[list[str]]:
    """BPE merges of a SentencePiece vocabulary: all splits of a piece in two known ones, best score first.

    Within one score the longer left part goes first, then the longer right part: the order in which Gemma's
    own tokenizer.json lists them. User-defined pieces (runs of spaces, newlines) are made like score 0.
    """
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        if kind in (_CONTROL, _BYTE):
            continue
        score = 0.0 if kind == _USER_DEFINED else score
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((score, cut, len(piece) - cut, left, right))
    merges.sort(key=lambda merge: merge[:3], reverse=True)  # stable: equal keys stay in vocabulary order
    return [[left, right] for *_, left, right in merges]


def tokenizer_spec(
    vocab: dict[str, int], merges: list[list[str]], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """A Gemma tokenizer.json: BPE with byte fallback over text whose spaces are U+2581, BOS put in front."""
    bos = vocab[BOS]
    start = {"SpecialToken": {"id": BOS, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": BOS, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


# struct codes of GGUF's scalar value types; 8 is a string, 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _gguf_metadata(path: Path, prefix: str) -> dict[str, Any]:
    """The metadata of a GGUF file (v2, v3, little endian) whose keys begin with `prefix`.

    `gguf.GGUFReader` makes numpy views of each of the 262,144 pieces, which takes 9 s; this takes a fifth of
    one. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    broken = SeavlmError(f"{path} is not a whole GGUF file", hint="Download it again.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise broken
            at = 24  # magic u32, version u32, tensor count u64, metadata count u64

            def take(code: str, count: int = 1) -> tuple[Any, ...]:
                nonlocal at
                size = struct.calcsize("<" + code) * count
                if count > len(data) or at + size > len(data):
                    raise broken
                at += size
                return struct.unpack_from(f"<{count}{code}", data, at - size)

            def text() -> str:
                nonlocal at
                (size,) = take("Q")
                if at + size > len(data):
                    raise broken
                at += size
                return data[at - size : at].decode("utf-8", "replace")

            def value(kind: int) -> Any:
                if kind == 8:
                    return text()
                if kind == 9:
                    inner, count = take("I")[0], take("Q")[0]
                    if inner in _GGUF_SCALARS:
                        return list(take(_GGUF_SCALARS[inner], count))
                    if count > len(data):
                        raise broken
                    return [value(inner) for _ in range(count)]
                if kind not in _GGUF_SCALARS:
                    raise broken
                return take(_GGUF_SCALARS[kind])[0]

            found = {}
            for _ in range(struct.unpack_from("<Q", data, 16)[0]):
                key, kind = text(), take("I")[0]
                content = value(kind)
                if key.startswith(prefix):
                    found[key] = content
            return found
    except (OSError, ValueError, struct.error, RecursionError) as error:
        if isinstance(error, FileNotFoundError):
            raise SeavlmError(f"There is no file {path}", hint="Check the path.") from error
        raise broken from error


# --- small things -------------------------------------------------------------------------------------------


def _without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, which JSON's \\ud800 leaves behind, as question marks: they are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SeavlmError(f"{path} cannot be read: {_one_line(error)}", hint="Download it again.") from error


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _pretty(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
