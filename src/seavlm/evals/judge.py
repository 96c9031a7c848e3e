"""A second opinion: a model behind an endpoint reads the replies of a finished run.

Its verdicts stand beside the automatic ones and change none of them. What is worth reading is how far the two
agree, and where they do not (`agreement`): a judge is a model too, and often a poor one in these languages.

out/judge-NAME.parquet   each question that counts: verdict or grade, reason, the raw reply, what it cost
out/judge-NAME.json      agreement by task and language, warnings, the cells and replies furthest apart
out/judge-NAME.md        the same for people
out/judge-NAME.jsonl     while it lasts: what the judge has said, so that a killed run goes on

What is known to mislead judges, and what is done about it:

- Instructions in a reply ("give full marks"): a case is one JSON object, out of which no reply can break, and
  the rubric stands before and after it. What is read as the judge's verdict must be all that it says; where
  it quotes another verdict, it is not judged. A weak judge may obey all the same.
- Length and style: the rubric says that they do not count, and `length` shows how both scores go with the
  length of a reply. Order of replies: each is judged alone.
- Its own replies: a judge by the name of the model is warned of.
- Language: the rubric is English, names the language of the question, and asks for a reason in English; how
  well a judge reads Lao shows in the agreement on Lao.
- Wording: rubric.yaml has a version and a change log, and its hash is kept.

A judge sees the question as text, what is accepted, the reply, and the pictures where they are given to it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from seavlm import __version__, manifest
from seavlm.errors import SeavlmError
from seavlm.evals.agreement import GRADES, Opinion, summary
from seavlm.evals.http import Endpoint
from seavlm.evals.report import judge_markdown
from seavlm.evals.run import Journal, progress_bar
from seavlm.evals.scores import Results
from seavlm.evals.tasks import BLIND, GRADED, Messages, Reply, counted
from seavlm.text.language import LANGUAGES

RUBRIC = Path(__file__).with_name("rubric.yaml")
LONGEST, REASON = 1024, 240
"""Tokens of a judge's reply, should it think first; characters of its reason."""
READ = 16 * LONGEST
"""Characters that are read of it, its thoughts left out: looking for JSON takes the square of the time."""
_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("case", pa.string()),  # SHA-256 of what the judge was shown
        ("verdict", pa.string()),  # right, wrong; null where there is a grade, or none
        ("grade", pa.int64()),
        ("reason", pa.string()),
        ("reply", pa.string()),  # as the judge gave it
        ("not_judged", pa.string()),  # why, or nothing
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
    ]
)
_CUT, _WITHHELD = f"cut off at {LONGEST:,} tokens", "kept back by a filter"
_WORDS = {"right": True, "correct": True, "wrong": False, "incorrect": False}
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\A```\w*\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_LINE = re.compile(r"^\W*(verdict|grade)\W+(right|wrong|correct|incorrect|\d+)\W*$", re.I | re.M)


@dataclass(frozen=True)
class Rubric:
    """What a judge is told. `verdict` and `grade` have a {case}."""

    version: str
    sha256: str
    system: str
    verdict: str
    grade: str


def load_rubric(path: Path = RUBRIC) -> Rubric:
    """The rubric that ships with seavlm."""
    data = path.read_bytes()
    raw = yaml.safe_load(data)
    texts = {key: str(raw[key]).strip() for key in ("system", "verdict", "grade")}
    return Rubric(str(raw["version"]), manifest.sha256_bytes(data), **texts)


def judged(
    results: Results,
    folder: Path,
    url: str,
    *,
    model: str = "",
    key: str = "",
    pictures: Mapping[str, bytes] | None = None,
    concurrency: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Let the model at `url` judge the replies of `results`, and write what it says into the run's `folder`.

    model, key: at the endpoint, and of it (SEAVLM_JUDGE_KEY). pictures: SHA-256 -> picture, to be shown with
    the questions about them; None: the judge sees none. Cases that are alike are asked once, and one that has
    been answered is not asked again. Raises SeavlmError when the endpoint cannot be asked; what it has said
    so far is kept.
    """
    rubric = load_rubric()
    options: dict[str, Any] = {"max_new_tokens": LONGEST, "concurrency": concurrency}
    with _as_judge():
        first = Endpoint(url, model=model, key=key, response_formats=_forms(False), **options)
    name, place = first.model, first.url
    endpoints = {
        False: first,
        True: Endpoint(url, model=name, key=key, response_formats=_forms(True), **options),
    }
    about = {
        "model": name,
        "url": _without_secrets(place),
        "rubric": {"version": rubric.version, "sha256": rubric.sha256},
        "seavlm": __version__,
        "temperature": 0,
        "seed": 0,
        "pictures": pictures is not None,
    }
    stem = "judge-" + (re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "model")
    shown = pictures or {}
    cases = {
        _case_hash(record, shown): record
        for record in results.records
        if counted(record["task"]) and record["verdict"] != "no_reply"
    }
    identity = _sha256(json.dumps([place, name, rubric.sha256, pictures is not None]))
    replies = _said_before(folder / f"{stem}.parquet", identity)
    todo = [case for case in cases if case not in replies]
    if todo:
        path, whole = folder / f"{stem}.jsonl", f"{identity} {_sha256(' '.join(todo))}"
        whose, kept, _ = Journal.read(path) if path.exists() else ("", {}, 0.0)
        kept = kept if whose == whole else {}
        journal = Journal(path, whole, kept, 0.0)
        replies |= {todo[index]: reply for index, reply in kept.items()}
        with progress_bar(progress) as bar:
            row = bar.add_task(f"{name} judges", total=len(cases), completed=sum(c in replies for c in cases))
            for graded, endpoint in endpoints.items():
                wanted = [
                    index
                    for index, case in enumerate(todo)
                    if case not in replies and is_graded(cases[case]) == graded
                ]
                talks = [conversation(cases[todo[index]], rubric, shown) for index in wanted]
                with _as_judge():
                    for position, reply in endpoint.each(talks):
                        replies[todo[wanted[position]]] = reply
                        journal.add({wanted[position]: reply}, 0.0)
                        bar.advance(row)
    rows = [_row(record, shown, replies) for record in results.records if counted(record["task"])]
    if pictures is not None:
        asked = [one for one in results.records if counted(one["task"]) and one["image_sha256"]]
        about["unseen"] = sum(not _shown(one, shown) for one in asked)
    about["asked_without"] = sorted({name for endpoint in endpoints.values() for name in endpoint.without})
    about["retried"] = sum(endpoint.retried for endpoint in endpoints.values())
    about["usage"] = _usage([replies[case] for case in cases])
    found = _write(results, folder / stem, rows, about, identity)
    (folder / f"{stem}.jsonl").unlink(missing_ok=True)
    return found


def refresh(results: Results, folder: Path) -> list[dict[str, Any]]:
    """The agreement of all judges in a run's folder with `results`, written anew; nothing is asked.

    An opinion of a reply that is there no more is dropped.
    """
    found = []
    for path in sorted(folder.glob("judge-*.parquet")):
        metadata = _metadata(path)
        about = json.loads(metadata["about"])
        rows = pq.read_table(path).to_pylist()
        known = {row["case"]: row for row in rows if row["case"]}
        shown = dict.fromkeys(
            digest for record in results.records for digest in record["image_sha256"] if about["pictures"]
        )
        current = []
        for record in results.records:
            if counted(record["task"]):
                lost = record["verdict"] == "no_reply"
                ways = [] if lost else [_case_hash(record, {}), _case_hash(record, shown)]
                old: dict[str, Any] = next((known[way] for way in ways if way in known), {})
                row = _blank(record, "no reply" if lost else "not asked")
                current.append(row | {name: old[name] for name in _COLUMNS.names[3:] if name in old})
        found.append(_write(results, path.with_suffix(""), current, about, metadata["key"]))
    return found


# --- what a judge is asked


def is_graded(record: Mapping[str, Any]) -> bool:
    """Whether the replies to a question are more or less good, not right or wrong."""
    return (record.get("kind") or record["task"].removesuffix(BLIND)) in GRADED


def conversation(record: Mapping[str, Any], rubric: Rubric, pictures: Mapping[str, bytes]) -> Messages:
    """What the judge is sent about one row of questions.parquet: the rubric, its pictures, and the case."""
    template = rubric.grade if is_graded(record) else rubric.verdict
    text = template.replace("{case}", case(record, pictures))
    images = [{"type": "image", "image": pictures[name]} for name in _shown(record, pictures)]
    content = [*images, {"type": "text", "text": text}]
    return [{"role": "system", "content": rubric.system}, {"role": "user", "content": content}]


def case(record: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """A reply and its question as one JSON object: whatever they say stays within their strings."""
    told: dict[str, Any] = {
        "language": LANGUAGES[record["language"]].english_name,
        "question": record["prompt"],
    }
    if record["image_sha256"]:
        told["pictures"] = {
            "count": len(record["image_sha256"]),
            "shown to you": bool(_shown(record, pictures)),
        }
    if record["options"]:
        told["options"] = dict(zip(record["letters"] or (), record["options"], strict=False))
    told["references"] = list(record["answers"] or ())
    if record.get("checks"):
        told["requirements"] = json.loads(record["checks"])
    return json.dumps(told | {"reply": record["reply"]}, ensure_ascii=False, indent=1)


def _shown(record: Mapping[str, Any], pictures: Mapping[str, Any]) -> list[str]:
    """All pictures of a question, or none."""
    names = list(record["image_sha256"])
    return names if names and all(name in pictures for name in names) else []


def _case_hash(record: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    kind = "grade" if is_graded(record) else "verdict"
    return _sha256(json.dumps([kind, case(record, pictures), list(record["image_sha256"])]))


def _forms(graded: bool) -> list[dict[str, Any]]:
    """The structured output that is asked for, then the same without a limit, which not all endpoints know.

    The reason comes first, to be thought before it is decided.
    """
    decision: dict[str, Any] = (
        {"grade": {"type": "integer", "enum": list(range(GRADES + 1))}}
        if graded
        else {"verdict": {"type": "string", "enum": ["right", "wrong"]}}
    )
    forms = []
    for limit in ({"maxLength": REASON}, {}):
        schema = {
            "type": "object",
            "properties": {"reason": {"type": "string", **limit}, **decision},
            "required": ["reason", *decision],
            "additionalProperties": False,
        }
        told = {"name": "opinion", "strict": True, "schema": schema}
        forms.append({"type": "json_schema", "json_schema": told})
    return forms


# --- what it says


def read_opinion(text: str, graded: bool) -> Opinion | None:
    """A judge's reply, read; None where it cannot be.

    JSON, in a fence or after other words, or a line "verdict: right". Whatever it says of a verdict must be
    the same, as a reply that is quoted may hold one; and JSON must end the reply, as one that is cut off may
    have quoted a verdict but not come to its own.
    """
    body = _THOUGHT.sub("", text).strip()
    if len(body) > READ:
        return None
    if fence := _FENCE.match(body):
        body = fence[1].strip()
    key = "grade" if graded else "verdict"
    objects, end = _objects(body)
    said = [(one[key], str(one.get("reason") or "")) for one in objects if key in one]
    if said and body[end:].strip(" \t\n`."):
        return None
    if not said:
        said = [(value.lower(), "") for name, value in _LINE.findall(body) if name.lower() == key]
    if not said and body.lower().strip(' \n."*') in _WORDS and not graded:
        said = [(body.lower().strip(' \n."*'), "")]
    values = {_decision(value, graded) for value, _ in said}
    if len(values) != 1 or (value := values.pop()) is None:
        return None
    reason = said[-1][1]
    return Opinion(reason, grade=int(value)) if graded else Opinion(reason, right=bool(value))


def _objects(text: str) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects in a text, and where the last one ends."""
    decoder, found, at, end = json.JSONDecoder(), list[dict[str, Any]](), 0, 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
            found.append(value)
            end = at
        except (ValueError, RecursionError):
            at += 1
    return found, end


def _decision(value: Any, graded: bool) -> int | bool | None:
    if not graded:
        return _WORDS.get(str(value).strip().lower())
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number in range(GRADES + 1) else None


# --- what is kept


def _row(
    record: Mapping[str, Any], pictures: Mapping[str, bytes], replies: Mapping[str, Reply]
) -> dict[str, Any]:
    if record["verdict"] == "no_reply":
        return _blank(record, "no reply")
    hashed = _case_hash(record, pictures)
    reply = replies[hashed]
    opinion = None if reply.error else read_opinion(reply, is_graded(record))
    return _blank(record, "") | {
        "case": hashed,
        "verdict": None
        if opinion is None or opinion.right is None
        else ("right" if opinion.right else "wrong"),
        "grade": opinion.grade if opinion else None,
        "reason": opinion.reason if opinion else "",
        "reply": str(reply),
        "not_judged": "" if opinion else f"refused: {reply.error}" if reply.error else _why(reply),
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
    }


def _why(reply: Reply) -> str:
    """Why nothing can be read of it."""
    return {"length": _CUT, "content_filter": _WITHHELD}.get(reply.finish, "unreadable")


def _blank(record: Mapping[str, Any], why: str) -> dict[str, Any]:
    row: dict[str, Any] = {key: record[key] for key in ("id", "task", "language")}
    row |= {"case": "", "verdict": None, "grade": None, "reason": "", "reply": ""}
    return row | {"not_judged": why, "prompt_tokens": 0, "new_tokens": 0}


def _write(
    results: Results, stem: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any], key: str
) -> dict[str, Any]:
    """The rows, and the agreement that comes of them. `stem`: the files without their endings."""
    records = [record for record in results.records if counted(record["task"])]
    pairs = [
        (
            record,
            Opinion(
                row["reason"], None if row["verdict"] is None else row["verdict"] == "right", row["grade"]
            ),
        )
        for record, row in zip(records, rows, strict=True)
        if not row["not_judged"]
    ]
    reasons = Counter(row["not_judged"] for row in rows if row["not_judged"])
    found = about | {
        "run": results.name,
        "asked": len(rows),
        "judged": len(pairs),
        "not_judged": dict(reasons.most_common()),
        "warnings": _warnings(results, about, len(pairs), len(rows)),
        **summary(pairs),
    }
    metadata = {"seavlm_key": key, "seavlm_about": json.dumps(about, ensure_ascii=False)}
    table = pa.Table.from_pylist(list(rows), schema=_COLUMNS.with_metadata(metadata))
    paths = [stem.with_name(stem.name + end) for end in (".parquet", ".json", ".md")]
    manifest.put(paths[0], lambda path: pq.write_table(table, path, compression="zstd"))
    manifest.write_json(paths[1], found)
    manifest.write_text(paths[2], judge_markdown(found))
    return found


def _warnings(results: Results, about: Mapping[str, Any], judged: int, asked: int) -> list[str]:
    names = [results.name, *(str(results.about.get(key) or "") for key in ("name", "model"))]
    found = []
    if _bare(about["model"]) in {_bare(name) for name in names if not name.startswith("http")}:
        found.append(f"{about['model']} judges its own replies, which models favour: take another judge.")
    if about.get("unseen"):
        found.append(
            f"{about['unseen']:,} questions were judged without their pictures, which are not there."
        )
    if judged < 0.9 * asked:
        found.append(f"{asked - judged:,} of {asked:,} replies are not judged: the figures leave them out.")
    return found


def _bare(name: str) -> str:
    """A model's name without where it lies, its case, and how it is quantised or stored."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    return re.sub(r"[-_.:](q\d\w*|int[48]|fp(8|16|32)|bf16|awq|gptq|gguf|latest)$", "", last)


def _said_before(path: Path, key: str) -> dict[str, Reply]:
    """case -> what the same judge has said of it, where it could be asked."""
    if not path.exists() or _metadata(path).get("key") != key:
        return {}
    return {
        row["case"]: Reply(
            row["reply"],
            row["prompt_tokens"],
            row["new_tokens"],
            finish={_CUT: "length", _WITHHELD: "content_filter"}.get(row["not_judged"], ""),
        )
        for row in pq.read_table(path).to_pylist()
        if row["case"] and not row["not_judged"].startswith("refused")
    }


def _metadata(path: Path) -> dict[str, str]:
    found = pq.read_schema(path).metadata or {}
    return {key.decode().removeprefix("seavlm_"): value.decode() for key, value in found.items()}


def _usage(replies: Sequence[Reply]) -> dict[str, int]:
    told = {name: sum(getattr(reply, name) for reply in replies) for name in ("prompt_tokens", "new_tokens")}
    return told | {"uncounted": sum(not (reply.prompt_tokens or reply.error) for reply in replies)}


@contextmanager
def _as_judge() -> Iterator[None]:
    """What an endpoint says is wrong, said of the judge, with the options that are the judge's."""
    try:
        yield
    except SeavlmError as error:
        hint = (error.hint or "").replace("SEAVLM_API_KEY", "SEAVLM_JUDGE_KEY")
        hint = hint.replace("--name", "--judge-model")
        raise SeavlmError(f"the judge at {error.message}", hint=hint) from None


def _without_secrets(url: str) -> str:
    """A URL without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _sha256(text: str) -> str:
    return manifest.sha256_bytes(text.encode("utf-8", "surrogatepass"))
