"""How often a sweep is fooled: `python benchmarks/sweep_luck.py [RUNS [PART...]]`.

No model is asked: merges that answer at random, with a truth that is known, go through `merge.search`, with
its races, its choice and its verdict on other concepts. Counted over many runs, each part by its name:

- equals: no merge is better than a parent. How many runs call one a win, and how many would if the search's
  own questions had the last word. three_looks: each with more questions, in one folder, as one may do who is
  told that so many more would settle it.
- ahead: one merge is better by a known difference. How often it is found and called a win; how often the
  better one was stopped early; how many questions were saved. foretold: with as many questions as a first,
  small run foresees for that difference, how often it is settled. 80 % is promised.
- floors: a merge has the best score and is truly below a floor, or truly above. How often each is chosen.

Writes sweep_luck.json beside this file.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np

from seavlm.evals import metrics
from seavlm.evals.stats import clusters_needed
from seavlm.evals.tasks import Answerer, Question
from seavlm.merge import search as searching
from seavlm.merge import show
from seavlm.merge.search import Betas, search

LANGUAGES = ("en", "zh", "th", "vi", "id")
GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@functools.cache
def questions(concepts: int) -> list[Question]:
    """One about each concept in each language; the prompt names both."""
    return [
        Question(
            id=f"{code}-{concept}",
            task="yesno",
            language=code,
            concept=f"c{concept}",
            prompt=f"{code} {concept}",
            answers=("yes",),
            messages=[{"role": "user", "content": f"{code} {concept}"}],
        )
        for code in LANGUAGES
        for concept in range(concepts)
    ]


def world(
    truth: Callable[[Betas, str], float], seed: int, *, alike: float = 0.6, concepts: int = 4000
) -> Callable[[Betas], Answerer]:
    """Merges that know truth(betas, language) of all questions. Concepts are more or less hard for all of
    them (sd 0.15), and a share `alike` of the questions is answered by a toss that all of them share.
    """
    draw = np.random.default_rng(seed)
    hard = draw.normal(0, 0.15, concepts)
    common = draw.random((len(LANGUAGES), concepts))
    shared = draw.random((len(LANGUAGES), concepts)) < alike

    def make(betas: Betas) -> Answerer:
        mark = [round(1000 * beta) for beta in betas.values()]
        own = np.random.default_rng([seed, *mark]).random((len(LANGUAGES), concepts))
        toss = np.where(shared, common, own)
        chance = np.array([[truth(betas, code)] for code in LANGUAGES]) + hard
        right = toss < np.clip(chance, 0, 1)

        def answer(batch: list[list[dict]]) -> list[str]:
            asked = [messages[-1]["content"].split() for messages in batch]
            return ["yes" if right[LANGUAGES.index(code), int(c)] else "no" for code, c in asked]

        return answer

    return make


def swept(make: Callable[[Betas], Answerer], concepts: int, out: Path | None = None, **changes) -> dict:
    settings = {"betas": GRID, "resamples": 300, "batch_size": 10_000}
    return search(questions(concepts), make, out, **settings | changes)


def same(betas: Betas, code: str) -> float:
    """All know as much as the global parent; the regional one is far behind, as a win over one parent takes
    less luck than one over two.
    """
    return 0.3 if set(betas.values()) == {1.0} else 0.5


def equals(runs: int, concepts: int = 80, modules: tuple[str, ...] = ()) -> dict:
    wins, naive, saved = 0, 0, []
    for seed in range(runs):
        report = swept(world(same, seed), concepts, modules=modules, seed=seed)
        wins += report["win"]
        best = next(row for row in report["rows"] if row["chosen"])
        parents = [row["score"]["mean"] for row in report["rows"] if row["label"] in ("0", "1")]
        error = report["against"]["better_parent"]["standard_error"] if report["against"] else 1.0
        naive += best["score"]["mean"] - max(parents) > 1.96 * error
        saved.append(report["questions"]["saved_share"])
    return {
        "concepts": concepts,
        "modules": list(modules),
        "called_a_win": wins / runs,
        "by_the_searchs_own_questions": naive / runs,
        "saved": round(statistics.mean(saved), 3),
    }


def looks(runs: int, sizes: tuple[int, ...] = (60, 90, 135)) -> dict:
    """Goes on with more questions in the same folder until it is told of a win."""
    wins = 0
    for seed in range(runs):
        make = world(same, seed)
        with tempfile.TemporaryDirectory() as folder:
            wins += any(swept(make, size, Path(folder), seed=seed)["win"] for size in sizes)
    return {"concepts": list(sizes), "called_a_win": wins / runs}


def ahead(runs: int, gap: float, concepts: int) -> dict:
    """beta 0.4 knows 0.5 + gap, all others 0.5."""

    def truth(betas: Betas, code: str) -> float:
        return 0.5 + gap * (betas["default"] == 0.4)

    wins, found, lost, saved, needed = 0, 0, 0, [], []
    for seed in range(runs):
        report = swept(world(truth, seed), concepts, seed=seed)
        wins += report["win"] and report["chosen"]["label"] == "0.4"
        found += report["chosen"]["label"] == "0.4"
        lost += next(bool(row["stopped"]) for row in report["rows"] if row["label"] == "0.4")
        saved.append(report["questions"]["saved_share"])
        if report["chosen"]["label"] == "0.4" and report["against"]["better_parent"]["more_concepts"]:
            needed.append(report["against"]["better_parent"]["more_concepts"])
    return {
        "gap": gap,
        "concepts": concepts,
        "chosen": found / runs,
        "stopped_early": lost / runs,
        "called_a_win": wins / runs,
        "saved": round(statistics.mean(saved), 3),
        "more_concepts_median": statistics.median(needed) if needed else None,
    }


def foretold(runs: int, gap: float, concepts: int = 80) -> dict:
    """A small run's noise foresees how many concepts settle a lead of `gap`; then so many are asked about."""

    def truth(betas: Betas, code: str) -> float:
        return {0.0: 0.3, 0.4: 0.5 + gap, 1.0: 0.5}[betas["default"]]

    needed, wins, tried = [], 0, 0
    for seed in range(runs):
        make = world(truth, seed)
        with tempfile.TemporaryDirectory() as folder:
            first = swept(make, concepts, Path(folder), betas=(0.4,), seed=seed)
            if not first["against"]:  # the search did not see it
                continue
            error = first["against"]["better_parent"]["standard_error"]
            there = first["questions"]["concepts_verdict"]
            needed.append(clusters_needed(gap, error, there, NormalDist().inv_cdf(1 - 0.025 / 4)))
            tried += 1
            wins += swept(make, 2 * max(needed[-1], there), Path(folder), betas=(0.4,), seed=seed)["win"]
    return {
        "gap": gap,
        "concepts_first": concepts,
        "concepts_foretold_median": 2 * statistics.median(needed),
        "settled": wins / tried,
    }


def floors(runs: int, kept: float, concepts: int = 160) -> dict:
    """The regional languages gain with beta, English loses; the floor of en is 0.85. At beta 0.4 English is
    at `kept` of the parent's."""

    def truth(betas: Betas, code: str) -> float:
        beta = betas["default"]
        if code == "en":
            return 0.8 * (1 - (1 - kept) * beta / 0.4)
        return 0.3 + 0.3 * beta if code != "zh" else 0.6

    below, wins, saved = 0, 0, []
    for seed in range(runs):
        report = swept(world(truth, seed), concepts, seed=seed, alpha=0.3, floors={"en": 0.85})
        chosen = next(row for row in report["rows"] if row["chosen"])
        low = truth(chosen["betas"], "en") < 0.85 * 0.8 - 1e-9
        below += low
        wins += low and report["win"]
        saved.append(report["questions"]["saved_share"])
    return {
        "english_at_beta_0.4": kept,
        "truly_below_chosen": below / runs,
        "truly_below_called_a_win": wins / runs,
        "saved": round(statistics.mean(saved), 3),
    }


PARTS: dict[str, Callable[[int], object]] = {
    "equals": lambda runs: [equals(runs), equals(runs // 4, modules=("attention", "mlp"))],
    "three_looks": looks,
    "ahead": lambda runs: [ahead(runs, *one) for one in ((0.04, 160), (0.08, 160), (0.08, 320))],
    "foretold": lambda runs: foretold(runs, 0.08),
    "floors": lambda runs: [floors(runs, kept) for kept in (0.95, 0.85, 0.75)],
}


def main(runs: int, parts: list[str]) -> None:
    known: dict[tuple[str, str], metrics.Judgement] = {}  # the same replies are judged but once

    def judge(question: Question, reply: str, vocabulary: metrics.Vocabulary) -> metrics.Judgement:
        if (question.id, reply) not in known:
            known[question.id, reply] = metrics.judge(question, reply, vocabulary)
        return known[question.id, reply]

    searching.judge = judge
    show.curve = show.pareto = lambda report: b""  # nobody looks at the pictures
    place = Path(__file__).with_suffix(".json")
    for part in parts or PARTS:
        found = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
        found[part] = {"runs": runs, "found": PARTS[part](runs)}
        print(part, json.dumps(found[part]), flush=True)
        place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400, sys.argv[2:])
