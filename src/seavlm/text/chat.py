"""Messages to ids: Gemma 3's conversation format, built segment by segment.

Control ids (turns, images) are put in by this module alone; everything between two of them is one text,
expanded first and tokenised then, because neighbouring newlines fuse into one token. What a user types stays
text.

    <bos><start_of_turn>user
    {system text, blank line}{text}

    <start_of_image>{n soft tokens}<end_of_image>

    {text}<end_of_turn>
    <start_of_turn>model
    {reply}<end_of_turn>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from seavlm.errors import SeavlmError, nearest
from seavlm.text.normalize import normalize

if TYPE_CHECKING:
    from seavlm.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "image_url")
USER, MODEL = "user\n", "model\n"  # what follows <start_of_turn>

# What the processor writes around the views of a picture when pan & scan cut it up.
ORIGINAL_VIEW = "Here is the original image "
CROPPED_VIEWS = " and here are some crops to help you see better "
BETWEEN_CROPS = " "
AROUND_IMAGE = "\n\n"

# Texts this module itself puts into a prompt: a trimmed vocabulary must keep their tokens.
OWN_TEXTS = (USER, MODEL, ORIGINAL_VIEW, CROPPED_VIEWS, BETWEEN_CROPS, *("\n" * n for n in range(1, 9)))

# The same format for transformers, written into the directories we save. It renders what encode_chat builds,
# before the images are expanded.
CHAT_TEMPLATE = r"""
{#- Gemma 3: one BOS; system text opens the first user turn; users and the model take turns. -#}
{{- bos_token -}}
{%- set opening = '' -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set opening = (system if system is string else system[0]['text']) ~ '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- set expected = 'user' if loop.index0 is even else 'assistant' -%}
    {%- if turn['role'] != expected -%}
        {{- raise_exception('Turns must alternate: expected ' ~ expected ~ ', found ' ~ turn['role']) -}}
    {%- endif -%}
    {{- '<start_of_turn>' ~ ('user' if expected == 'user' else 'model') ~ '\n' -}}
    {{- opening if loop.first -}}
    {%- if turn['content'] is string -%}
        {{- turn['content'] | trim -}}
    {%- else -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- elif part['type'] in ('image', 'image_url') -%}
                {{- '<start_of_image>' -}}
            {%- else -%}
                {{- raise_exception('Unknown content type ' ~ part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
""".lstrip()


@dataclass
class Encoded:
    """A conversation as ids.

    `assistant_mask` is True on what the model has to learn: the tokens of its replies and their
    <end_of_turn>. `image_spans` are (start, end) of the runs of soft tokens, one per view, in the order of
    the views.
    """

    input_ids: list[int] = field(default_factory=list)
    assistant_mask: list[bool] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)

    def _add(self, ids: Sequence[int], *, learn: bool = False) -> None:
        self.input_ids += ids
        self.assistant_mask += [learn] * len(ids)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    mm_tokens_per_image: int = 256,
    add_generation_prompt: bool = True,
    views_per_image: Sequence[int] | None = None,
) -> Encoded:
    """The ids transformers' Gemma3Processor makes of `messages`, BOS once, image places expanded.

    `views_per_image` says for each image in order how many views it has: 1, or 1 + its pan & scan crops; None
    is 1 each. Text is taken as it is (see `normalize_messages`). Raises SeavlmError for roles that do not
    alternate, unknown parts, and a count of views that does not fit the images.
    """
    check_messages(messages)
    images = len(image_parts(messages))
    views = [1] * images if views_per_image is None else list(views_per_image)
    if len(views) != images:
        raise SeavlmError(
            f"{len(views)} view counts were given for {images} images",
            hint="Give one count for each image, in order.",
        )
    if any(count < 1 for count in views):
        raise SeavlmError(
            f"Views per image {views} hold a count below 1", hint="The picture itself is one view."
        )
    next_views = iter(views)

    out = Encoded()
    out._add([tokenizer.bos_id])
    opening, turns = _split_system(messages)
    for turn in turns:
        out._add([tokenizer.start_of_turn_id])
        if turn["role"] == "assistant":
            # "\n" is a token of its own and a trimmed reply never begins with one: this cut changes no ids.
            out._add(tokenizer.encode(MODEL))
            reply = "".join(part["text"].strip() for part in _parts(turn))
            out._add(tokenizer.encode(reply), learn=True)
            out._add([tokenizer.end_of_turn_id], learn=True)
        else:
            text = USER + opening
            opening = ""
            for part in _parts(turn):
                if part["type"] == "text":
                    text += part["text"].strip()
                else:
                    text = _add_image(out, tokenizer, text, next(next_views), mm_tokens_per_image)
            out._add(tokenizer.encode(text))
            out._add([tokenizer.end_of_turn_id])
        out._add(tokenizer.encode("\n"))
    if add_generation_prompt:
        out._add([tokenizer.start_of_turn_id])
        out._add(tokenizer.encode(MODEL))
    return out


def _add_image(out: Encoded, tokenizer: Tokenizer, text: str, views: int, soft_tokens: int) -> str:
    """Writes the open `text` and all views of one image; gives back the text that follows, still open."""
    for view in range(views):
        if views > 1:
            text += ORIGINAL_VIEW if view == 0 else CROPPED_VIEWS if view == 1 else BETWEEN_CROPS
        out._add(tokenizer.encode(text + AROUND_IMAGE))
        out._add([tokenizer.boi_id])
        start = len(out.input_ids)
        out._add([tokenizer.image_id] * soft_tokens)
        out.image_spans.append((start, start + soft_tokens))
        out._add([tokenizer.eoi_id])
        text = AROUND_IMAGE
    return text


def image_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The parts of `messages` that are images, in order."""
    return [dict(part) for message in messages for part in _parts(message) if part["type"] != "text"]


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of `messages` whose texts went through `normalize`; image parts are kept as they are."""
    out: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            out.append({**message, "content": normalize(content)})
        else:
            parts = [
                {**p, "text": normalize(p["text"])} if p["type"] == "text" else dict(p)
                for p in _parts(message)
            ]
            out.append({**message, "content": parts})
    return out


def check_messages(messages: Sequence[Message]) -> None:
    """Raises SeavlmError, naming the message by its number, unless Gemma can read `messages`."""
    if not messages:
        raise SeavlmError("There are no messages", hint="Give at least one message with role 'user'.")
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in ROLES:
            raise SeavlmError(
                f"Message {number} has the role {role!r}",
                hint=f"Roles are {', '.join(ROLES)}.{nearest(str(role), ROLES)}",
            )
        if role == "system" and number > 1:
            raise SeavlmError(
                f"Message {number} is a system message", hint="Only the first message may be one."
            )
        parts = _parts(message, number)
        if role != "user" and any(part["type"] != "text" for part in parts):
            raise SeavlmError(
                f"Message {number} ({role}) holds an image", hint="Only user messages may hold images."
            )
        if role == "system" and len(parts) != 1:
            raise SeavlmError(
                f"The system message has {len(parts)} parts", hint="Give its content as one text."
            )
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise SeavlmError(
            "There is no user message", hint="Add a message with role 'user' after the system message."
        )
    first = len(messages) - len(turns) + 1
    for number, turn in enumerate(turns, first):
        expected = "user" if (number - first) % 2 == 0 else "assistant"
        if turn["role"] != expected:
            raise SeavlmError(
                f"Message {number} is from the {turn['role']} where the {expected} must speak",
                hint="After an optional system message, user and assistant alternate, the user first.",
            )


def _split_system(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The text that opens the first user turn (untrimmed, as in Gemma's template) and the turns."""
    if messages[0]["role"] != "system":
        return "", messages
    return _parts(messages[0])[0]["text"] + "\n\n", messages[1:]


def _parts(message: Message, number: int = 0) -> list[Mapping[str, Any]]:
    """A message's content as typed parts."""
    where = f"Message {number}" if number else f"A message of role {message.get('role')!r}"
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise SeavlmError(
            f"{where} has content of type {type(content).__name__}",
            hint="Content is a text or a list of parts.",
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PART_TYPES:
            raise SeavlmError(
                f"{where} has a part of type {kind!r}",
                hint=f"Types are {', '.join(PART_TYPES)}.{nearest(str(kind), PART_TYPES)}",
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise SeavlmError(f"{where} has a text part without a text", hint="Give it the key 'text'.")
    return list(content)
