"""Questions that need nothing from outside: what ships with the package, asked in eleven languages.

Equal options give equal questions. Words are the picture set's names (CLDR), so that one concept is asked
about in all languages; texts to continue are the Universal Declaration of Human Rights.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from seavlm.data.pictures import HELD_OUT, Concept, load_pictures
from seavlm.data.tasks import MOST_COPIES, make_samples, templates
from seavlm.errors import SeavlmError
from seavlm.evals.adapters import Row, prompt, sample
from seavlm.evals.similarity import graphemes
from seavlm.text.language import LANGUAGES, to_native_digits
from seavlm.text.tools import Tool, instructions

READING = Path(__file__).parent / "suites" / "reading.parquet"
DECLARATION = Path(__file__).parents[1] / "engine" / "udhr.json"
CONCEPTS = ["animals-nature", "food-drink", "clothing", "musical-instrument"]
MAX_CHARACTERS = 60

TOOLS = (
    Tool(
        "multiply",
        "Multiply two whole numbers.",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    ),
    Tool(
        "get_population",
        "The number of people who live in a country.",
        {
            "type": "object",
            "properties": {"country": {"type": "string", "description": "its name, in any language"}},
            "required": ["country"],
        },
    ),
)


def pictures(options: dict[str, Any]) -> Iterator[Row]:
    """Tasks of `data.tasks` on art that nothing was trained on. each: questions a task and language.

    Of what is chosen or counted, each place and each number is right equally often: who always says the same
    is at chance. More is drawn for that than asked.
    """
    task, each = str(options["task"]), int(options["each"])
    kinds = {"choose": 4, "count": MOST_COPIES}.get(task, 1)
    left: Counter[str] = Counter()
    if each % kinds:
        raise SeavlmError(
            f"{each} questions of {task} cannot be balanced", hint=f"A multiple of {kinds} can."
        )
    drawn = list(
        make_samples(
            load_pictures(),
            split="eval",
            tasks={task: 1},
            languages=list(LANGUAGES),
            families=[HELD_OUT],
            concepts=options.get("concepts", CONCEPTS),
            n=each * len(LANGUAGES) * (4 if kinds > 1 else 1),
            seed=int(options.get("seed", 0)),
        )
    )
    for start in range(0, len(drawn), len(LANGUAGES)):  # one drawing, asked about in all of them
        meta = json.loads(drawn[start]["meta"])
        right = meta["answer"]
        kind = str(meta["options"].index(right) if task == "choose" else right) if kinds > 1 else ""
        if left[kind] < each // kinds:
            left[kind] += 1
            yield from drawn[start : start + len(LANGUAGES)]


def reading(options: dict[str, Any]) -> Iterator[Row]:
    """Words, numbers and phrases drawn in fonts of each script; what they say is to be written down."""
    for row in pq.read_table(options.get("data", READING)).to_pylist():
        language = row["language"]
        yield sample(
            f"reading-{row['id']}",
            options["name"],
            language,
            prompt(language, "read"),
            [row["image"]],
            kind="read",
            answer=row["text"],
            concept=row["concept"],
            family=row["kind"],
        )


def formats(options: dict[str, Any]) -> Iterator[Row]:
    """One form, over several concepts: json, language, lines or length."""
    form, each = options["form"], int(options["each"])
    codes = list(LANGUAGES)
    for index, concept in enumerate(_some(each)):
        rng = random.Random(f"{form} {index}")
        number = rng.randint(11, 99)
        for position, code in enumerate(codes):
            asked_in = (
                codes[(position + 1 + index % (len(codes) - 1)) % len(codes)] if form == "language" else code
            )
            name = concept.names[asked_in]
            text = prompt(asked_in, form).format(
                name=name,
                n=MAX_CHARACTERS,
                language=LANGUAGES[code].native_name,
                number=to_native_digits(str(number), code) if templates(code).native_digits else number,
            )
            checks: dict[str, dict[str, Any]] = {
                "json": {
                    "json": {"name": "string", "number": "integer"},
                    "values": {"name": name, "number": number},
                },
                "language": {"language": code},
                "lines": {"lines": 3, "each_line": name},
                "length": {"max_characters": MAX_CHARACTERS, "language": code},
            }
            yield sample(
                f"{form}-{concept.key}-{code}",
                options["name"],
                code,
                text,
                kind="checks",
                checks=checks[form],
                concept=concept.key,
            )


def calls(options: dict[str, Any]) -> Iterator[Row]:
    """Two functions are offered as text (`text/tools.py`): one fits, or, where somebody says hello, none."""
    each, system = int(options["each"]), instructions(TOOLS)
    names = [tool.name for tool in TOOLS]
    countries = [flag for flag in load_pictures().flags if flag.asked and not flag.same_as]
    for index in range(each):
        rng = random.Random(f"calls {index}")
        a, b = rng.randint(11, 99), rng.randint(2, 9)
        flag = rng.choice(countries)
        for code in LANGUAGES:
            native = templates(code).native_digits
            said = [to_native_digits(str(n), code) if native else str(n) for n in (a, b)]
            asked: dict[str, tuple[str, list[dict[str, Any]]]] = {
                "multiply": (
                    prompt(code, "multiply").format(a=said[0], b=said[1]),
                    [{"name": "multiply", "arguments": {"a": [str(a)], "b": [str(b)]}}],
                ),
                "population": (
                    prompt(code, "population").format(country=flag.names[code]),
                    [
                        {
                            "name": "get_population",
                            "arguments": {"country": sorted(set(flag.names.values()) | {flag.code})},
                        }
                    ],
                ),
            }
            if index == 0:
                asked["greeting"] = (prompt(code, "greeting"), [])
            for form, (text, wanted) in asked.items():
                checks = {"calls": wanted, "functions": names}
                yield sample(
                    f"calls-{form}-{index:03d}-{code}",
                    options["name"],
                    code,
                    text,
                    system=system,
                    kind="calls",
                    checks=checks,
                    concept=f"{form}-{index}",
                )


def continuations(options: dict[str, Any]) -> Iterator[Row]:
    """A piece of the declaration, and four pieces one of which goes on there: for a `Ranker`."""
    length = int(options.get("graphemes", 60))
    for code, text in declaration().items():
        pieces = _pieces(" ".join(text.split()), length)
        for index in range(0, len(pieces) - 1, 2):
            rng = random.Random(f"{code} {index}")
            others = [i for i in range(len(pieces)) if abs(i - index - 1) > 1 and i != index]
            chosen = [pieces[i] for i in rng.sample(others, 3)]
            chosen.insert(rng.randrange(4), pieces[index + 1])
            yield sample(
                f"continue-{code}-{index:03d}",
                options["name"],
                code,
                prompt(code, "continue").format(text=pieces[index]),
                kind="ranked",
                options=chosen,
                answer=pieces[index + 1],
                concept=f"{code}-{index}",
            )


@cache
def declaration() -> dict[str, str]:
    """Language -> the beginning of the Universal Declaration of Human Rights (engine/UDHR.md)."""
    return dict(json.loads(DECLARATION.read_text(encoding="utf-8")))


def _pieces(text: str, length: int) -> list[str]:
    """A text cut into pieces of about so many graphemes, at spaces where there are any near."""
    units, pieces, start = graphemes(text), list[str](), 0
    while len(units) - start >= length:
        end = start + length
        near = range(start + length // 2, min(len(units), end + length // 2))
        spaces = [i for i in near if units[i] == " "]
        end = min(spaces, key=lambda i: abs(i - end)) if spaces else end
        pieces.append("".join(units[start:end]).strip())
        start = end
    return pieces


def _some(count: int) -> list[Concept]:
    """Concepts spread over the set."""
    concepts = load_pictures().select(CONCEPTS)
    return [concepts[i * len(concepts) // count] for i in range(min(count, len(concepts)))]


GENERATORS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "pictures": pictures,
    "reading": reading,
    "formats": formats,
    "calls": calls,
    "continuations": continuations,
}
