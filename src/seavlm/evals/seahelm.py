"""SEA-HELM's text tasks (Susanto et al. 2025), from files in its own layout.

A row has `prompts` (a list of turns, each with the template's fields) and a `label`; the language is in
`metadata.language`, else in the file's or the folder's name. Files of examples for few-shot prompts are not
asked. So have the Parquet files of huggingface.co/aisingapore (a folder a language: `id/eval-...`) and the
JSONL files of github.com/aisingapore/SEA-HELM.

Its prompts are in a checkout of that repository (MIT), not in the data: in the config.yaml of the task, as
`preamble`, `task_template` and `answer_tag`. They are read from there when it lies in the folder that --data
names, so that what is asked is what SEA-HELM asks, zero-shot. Without it, only rows that have options of
their own can be asked, in the words of their fields.

Options of a task in a suite: `task` (its key in config.yaml), `kind`:

| kind | answers | SEA-HELM scores | scored here |
|---|---|---|---|
| letter | a letter, or one of the labels | balanced accuracy | accuracy; balanced in the measures |
| answer | texts | F1 of words (SQuAD), the best of the answers | the same |
| summary | a text | ROUGE-L | the same |
| translation | a text; `reply`: in this language | MetricX-24, a model of 13 B | chrF++ |
| rules | checks (`formats`) | rules that hold, in the right language | the same |

Words are those of `similarity.words`: SEA-HELM's for Thai (newmm), syllables for Burmese, characters for
Chinese, and between spaces for the others. Not here, because they are judged by a model: mt-bench, kalahi's
open half, syntax-criteria, MetricX, healthbench.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from seavlm.evals.adapters import Row, Skipped, Source, file_language, language_code, multiple_choice, sample
from seavlm.text.language import LANGUAGES

_EXAMPLES = re.compile(r"(^|[_-])(examples|example|fewshot|dev)([_-]|$)")
_OPTION = re.compile(r"(?:choice|option)_?(\d+|[a-z])")
_QUOTED = re.compile('["“”]([^"“”]*\\w[^"“”]*)["“”]')
UNSPACED = ("th", "lo", "km", "my")
"""Where SEA-IFEval does not count words."""


def seahelm(source: Source) -> Iterator[Row | Skipped]:
    """The rows of a task of SEA-HELM."""
    options = source.options
    key, kind = str(options.get("task", options["name"])), options.get("kind", "letter")
    rows: dict[str, list[tuple[Row, dict[str, Any]]]] = {}
    for path, row in source.rows():
        if _EXAMPLES.search(path.stem) or _EXAMPLES.search(path.parent.name):
            continue
        said = (row.get("metadata") or {}).get("language") or options.get("language")
        language = language_code(said) if said else file_language(path)
        if language is None:
            yield Skipped("another language")
        else:
            rows.setdefault(language, []).append((row, _fields(row)))
    for language, asked in rows.items():
        words = {**_words(source.folder, key).get(language, {}), **options.get("words", {})}
        labels = sorted({_label(row) for row, _ in asked if "label" in row})
        seen: set[str] = set()
        for index, (row, fields) in enumerate(asked):
            given = str(index if row.get("id") is None else row["id"])
            given = given if given not in seen else f"{given}-{index}"  # ids of LINDSEA's syntax repeat
            seen.add(given)
            about: dict[str, Any] = {"name": f"{options['name']}-{language}-{given}", "task": options["name"]}
            text = _asked(row, fields, words)
            concept = f"{key}-{given}"
            if kind == "letter":
                yield _choice(about, language, text, fields, _label(row), labels, concept)
            elif text is None:
                yield _unworded()
            elif kind == "rules":
                yield _ruled(about, language, text, row, concept)
            else:
                yield sample(
                    **about,
                    language=language,
                    text=text,
                    kind=kind,
                    answer=[str(one) for one in _listed(row["label"])],
                    checks={"after": words.get("answer_tag", ""), "language": options.get("reply", language)},
                    concept=concept,
                )


def _choice(
    about: dict[str, Any],
    language: str,
    text: str | None,
    fields: dict[str, Any],
    label: str,
    labels: list[str],
    concept: str,
) -> Row | Skipped:
    """Options are fields of the row, or else the labels that occur in this language."""
    keys = sorted(key for key in fields if _OPTION.fullmatch(key) and fields[key] is not None)
    native = LANGUAGES[language].option_letters
    own = not native.isascii() and any(one in native for one in labels)
    letters = list(native if own else "ABCDEFGHIJ")
    if keys:
        choices = [str(fields[key]) for key in keys]
        letters = letters[: len(choices)]
        right = int(label) if label.isdecimal() else letters.index(label) if label in letters else -1
        if not 0 <= right < len(choices):
            return Skipped("the label is no option")
        if text is None:
            said = [str(fields[key]) for key in _OWN if fields.get(key)]
            if not said:
                return _unworded()
            return multiple_choice(
                **about, language=language, question="\n\n".join(said), options=choices, right=right,
                concept=concept,
            )  # fmt: skip
    else:
        choices = _offered(fields, labels)
        letters = choices
        if label not in choices:
            return Skipped("the label is no option")
        if text is None:
            return _unworded()
        right = choices.index(label)
    return sample(
        **about, language=language, text=text, kind="letter", options=choices, letters=letters,
        answer=choices[right], concept=concept,
    )  # fmt: skip


_OWN = ("text", "premise", "phrase", "question", "question_translated")
"""Fields that are put before a row's own options where there is no template, in this order."""


def _offered(fields: dict[str, Any], labels: list[str]) -> list[str]:
    """The labels; in LINDSEA, where each row offers two of them, those two."""
    offered = str(fields.get("choices_translated") or "").casefold()
    return [one for one in labels if one.casefold() in offered] or labels


def _ruled(about: dict[str, Any], language: str, text: str, row: Row, concept: str) -> Row | Skipped:
    """A row of SEA-IFEval: `metadata.subcategory` names the rule, `kwargs` its figures."""
    rule = str((row.get("metadata") or {}).get("subcategory"))
    given = {key: value for key, value in _first(row.get("kwargs")).items() if value is not None}
    if rule == "length_constraints:number_words" and language in UNSPACED:
        return Skipped("it counts words where none are spaced")
    if rule == "language:response_language":
        wanted = language_code(given.get("response_language"))
        if wanted is None:
            return Skipped("another language")
        checks: dict[str, Any] = {"language": wanted}
    else:
        if rule == "detectable_format:constrained_response":
            given = {"phrases": _QUOTED.findall(text)}
            if len(given["phrases"]) < 2:
                return Skipped("its phrases are not quoted")
        checks = {"rule": {"name": rule, "spoken": language, **given}, "language": language}
    return sample(
        **about, language=language, text=text, kind="checks", checks=checks, concept=concept,
        family=rule.split(":")[0],
    )  # fmt: skip


def _unworded() -> Skipped:
    return Skipped("its prompt is in a checkout of SEA-HELM, which is not in this folder")


def _label(row: Row) -> str:
    return str(_listed(row.get("label"))[0]).strip()


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) and value else [value]


def _first(value: Any) -> dict[str, Any]:
    """The first of a list of dicts; of a dict of lists, which `datasets` made of it before version 4."""
    if isinstance(value, dict):
        return {key: each[0] if isinstance(each, list) and each else each for key, each in value.items()}
    return dict(value[0]) if value else {}


def _fields(row: Row) -> dict[str, Any]:
    return _first(row["prompts"])


def _asked(row: Row, fields: dict[str, Any], words: dict[str, str]) -> str | None:
    """The user's turn: preamble and task. Older rows carry a template of their own."""
    fields = {**fields, "answer_tag": words.get("answer_tag", "")}
    if "task_template" in words:
        parts = (words.get("preamble", ""), words["task_template"])
        return "\n\n".join(_filled(part, fields) for part in parts).strip()
    own = row.get("prompt_templates")
    return _filled(own[0], fields) if own else None


def _filled(template: str, fields: dict[str, Any]) -> str:
    """The template with its {fields}; those that are not known ({fewshot_examples}) are empty."""
    return re.sub(r"\{(\w+)\}", lambda found: str(fields.get(found[1], "")), template)


@cache
def _words(folder: Path, key: str) -> dict[str, dict[str, str]]:
    """Language -> preamble, task_template, answer_tag of a task in the config.yaml that has it."""
    for path in sorted(folder.rglob("config.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not re.search(rf"^{re.escape(key)}:", text, re.MULTILINE):
            continue
        try:
            languages = yaml.safe_load(text)[key]["languages"]
            found = {language_code(code): one["prompt_template"] for code, one in languages.items()}
        except (yaml.YAMLError, KeyError, TypeError, AttributeError):
            continue
        return {code: {k: str(v) for k, v in words.items()} for code, words in found.items() if code}
    return {}
