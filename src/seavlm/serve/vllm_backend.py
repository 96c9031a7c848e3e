"""A vLLM server behind ours: the same contract, limits, guards and parsing in front of it, its engine behind.

    VllmBackend("org/model", url="http://gpu-7:8000")        # one that runs
    VllmBackend("org/model", arguments=["--tensor-parallel-size", "2"])    # one that is started, and ended

Everything goes through its /v1/chat/completions and /v1/completions as streams. Pictures were decoded by us
and go as PNG; names of control tokens in a text are broken up, as vLLM takes them for the tokens; forms are
checked by our own compiler first. Leaving a stream ends the work there.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seavlm.engine.grammar import COMPACT, json_or_text
from seavlm.engine.sampler import Sampling
from seavlm.engine.schema import ready
from seavlm.errors import SeavlmError
from seavlm.image.decode import load_part
from seavlm.serve.backend import Form, Piece, Ticket, Token
from seavlm.text.chat import check_messages, normalize_messages
from seavlm.text.normalize import normalize
from seavlm.text.tokenizer import CONTROL_NAMES

log = logging.getLogger("seavlm.serve")
START_SECONDS = 1800  # that a vLLM may take to load a model
SEQUENCES = 256  # that a vLLM writes at once, by its default
WORD_JOINER = "\u2060"
TOP = "top_logprobs"
FAILED = "the model's server could not answer"


@dataclass(frozen=True)
class Ask:
    """A prompt: what is sent, and where. images: views."""

    path: str
    body: dict[str, Any]
    images: int = 0


@dataclass(eq=False, kw_only=True)
class VllmTicket(Ticket):
    task: asyncio.Task[None] | None = None


class VllmBackend:
    """`Backend` over a vLLM. name: of the model, as the vLLM knows it where it runs already. max_queue:
    requests that may wait beside `max_sequences`. key: that the vLLM asks for. weights, dtype, arguments: of
    the vLLM that is started without a url.
    """

    def __init__(
        self,
        name: str,
        *,
        url: str | None = None,
        key: str | None = None,
        weights: Path | None = None,
        arguments: Sequence[str] = (),
        dtype: str = "auto",
        max_sequences: int = SEQUENCES,
        max_queue: int = 256,
        max_tokens: int | None = None,
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise SeavlmError("--backend vllm needs httpx", hint="pip install 'seavlm[vllm]'") from None
        self.name, self.most, self.count = name, max_queue + max_sequences, 0
        self.max_tokens = max_tokens or 0  # until the vLLM has said
        self.ended: Callable[[Ticket], None] = lambda _: None
        self._running, self._alive = 0, False
        self._child: subprocess.Popen[bytes] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        if url is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            more = ["--dtype", dtype, "--max-num-seqs", str(max_sequences)]
            more += ["--max-model-len", str(max_tokens)] if max_tokens else []
            key = key or secrets.token_urlsafe()  # nobody goes around our keys and guards
            self._child = _start(name, weights or Path(name), port, key, [*more, *arguments])
        self._url = url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=self.most + 8, max_keepalive_connections=64)
        timeout = httpx.Timeout(None, connect=10)
        self._client = httpx.AsyncClient(
            base_url=self._url,
            limits=limits,
            timeout=timeout,
            follow_redirects=False,
            trust_env=False,
            headers={"authorization": f"Bearer {key}"} if key else {},
        )
        self._errors = httpx.HTTPError

    async def start(self) -> None:
        """Wait until it is there. SeavlmError where it is not, or serves another model."""
        end = time.monotonic() + (START_SECONDS if self._child else 30)
        told = 0.0
        while (status := await self._status()) != 200:
            if status in (401, 403):
                hint = "Put it in SEAVLM_VLLM_API_KEY."
                raise SeavlmError(f"the vLLM at {self._url} asks for another key", hint=hint)
            if self._child is not None and (code := self._child.poll()) is not None:
                raise SeavlmError(f"vLLM ended with {code}", hint="Its own words are above.")
            if time.monotonic() > end:
                hint = "Is it running? Start it with: vllm serve MODEL"
                raise SeavlmError(f"no vLLM answers at {self._url}", hint=hint)
            if self._child is not None and time.monotonic() > told + 30:
                told = time.monotonic()
                log.info("waiting for vLLM to load %s", self.name)
            await asyncio.sleep(0.5)
        listed = (await self._client.get("/v1/models", timeout=10)).json()["data"]
        ours = next((one for one in listed if one["id"] == self.name), None)
        if ours is None:
            known = ", ".join(one["id"] for one in listed)
            raise SeavlmError(
                f"the vLLM at {self._url} serves {known}, not {self.name}", hint=f"Give {known}."
            )
        most = ours.get("max_model_len") or 0
        self.max_tokens = min(self.max_tokens or most, most or self.max_tokens)
        if not self.max_tokens:
            hint = "Give --max-model-len."
            raise SeavlmError(f"{self._url} does not say how many tokens a prompt may have", hint=hint)
        self._alive = True
        self._keep(asyncio.ensure_future(self._look()))

    async def _status(self) -> int:
        """That it answers with; 0: it does not."""
        try:
            return int((await self._client.get("/v1/models", timeout=5)).status_code)
        except self._errors:
            return 0

    async def _look(self) -> None:
        missed = 0
        while True:
            await asyncio.sleep(5)
            missed = 0 if await self._status() == 200 else missed + 1
            self._alive = missed < 2

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
        if self._child is not None:
            self._child.terminate()
            try:
                await asyncio.to_thread(self._child.wait, 15)
            except subprocess.TimeoutExpired:
                self._child.kill()

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def fatal(self) -> bool:
        """The vLLM that was started has ended; one that runs elsewhere may come back."""
        return self._child is not None and self._child.poll() is not None

    @property
    def running(self) -> int:
        return self._running

    def pages(self) -> Mapping[str, int]:
        return {}

    # --- in a thread beside the loop

    def chat(self, messages: Sequence[Mapping[str, Any]], *, allow_urls: bool) -> Ask:
        messages = normalize_messages(messages)
        check_messages(messages)
        images, closely, told = 0, False, []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                told.append({**message, "content": broken_up(content)})
                continue
            parts: list[dict[str, Any]] = []
            for part in content:
                if part["type"] != "text":
                    image = load_part(part, allow_urls=allow_urls, allow_files=False)
                    closely = closely or part.get("detail") == "high"
                    parts.append({"type": "image_url", "image_url": {"url": _png(image)}})
                    images += 1
                elif parts and parts[-1]["type"] == "text":  # joined as the template would
                    parts[-1]["text"] += part["text"].strip()
                else:
                    parts.append({"type": "text", "text": part["text"].strip()})
            for part in parts:
                if part["type"] == "text":
                    part["text"] = broken_up(part["text"])
            told.append({**message, "content": parts})
        body: dict[str, Any] = {"messages": told}
        if messages[-1]["role"] == "assistant":
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        if closely:
            body["mm_processor_kwargs"] = {"do_pan_and_scan": True}
        return Ask("/v1/chat/completions", body, images)

    def plain(self, text: str | list[int]) -> Ask:
        text = broken_up(normalize(text)) if isinstance(text, str) else text
        return Ask("/v1/completions", {"prompt": text})

    def words(self, text: str | list[int]) -> str:
        if isinstance(text, str):
            return text
        raise SeavlmError("prompts of token ids are not served through vLLM", hint="Send the text.")

    def form(self, form: Form) -> dict[str, Any]:
        if form.kind == "json_schema":
            return {"json": {**ready(form.value), "x-guidance": COMPACT}}
        if form.kind == "json_object":
            return {"json": {"type": "object", "x-guidance": COMPACT}}
        if form.kind == "json_or_text":
            return {"grammar": json_or_text(ready(form.value))}
        return {form.kind: form.value}

    def sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        given = {key: value for key, value in given.items() if value is not None}
        Sampling(**given)  # the same bounds
        if "logit_bias" in given:
            given["logit_bias"] = {str(key): value for key, value in given["logit_bias"].items()}
        if given.get("top_k") == 0:
            given["top_k"] = -1
        return dict(given)

    # --- in the loop

    def submit(
        self,
        prompt: Ask,
        sampling: dict[str, Any],
        *,
        max_new_tokens: int | None,
        form: dict[str, Any] | None = None,
        seed: int | None = None,
        owner: Any = None,
        salt: bytes = b"",
        who: str = "",
    ) -> VllmTicket:
        self.count += 1
        options = {"include_usage": True}
        body = prompt.body | sampling | {"model": self.name, "stream": True, "stream_options": options}
        logprobs = body.pop("logprobs", None)
        if logprobs is not None:
            chat = prompt.path.endswith("chat/completions")
            body |= {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
        if max_new_tokens is not None:
            body["max_tokens"] = min(max_new_tokens, self.max_tokens or max_new_tokens)
        if form is not None:
            body["structured_outputs"] = form
        if seed is not None:
            body["seed"] = seed % 2**63
        if salt:
            body["cache_salt"] = salt.hex()
        ticket = VllmTicket(prompt=prompt, owner=owner, give_up=_cancel, images=prompt.images)
        ticket.task = asyncio.ensure_future(self._follow(ticket, prompt.path, body))
        self._keep(ticket.task)
        return ticket

    async def _follow(self, ticket: VllmTicket, path: str, body: dict[str, Any]) -> None:
        """Hand on the pieces as they come."""
        self._running += 1
        last = Piece("", [], 0, "cancelled")
        try:
            async for piece in self._pieces(ticket, path, body):
                if piece.finish_reason is None:
                    ticket.put(piece)
                else:
                    last = piece
        except SeavlmError as error:
            last = Piece("", [], 0, "error", error)
        except Exception as error:
            log.warning("vLLM could not answer", exc_info=error)
            failed = SeavlmError(FAILED)
            failed.__cause__ = error
            last = Piece("", [], 0, "error", failed)
        finally:
            self._running -= 1
            self.count -= 1
            ticket.finish_reason = last.finish_reason
            self.ended(ticket)
            ticket.put(replace(last, num_tokens=ticket.num_tokens))

    async def _pieces(self, ticket: VllmTicket, path: str, body: dict[str, Any]) -> AsyncIterator[Piece]:
        last: Piece | None = None
        async with self._client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                raise _refusal(answer.status_code, await answer.aread())
            async for line in _lines(answer):
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise _refusal(int(chunk["error"].get("code") or 500), line[6:])
                if used := chunk.get("usage"):
                    ticket.prompt_tokens, ticket.num_tokens = used["prompt_tokens"], used["completion_tokens"]
                    ticket.cached_tokens = (used.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                for choice in chunk["choices"]:
                    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
                    tokens = _tokens(choice.get("logprobs"))
                    reason = choice.get("finish_reason")
                    if text or tokens:
                        ticket.last_at = time.perf_counter()
                        ticket.first_at = ticket.first_at or ticket.last_at
                        ticket.num_tokens += max(1, len(tokens))
                    if reason == "stop" and isinstance(choice.get("stop_reason"), int):
                        tokens = tokens[:-1]  # the one that ends the turn
                    piece = Piece(text or "", tokens, ticket.num_tokens, reason)
                    if reason is None:
                        yield piece
                    else:
                        last = piece  # what was used comes after it
        if last is None:
            raise ValueError("the stream ended early")
        yield last


def broken_up(text: str) -> str:
    """Names of control tokens with a word joiner in them, so that no tokenizer takes them for the tokens."""
    return CONTROL_NAMES.sub(lambda found: found[0][0] + WORD_JOINER + found[0][1:], text)


async def _lines(answer: Any) -> AsyncIterator[bytes]:
    """Of server-sent events. A newline alone ends one; httpx's own lines end with U+2028 in a text, too."""
    rest = b""
    async for data in answer.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    yield rest


def _cancel(ticket: Ticket) -> None:
    """Only after its task has begun, which else would never count it out."""
    if isinstance(ticket, VllmTicket) and ticket.task is not None:
        ticket.task.get_loop().call_soon(ticket.task.cancel)


def _png(image: Any) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _refusal(status: int, body: bytes) -> SeavlmError:
    """What it refused is the caller's to mend; the rest is not told."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = ""
    if status in (400, 404, 413, 422) and message:
        return SeavlmError(" ".join(message.split())[:500])
    log.warning("vLLM answered %d: %s", status, message[:500])
    error = SeavlmError(FAILED)
    error.__cause__ = ValueError(f"status {status}")
    return error


def _tokens(told: Any) -> list[Token]:
    if not told:
        return []
    if "content" in told:
        return [
            Token(_data(one), one["logprob"], [(_data(other), other["logprob"]) for other in one[TOP]])
            for one in told["content"]
        ]
    tops = told.get(TOP) or [{} for _ in told["tokens"]]
    return [
        Token(name.encode(), chance, [(other.encode(), value) for other, value in (top or {}).items()])
        for name, chance, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    ]


def _data(told: Mapping[str, Any]) -> bytes:
    return bytes(told["bytes"]) if told.get("bytes") else str(told["token"]).encode()


def _start(name: str, weights: Path, port: int, key: str, more: Sequence[str]) -> subprocess.Popen[bytes]:
    """SeavlmError where there is no vLLM."""
    command = shutil.which("vllm")
    if command is None:
        raise SeavlmError(
            "there is no vllm command here", hint="pip install vllm, or give --vllm-url of one that runs."
        )
    line = [command, "serve", str(weights), "--served-model-name", name, "--host", "127.0.0.1"]
    line += ["--port", str(port), "--enable-prompt-tokens-details"]
    line += ["--structured-outputs-config.backend", "guidance"]
    return subprocess.Popen([*line, *more], env=os.environ | {"VLLM_API_KEY": key})
