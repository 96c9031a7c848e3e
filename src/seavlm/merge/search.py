"""Which share of the regional model each module should keep, found with as few questions as will tell.

    theta = beta_m * regional + (1 - beta_m) * global          for each module m (the words of `plan.MODULES`)
    score = alpha * accuracy on the global suite (en, zh) + (1 - alpha) * accuracy on the regional suite

1. A grid of one beta for all. 2. With modules: their betas one after the other (coordinate search), or, with
trials, by a tree-structured Parzen estimator (Bergstra et al. 2011, through optuna). All candidates answer
the same questions, in rounds, each twice as long as the one before: who is surely behind the leader, or
surely below a floor, is not asked on (a race: Maron & Moore 1994; rounds as in successive halving, Jamieson
& Talwalkar 2016). "Surely" is the paired interval of `evals.stats`, over resampled concepts, widened for the
number of rounds (Bonferroni).

The best of many looks better than it is. So the verdict comes from concepts that the search has not asked
about: the chosen one, the better parent and the best single beta are compared there.

    out/sweep.json    every candidate, what it was asked, the verdict
    out/sweep.csv     a line a candidate
    out/pareto.png    global score against regional score, the front marked
    out/best.yaml     the chosen one: seavlm merge out/best.yaml --out DIR
    out/replies/      what was answered: a search that was killed, or is given more trials, asks the rest
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE
from rich.table import Table

from seavlm import manifest
from seavlm.errors import SeavlmError
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.scores import SUITES
from seavlm.evals.stats import Z95, Bootstrap, bootstrap, clusters_needed, student
from seavlm.evals.tasks import RANKED, Answerer, Question, fingerprint
from seavlm.merge.plan import module_words

STEP = 0.05  # between the betas that trials try
ROUNDS = 4
LEAST = 16  # concepts in a round: an interval over fewer drops the wrong ones too often
PASSES = 2  # of the coordinate search, over all modules
Betas = dict[str, float]  # module's word -> share of the regional model; "default" for the rest


@dataclass
class Candidate:
    """One merge, and what each question that it was asked earned it."""

    betas: Betas
    scores: dict[int, float] = field(default_factory=dict)
    stopped: str = ""

    @property
    def linear(self) -> bool:
        return len(set(self.betas.values())) == 1

    @property
    def label(self) -> str:
        if self.linear:
            return f"{self.betas['default']:g}"
        return ", ".join(f"{'rest' if w == 'default' else w} {b:g}" for w, b in self.betas.items())


@dataclass
class Search:
    """What all candidates share. `rounds[-1]` has all questions of the search; `kept` are the verdict's."""

    questions: list[Question]
    rounds: list[list[int]]
    kept: list[int]
    make: Callable[[Betas], Answerer]
    out: Path
    key: str
    modules: list[str]
    alpha: float
    floors: dict[str, float]
    batch_size: int
    resamples: int
    seed: int
    tell: Callable[[str], None]
    vocabulary: Vocabulary = field(init=False)
    names: list[str] = field(init=False)
    known: dict[tuple[float, ...], Candidate] = field(default_factory=dict)
    merges: int = 0

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary.of(self.questions)
        self.names = [fingerprint([question])[:20] for question in self.questions]

    def candidate(self, betas: Betas) -> Candidate:
        """The candidate with these betas: the same one whenever they come again."""
        whole = {word: round(betas.get(word, betas["default"]), 6) for word in [*self.modules, "default"]}
        return self.known.setdefault(tuple(whole.values()), Candidate(whole))

    @property
    def parent(self) -> Candidate:
        return self.candidate({"default": 0.0})


def search(
    questions: Sequence[Question],
    make: Callable[[Betas], Answerer],
    out: Path,
    *,
    key: str,
    betas: Sequence[float],
    modules: Sequence[str] = (),
    trials: int = 0,
    alpha: float = 0.43,
    floors: Mapping[str, float] | None = None,
    confirm: float = 0.5,
    rounds: int = ROUNDS,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    parents: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Search, write the files to `out`, and return what is in sweep.json.

    make: betas -> an answerer; the one before has been let go of. key: what decides replies besides the betas
    (parents, settings). modules: their own betas, the first that fits a tensor counts. trials: of the Parzen
    estimator, which needs optuna; 0 searches coordinates. floors: language -> share of the global parent's
    accuracy that a merge must keep. confirm: share of the concepts kept for the verdict. parents: their
    references, for best.yaml. SeavlmError for modules nobody knows, and for questions that lack a suite or a
    language with a floor.
    """
    wanted = dict(floors or {})
    asked = [question for question in questions if question.counted and question.reading != RANKED]
    _check(asked, modules, wanted, trials)
    optuna = _optuna() if trials else None
    searched, kept = _split(asked, confirm, seed)
    state = Search(
        questions=asked,
        rounds=_rounds(asked, searched, rounds, seed),
        kept=kept,
        make=make,
        out=out,
        key=key,
        modules=list(modules),
        alpha=alpha,
        floors=wanted,
        batch_size=batch_size,
        resamples=resamples,
        seed=seed,
        tell=tell,
    )
    _ask(state, state.parent, state.rounds[-1])  # the floors are shares of its accuracy
    grid = [state.candidate({"default": beta}) for beta in sorted({0.0, 1.0, *betas})]
    leader = _race(state, grid, state.parent)
    tell(f"one beta for all: {leader.label}")
    if optuna is not None:
        leader = _trials(state, leader, trials, optuna)
    elif modules:
        leader = _coordinates(state, leader, sorted({0.0, 1.0, *betas}))
    report = _report(state, leader, trials) | {"parents": dict(parents or {})}
    out.mkdir(parents=True, exist_ok=True)
    manifest.write_json(out / "sweep.json", report)
    for name, content in {
        "sweep.csv": _csv(report).encode(),
        "pareto.png": plot(report),
        "best.yaml": _recipe(report).encode(),
    }.items():
        partial = out / f"{name}.tmp-{os.getpid()}"
        partial.write_bytes(content)
        os.replace(partial, out / name)
    return report


# --- which questions


def _check(
    questions: Sequence[Question], modules: Sequence[str], floors: Mapping[str, float], trials: int
) -> None:
    module_words(modules)
    languages = {question.language for question in questions}
    for suite, codes in SUITES.items():
        if not languages & set(codes):
            raise SeavlmError(
                f"there is no question for the {suite} suite ({' '.join(codes)})",
                hint="A sweep weighs both: ask in all languages.",
            )
    for code, share in floors.items():
        if code not in languages:
            raise SeavlmError(f"there is a floor for {code!r} and no question in it", hint="Floors: en=0.9.")
        if not 0 < share <= 1:
            raise SeavlmError(
                f"the floor of {code} is {share:g}", hint="It is a share of the parent's accuracy: 0 to 1."
            )


def _strata(questions: Sequence[Question], seed: int) -> list[list[str]]:
    """Concepts, shuffled, by the tasks that ask about them: each part of a round gets its share of each."""
    tasks: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        tasks[question.concept].add(question.task)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for concept in sorted(tasks):
        groups[tuple(sorted(tasks[concept]))].append(concept)
    draw = random.Random(seed)
    for group in groups.values():
        draw.shuffle(group)
    return list(groups.values())


def _split(questions: Sequence[Question], confirm: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the search's questions and of the verdict's; no concept is in both."""
    kept = {c for group in _strata(questions, seed) for c in group[: round(len(group) * confirm)]}
    parts: tuple[list[int], list[int]] = ([], [])
    for index, question in enumerate(questions):
        parts[question.concept in kept].append(index)
    for part, name in zip(parts, ("the search", "the verdict"), strict=True):
        if len({questions[i].concept for i in part}) < 2:
            raise SeavlmError(
                f"{len(questions)} questions leave too few concepts for {name}", hint="Raise --limit."
            )
    return parts


def _rounds(questions: Sequence[Question], searched: list[int], rounds: int, seed: int) -> list[list[int]]:
    """Growing lists of indices: an eighth of the concepts (or LEAST), a quarter, a half, all."""
    groups = _strata([questions[i] for i in searched], seed + 1)
    found: list[list[int]] = []
    for place in range(rounds - 1, -1, -1):
        share = 0.5**place
        taken = {c for group in groups for c in group[: max(2, round(len(group) * share))]}
        part = [i for i in searched if questions[i].concept in taken]
        if place == 0 or LEAST <= len(taken) < sum(map(len, groups)):
            found.append(part)
    return found


# --- asking and comparing


def _ask(state: Search, candidate: Candidate, indices: Iterable[int]) -> None:
    """Fill in `scores`: from what was answered before, else by a merge in memory."""
    missing = [i for i in indices if i not in candidate.scores]
    if not missing:
        return
    identity = f"{state.key} {sorted(_told(candidate.betas).items())}"
    path = state.out / "replies" / f"{manifest.sha256_bytes(identity.encode())[:20]}.jsonl"
    replies = _read(path)
    todo = [i for i in missing if state.names[i] not in replies]
    todo.sort(key=lambda i: (state.questions[i].task, state.questions[i].language, i))
    if todo:
        state.tell(f"beta {candidate.label}: {len(todo)} questions")
        answerer = state.make(candidate.betas)
        state.merges += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for start in range(0, len(todo), state.batch_size):
                batch = todo[start : start + state.batch_size]
                answers = answerer([state.questions[i].conversation() for i in batch])
                for i, answer in zip(batch, answers, strict=True):
                    replies[state.names[i]] = str(answer)
                    file.write(json.dumps([state.names[i], str(answer)]) + "\n")
                file.flush()
    for i in missing:
        reply = replies[state.names[i]]
        candidate.scores[i] = judge(state.questions[i], reply, state.vocabulary).score


def _told(betas: Betas) -> Betas:
    """Without the modules that are as the rest: equal merges, equal replies."""
    return betas if len(set(betas.values())) > 1 else {"default": betas["default"]}


def _read(path: Path) -> dict[str, str]:
    """Replies by question. A line that was cut off by a kill is taken away."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return dict(json.loads(line) for line in text.splitlines())


def _draws(state: Search, candidates: Sequence[Candidate], indices: Sequence[int]) -> Bootstrap:
    """Paired draws: a column a candidate, and a last one of the floors (share times the parent's score)."""
    rows = [state.questions[i] for i in indices]
    columns = [[candidate.scores[i] for i in indices] for candidate in candidates]
    columns.append(
        [state.floors.get(state.questions[i].language, 0) * state.parent.scores[i] for i in indices]
    )
    cells: list[Hashable] = [(row.task, row.language) for row in rows]
    return bootstrap(
        np.array(columns, dtype=np.float64).T,
        [row.concept for row in rows],
        cells,
        resamples=state.resamples,
        seed=state.seed,
    )


def _cells(draws: Bootstrap, codes: Iterable[str]) -> list[Any]:
    wanted = set(codes)
    return [cell for cell in draws.cells if cell[1] in wanted]


def _weights(state: Search, draws: Bootstrap) -> dict[Hashable, float]:
    """Of each cell in the score: equal within a suite."""
    shares = {"global": state.alpha, "regional": 1 - state.alpha}
    found: dict[Hashable, float] = {}
    for suite, codes in SUITES.items():
        cells = _cells(draws, codes)
        found |= {cell: shares[suite] / len(cells) for cell in cells}
    return found


def _upper(state: Search, draws: Bootstrap, a: int, b: int, cells: Any) -> float:
    """The bound that a's mean minus b's is below, at 97.5 % for all rounds together."""
    gap, looks = draws.difference(a, b, cells), len(state.rounds)
    wider = NormalDist().inv_cdf(1 - 0.025 / looks) / Z95 - 1
    return gap.high + wider * student(draws.clusters(cells) - 1) * draws.standard_error(a, b, cells)


def _shortfall(state: Search, draws: Bootstrap, column: int) -> float:
    """By how much the floors are missed, added up; 0 when all are kept."""
    last = draws.sums.shape[2] - 1
    gaps = [draws.difference(column, last, _cells(draws, [code])).mean for code in state.floors]
    return sum(max(0.0, -gap) for gap in gaps if gap < -1e-12)


def _value(state: Search, draws: Bootstrap, column: int) -> tuple[bool, float]:
    """To choose by: who keeps the floors comes first, then the score."""
    return _shortfall(state, draws, column) == 0, draws.interval(_weights(state, draws), column).mean


def _no_safer(state: Search, draws: Bootstrap, column: int, leader: int) -> bool:
    """Whether the leader's floors are no reason to keep another: surely kept, or the other is no nearer."""
    last = draws.sums.shape[2] - 1
    for code in state.floors:
        cells = _cells(draws, [code])
        nearer = draws.difference(column, leader, cells).mean > 0
        if nearer and _upper(state, draws, last, leader, cells) > 0:
            return False
    return True


def _race(state: Search, candidates: Sequence[Candidate], champion: Candidate) -> Candidate:
    """Ask in rounds, drop clear losers; the best of those left and of `champion`, who was asked all."""
    alive = [c for c in candidates if not c.stopped and c is not champion]
    for place, indices in enumerate(state.rounds):
        for candidate in alive:
            _ask(state, candidate, indices)
        field_ = [champion, *alive]  # of equals the one that was there first
        draws = _draws(state, field_, indices)
        values = [_value(state, draws, i) for i in range(len(field_))]
        first = max(range(len(field_)), key=values.__getitem__)
        leader, weights = field_[first], _weights(state, draws)
        if place + 1 == len(state.rounds):
            return leader
        for column, candidate in enumerate(field_):
            if candidate in (leader, champion):
                continue
            for code in state.floors:
                if _upper(state, draws, column, len(field_), _cells(draws, [code])) < 0:
                    candidate.stopped = f"below the floor of {code}"
            behind = _upper(state, draws, column, first, weights) < 0
            if behind and _no_safer(state, draws, column, first):
                candidate.stopped = f"behind {leader.label}"
        alive = [c for c in alive if not c.stopped]
    raise AssertionError("there is a last round")


# --- the search


def _coordinates(state: Search, leader: Candidate, betas: Sequence[float]) -> Candidate:
    """One module after the other gets each beta of the grid; again, until nothing changes (PASSES)."""
    for _ in range(PASSES):
        before = leader
        for word in [*state.modules, "default"]:
            leader = _race(state, [state.candidate(leader.betas | {word: b}) for b in betas], leader)
            state.tell(f"{word}: {leader.label}")
        if leader is before:
            break
    return leader


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SeavlmError(
            "trials need optuna", hint="pip install 'seavlm[sweep]', or leave --trials out."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _trials(state: Search, leader: Candidate, trials: int, optuna: Any) -> Candidate:
    """Ask the Parzen estimator for betas.

    It starts from the grid's results, and its seed is fixed: run again, it proposes the same ones, whose
    replies are there.
    """
    words = [*state.modules, "default"]
    steps = round(1 / STEP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls `multivariate` experimental
        sampler = optuna.samplers.TPESampler(
            seed=state.seed, multivariate=True, n_startup_trials=len(state.known) + len(words)
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space = {word: optuna.distributions.IntDistribution(0, steps) for word in words}
    for known in list(state.known.values()):
        params = {word: round(known.betas[word] * steps) for word in words}
        value = _estimate(state, known, leader)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    for _ in range(trials):
        trial = study.ask(space)
        candidate = state.candidate({word: trial.params[word] / steps for word in words})
        before, leader = leader, _race(state, [candidate], leader)
        study.tell(trial, _estimate(state, candidate, before))
        if leader is not before:
            state.tell(f"best so far: {leader.label}")
    return leader


def _estimate(state: Search, candidate: Candidate, reference: Candidate) -> float:
    """The score on all questions of the search, less ten times what the floors are missed by.

    Of a candidate that was stopped: the reference's, and the paired difference on what both were asked.
    """
    whole = state.rounds[-1]
    shared = [i for i in whole if i in candidate.scores]
    on_all, on_some = _draws(state, [reference], whole), _draws(state, [candidate, reference], shared)
    weights = _weights(state, on_some)
    score = on_all.interval(_weights(state, on_all)).mean
    score += on_some.interval(weights, 0).mean - on_some.interval(weights, 1).mean
    return score - 10 * _shortfall(state, on_some, 0)


# --- the report


def _report(state: Search, chosen: Candidate, trials: int) -> dict[str, Any]:
    whole = state.rounds[-1]
    rows = [_row(state, candidate, chosen) for candidate in state.known.values() if candidate.scores]
    front = _front([row for row in rows if row["asked"] == len(whole) and row["floors_kept"]])
    for row in rows:
        row["front"], row["chosen"] = row["label"] in front, row["label"] == chosen.label
    score = {row["label"]: (row["floors_kept"], row["score"]["mean"]) for row in rows}
    parents = [state.parent, state.candidate({"default": 1.0})]
    parent = max(parents, key=lambda c: score[c.label])  # one below a floor is no choice
    complete = [c for c in state.known.values() if c.linear and all(i in c.scores for i in whole)]
    linear = max(complete, key=lambda c: score[c.label], default=parent)
    for candidate in (chosen, parent, linear, state.parent):
        _ask(state, candidate, state.kept)
    against = {
        name: _against(state, chosen, other) | {"label": other.label}
        for name, other in {"better_parent": parent, "best_linear": linear}.items()
        if other is not chosen
    }
    asked, all_of = sum(row["asked"] for row in rows), len(rows) * len(whole)
    report: dict[str, Any] = {
        "alpha": state.alpha,
        "modules": state.modules,
        "search": "trials" if trials else "coordinates" if state.modules else "grid",
        "floors": _floors(state, chosen),
        "chosen": {"label": chosen.label, "betas": _told(chosen.betas)},
        "better_parent": parent.label,
        "best_linear": linear.label,
        "candidates": len(rows),
        "questions": {
            "search": len(whole),
            "rounds": [len(part) for part in state.rounds],
            "verdict": len(state.kept),
            "concepts_search": len({state.questions[i].concept for i in whole}),
            "concepts_verdict": len({state.questions[i].concept for i in state.kept}),
            "asked": asked,
            "saved": all_of - asked,
            "saved_share": (all_of - asked) / all_of,
        },
        "merges": state.merges,
        "against": against,
        "rows": rows,
    }
    gain = against.get("better_parent")
    broken = [code for code, floor in report["floors"].items() if not floor["kept"]]
    report["win"] = bool(gain and gain["low"] > 0 and not broken)
    report["verdict"] = _verdict(report, broken)
    return report


def _row(state: Search, candidate: Candidate, chosen: Candidate) -> dict[str, Any]:
    """A candidate's figures on the questions of the search.

    Of one that was stopped: the chosen one's, and the paired difference on what both were asked.
    """
    whole = state.rounds[-1]
    shared = [i for i in whole if i in candidate.scores]
    draws, all_of = _draws(state, [candidate, chosen], shared), _draws(state, [chosen], whole)
    row: dict[str, Any] = {
        "label": candidate.label,
        "betas": candidate.betas,
        "asked": len(shared),
        "stopped": candidate.stopped,
        "floors_kept": _shortfall(state, draws, 0) == 0,
    }
    groups: dict[str, tuple[Any, Any]] = {
        suite: (_cells(draws, codes), _cells(all_of, codes)) for suite, codes in SUITES.items()
    }
    groups["score"] = (_weights(state, draws), _weights(state, all_of))
    for name, (mine, theirs) in groups.items():
        own = draws.interval(mine, 0)
        shift = all_of.interval(theirs).mean - draws.interval(mine, 1).mean
        row[name] = {"mean": own.mean + shift, "low": own.low + shift, "high": own.high + shift}
    codes = dict.fromkeys(state.questions[i].language for i in shared)
    row["languages"] = {code: draws.interval(_cells(draws, [code]), 0).mean for code in codes}
    return row


def _front(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The labels of those that no other beats in one suite without being worse in the other (Pareto)."""
    points = {row["label"]: (row["global"]["mean"], row["regional"]["mean"]) for row in rows}
    return {
        label
        for label, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    }


def _against(state: Search, chosen: Candidate, other: Candidate) -> dict[str, Any]:
    """The chosen one's lead on the verdict's questions, and how many more would settle it."""
    draws = _draws(state, [chosen, other], state.kept)
    weights = _weights(state, draws)
    gap, error = draws.difference(0, 1, weights), draws.standard_error(0, 1, weights)
    concepts = draws.clusters(weights)
    needed = clusters_needed(gap.mean, error, concepts)
    more = math.ceil(max(0, needed - concepts) * len(state.kept) / concepts)
    suites = {s: asdict(draws.difference(0, 1, _cells(draws, codes))) for s, codes in SUITES.items()}
    return {
        **asdict(gap),
        "p": draws.p_value(0, 1, weights, seed=state.seed),
        "settled": gap.excludes_zero,
        "more_questions": 0 if gap.excludes_zero else more or None,
        "suites": suites,
        "scores": [asdict(draws.interval(weights, column)) for column in (0, 1)],
    }


def _floors(state: Search, chosen: Candidate) -> dict[str, Any]:
    """Each floor on the verdict's questions. sure: the whole interval lies on one side of it."""
    draws = _draws(state, [chosen, state.parent], state.kept)
    found = {}
    for code, share in state.floors.items():
        cells = _cells(draws, [code])
        if not cells:
            raise SeavlmError(f"the verdict has no question in {code}", hint="Raise --limit.")
        gap = draws.difference(0, 2, cells)
        found[code] = {
            "share": share,
            "parent": draws.interval(cells, 1).mean,
            "chosen": draws.interval(cells, 0).mean,
            "kept": gap.mean >= -1e-12,
            "sure": gap.excludes_zero,
        }
    return found


def _verdict(report: dict[str, Any], broken: list[str]) -> str:
    gain = report["against"].get("better_parent")
    parent = "global" if report["better_parent"] == "0" else "regional"
    if gain is None:
        return f"No merge scores higher than the {parent} parent."
    said = f"beta {report['chosen']['label']} against the better parent ({parent}): {_points(gain)}."
    if broken:
        return f"No win: below the floor in {', '.join(broken)}. {said}"
    if report["win"]:
        said = f"A win: {said}"
    elif gain["high"] < 0:
        said = f"A loss: {said}"
    else:
        said = f"No win, inside the noise: {said} {_more(gain)}"
    linear = report["against"].get("best_linear")
    if linear and report["best_linear"] != report["better_parent"]:
        said += f" Against the best single beta ({report['best_linear']}): {_points(linear)}"
        said += ", settled." if linear["settled"] else f", inside the noise. {_more(linear)}"
    return said


def _points(gap: dict[str, Any]) -> str:
    return (
        f"{gap['mean'] * 100:+.1f} points, 95 % interval {gap['low'] * 100:+.1f} to {gap['high'] * 100:+.1f}"
    )


def _more(gap: dict[str, Any]) -> str:
    if gap["more_questions"] is None:
        return "No number of questions is foreseen to settle it."
    return f"About {gap['more_questions']:,} more questions would settle a difference of this size."


def _recipe(report: dict[str, Any]) -> str:
    """The chosen one as a recipe of `merge.plan`."""
    betas = report["chosen"]["betas"]
    beta = betas["default"] if len(betas) == 1 else betas
    raw = {**report.get("parents", {}), "beta": beta}
    return f"# {report['verdict']}\n" + yaml.safe_dump(raw, sort_keys=False, width=1000)


def table(report: dict[str, Any], most: int = 16) -> Table:
    """The best candidates for the terminal."""
    asked = report["questions"]
    title = (
        f"merge sweep, alpha {report['alpha']:g}: accuracy % on the search's {asked['search']} questions; "
        f"{asked['saved']} of {asked['asked'] + asked['saved']} saved"
    )
    grid = Table(title=title, title_justify="left", box=SIMPLE)
    grid.add_column("beta")
    for head in ("global", "regional", "weighted", "asked"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("")
    rows = sorted(report["rows"], key=lambda row: -row["score"]["mean"])
    parents = [row for row in rows if row["label"] in ("0", "1") and row not in rows[:most]]
    for row in [*rows[:most], *parents]:
        notes = [row["stopped"], "" if row["floors_kept"] else "below a floor"]
        notes += ["front" if row["front"] else "", "<- chosen" if row["chosen"] else ""]
        figures = [_figure(row[key], bool(row["stopped"])) for key in ("global", "regional", "score")]
        style = "bold" if row["chosen"] else "dim" if row["stopped"] else ""
        grid.add_row(row["label"], *figures, str(row["asked"]), "; ".join(filter(None, notes)), style=style)
    if len(rows) > most + len(parents):
        grid.add_row(f"and {len(rows) - most - len(parents)} more", *[""] * 5, style="dim")
    return grid


def _figure(interval: dict[str, float], guessed: bool) -> str:
    return f"{'~' if guessed else ''}{interval['mean'] * 100:.1f}"


def _csv(report: dict[str, Any]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    words = [*report["modules"], "default"]
    parts = [(key, part) for key in ("global", "regional", "score") for part in ("mean", "low", "high")]
    heads = [f"{key}_{part}" for key, part in parts]
    writer.writerow([*words, *heads, "asked", "floors_kept", "front", "chosen", "stopped"])
    for row in report["rows"]:
        figures = [round(row[key][part], 6) for key, part in parts]
        rest = [row[key] for key in ("asked", "floors_kept", "front", "chosen", "stopped")]
        writer.writerow([*(row["betas"][word] for word in words), *figures, *rest])
    return buffer.getvalue()


def plot(report: dict[str, Any]) -> bytes:
    """Global against regional score as a PNG: one beta as a line, the others as dots, the front marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    figure = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()

    def points(rows: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]]:
        chosen = list(rows)
        return [r["regional"]["mean"] * 100 for r in chosen], [r["global"]["mean"] * 100 for r in chosen]

    rows = report["rows"]
    linear = sorted((r for r in rows if len(set(r["betas"].values())) == 1), key=lambda r: r["label"])
    others = [r for r in rows if r not in linear]
    blue, orange = "#2a78b5", "#d9661f"
    for chosen, colour, label in ((linear, blue, "one β for all"), (others, orange, "β by module")):
        if not chosen:
            continue
        if chosen is linear:
            axes.plot(*points(chosen), color=colour, alpha=0.5, linewidth=1)
        done = [r for r in chosen if not r["stopped"]]
        axes.plot(*points(done), color=colour, label=label, marker="o", markersize=6, linestyle="none")
        early = [r for r in chosen if r["stopped"]]
        axes.plot(
            *points(early), linestyle="none", marker="o", markersize=6, zorder=2,
            markerfacecolor="white", markeredgecolor=colour,
        )  # fmt: skip
    for row in linear:
        x, y = points([row])
        name = {"0": "global parent", "1": "regional parent"}.get(row["label"], row["label"])
        above = row["label"] == "0"
        axes.annotate(
            name, (x[0], y[0]), xytext=(0, 9 if above else -9), textcoords="offset points", fontsize=8,
            color=blue, ha="center", va="bottom" if above else "top", zorder=1.5, path_effects=halo,
        )  # fmt: skip
    front = sorted((r for r in rows if r["front"]), key=lambda r: r["regional"]["mean"])
    axes.plot(*points(front), color="#1d1d1f", linewidth=1.2, linestyle=(0, (4, 3)), label="front", zorder=3,
              marker="o", markersize=10, markerfacecolor="none", markeredgewidth=1.4)  # fmt: skip
    best = next(r for r in rows if r["chosen"])
    axes.plot(*points([best]), marker="*", markersize=18, color="#e0a800", markeredgecolor="#1d1d1f",
              linestyle="none", zorder=5, label="chosen")  # fmt: skip
    axes.plot([], [], linestyle="none", marker="o", markerfacecolor="white", markeredgecolor="#666",
              label="stopped early: estimated")  # fmt: skip
    axes.margins(0.08, 0.1)
    axes.set_xlabel(f"regional suite, accuracy %\nchosen: β {best['label']}")
    axes.set_ylabel("global suite (en, zh), accuracy %")
    axes.set_title("Merge sweep", loc="left", fontweight="bold")
    asked = report["questions"]
    axes.set_title(
        f"{len(rows)} merges, {asked['search']} questions on {asked['concepts_search']} concepts",
        loc="right",
        fontsize=9,
        color="#666",
    )
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
