"""A model behind an OpenAI-compatible endpoint, asked many questions at a time.

    ask = Endpoint("http://127.0.0.1:8000/v1", model="nano")
    for position, reply in ask.each(conversations): ...

Pictures go in their place in the text, as PNG, so that the pixels that arrive are those of the file: a PNG
as it is, anything else decoded and written as one. Answers of 408, 409, 425, 429 and 5xx, broken connections
and what is no JSON are tried again after a pause that doubles (or as long as `Retry-After` says); of 401 to
407, a redirection or a bad certificate nothing better is to be expected, so the run ends there, and can be
continued. Any other refusal concerns one question, as does a 5xx or 403 that stays while others are answered:
its reply is empty and says why. An option that a refusal names is left out from then on, if that helps.

What is read of an answer: `content`, as a text or as parts; else the `refusal`, which is what the model said;
functions that the endpoint took for called, as the text that a model here would have written. Thoughts
(`reasoning`, `reasoning_content`) are not part of a reply. Server-sent events are put together.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import ipaddress
import json
import queue
import random
import re
import signal
import ssl
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from seavlm.errors import SeavlmError
from seavlm.evals.tasks import Messages, Reply
from seavlm.image.decode import decode
from seavlm.text.tools import Call, render_calls

AGAIN = frozenset({408, 409, 425, 429})  # and 5xx
HOPELESS = frozenset({401, 402, 403, 404, 405, 407})
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
PATIENCE = 180.0  # seconds that 429 is borne with, however often it comes; the longest Retry-After, too
CUT = ("length", "content_filter")  # reasons to end that are not the model's own
IN_A_ROW = 8  # questions that fail with 5xx, none being answered between them: the endpoint is out of order
LARGEST = 32 << 20  # bytes of an answer
LONGEST_TOKEN = (
    64  # letters; a reply of more than that for each token asked for is of a server that cuts none
)


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
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """url: up to and with /v1. key: of the endpoint; it is sent there and written nowhere.

        response_formats: of all replies, the best one first; where it refuses one, and takes the same request
        with a later one or without any, it is asked that way from then on. tell: gets a line when Ctrl-C is
        waited for.
        """
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.headers = {"Content-Type": "application/json", "User-Agent": "seavlm"}
        self._key = key.strip()
        if self._key:
            if not (self._key.isascii() and self._key.isprintable()):
                raise SeavlmError("the endpoint's key has letters that no key has", hint=_HINTS[401])
            self.headers["Authorization"] = f"Bearer {self._key}"
        self._open = _opener(self.url).open
        self.max_new_tokens, self.concurrency = max_new_tokens, max(1, concurrency)
        self.retries, self.timeout, self.tell = retries, timeout, tell
        options = {"temperature": 0, "seed": 0, "max_tokens": max_new_tokens}
        self.ways = [
            options | form for form in (*({"response_format": form} for form in response_formats), {})
        ]
        self.without: list[str] = []  # options that the endpoint does not take
        self.retried = 0  # requests that were sent once more
        self._answered = False
        self._failed = 0  # questions since one was answered
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.model = model or self._only_model()

    def __call__(self, conversations: list[Messages]) -> list[Reply]:
        replies = dict(self.each(conversations))
        return [replies[position] for position in range(len(conversations))]

    def each(self, conversations: Iterable[Messages]) -> Iterator[tuple[int, Reply]]:
        """(position, reply) as they come; no more conversations are taken than are asked at once.

        SeavlmError when the endpoint cannot be asked, after the replies that are under way: they are paid. So
        it is with Ctrl-C; at a second one they are not waited for.
        """
        todo = iter(enumerate(conversations))
        failure: BaseException | None = None
        done: queue.SimpleQueue[tuple[int, Reply | BaseException]] = queue.SimpleQueue()
        running = 0
        self._stop.clear()

        def work(position: int, messages: Messages) -> None:
            try:
                done.put((position, self.ask(messages)))
            except BaseException as error:
                done.put((position, error))

        def stop() -> None:
            done.put((-1, KeyboardInterrupt()))
            if running:
                self.tell(f"{running} replies are under way, and waited for: Ctrl-C again gives them up")

        try:
            with _interrupted(stop):
                while running or failure is None:
                    while (
                        failure is None
                        and running < self.concurrency
                        and (one := next(todo, None)) is not None
                    ):
                        # A daemon: nobody waits for an answer that is not wanted any more.
                        threading.Thread(target=work, args=one, daemon=True).start()
                        running += 1
                    if not running and failure is None:
                        return
                    position, reply = done.get()
                    running -= position >= 0
                    if isinstance(reply, BaseException):
                        failure = failure or reply
                        self._stop.set()
                    else:
                        yield position, reply
                raise failure
        finally:
            self._stop.set()  # those that wait to try again give up

    def ask(self, messages: Messages) -> Reply:
        """The reply to one conversation."""
        try:
            said = to_openai(messages)
        except SeavlmError as error:  # a damaged picture
            return Reply("", error=error.message)
        ways, tried = self.ways, self.ways
        while True:
            try:
                reply = self._ask(said, ways[0])
            except _Refused as refusal:
                if refusal.out_of_order:
                    self._failed += 1
                    if self._failed >= IN_A_ROW:
                        raise SeavlmError(
                            f"{self.url} answers nothing any more: {refusal}", hint=_AGAIN
                        ) from None
                mended = [_mended(way, refusal) for way in ways]
                ways = mended if mended[0] != ways[0] else ways[1:]
                if refusal.out_of_order or not ways:
                    return Reply("", error=str(refusal))
                continue
            if ways is not tried:
                with self._lock:
                    kept = {*ways[-1], *self.without, "max_tokens"}  # that has another name now
                    self.without += [name for name in tried[-1] if name not in kept]
                    self.ways = ways
            self._failed, self._answered = 0, True
            return reply

    def _ask(self, said: list[dict[str, Any]], options: dict[str, Any]) -> Reply:
        body = {"model": self.model, "messages": said, **options}
        answer = self._send("/chat/completions", json.dumps(body, ensure_ascii=False).encode())
        try:
            choice = answer["choices"][0]
            text = _text(choice.get("message") or {})
            finish = choice.get("finish_reason") if choice.get("finish_reason") in CUT else ""
            usage = answer.get("usage") or {}
            read, written = (_count(usage.get(f"{one}_tokens")) for one in ("prompt", "completion"))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError):
            told = "does not answer as OpenAI's interface does"
            if self._answered:
                raise _Refused(f"it {told}", out_of_order=True) from None
            raise SeavlmError(f"{self.url} {told}", hint=_V1) from None
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of a letter, which no file can hold
        if len(text) > (most := LONGEST_TOKEN * self.max_new_tokens):
            text, finish = text[:most], "length"
        return Reply(text, read, written, finish=finish)

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
        left = tries = 1 + (self.retries if retries is None else retries)
        pause, began = FIRST_PAUSE, time.monotonic()
        while True:
            try:
                return self._once(path, body)
            except _Again as error:
                trouble = error
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                # broken connections, time-outs, half an answer
                told = " ".join(str(error).split()) or type(error).__name__
                trouble = _Again(told)
            if trouble.wanted is not None and trouble.wanted > PATIENCE:
                raise SeavlmError(
                    f"{self.url} asks to come back in {trouble.wanted:,.0f} s: {trouble}", hint=_AGAIN
                )
            left -= trouble.status != 429 or time.monotonic() - began > PATIENCE
            wait = pause * random.uniform(0.75, 1.25) if trouble.wanted is None else trouble.wanted
            if trouble.status == 429:  # for which there is no limit of tries
                wait = max(wait, FIRST_PAUSE * random.uniform(0.75, 1.25))
            if not left or self._stop.wait(wait):
                break
            self.retried += 1
            pause = min(LONGEST_PAUSE, 2 * pause)
        if trouble.status >= 500 and not self._stop.is_set():
            raise _Refused(str(trouble), out_of_order=True)
        hint = _AGAIN if self._answered else f"{_V1} {_AGAIN}"
        raise SeavlmError(f"{self.url} gave no answer after {tries - left} tries: {trouble}", hint=hint)

    def _once(self, path: str, body: bytes | None) -> Any:
        """What is answered to one request. `_Again` where it may be asked once more."""
        request = urllib.request.Request(self.url + path, data=body, headers=self.headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._open(request, timeout=self.timeout) as answer:
                data, form = _whole(answer, deadline, LARGEST), answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            with error:
                if 300 <= error.code < 400:
                    place = error.headers.get("Location", "")
                    raise SeavlmError(
                        f"{self.url} sends us on to {place}",
                        hint="The key is not taken there: give that URL, up to /v1, if you trust it.",
                    ) from None
                told = _told(_whole(error, deadline, 65536), str(error.reason))
                wanted = _seconds(error.headers.get("Retry-After"))
            raise self._refusal(error.code, told, wanted) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise SeavlmError(
                    f"{self.url} has no certificate to be trusted: {error.reason.verify_message}",
                    hint="If it is signed by an authority of your own: SSL_CERT_FILE=authority.pem.",
                ) from None
            raise
        try:
            value = _put_together(data) if form == "text/event-stream" else json.loads(data)
        except (ValueError, RecursionError):
            start = " ".join(data[:200].decode("utf-8", "replace").split())[:80]
            raise _Again(f"what it answers is no JSON: {start!r}") from None
        if isinstance(value, dict):
            choices = value.get("choices")
            first = choices[0] if isinstance(choices, list) and choices else value
            if isinstance(first, dict) and (first.get("error") or first.get("finish_reason") == "error"):
                fault = first.get("error")
                code = fault.get("code") if isinstance(fault, dict) else None
                told = _told(json.dumps(first).encode(), "the endpoint's model failed")
                raise self._refusal(code if type(code) is int and code >= 400 else 502, told, None)
        return value

    def _refusal(self, status: int, told: str, wanted: float | None) -> Exception:
        told = f"{status} {told}"
        if self._key:
            told = told.replace(self._key, "***")
        hopeless = status in HOPELESS and not (status == 403 and self._answered)
        if hopeless or "insufficient_quota" in told:
            return SeavlmError(f"{self.url} refuses: {told}", hint=_HINTS.get(status, ""))
        if status in AGAIN or status >= 500:
            return _Again(told, status, wanted)
        return _Refused(told, out_of_order=status == 403)


class _Again(Exception):
    """A request that may be sent once more. status: of the answer, or 0; wanted: seconds to wait before."""

    def __init__(self, told: str, status: int = 0, wanted: float | None = None) -> None:
        super().__init__(told)
        self.status, self.wanted = status, wanted


class _Refused(Exception):
    """One request was refused, and would be again. out_of_order: perhaps all others, too."""

    def __init__(self, told: str, *, out_of_order: bool = False) -> None:
        super().__init__(told)
        self.out_of_order = out_of_order


@contextmanager
def _interrupted(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`, a second one is as ever; in a program's main thread only."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def first(number: int, frame: Any) -> None:
        signal.signal(number, signal.default_int_handler)
        stop()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the key along to any host, and turn a question into a GET."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """As the environment says of proxies, save to this machine. SeavlmError for what cannot be asked."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or any(letter.isspace() for letter in url):
        raise SeavlmError("the endpoint's URL is none", hint=_V1)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SeavlmError(
            "the endpoint's URL has a user, a query or a fragment, which would be kept with the results",
            hint="Give http(s)://HOST[:PORT]/v1, and the key in the environment.",
        )
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = False
    proxies = [urllib.request.ProxyHandler({})] if here else []
    return urllib.request.build_opener(_NoRedirect, *proxies)


def _mended(options: dict[str, Any], refusal: _Refused) -> dict[str, Any]:
    """The options without those that a refusal names; the limit by its newer name; a stream if need be."""
    told = str(refusal)
    if not told.startswith(("400", "422")):
        return options
    named = {
        name
        for name in ("temperature", "seed", "max_tokens", "stream_options")
        if name in options and re.search(rf"\b{name}\b", told)
    }
    mended = {name: value for name, value in options.items() if name not in named}
    if "max_tokens" in named:
        mended["max_completion_tokens"] = options["max_tokens"]
    if "stream" not in options and re.search(r"\bstream", told):
        mended |= {"stream": True, "stream_options": {"include_usage": True}}
    return mended


def _text(message: dict[str, Any]) -> str:
    """What a message says. ValueError, TypeError, ... for what is no message of OpenAI's."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else part.get("text") or "" for part in content]
        content = "".join(parts)
    text = content or message.get("refusal") or ""
    if not isinstance(text, str):
        raise ValueError("no text")
    called = [one["function"] for one in message.get("tool_calls") or () if one.get("function")]
    if not called:
        return text
    calls = [
        Call(
            str(one["name"]),
            given if isinstance(given := one.get("arguments") or "{}", str) else json.dumps(given),
        )
        for one in called
    ]
    return "\n".join([text, render_calls(calls)] if text.strip() else [render_calls(calls)])


def _count(told: Any) -> int:
    """A number of tokens; 0 where none is told."""
    return told if type(told) is int and 0 < told < 2**40 else 0


def _whole(answer: Any, deadline: float, most: int) -> bytes:
    """The body. TimeoutError when it goes on beyond the deadline, `_Refused` when it is too large."""
    pieces, size = list[bytes](), 0
    while piece := answer.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer does not end")
        if size > most:
            break
    data = b"".join(pieces)
    if answer.headers.get("Content-Encoding", "identity").lower() in ("gzip", "deflate"):
        try:
            data = zlib.decompressobj(47).decompress(data, most + 1)
        except zlib.error as error:
            raise ValueError(f"a damaged answer: {error}") from None
    if len(data) > most and most == LARGEST:
        raise _Refused(f"the answer has more than {LARGEST >> 20} MB")
    return data


def _put_together(data: bytes) -> dict[str, Any]:
    """The answer that server-sent events bring in pieces; ValueError where they do not end."""
    content, refusal, finish = list[str](), list[str](), None
    calls: dict[int, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for line in data.decode().splitlines():
        name, _, told = line.partition(":")
        if name != "data" or told.strip() in ("", "[DONE]"):
            continue
        event = json.loads(told)
        if event.get("error"):
            return {"error": event["error"]}
        whole["usage"] = event.get("usage") or whole.get("usage")
        for choice in event.get("choices") or ():
            finish = choice.get("finish_reason") or finish
            delta = choice.get("delta") or {}
            content.append(delta.get("content") or "")
            refusal.append(delta.get("refusal") or "")
            for call in delta.get("tool_calls") or ():
                known = calls.setdefault(call.get("index", 0), {"name": "", "arguments": ""})
                for key, text in (call.get("function") or {}).items():
                    known[key] = known.get(key, "") + (text or "")
    if finish is None:
        raise ValueError("the stream broke off")
    message = {"content": "".join(content), "refusal": "".join(refusal)}
    message["tool_calls"] = [{"function": call} for call in calls.values()]  # type: ignore[assignment]
    return whole | {"choices": [{"message": message, "finish_reason": finish}]}


_AGAIN = "What has been answered is kept: run the same command again."
_V1 = "Give the URL that ends in /v1."
_HINTS = {
    401: "Set SEAVLM_API_KEY to the endpoint's key.",
    404: f"{_V1} If that is right, the model has another name: --name.",
    407: "The proxy of HTTP_PROXY or HTTPS_PROXY wants a password.",
    429: "There is no credit left.",
}


def _told(data: bytes, otherwise: str) -> str:
    """What the body of an answer says is wrong, on one line."""
    text = data.decode("utf-8", "replace")
    try:
        body = json.loads(text)
        detail = body.get("error") or body
        if isinstance(detail, dict):
            code = detail.get("code")
            text = str(detail.get("message", text))
            text += f" ({code})" if isinstance(code, str) and code not in text else ""
        else:
            text = str(detail)
    except (ValueError, AttributeError, RecursionError):
        text = otherwise
    return " ".join(text.split())[:300]


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
