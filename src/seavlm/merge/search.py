"""Which share of the regional model each module should keep, found with as few questions as will tell.

    theta = beta_m * regional + (1 - beta_m) * global          for each module m (the words of `plan.MODULES`)
    score = alpha * accuracy on the global suite (en, zh) + (1 - alpha) * accuracy on the regional suite

1. A grid of one beta for all, both parents in it. 2. With modules: their betas one after the other
(coordinate search), or, with trials, by a tree-structured Parzen estimator (Bergstra et al. 2011, through
optuna). All candidates answer the same questions, in rounds, each twice as long as the one before: who is
surely behind the leader, or surely below a floor, is not asked on (a race: Maron & Moore 1994; rounds as in
successive halving, Jamieson & Talwalkar 2016). "Surely" is the paired interval of `evals.stats`, over
resampled concepts, widened for the number of rounds and of rivals (Bonferroni). A leader that turns out to be
below a floor gives back those it had put out.

The best of many looks better than it is. So the verdict comes from concepts that the search has not asked
about: the chosen one is compared there with both parents and with the best single beta. Who asks more
questions and looks again has another chance of luck: the k-th verdict of one folder is held to 2.5 % / k^2,
so that all of them together call 4.1 % of equals a win at most. benchmarks/sweep_luck.py counts how often.

    out/sweep.json    every candidate, what it was asked, the verdict
    out/sweep.csv     a line a candidate
    out/sweep.png     scores over one beta for all;  out/pareto.png: global score against regional score
    out/best.yaml     the chosen one: seavlm merge out/best.yaml --out DIR
    out/replies/      what was answered: a search that was killed, or is given more trials, asks the rest
"""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from seavlm import manifest
from seavlm.errors import SeavlmError
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.scores import SUITES
from seavlm.evals.stats import Bootstrap, bootstrap, clusters_needed, front
from seavlm.evals.tasks import RANKED, Answerer, Question, fingerprint
from seavlm.merge import show
from seavlm.merge.plan import module_words

STEP = 0.05  # between the betas that trials try
ROUNDS = 4
LEAST = 16  # concepts in a round: an interval over fewer drops the wrong ones too often
PASSES = 2  # of the coordinate search, over all modules
CHANCE = 0.025  # of a false alarm on one side
Betas = dict[str, float]  # module's word -> share of the regional model; "default" for the rest


@dataclass(eq=False)
class Candidate:
    """One merge, and what each question that it was asked earned it."""

    betas: Betas
    label: str
    scores: dict[int, float] = field(default_factory=dict)
    stopped: str = ""
    behind: Candidate | None = None  # the leader that put it out

    @property
    def linear(self) -> bool:
        return len(set(self.betas.values())) == 1


@dataclass
class Search:
    """What all candidates share. `rounds[-1]` has all questions of the search; `kept` are the verdict's."""

    questions: list[Question]
    rounds: list[list[int]]
    kept: list[int]
    make: Callable[[Betas], Answerer]
    out: Path | None
    key: str
    words: list[str]  # that have a beta
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
        whole = {word: round(betas.get(word, betas["default"]), 6) for word in self.words}
        shown = {"rest" if word == "default" else word: beta for word, beta in whole.items()}
        label = ", ".join(f"{word}={beta:g}" for word, beta in shown.items())
        if len(set(whole.values())) == 1:
            label = f"{whole[self.words[0]]:g}"
        whole.setdefault("default", whole[self.words[0]])  # no tensor is left that would show it
        return self.known.setdefault(tuple(whole.values()), Candidate(whole, label))

    @property
    def parents(self) -> list[Candidate]:
        """The global one and the regional one."""
        return [self.candidate({"default": 0.0}), self.candidate({"default": 1.0})]


def search(
    questions: Sequence[Question],
    make: Callable[[Betas], Answerer],
    out: Path | None = None,
    *,
    key: str = "",
    betas: Sequence[float],
    modules: Sequence[str] = (),
    rest: bool = True,
    trials: int = 0,
    alpha: float = 0.43,
    floors: Mapping[str, float] | None = None,
    confirm: float = 0.5,
    rounds: int = ROUNDS,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    parents: Mapping[str, str] | None = None,
    replace: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Search, write the files to `out` (None: nowhere), and return what is in sweep.json.

    make: betas -> an answerer; the one before has been let go of. key: what decides replies besides the betas
    (parents, settings). betas: of the grid, 0 to 1; both ends are always in it. modules: their own betas, the
    first that fits a tensor counts; rest: whether tensors that differ are left for one more, "default".
    trials: of the Parzen estimator, which needs optuna; 0 searches coordinates. floors: language -> share of
    the global parent's accuracy that a merge must keep. confirm: share of the concepts kept for the verdict.
    parents: their references, for best.yaml. SeavlmError, before anything is asked, for modules nobody knows,
    betas outside 0..1, questions that lack a suite or a language with a floor in one of the two parts, and an
    `out` that holds a search of other models, settings or questions (with `replace` that one is removed).
    """
    wanted = dict(floors or {})
    asked = [question for question in questions if question.counted and question.reading != RANKED]
    _check(asked, betas, modules, wanted)
    optuna = _optuna() if trials else None
    searched, kept = _split(asked, wanted, confirm, seed)
    state = Search(
        questions=asked,
        rounds=_rounds(asked, searched, rounds, seed),
        kept=kept,
        make=make,
        out=out,
        key=key,
        words=[*modules, *(["default"] if rest or not modules else [])],
        alpha=alpha,
        floors=wanted,
        batch_size=batch_size,
        resamples=resamples,
        seed=seed,
        tell=tell,
    )
    if out is not None:
        _same_search(state, out, replace)
    _ask(state, state.parents[0], state.rounds[-1])  # the floors are shares of its accuracy
    grid = [state.candidate({"default": beta}) for beta in sorted({0.0, 1.0, *betas})]
    leader = _race(state, grid, state.parents[0])
    tell(f"one beta for all: {leader.label}")
    if optuna is not None:
        leader = _trials(state, leader, trials, optuna)
    elif modules:
        leader = _coordinates(state, leader, sorted({0.0, 1.0, *betas}))
    report = _report(state, leader, trials) | {"parents": dict(parents or {})}
    if out is not None:
        show.write(report, out)
    return report


# --- which questions


def _check(
    questions: Sequence[Question],
    betas: Sequence[float],
    modules: Sequence[str],
    floors: Mapping[str, float],
) -> None:
    module_words(modules)
    if twice := [word for word in modules if list(modules).count(word) > 1]:
        raise SeavlmError(f"{twice[0]} is there twice", hint="A module has one beta.")
    for beta in betas:
        if not 0 <= beta <= 1:
            raise SeavlmError(
                f"beta is {beta:g}", hint="A share is between 0 and 1: nothing is extrapolated."
            )
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


def _same_search(state: Search, out: Path, replace: bool) -> None:
    """SeavlmError where `out` holds a search of something else; the note that the next one will read."""
    path = out / "replies" / "search.json"
    note = {"key": manifest.sha256_bytes(state.key.encode()), "questions": state.names}
    if path.is_file():
        before = manifest.read_json(path)
        same = before["key"] == note["key"]
        mine = same and bool(set(before["questions"]) & set(state.names))
        if not mine and replace:
            shutil.rmtree(out / "replies")
            (out / show.JSON).unlink(missing_ok=True)
        elif not mine:
            what = "questions" if same else "models or settings"
            raise SeavlmError(f"{out} holds a sweep of other {what}", hint="Give another folder with --out.")
        else:
            note["questions"] = sorted({*before["questions"], *state.names})
    manifest.write_json(path, note)


def _cell(question: Question) -> tuple[str, str]:
    return question.task, question.language


def _order(questions: Iterable[Question], seed: int) -> list[str]:
    """Concepts, shuffled, those side by side that are asked about in the same tasks and languages: every k-th
    of them is a part with its share of each.
    """
    cells: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for question in questions:
        cells[question.concept].add(_cell(question))
    concepts = sorted(cells)
    random.Random(seed).shuffle(concepts)
    return sorted(concepts, key=lambda concept: sorted(cells[concept]))


def _share(concepts: Sequence[str], share: float) -> set[str]:
    """Such a share of the concepts, evenly from the whole list."""
    whole = [math.floor(i * share + 1e-9) for i in range(len(concepts) + 1)]
    return {concept for i, concept in enumerate(concepts) if whole[i + 1] > whole[i]}


def _split(
    questions: Sequence[Question], floors: Iterable[str], confirm: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the search's questions and of the verdict's; no concept is in both."""
    kept = _share(_order(questions, seed), confirm)
    parts: tuple[list[int], list[int]] = ([], [])
    for index, question in enumerate(questions):
        parts[question.concept in kept].append(index)
    wanted = {f"the {suite} suite": set(codes) for suite, codes in SUITES.items()}
    wanted |= {f"the floor of {code}": {code} for code in floors}
    for part, name in zip(parts, ("search", "verdict"), strict=True):
        for what, codes in wanted.items():
            if len({questions[i].concept for i in part if questions[i].language in codes}) < 2:
                raise SeavlmError(
                    f"{len(questions)} questions leave the {name} fewer than two concepts for {what}",
                    hint="Raise --limit, or ask about more.",
                )
    return parts


def _rounds(questions: Sequence[Question], searched: list[int], rounds: int, seed: int) -> list[list[int]]:
    """Growing lists of indices: an eighth of the concepts, a quarter, a half, all. Each asks LEAST concepts
    or more, two of them in each task and language.
    """
    order = _order([questions[i] for i in searched], seed + 1)
    cells: dict[tuple[str, str], set[str]] = defaultdict(set)
    asked: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for i in searched:
        asked[questions[i].concept].add(_cell(questions[i]))
    for concept in order:
        for cell in asked[concept]:
            if len(cells[cell]) < 2:
                cells[cell].add(concept)
    always = set().union(*cells.values())
    found: list[list[int]] = []
    for place in range(rounds - 1, 0, -1):
        taken = _share(order, 0.5**place) | always
        if LEAST <= len(taken) <= 0.75 * len(order):
            found.append([i for i in searched if questions[i].concept in taken])
    return [*found, searched]


# --- asking and comparing


def _ask(state: Search, candidate: Candidate, indices: Iterable[int]) -> None:
    """Fill in `scores`: from what was answered before, else by a merge in memory."""
    missing = [i for i in indices if i not in candidate.scores]
    if not missing:
        return
    identity = f"{state.key} {sorted(_told(candidate.betas).items())}"
    path = state.out and state.out / "replies" / f"{manifest.sha256_bytes(identity.encode())[:20]}.jsonl"
    replies = _read(path) if path else {}
    todo = [i for i in missing if state.names[i] not in replies]
    todo.sort(key=lambda i: (*_cell(state.questions[i]), i))
    if todo:
        state.tell(f"beta {candidate.label}: {len(todo)} questions")
        answerer = state.make(candidate.betas)
        state.merges += 1
        for start in range(0, len(todo), state.batch_size):
            batch = todo[start : start + state.batch_size]
            answers = answerer([state.questions[i].conversation() for i in batch])
            fresh = {state.names[i]: str(answer) for i, answer in zip(batch, answers, strict=True)}
            replies |= fresh
            if path:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(pair) + "\n" for pair in fresh.items())
    for i in missing:
        reply = replies[state.names[i]]
        score = judge(state.questions[i], reply, state.vocabulary).score
        if not 0 <= score <= 1:
            raise SeavlmError(f"question {state.questions[i].id}: the score is {score}", hint="0 to 1.")
        candidate.scores[i] = score


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
        manifest.write_text(path, text)
    return dict(json.loads(line) for line in text.splitlines())


def _draws(
    state: Search, candidates: Sequence[Candidate], indices: Sequence[int], *, floors: bool = False
) -> Bootstrap:
    """Paired draws: a column a candidate; with floors, a last one: share times the global parent's score."""
    rows = [state.questions[i] for i in indices]
    columns = [[candidate.scores[i] for i in indices] for candidate in candidates]
    if floors:
        shares, parent = [state.floors.get(row.language, 0.0) for row in rows], state.parents[0].scores
        columns.append([share * parent[i] for share, i in zip(shares, indices, strict=True)])
    cells: list[Hashable] = [_cell(row) for row in rows]
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
    """Of each cell in the score: equal within a suite. A suite of no weight is left out."""
    shares = {"global": state.alpha, "regional": 1 - state.alpha}
    found: dict[Hashable, float] = {}
    for suite, codes in SUITES.items():
        cells = _cells(draws, codes) if shares[suite] else []
        found |= {cell: shares[suite] / len(cells) for cell in cells}
    return found


def _z(chances: int) -> float:
    """The normal distribution's point for a false alarm in CHANCE of all, with so many chances for one."""
    return NormalDist().inv_cdf(1 - CHANCE / chances)


def _missed(state: Search, candidate: Candidate) -> float:
    """By how much the floors are missed, added up, on all it was asked of the search; 0 when all are kept."""
    gaps: dict[str, dict[str, list[float]]] = {code: defaultdict(list) for code in state.floors}
    for i in state.rounds[-1]:
        task, code = _cell(state.questions[i])
        if code in gaps and i in candidate.scores:
            gap = candidate.scores[i] - state.floors[code] * state.parents[0].scores[i]
            gaps[code][task].append(gap)
    means = [np.mean([np.mean(each) for each in tasks.values()]) for tasks in gaps.values()]
    return float(sum(-mean for mean in means if mean < -1e-12))


def _race(state: Search, candidates: Sequence[Candidate], champion: Candidate) -> Candidate:
    """The best of `candidates` and of `champion`, who was asked all and keeps the floors.

    Those that a leader put out which has turned out to be below a floor race again.
    """
    alive = [c for c in candidates if c is not champion and not c.stopped]
    while alive:
        champion = _race_once(state, alive, champion)
        alive = [c for c in candidates if c.behind and (c.behind.stopped or _missed(state, c.behind))]
        alive = [c for c in alive if c.behind and not c.behind.behind]  # else that one's leader stands for it
        for candidate in alive:
            candidate.stopped, candidate.behind = "", None
    return champion


def _race_once(state: Search, alive: list[Candidate], champion: Candidate) -> Candidate:
    """Ask in rounds, drop clear losers: surely behind a leader that keeps the floors, or surely below one."""
    looks = max(1, len(state.rounds) - 1)
    level, floor_level = _z(looks * len(alive)), _z(looks * max(1, len(state.floors)))
    for place, indices in enumerate(state.rounds):
        for candidate in alive:
            _ask(state, candidate, indices)
        field_ = [champion, *alive]  # of equals the one that was there first
        draws = _draws(state, field_, indices)
        weights = _weights(state, draws)
        values = [(not _missed(state, c), draws.interval(weights, i).mean) for i, c in enumerate(field_)]
        first = max(range(len(field_)), key=values.__getitem__)
        leader = field_[first]
        if place + 1 == len(state.rounds):
            break
        floors = _draws(state, field_, indices, floors=True) if state.floors else draws
        for column, candidate in enumerate(field_):
            if candidate in (leader, champion):
                continue
            for code in state.floors:
                gap = floors.difference(column, len(field_), _cells(floors, [code]), z=floor_level)
                if gap.high < 0:
                    candidate.stopped = f"below the floor of {code}"
            if not candidate.stopped and draws.difference(column, first, weights, z=level).high < 0:
                candidate.stopped, candidate.behind = f"behind {leader.label}", leader
        alive = [c for c in alive if not c.stopped]
        if not alive:
            return champion
    return leader


# --- the search


def _coordinates(state: Search, leader: Candidate, betas: Sequence[float]) -> Candidate:
    """One module after the other gets each beta of the grid; again, until nothing changes (PASSES)."""
    for _ in range(PASSES):
        before = leader
        for word in state.words:
            leader = _race(state, [state.candidate(leader.betas | {word: b}) for b in betas], leader)
            state.tell(f"{'rest' if word == 'default' else word}: {leader.label}")
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
    words = state.words
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
    """The score on all questions of the search, less ten times what the floors are missed by."""
    return _figures(state, candidate, reference)["score"]["mean"] - 10 * _missed(state, candidate)


# --- the report


def _report(state: Search, chosen: Candidate, trials: int) -> dict[str, Any]:
    whole = state.rounds[-1]
    rows = [_row(state, candidate, chosen) for candidate in state.known.values() if candidate.scores]
    sound = [row for row in rows if row["asked"] == len(whole) and row["floors_kept"]]
    leading = front(map(_point, sound))
    for row in rows:
        row["front"] = row in sound and _point(row) in leading
    score = {row["label"]: (row["floors_kept"], row["score"]["mean"]) for row in rows}
    complete = [c for c in state.known.values() if c.linear and all(i in c.scores for i in whole)]
    linear = max(complete, key=lambda c: score[c.label])
    rivals = _rivals(state)
    for candidate in (chosen, *rivals, linear, *(state.parents[:1] if state.floors else [])):
        _ask(state, candidate, state.kept)
    looks, against = _looks(state, chosen), {}
    if chosen not in rivals:
        z = _z((looks.index(_look(state, chosen)) + 1) ** 2)
        found = [_against(state, chosen, rival, z) for rival in rivals]
        against["better_parent"] = min(found, key=lambda gap: gap["low"])  # a win is one over both
        if linear is not chosen:
            against["best_linear"] = _against(state, chosen, linear, z)
    betas = _told(chosen.betas)
    asked, all_of = sum(row["asked"] for row in rows), len(rows) * len(whole)
    report: dict[str, Any] = {
        "alpha": state.alpha,
        "modules": [word for word in state.words if word != "default"],
        "search": "trials" if trials else "coordinates" if len(state.words) > 1 else "grid",
        "floors": _floors(state, chosen),
        "chosen": {"label": chosen.label, "beta": betas["default"] if len(betas) == 1 else betas},
        "better_parent": against["better_parent"]["label"] if against else chosen.label,
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
        "looks": looks,
        "against": against,
        "rows": rows,
    }
    gain = against.get("better_parent")
    broken = any(not floor["kept"] for floor in report["floors"].values())
    report["win"] = bool(gain and gain["low"] > 0 and not broken)
    report["verdict"] = _verdict(report)
    return report


def _row(state: Search, candidate: Candidate, chosen: Candidate) -> dict[str, Any]:
    shared = [i for i in state.rounds[-1] if i in candidate.scores]
    tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i in shared:
        task, code = _cell(state.questions[i])
        tasks[code][task].append(candidate.scores[i])
    return {
        "label": candidate.label,
        "betas": candidate.betas,
        "asked": len(shared),
        "stopped": candidate.stopped,
        "chosen": candidate is chosen,
        "floors_kept": not _missed(state, candidate),
        **_figures(state, candidate, chosen),
        "languages": {c: float(np.mean([np.mean(each) for each in t.values()])) for c, t in tasks.items()},
    }


def _figures(state: Search, candidate: Candidate, reference: Candidate) -> dict[str, dict[str, float]]:
    """Score and suites on all questions of the search, with intervals.

    Of one that was stopped: the reference's, and the paired difference on what both were asked.
    """
    whole = state.rounds[-1]
    shared = [i for i in whole if i in candidate.scores]
    draws, all_of = _draws(state, [candidate, reference], shared), _draws(state, [reference], whole)
    groups: dict[str, tuple[Any, Any]] = {
        suite: (_cells(draws, codes), _cells(all_of, codes)) for suite, codes in SUITES.items()
    }
    groups["score"] = (_weights(state, draws), _weights(state, all_of))
    found = {}
    for name, (mine, theirs) in groups.items():
        own = draws.interval(mine, 0)
        shift = all_of.interval(theirs).mean - draws.interval(mine, 1).mean
        found[name] = {part: float(np.clip(value + shift, 0, 1)) for part, value in asdict(own).items()}
    return found


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return row["global"]["mean"], row["regional"]["mean"]


def _rivals(state: Search) -> list[Candidate]:
    """The parents that a win must be over: not one below a floor, nor one that is surely behind the other."""
    world, regional = state.parents
    if _missed(state, regional):
        return [world]
    draws = _draws(state, [world, regional], [i for i in state.rounds[-1] if i in regional.scores])
    gap = draws.difference(0, 1, _weights(state, draws))
    return [world] if gap.low > 0 else [regional] if gap.high < 0 else [world, regional]


def _look(state: Search, chosen: Candidate) -> str:
    """What a verdict is about: looking at the same again is no other look."""
    said = [chosen.label, state.alpha, sorted(state.names[i] for i in state.kept)]
    return manifest.sha256_bytes(json.dumps(said).encode())[:16]


def _looks(state: Search, chosen: Candidate) -> list[str]:
    """The verdicts that this folder has seen, this one among them."""
    path = state.out / show.JSON if state.out else None
    before = manifest.read_json(path).get("looks", []) if path and path.is_file() else []
    return list(dict.fromkeys([*before, _look(state, chosen)]))


def _against(state: Search, chosen: Candidate, other: Candidate, z: float) -> dict[str, Any]:
    """The chosen one's lead on the verdict's questions, and how many more would settle it."""
    draws = _draws(state, [chosen, other], state.kept)
    weights = _weights(state, draws)
    gap = draws.difference(0, 1, weights, z=z)
    suites = {s: asdict(draws.difference(0, 1, _cells(draws, codes))) for s, codes in SUITES.items()}
    return {
        **asdict(gap),
        "label": other.label,
        "p": draws.p_value(0, 1, weights, seed=state.seed),
        "suites": suites,
        "scores": [asdict(draws.interval(weights, column)) for column in (0, 1)],
        **_settles(state, draws, weights, z),
    }


def _settles(state: Search, draws: Bootstrap, cells: Any, z: float) -> dict[str, Any]:
    """Whether the difference of the first column and the last is settled, and what would settle one of its
    size in 80 of 100 tries at the next look: more concepts, and questions on them, of the verdict alone and
    with those that the search would get. None where no difference is seen.
    """
    last = draws.sums.shape[2] - 1
    gap, concepts = draws.difference(0, last, cells, z=z), draws.clusters(cells)
    more: int | None = 0
    error = draws.standard_error(0, last, cells)
    if not gap.excludes_zero:
        looks = round(math.sqrt(CHANCE / (1 - NormalDist().cdf(z))))
        needed = clusters_needed(gap.mean, error, concepts, _z((looks + 1) ** 2))
        more = max(1, needed - concepts) if gap.mean else None
    questions = draws.counts[:, [k for k, cell in enumerate(draws.cells) if cell in cells]].sum()
    each = float(questions) / concepts
    return {
        "settled": gap.excludes_zero,
        "standard_error": error,
        "more_concepts": more,
        "more_questions": None if more is None else math.ceil(more * each),
        "more_in_all": None if more is None else math.ceil(more * each * len(state.names) / len(state.kept)),
    }


def _floors(state: Search, chosen: Candidate) -> dict[str, Any]:
    """Each floor on the verdict's questions. settled: the whole interval lies on one side of it."""
    found = {}
    for code, share in state.floors.items():
        kept = [i for i in state.kept if state.questions[i].language == code]
        draws = _draws(state, [chosen], kept, floors=True)
        gap = draws.difference(0, 1)
        found[code] = {
            "share": share,
            "wanted": draws.interval(None, 1).mean,
            "chosen": draws.interval(None, 0).mean,
            "kept": gap.mean >= -1e-12,
            **_settles(state, draws, draws.cells, _z(1)),
        }
    return found


def _verdict(report: dict[str, Any]) -> str:
    gain = report["against"].get("better_parent")
    if gain is None:
        parent = "global" if report["chosen"]["label"] == "0" else "regional"
        return f"No merge scores higher than the {parent} parent."
    parent = "global" if gain["label"] == "0" else "regional"
    said = f"beta {report['chosen']['label']} against the better parent ({parent}): {_points(gain)}."
    below = [code for code, floor in report["floors"].items() if not floor["kept"]]
    if below:
        said = f"No win, below the floor of {', '.join(below)}: {said}"
    elif report["win"]:
        said = f"A win: {said}"
    elif gain["high"] < 0:
        said = f"A loss: {said}"
    else:
        said = f"No win, inside the noise: {said} {_more(gain)}"
    linear = report["against"].get("best_linear")
    if linear and linear["label"] != gain["label"]:
        said += f" Against the best single beta ({linear['label']}): {_points(linear)}"
        said += ", settled." if linear["settled"] else f", inside the noise. {_more(linear)}"
    for code, floor in report["floors"].items():
        said += (
            f" The floor of {code} ({floor['wanted'] * 100:.1f} %) is {'' if floor['kept'] else 'not '}kept"
        )
        said += f": {floor['chosen'] * 100:.1f} %"
        said += "." if floor["settled"] else f", inside the noise. {_more(floor)}"
    if len(report["looks"]) > 1:
        said += f" This is verdict {len(report['looks'])} of this folder; its interval is wider for that."
    return said


def _points(gap: dict[str, Any]) -> str:
    return f"{gap['mean'] * 100:+.1f} points, interval {gap['low'] * 100:+.1f} to {gap['high'] * 100:+.1f}"


def _more(gap: dict[str, Any]) -> str:
    if gap["more_questions"] is None:
        return "No number of questions is foreseen to settle it."
    return (
        f"About {gap['more_questions']:,} more questions on {gap['more_concepts']:,} concepts would settle a "
        f"difference of this size ({gap['more_in_all']:,} with the search's)."
    )
