"""Replies held to a form: a JSON schema, any JSON object, a regular expression, or one of some texts.

    grammars = Grammars(tokenizer, stop_ids)
    engine.add(prompt, mask=grammars.json_schema({"type": "object", ...}))

llguidance (MIT) says after each token which may follow. A form that it cannot hold a reply to is an error
before anything is written; there is no falling back to a free reply. JSON is compact.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from seavlm.engine.schema import blame, ready, refused
from seavlm.errors import SeavlmError
from seavlm.text.tokenizer import Tokenizer

MASK_SECONDS = (0.25, 0.025)  # of a core that a reply's masks may take in all, and more for each of them
COMPACT: Any = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'nrbtf\\"',  # \u0061 would be another way to write the name "a"
}


class Grammars:
    """stop_ids: tokens that end a reply. Making one takes seconds on a large vocabulary."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int]) -> None:
        self.vocab_size = tokenizer.vocab_size
        known = _Words(tokenizer, sorted(stop_ids))
        self._tokenizer = LLTokenizer(TokenizerWrapper(known), eos_token=known.stop_ids)

    def json_schema(self, schema: dict[str, Any]) -> Constraint:
        """SeavlmError for a schema that cannot be held to, with the reason.

        Objects have the properties that are named, and others only where the schema says so itself: models do
        not end what may go on.
        """
        made = self._ready(schema)
        return self._constraint(LLMatcher.grammar_from_json_schema(made, overrides=COMPACT), "JSON schema")

    def _ready(self, schema: Any) -> dict[str, Any]:
        def fault(part: dict[str, Any]) -> str:
            grammar = LLMatcher.grammar_from_json_schema(part, overrides=COMPACT)
            return LLMatcher.validate_grammar(grammar, self._tokenizer).split("while processing")[0]

        try:
            made = ready(schema)
            if told := fault(made):
                raise refused(blame(made, fault), _one_line(told), "Mend it, or leave it out.")
        except RecursionError:
            why = "it is nested too deeply, or its references form too long a chain"
            raise _refused("JSON schema", why) from None
        except ValueError as error:
            raise _refused("JSON schema", str(error)) from None
        return made

    def json_object(self) -> Constraint:
        return self.json_schema({"type": "object"})

    def json_or_text(self, schema: dict[str, Any]) -> Constraint:
        """JSON of this schema, or else a text that does not look like it."""
        return self._constraint(LLMatcher.grammar_from_lark(json_or_text(self._ready(schema))), "JSON schema")

    def regex(self, pattern: str) -> Constraint:
        return self._constraint(LLMatcher.grammar_from_regex(pattern), "regex")

    def choice(self, texts: Sequence[str]) -> Constraint:
        """One of `texts`, which must not be empty."""
        options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._constraint(LLMatcher.grammar_from_lark(f"start: {options}"), "choice")

    def _constraint(self, grammar: str, what: str) -> Constraint:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(what, matcher.get_error())
        constraint = Constraint(matcher, self.vocab_size)
        try:
            constraint(())
        except SeavlmError:
            raise _refused(what, "no reply is of it") from None
        return constraint


class Constraint:
    """A `TokenMask` for one reply."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self._read = 0  # tokens of the reply
        self._known = False  # what the bits are after them
        self._masks, self._seconds = 0, 0.0

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """bool [V]"""
        bits = np.unpackbits(self.bits(ids).view(np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(bool)

    def bits(self, ids: Sequence[int]) -> np.ndarray:
        """The same as int32 [V / 32], a bit a token, the lowest first; valid until the next call."""
        new = list(ids[self._read :])
        if not new and self._known:
            return self._bits
        self._known = False
        self._read += len(new)
        if new:
            self._matcher.consume_tokens(new)
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._seconds += time.thread_time() - began
        self._masks += 1
        if self._seconds > MASK_SECONDS[0] + MASK_SECONDS[1] * self._masks:
            raise SeavlmError(
                f"the reply's form takes {1000 * self._seconds / self._masks:.0f} ms a token to follow, "
                "while all others wait",
                hint="Simplify the schema or expression.",
            )
        if self._matcher.is_error():
            raise SeavlmError(
                f"the reply can no longer be held to its form: {_one_line(self._matcher.get_error())}",
                hint="Simplify the schema or expression.",
            )
        self._known = True
        return self._bits

    def copy(self) -> Constraint:
        """For another reply, from where this one is."""
        other = Constraint(self._matcher.deep_copy(), self._vocab_size)
        other._read, other._known = self._read, self._known
        other._bits[:] = self._bits
        return other


class _Words:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop_ids: list[int]) -> None:
        self.stop_ids = [i for i in stop_ids if i < tokenizer.vocab_size] or [tokenizer.end_of_turn_id]
        self.eos_token_id = self.stop_ids[-1]
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.specials.values())
        self._encode: Callable[[str], list[int]] = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("texts only")
        return self._encode(text)


def json_or_text(made: dict[str, Any]) -> str:
    """The grammar, as llguidance writes them, of JSON of a schema that was made ready, or else of a text."""
    told = json.dumps({**made, "x-guidance": COMPACT}, ensure_ascii=False)
    return "start: calls | text\n" + r"text: /[^\[{`<\s](?s:.)*/" + f"\ncalls: %json {told}"


def _refused(what: str, why: str) -> SeavlmError:
    return SeavlmError(f"the {what} cannot be held to: {_one_line(why)}", hint="Simplify or mend it.")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
