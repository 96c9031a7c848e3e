"""A model behind an OpenAI-compatible endpoint, asked many questions at a time.

    ask = Endpoint("http://127.0.0.1:8000/v1", model="nano")
    for position, reply in ask.each(conversations): ...

Pictures go in their place in the text, as PNG, so that the pixels that arrive are those of the file: a PNG
as it is, anything else decoded and written as one. Answers of 408, 409, 425, 429 and 5xx, and broken
connections, are tried again after a pause that doubles (or as long as `Retry-After` says); of 401 to 405
nothing better is to be expected, so the run ends there, and can be continued. Any other refusal concerns one
question, as does a 5xx that stays while others are answered: its reply is empty and says why.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from seavlm.errors import SeavlmError
from seavlm.evals.tasks import Messages, Reply
from seavlm.image.decode import decode

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
HOPELESS = frozenset({401, 402, 403, 404, 405})
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
IN_A_ROW = 8  # questions that fail with 5xx, none being answered between them: the endpoint is out of order


class Endpoint:
    """An `Answerer`. Greedy: temperature 0, and a seed, for endpoints that are not deterministic without."""

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        key: str = "",
        max_new_tokens: int = 256,
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 300.0,
        response_formats: Sequence[dict[str, Any]] = (),
    ) -> None:
        """url: up to and with /v1. key: of the endpoint; it is sent there and written nowhere.

        response_formats: of all replies, the best one first; where it refuses one, and takes the same request
        with a later one or without any, it is asked that way from then on.
        """
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.headers = {"Content-Type": "application/json", "User-Agent": "seavlm"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.max_new_tokens, self.concurrency = max_new_tokens, max(1, concurrency)
        self.retries, self.timeout = retries, timeout
        self.ways = [*({"response_format": form} for form in response_formats), {}]
        self.retried = 0  # requests that were sent once more
        self._failed = 0  # questions since one was answered
        self._stop = threading.Event()
        self.model = model or self._only_model()

    def __call__(self, conversations: list[Messages]) -> list[Reply]:
        replies = dict(self.each(conversations))
        return [replies[position] for position in range(len(conversations))]

    def each(self, conversations: Iterable[Messages]) -> Iterator[tuple[int, Reply]]:
        """(position, reply) as they come; no more conversations are taken than are asked at once.

        SeavlmError when the endpoint cannot be asked, after the replies that are under way: they are paid.
        """
        todo = iter(enumerate(conversations))
        failure: SeavlmError | None = None
        self._stop.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            running: dict[Future[Reply], int] = {}
            try:
                while True:
                    while (
                        failure is None
                        and len(running) < self.concurrency
                        and (one := next(todo, None)) is not None
                    ):
                        running[pool.submit(self.ask, one[1])] = one[0]
                    if not running and failure is not None:
                        raise failure
                    if not running:
                        return
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        position = running.pop(done)
                        try:
                            reply = done.result()
                        except SeavlmError as error:
                            failure = failure or error
                            self._stop.set()
                        else:
                            yield position, reply
            finally:
                self._stop.set()  # those that wait to try again give up

    def ask(self, messages: Messages) -> Reply:
        """The reply to one conversation."""
        ways = self.ways
        for place, way in enumerate(ways):
            reply = self._ask(messages, way)
            if not reply.error:
                if place:
                    self.ways = ways[place:]
                break
        return reply

    def _ask(self, messages: Messages, more: dict[str, Any]) -> Reply:
        try:
            said = to_openai(messages)
        except SeavlmError as error:  # a damaged picture
            return Reply("", error=error.message)
        body = {
            "model": self.model,
            "messages": said,
            "temperature": 0,
            "seed": 0,
            "max_tokens": self.max_new_tokens,
            **more,
        }
        try:
            answer = self._send("/chat/completions", json.dumps(body, ensure_ascii=False).encode())
            text = answer["choices"][0]["message"].get("content") or ""
        except _Refused as refusal:
            self._failed += refusal.out_of_order
            if self._failed >= IN_A_ROW:
                raise SeavlmError(f"{self.url} answers nothing any more: {refusal}", hint=_AGAIN) from None
            return Reply("", error=str(refusal))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise SeavlmError(f"{self.url} does not answer as OpenAI's interface does", hint=_V1) from None
        self._failed = 0
        usage = answer.get("usage") or {}
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of a letter, which no file can hold
        return Reply(text, usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)

    def _only_model(self) -> str:
        try:
            names = [entry["id"] for entry in self._send("/models", None, retries=1).get("data", [])]
        except (_Refused, KeyError, TypeError, AttributeError) as error:
            raise SeavlmError(f"{self.url} does not list its models: {error}", hint=_V1) from None
        if len(names) != 1:
            raise SeavlmError(
                f"{self.url} has {len(names)} models", hint=f"Choose one with --name: {', '.join(names[:8])}"
            )
        return names[0]

    def _send(self, path: str, body: bytes | None, retries: int | None = None) -> Any:
        retries = self.retries if retries is None else retries
        pause = FIRST_PAUSE
        answered = False  # the last try, if with an error of the endpoint's own
        for left in range(retries, -1, -1):
            wanted, answered = None, False
            try:
                request = urllib.request.Request(self.url + path, data=body, headers=self.headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                told = f"{error.code} {_told(error)}"
                if error.code in HOPELESS:
                    hint = _HINTS.get(error.code, "")
                    raise SeavlmError(f"{self.url} refuses: {told}", hint=hint) from None
                if error.code not in AGAIN:
                    raise _Refused(told) from None
                wanted, answered = _seconds(error.headers.get("Retry-After")), error.code >= 500
            except (OSError, ValueError, http.client.HTTPException) as error:
                # broken connections, time-outs, half an answer
                told = " ".join(str(error).split()) or type(error).__name__
            wait_for = wanted if wanted is not None else pause * random.uniform(0.75, 1.25)
            if not left or self._stop.wait(min(LONGEST_PAUSE, wait_for)):
                break
            self.retried += 1
            pause = min(LONGEST_PAUSE, 2 * pause)
        if answered and not self._stop.is_set():
            raise _Refused(told, out_of_order=True)
        raise SeavlmError(f"{self.url} gave no answer after {retries + 1} tries: {told}", hint=_AGAIN)


class _Refused(Exception):
    """One request was refused, and would be again. out_of_order: with 5xx, at each of its tries."""

    def __init__(self, told: str, *, out_of_order: bool = False) -> None:
        super().__init__(told)
        self.out_of_order = out_of_order


_AGAIN = "What has been answered is kept: run the same command again."
_V1 = "Give the URL that ends in /v1."
_HINTS = {401: "Set SEAVLM_API_KEY to the endpoint's key.", 404: _V1}


def _told(error: urllib.error.HTTPError) -> str:
    """What the body of an answer says is wrong, on one line."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
        body = json.loads(text)
        detail = body.get("error", body)
        text = detail.get("message", text) if isinstance(detail, dict) else str(detail)
    except (OSError, ValueError, AttributeError):
        text = error.reason if isinstance(error.reason, str) else ""
    return " ".join(str(text).split())[:200]


def _seconds(header: str | None) -> float | None:
    """Of a Retry-After, which has seconds or a date (RFC 9110, 10.2.3)."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def to_openai(messages: Messages) -> list[dict[str, Any]]:
    """The conversation as OpenAI's interface writes it: pictures as data: URIs, where they stand."""
    return [{"role": turn["role"], "content": _content(turn["content"])} for turn in messages]


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    if all(part["type"] == "text" for part in content) and len(content) == 1:
        return content[0]["text"]
    return [
        {"type": "text", "text": part["text"]}
        if part["type"] == "text"
        else {"type": "image_url", "image_url": {"url": data_uri(part["image"])}}
        for part in content
    ]


def data_uri(picture: bytes) -> str:
    """A picture as a PNG data: URI; a PNG goes as it is."""
    if not picture.startswith(b"\x89PNG\r\n"):
        buffer = io.BytesIO()
        decode(picture).save(buffer, "PNG", compress_level=1)
        picture = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
