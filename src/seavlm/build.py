"""From a recipe to a model: (init ->) data -> train -> merge -> eval -> card; each a folder with a manifest.

    out/init/    model/: a base made from nothing, where the recipe says so
    out/data/    train.parquet, dev.parquet (asked in the sweep), eval.parquet (asked at the end)
    out/train/   model/: the regional parent; metrics.jsonl, loss.png
    out/merge/   model/: the best merge; sweep.json, sweep.csv, sweep.png, pareto.png, best.yaml
    out/eval/    a folder for each of: global parent, regional parent, merged model; results.json, table.md
    out/card/    README.md, also put into the model's folder

A stage is done when its manifest is there with the fingerprint (settings, seed, hashes of its inputs) that
the recipe asks for now. So an unchanged stage is not run again, and a changed one runs with all that depend
on it. A stage that was stopped goes on: training from its checkpoint, questions from those answered.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from seavlm import manifest
from seavlm.carbon import Meter
from seavlm.errors import SeavlmError, nearest
from seavlm.recipe import Recipe, Train
from seavlm.text.language import LANGUAGES

if TYPE_CHECKING:
    from seavlm.merge.stream import Merged
    from seavlm.weights.checkpoint import FileCheckpoint

STAGES = ("init", "data", "train", "merge", "eval", "card")
GLOBAL, REGIONAL, MERGED = "global parent", "regional parent", "merged"
# Settings that decide how a stage runs, not what comes out of it.
_BYSTANDERS = {
    "init": {"watts", "region"},
    "train": {
        *("threads", "device", "save_every", "keep_last", "image_cache_dir"),
        *("watts", "carbon_intensity", "region", "pue"),
    },
    "eval": {"batch_size", "device"},
}


def build(
    recipe: Recipe, out: str | Path | None = None, *, force: bool = False, progress: bool = True
) -> Path:
    """Run the stages that are not done, show what came out, and return the finished model's folder."""
    root = Path(out or recipe.out_dir)
    for stage in STAGES:
        run_stage(stage, recipe, root, force=force, progress=progress)
    model = models_of(recipe, root)[-1][1]
    console = _results_console()
    for stage in STAGES:
        show(stage, recipe, root, console)
    _show_answers(recipe, root, model, console)
    _show_places(recipe, root, console)
    return model


def run_stage(
    name: str,
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    force: bool = False,
    progress: bool = True,
) -> bool:
    """Run one stage unless it is done; True when it ran. SeavlmError when an earlier stage is missing."""
    if name not in STAGES:
        raise SeavlmError(f"there is no stage {name!r}", hint=nearest(name, STAGES).strip())
    root = Path(out or recipe.out_dir)
    console = Console(stderr=True, quiet=not progress, highlight=False)
    with _alone(root):
        _keep_recipe(recipe, root)
        if name == "init" and recipe.init is None:
            return False
        if (name == "train" and not recipe.train.enabled) or (name == "merge" and not _merges(recipe)):
            console.print(f"[dim]{name}: switched off in the recipe[/dim]")
            return False
        inputs = _INPUTS[name](recipe, root)
        print_ = fingerprint(name, recipe, inputs)
        if not force and is_done(root / name, print_):
            console.print(f"[dim]{name}: done before, nothing has changed[/dim]")
            return False
        console.print(f"[bold]{name}[/bold] -> {root / name}")
        (root / name / manifest.MANIFEST).unlink(missing_ok=True)  # whatever happens now, it is not done
        if force and name in ("train", "merge", "eval"):
            shutil.rmtree(root / name, ignore_errors=True)  # not from a checkpoint either
        began = time.monotonic()
        _RUN[name](recipe, root, inputs, progress)
        _stamp(root / name, print_)
        console.print(f"[dim]{name}: {_minutes(time.monotonic() - began)}[/dim]")
        return True


def fingerprint(stage: str, recipe: Recipe, inputs: dict[str, str]) -> str:
    """16 hex digits over all that decides a stage's output."""
    decisive = json.dumps([stage, _settings(stage, recipe), recipe.seed, inputs], sort_keys=True)
    return manifest.sha256_bytes(decisive.encode())[:16]


def is_done(folder: Path, fingerprint: str) -> bool:
    """Whether a stage's folder holds what this fingerprint asks for."""
    try:
        return manifest.read_manifest(folder).get("fingerprint") == fingerprint
    except SeavlmError:
        return False


def models_of(recipe: Recipe, root: Path) -> list[tuple[str, Path]]:
    """(what it is, where) of the models a recipe makes and starts from; the finished one comes last."""
    found = [(GLOBAL, _base(recipe, root))]
    if recipe.train.enabled:
        found.append((REGIONAL, root / "train" / "model"))
    if _merges(recipe):
        found.append((MERGED, root / "merge" / "model"))
    return found


def evaluate_model(
    ref: str | Path,
    data: Path | None = None,
    out: Path | None = None,
    *,
    suite: str | Path | None = None,
    tasks: list[str] | None = None,
    languages: list[str] | None = None,
    limit: int | None = None,
    blind: bool = False,
    max_new_tokens: int | None = None,
    name: str = "",
    key: str = "",
    concurrency: int = 8,
    price: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    seed: int = 0,
    progress: bool = True,
    replace: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Any:
    """Ask any model, or an OpenAI-compatible endpoint (ref: its URL); `evals.scores.Results`.

    The questions: those of a suite (a name, or a file; data: where its data set is), or without one those of
    a data stage's folder or of one Parquet file. blind: ask them once more without pictures. name, key: of
    the model at an endpoint, and of the endpoint. price: "IN,OUT" of a million tokens. replace: let another
    run that `out` holds give way. tell: gets a line about what will be asked. Beside what `evals.run` writes,
    `out` gets a manifest.json, and energy.json, what all sittings of a run took.
    """
    from seavlm import __version__
    from seavlm.engine.vlm import opened
    from seavlm.evals import suites
    from seavlm.evals.run import evaluate
    from seavlm.evals.scores import planned
    from seavlm.evals.tasks import RANKED, load_questions, with_blind
    from seavlm.evals.tasks import fingerprint as fingerprint_of
    from seavlm.recipe import Eval

    if out is not None:
        manifest.refuse_other(out, "eval")
    remote = str(ref).startswith(("http://", "https://"))
    about: dict[str, Any] = {"model": str(ref), "seavlm": __version__, "temperature": 0}
    about |= {"price": price} if price else {}
    if suite is not None:
        asked = suites.ask(suite, data=data, tasks=tasks, languages=languages, limit=limit, seed=seed)
        questions = asked.questions
        about |= {key: getattr(asked.suite, key) for key in ("version", "about", "source", "licence")}
        about["suite"] = asked.suite.name
        about["left_out"] = dict(asked.skipped)
    elif data is not None:
        file = data / "eval.parquet" if data.is_dir() else data
        questions = load_questions(file, tasks=tasks, languages=languages, limit=limit, seed=seed)
        about |= {"suite": str(data), "left_out": {}}
    else:
        raise SeavlmError("there are no questions", hint="Give a suite, or data.")
    if remote and (ranked := [question for question in questions if question.reading == RANKED]):
        about["left_out"]["only a model at hand ranks replies"] = len(ranked)
        questions = [question for question in questions if question.reading != RANKED]
    if blind:
        questions = with_blind(questions)
    settings = {"device": device, "dtype": dtype}
    cfg = Eval.model_validate(settings | ({"max_new_tokens": max_new_tokens} if max_new_tokens else {}))
    if suite is not None and not max_new_tokens:
        cfg = cfg.model_copy(update={"max_new_tokens": asked.suite.max_new_tokens or SUITE_TOKENS})
    about["max_new_tokens"] = cfg.max_new_tokens
    concepts = len({question.concept for question in questions})
    so_many = f"{len(questions)} questions on {concepts} concept{'s' * (concepts > 1)}"
    least = planned(questions)
    about["detectable"] = least.get("all", 1.0)
    alone = sorted(points for group, points in least.items() if group in LANGUAGES)
    left = "".join(f"; left out: {count} ({why})" for why, count in about["left_out"].items())
    tell(
        f"{so_many}; two models will likely be told apart from a "
        f"difference of {about['detectable'] * 100:.1f} points on"
        + (f", in one language from {_points(alone)} on" if len(alone) > 1 else "")
        + left
    )
    if remote:
        from seavlm.evals.http import Endpoint

        answerer: Any = Endpoint(
            str(ref),
            model=name,
            key=key,
            max_new_tokens=cfg.max_new_tokens,
            concurrency=concurrency,
            tell=tell,
        )
        about["name"] = answerer.model
        about["asked_without"] = answerer.without  # grows while it is asked
        identity, ranker, label = f"{answerer.url} {answerer.model}", None, answerer.model
    else:
        source = opened(ref)
        model = Asked(source, cfg, quantize)
        answerer, ranker, label = model.answer, model.rank, name or str(ref)
        identity = model_hash(source) if out else ""
        about |= {"quantize": quantize, "dtype": dtype}
        if not any(question.reading == RANKED or question.bare for question in questions):
            ranker = None
    key_ = f"{identity} {_asked_with(cfg)} {quantize or ''}".strip() if out else ""
    began, meter = time.monotonic(), None
    carbon: dict[str, Any] = {"unknown": "the model ran behind an endpoint"}
    with contextlib.ExitStack() as running:
        if out is not None and not remote:
            meter = running.enter_context(_meter(out, f"{key_} {fingerprint_of(questions)}", device))
        results = evaluate(
            answerer,
            questions,
            out,
            ranker=ranker,
            name=label,
            key=key_,
            batch_size=cfg.batch_size,
            resamples=cfg.bootstrap,
            seed=seed,
            progress=progress,
            about=about,
            replace=replace,
        )
        if out is not None:
            (out / "retention.json").unlink(missing_ok=True)  # of the run that was there before
            if not remote and any(question.task == "continue" for question in questions):
                manifest.write_json(out / "retention.json", retention(model))
        carbon = meter.report() if meter else carbon
    if out is not None:
        manifest.write_manifest(
            out,
            stage="eval",
            recipe=about | {"tasks": tasks, "languages": languages, "limit": limit, "blind": blind},
            seed=seed,
            inputs={"questions": results.suite} | ({} if remote else {"model": identity}),
            metrics={
                "questions": len(results.records),
                "accuracy": {suite: cell.accuracy for suite, cell in results.suites.items()},
                "carbon": carbon,
            },
            duration_s=round(time.monotonic() - began, 3),
        )
    return results


def _points(shares: Sequence[float]) -> str:
    """ "3.1", or "3.1 to 4.0", of shares in order."""
    ends = dict.fromkeys(f"{share * 100:.1f}" for share in (shares[0], shares[-1]))
    return " to ".join(ends)


def _meter(out: Path, identity: str, device: str, settings: Train | None = None) -> Meter:
    """Watches a run that goes on in the folder `out` after it was stopped."""
    import torch

    power = settings or Train()
    return Meter(
        region=power.region,
        watts=power.watts,
        kg_per_kwh=power.carbon_intensity,
        pue=power.pue,
        use_gpus=device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()),
        kept=out / "energy.json",
        identity=manifest.sha256_bytes(identity.encode()),
    )


def sweep_models(
    regional: str | Path,
    world: str | Path,
    out: Path,
    *,
    suite: str | Path | None = None,
    data: Path | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    betas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0),
    modules: Sequence[str] = (),
    trials: int = 0,
    alpha: float = 0.43,
    floors: Mapping[str, float] | None = None,
    confirm: float = 0.5,
    max_new_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Search for the shares of `regional` in a merge with `world` (`merge.search`). No merge is written: each
    is made tensor by tensor into the model that is asked, one model at a time.

    Modules in which the parents are equal are left out. The questions are chosen as in `evaluate_model`.
    """
    from seavlm.evals import suites
    from seavlm.evals.tasks import load_questions
    from seavlm.merge.unwritten import open_parent
    from seavlm.recipe import Eval, Merge

    began = time.monotonic()
    parents = [open_parent(ref) for ref in (regional, world)]
    if suite is not None:
        questions = suites.ask(suite, data=data, tasks=tasks, limit=limit, seed=seed).questions
    elif data is not None:
        file = data / "dev.parquet" if data.is_dir() else data
        questions = load_questions(file, tasks=tasks, limit=limit, seed=seed)
    else:
        raise SeavlmError("there are no questions", hint="Give a suite, or data.")
    cfg = Eval(device=device, dtype=dtype, max_new_tokens=max_new_tokens or SUITE_TOKENS)
    merge = Merge(
        betas=list(betas), modules=list(modules), trials=trials, alpha=alpha, floors=dict(floors or {}),
        confirm=confirm,
    )  # fmt: skip
    labelled = zip(("regional", "global"), parents, strict=True)
    hashes = {name: model_hash(place) for name, (place, _) in labelled}
    with _alone(out), _meter(out, f"{hashes} {_asked_with(cfg)} {quantize or ''}", device) as meter:
        names = {"regional": str(regional), "global": str(world)}
        report = _search(merge, cfg, questions, parents, out, hashes, seed, tell, quantize, names)
        manifest.write_manifest(
            out,
            stage="sweep",
            recipe={**names, "suite": str(suite or data)},
            seed=seed,
            inputs=hashes,
            metrics=report | {"carbon": meter.report()},
            duration_s=round(time.monotonic() - began, 3),
        )
    return report


def _search(
    merge: Any,
    cfg: Any,
    questions: Sequence[Any],
    sources: Sequence[tuple[Path, FileCheckpoint]],
    out: Path,
    hashes: Mapping[str, str],
    seed: int,
    tell: Callable[[str], None],
    quantize: str | None = None,
    parents: Mapping[str, str] | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """`merge.search` with the settings of recipe.Merge and recipe.Eval. sources: [regional, global]."""
    from seavlm.merge import plan as planning
    from seavlm.merge.search import search
    from seavlm.merge.stream import Merged

    if hashes["regional"] == hashes["global"]:
        raise SeavlmError("regional and global are the same model", hint="Give two.")
    places, opened = map(list, zip(*sources, strict=True))
    planning.by_module(places, opened, {"default": 0.5}, merge.dtype)  # says what does not fit, at once
    planning.module_words(merge.modules)
    words = planning.differing(opened, merge.modules)
    for word in merge.modules:
        if word not in words:
            tell(f"{word}: the parents are equal there, so it has no beta")
    held: list[tuple[Merged, Asked]] = []  # one at a time in memory

    def make(shares: dict[str, float]) -> Callable[[list[Any]], list[Any]]:
        merged = Merged(planning.by_module(places, opened, shares, merge.dtype))
        if not (held and held[0][1].refill(merged, merged.differs(held[0][0]))):
            held.clear()
            held.append((merged, Asked(merged, cfg, quantize)))
        held[0] = (merged, held[0][1])
        return held[0][1].answer

    return search(
        questions,
        make,
        out,
        key=f"{hashes['regional']} {hashes['global']} {_asked_with(cfg)} {merge.dtype} {quantize or ''}",
        betas=merge.betas,
        modules=[word for word in words if word != "default"],
        rest="default" in words,
        trials=merge.trials,
        alpha=merge.alpha,
        floors=merge.floors,
        confirm=merge.confirm,
        batch_size=cfg.batch_size,
        resamples=cfg.bootstrap,
        seed=seed,
        parents=parents,
        replace=replace,
        tell=tell,
    )


def judge_pictures(results: Any, suite: str | Path | None, data: Path | None) -> dict[str, bytes]:
    """SHA-256 -> picture of what a run has asked, read once more for a judge from its suite or data."""
    from seavlm.evals import suites
    from seavlm.evals.tasks import load_questions, pictures_of

    asked_of = results.about.get("suite", "")
    if suite is None and asked_of in suites.names():
        suite = asked_of
    if suite is not None:
        questions = suites.ask(suite, data=data).questions
    else:
        place = data or Path(asked_of)
        questions = load_questions(place / "eval.parquet" if place.is_dir() else place)
    wanted = {name for record in results.records for name in record["image_sha256"]}
    pairs = (pair for one in questions for pair in zip(one.image_sha256, pictures_of(one), strict=False))
    return {name: picture for name, picture in pairs if name in wanted}


SUITE_TOKENS = 128
"""The longest reply to a suite's question, where nothing else is asked for."""


def retention(model: Asked) -> dict[str, Any]:
    """How well a model foretells the declaration: the same text for every vocabulary.

    In bits per byte (of UTF-8), per character and per grapheme (what a reader sees as a letter); 2 to their
    power is the perplexity. A line of text is a document; `lines` has the characters and the bits of each, so
    that two models can be compared line by line. Any model has read this text more often than others: what
    tells is the change from a parent, not the figure.
    """
    from seavlm.evals.offline import declaration
    from seavlm.evals.similarity import graphemes

    found = {}
    for code, text in declaration().items():
        lines = [line for line in text.splitlines() if len(line) > 1]
        bits = model.bits(lines)
        found[code] = {
            "bits_per_byte": sum(bits) / sum(len(line.encode()) for line in lines),
            "bits_per_character": sum(bits) / sum(map(len, lines)),
            "bits_per_grapheme": sum(bits) / sum(len(graphemes(line)) for line in lines),
            "lines": [[len(line), round(each, 3)] for line, each in zip(lines, bits, strict=True)],
        }
    return found


def model_hash(model: Path | Merged) -> str:
    """SHA-256 of a model: of what it is made from and how, for a merge that is not written; wherever its
    parents lie and however they are named."""
    if isinstance(model, Path):
        return manifest.sha256_tree(model)
    hashes = list(map(manifest.sha256_tree, model.plan.places))
    made = json.dumps([model.plan.recipe, hashes], sort_keys=True, default=str)
    for reference, digest in zip(model.plan.references, hashes, strict=True):
        made = made.replace(json.dumps(reference), json.dumps(digest))
    return manifest.sha256_bytes(made.encode())


class Asked:
    """A model that answers the questions of `evals`, greedily. It is loaded at the first question."""

    def __init__(self, model: str | Path | Merged, cfg: Any, quantize: str | None = None) -> None:
        self.cfg = cfg
        self.vlm = functools.cache(lambda: _load(model, cfg, quantize))

    def refill(self, model: Any, names: Collection[str]) -> bool:
        """Become `model`, which differs in the tensors `names` alone. False where it takes a new `Asked`."""
        from seavlm.engine.vlm import refilled

        vlm = refilled(self.vlm(), model, names)
        if vlm is not None:
            self.vlm = functools.cache(lambda: vlm)
        return vlm is not None

    def answer(self, conversations: list[Any]) -> list[Any]:
        """One that cannot be asked (too long, a damaged picture) gets no reply; SeavlmError if none can."""
        from seavlm.evals.tasks import Reply

        try:
            return self._answer(conversations)
        except SeavlmError:
            replies: list[Any] = []
            for one in conversations:
                try:
                    replies += self._answer([one])
                except SeavlmError as error:
                    replies.append(Reply("", error=str(error)))
            if all(reply.error for reply in replies):
                raise
            return replies

    def _answer(self, conversations: list[Any]) -> list[Any]:
        from seavlm.evals.tasks import Reply

        replies = self.vlm().generate_batch(
            conversations, max_new_tokens=self.cfg.max_new_tokens, temperature=0.0
        )
        return [
            Reply(
                reply.text,
                reply.prompt_tokens,
                len(reply.token_ids),
                finish="length" if reply.finish_reason == "length" else "",
            )
            for reply in replies
        ]

    def rank(self, conversations: list[Any], options: list[tuple[str, ...]]) -> list[str]:
        ranked = self.vlm().rank_batch(conversations, options)
        return [texts[chances.index(max(chances))] for texts, chances in zip(options, ranked, strict=True)]

    def bits(self, texts: list[str]) -> list[float]:
        """Of each text: the bits that it would take to write it down with the model's help."""
        return [-chance / math.log(2) for chance in self.vlm().log_likelihoods(texts)]


def _load(model: str | Path | Merged, cfg: Any, quantize: str | None = None) -> Any:
    from seavlm.engine.vlm import load

    return load(model, device=cfg.device, dtype=cfg.dtype, quantize=quantize)


def _asked_with(cfg: Any) -> str:
    """The settings that decide a reply, beside the model: replies kept from other settings are not reused."""
    return f"max_new_tokens={cfg.max_new_tokens} dtype={cfg.dtype}"


# --- the stages: their inputs, and what they do


def _init_inputs(recipe: Recipe, root: Path) -> dict[str, str]:
    from seavlm.train import init

    return init.inputs(recipe.init) if recipe.init else {}


def _init(recipe: Recipe, root: Path, inputs: dict[str, str], progress: bool) -> None:
    from seavlm.train import init

    assert recipe.init is not None
    init.run(recipe.init, out=root / "init", seed=recipe.seed, progress=progress)


def _data_inputs(recipe: Recipe, root: Path) -> dict[str, str]:
    from seavlm.data.run import inputs

    return inputs(recipe.data)


def _data(recipe: Recipe, root: Path, inputs: dict[str, str], progress: bool) -> None:
    from seavlm.data import run as data

    data.run(recipe.data, out=root / "data", seed=recipe.seed, progress=progress)


def _train_inputs(recipe: Recipe, root: Path) -> dict[str, str]:
    samples = _need(root / "data" / "train.parquet", "seavlm data samples")
    return {"base": manifest.sha256_tree(_base(recipe, root)), "data": manifest.sha256_file(samples)}


def _train(recipe: Recipe, root: Path, inputs: dict[str, str], progress: bool) -> None:
    from seavlm.train import sft

    sft.run(
        recipe.train,
        base=_base(recipe, root),
        data=root / "data",
        out=root / "train",
        seed=recipe.seed,
        progress=progress,
        base_name="" if recipe.init else recipe.base,
    )


def _merge_inputs(recipe: Recipe, root: Path) -> dict[str, str]:
    regional = _need(root / "train" / "model" / "config.json", "seavlm train").parent
    return {
        "global": manifest.sha256_tree(_base(recipe, root)),
        "regional": manifest.sha256_tree(regional),
        "questions": manifest.sha256_file(_dev_questions(root)),
    }


def _merge(recipe: Recipe, root: Path, inputs: dict[str, str], progress: bool) -> None:
    from seavlm.evals.tasks import load_questions
    from seavlm.merge.stream import at_path, merge_recipe

    began, out = time.monotonic(), root / "merge"
    out.mkdir(parents=True, exist_ok=True)
    cfg, places = recipe.merge, [root / "train" / "model", _base(recipe, root)]
    console = Console(stderr=True, quiet=not progress, highlight=False)
    with _meter(out, json.dumps(inputs), recipe.eval.device, recipe.train) as meter:
        report = _search(
            cfg,
            recipe.eval,
            load_questions(_dev_questions(root)),
            [at_path(place) for place in places],
            out,
            inputs,
            recipe.seed,
            lambda line: console.print(f"[dim]{line}[/dim]"),
            parents={"regional": str(places[0]), "global": str(places[1])},
            replace=True,  # of a training that was changed since
        )
        raw = {**report["parents"], "beta": report["chosen"]["beta"]}
        report["merge"] = merge_recipe(raw, out / "model", dtype=cfg.dtype)
    manifest.write_manifest(
        out,
        stage="merge",
        recipe=cfg.model_dump(mode="json"),
        seed=recipe.seed,
        inputs=inputs,
        metrics=report | {"carbon": meter.report()},
        duration_s=round(time.monotonic() - began, 3),
    )


def _eval_inputs(recipe: Recipe, root: Path) -> dict[str, str]:
    hashes = {"questions": manifest.sha256_file(_need(root / "data" / "eval.parquet", "seavlm data samples"))}
    for label, path in models_of(recipe, root):
        if label != GLOBAL:
            _need(path / "config.json", "seavlm train" if label == REGIONAL else "seavlm merge")
        hashes[label] = manifest.sha256_tree(path)
    return hashes


def _eval(recipe: Recipe, root: Path, inputs: dict[str, str], progress: bool) -> None:
    from seavlm.evals.run import evaluate
    from seavlm.evals.scores import compare
    from seavlm.evals.show import markdown
    from seavlm.evals.tasks import load_questions

    began = time.monotonic()
    questions = load_questions(root / "data" / "eval.parquet")
    (root / "eval").mkdir(parents=True, exist_ok=True)
    with _meter(root / "eval", json.dumps(inputs), recipe.eval.device, recipe.train) as meter:
        results = {
            label: evaluate(
                (asked := Asked(path, recipe.eval)).answer,
                questions,
                root / "eval" / label.replace(" ", "-"),
                ranker=asked.rank,
                name=label,
                key=f"{inputs[label]} {_asked_with(recipe.eval)}",
                batch_size=recipe.eval.batch_size,
                resamples=recipe.eval.bootstrap,
                seed=recipe.seed,
                progress=progress,
                replace=True,
            )
            for label, path in models_of(recipe, root)
        }
    last = list(results)[-1]
    ahead = {
        label: {
            group: {"mean": d.mean, "low": d.low, "high": d.high}
            for group, d in compare(
                results[last], results[label], resamples=recipe.eval.bootstrap, seed=recipe.seed
            ).items()
        }
        for label in results
        if label != last
    }
    report = {
        "models": {label: result.to_dict() for label, result in results.items()},
        "final": last,
        "ahead": ahead,
    }
    manifest.write_json(root / "eval" / "results.json", report)
    manifest.write_text(root / "eval" / "table.md", "\n".join(map(markdown, results.values())))
    manifest.write_manifest(
        root / "eval",
        stage="eval",
        recipe=_settings("eval", recipe),
        seed=recipe.seed,
        inputs=inputs,
        metrics={
            "questions": len(questions),
            "final": last,
            "accuracy": {
                label: {
                    **{suite: cell.accuracy for suite, cell in result.suites.items()},
                    **{code: cell.accuracy for code, cell in result.languages.items()},
                }
                for label, result in results.items()
            },
            "ahead": ahead,
            "carbon": meter.report(),
        },
        duration_s=round(time.monotonic() - began, 3),
    )


def _card_inputs(recipe: Recipe, root: Path) -> dict[str, str]:
    _need(root / "eval" / manifest.MANIFEST, "seavlm eval")
    off = {"init": recipe.init is None, "train": not recipe.train.enabled, "merge": not _merges(recipe)}
    stages = [  # not those of an earlier recipe that this one has switched off
        stage
        for stage in STAGES
        if (root / stage / manifest.MANIFEST).is_file() and stage != "card" and not off.get(stage)
    ]
    return {stage: manifest.sha256_file(root / stage / manifest.MANIFEST) for stage in stages}


def _card(recipe: Recipe, root: Path, inputs: dict[str, str], progress: bool) -> None:
    from seavlm.card import card

    began = time.monotonic()
    model = models_of(recipe, root)[-1][1]
    facts = _facts(model, [root / stage for stage in inputs], recipe.name)
    if recipe.init is None:
        facts.base = recipe.base
    card.write(facts, root / "card" / "README.md", recipe.card)
    if recipe.train.enabled:  # where it comes from goes wherever the model goes
        card.write(facts, model / "README.md", recipe.card)
        manifest.write_json(
            model / manifest.MANIFEST, {stage: manifest.read_manifest(root / stage) for stage in inputs}
        )
    manifest.write_manifest(
        root / "card",
        stage="card",
        recipe=_settings("card", recipe),
        seed=recipe.seed,
        inputs=inputs,
        metrics={},
        duration_s=round(time.monotonic() - began, 3),
    )


def write_card(
    model: str,
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
) -> tuple[Path, list[str]]:
    """The card of a model from what its folder and those of its stages and runs have recorded; where it is,
    and what could not be followed. out: a .md file or a folder; default: in the model's folder.

    settings: what a recipe's `card` may say, and `name`. SeavlmError for runs of another model, and for a
    README.md that seavlm has not written, unless `force`.
    """
    from seavlm.card import card
    from seavlm.recipe import parse_recipe
    from seavlm.weights.refs import resolve

    said = dict(settings or {})
    name = str(said.pop("name", "") or "")
    place = resolve(model)
    if out is None and (place.is_file() or model in _builtin_names()):
        raise SeavlmError(f"{model} has no folder to put a card into", hint="Say where: --out README.md")
    target = out if out and out.suffix == ".md" else (out or place) / "README.md"
    card.may_replace(target, force)
    facts = _facts(place, folders, name or (model if model in _builtin_names() else ""))
    return card.write(facts, target, parse_recipe({"name": "card", "card": said}).card), facts.remarks


def _facts(model: Path, folders: Sequence[Path], name: str) -> Any:
    from seavlm.card.facts import gather
    from seavlm.weights.refs import resolve, unwritten

    def here(reference: str) -> Path | None:
        """Where a model or a delta is, if it is on this machine: nothing is fetched."""
        if found := unwritten(reference):
            return found.path
        known = reference in _builtin_names() or Path(reference).expanduser().exists()
        return resolve(reference) if known else None

    return gather(model, folders, name=name, resolve=here, compare=_compared)


def _builtin_names() -> set[str]:
    from seavlm.weights.refs import builtin_models

    return {entry.name for entry in builtin_models()}


def _compared(run: Path, other: Path) -> dict[str, Any]:
    """The lead of a run's model on another's, by language and suite; nothing if they share no question."""
    from seavlm.evals.report import gather

    found = gather([other, run], examples=0).facts["comparisons"][0]
    return dict(found.get("groups", {}))


_INPUTS: dict[str, Callable[[Recipe, Path], dict[str, str]]] = {
    "init": _init_inputs,
    "data": _data_inputs,
    "train": _train_inputs,
    "merge": _merge_inputs,
    "eval": _eval_inputs,
    "card": _card_inputs,
}
_RUN: dict[str, Callable[[Recipe, Path, dict[str, str], bool], None]] = {
    "init": _init,
    "data": _data,
    "train": _train,
    "merge": _merge,
    "eval": _eval,
    "card": _card,
}


# --- what came out


def show(stage: str, recipe: Recipe, out: str | Path | None = None, console: Console | None = None) -> None:
    """Print what a finished stage has found."""
    root, console = Path(out or recipe.out_dir), console or _results_console()
    place = root / stage
    if not (place / manifest.MANIFEST).is_file():  # switched off
        return
    metrics = manifest.read_manifest(place)["metrics"]
    if stage == "data":
        rows = ", ".join(f"{split} {figures['rows']:,}" for split, figures in metrics.items())
        console.print(f"samples: {rows}")
    elif stage == "train":
        console.print(
            f"loss {metrics['loss_first']:.3f} -> {metrics['loss_last']:.3f} in {metrics['steps']:,} steps, "
            f"{metrics['samples_per_s']:,.1f} samples/s, {metrics['carbon']['kg_co2e']:.2g} kg CO2e"
        )
    elif stage == "merge":
        from seavlm.merge.show import table as sweep_table

        console.print(sweep_table(metrics))
        console.print(metrics["verdict"])
    elif stage == "eval":
        from seavlm.evals.run import rescore
        from seavlm.evals.show import table as results_table

        report = manifest.read_json(place / "results.json")
        options = {"resamples": recipe.eval.bootstrap, "seed": recipe.seed}
        console.print(results_table(rescore(place / report["final"].replace(" ", "-"), **options)))
        console.print(side_by_side(report))


def _results_console() -> Console:
    """Standard output; tables have room there when it is a file or a pipe, which says no width."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=110)


def _show_places(recipe: Recipe, root: Path, console: Console) -> None:
    places = {
        "model": models_of(recipe, root)[-1][1],
        "card": root / "card" / "README.md",
        "sweep plot": root / "merge" / "sweep.png",
        "loss curve": root / "train" / "loss.png",
    }
    for what, path in places.items():
        if path.exists():
            console.print(f"{what:<11} {path}", highlight=False, soft_wrap=True)


def side_by_side(report: dict[str, Any]) -> Table:
    """Accuracy of each model on the held-out questions, languages down; the last one's lead on the first."""
    models, final = report["models"], report["final"]
    first = next(iter(models))
    grid = Table(title="means over the tasks, accuracy %", title_justify="left", box=SIMPLE)
    grid.add_column("language")
    for label in models:
        grid.add_column(label, justify="right")
    if final != first:
        grid.add_column(f"{final} - {first}, 95 %", justify="right", style="dim", no_wrap=True)
    groups = [(code, "languages") for code in models[final]["languages"]]
    groups += [(suite, "suites") for suite in models[final]["suites"]]
    for group, kind in groups:
        row = [f"{models[label][kind][group]['accuracy']:.1%}".rstrip("%") for label in models]
        if final != first:
            lead = report["ahead"][first][group]
            row.append(f"{lead['mean'] * 100:+.1f} [{lead['low'] * 100:+.1f} {lead['high'] * 100:+.1f}]")
        name = LANGUAGES[group].english_name if kind == "languages" else group
        grid.add_row(name, *row, style="bold" if kind == "suites" else "")
    return grid


def _show_answers(recipe: Recipe, root: Path, model: Path, console: Console) -> None:
    """The new model, asked what one unseen drawing shows, in every language. The drawing is kept in out/."""
    if recipe.data.source != "pictures":
        return
    from seavlm.data.samples import read_samples
    from seavlm.engine.vlm import load
    from seavlm.evals.tasks import question_of

    questions = [
        question_of(row) for row in read_samples(root / "data" / "eval.parquet") if row["task"] == "name"
    ]
    if not questions:
        return
    asked = [q for q in questions if q.concept == questions[0].concept and q.family == questions[0].family]
    by_language = {q.language: q for q in reversed(asked)}
    asked = [by_language[code] for code in LANGUAGES if code in by_language]
    picture = next(part["image"] for part in asked[0].messages[-1]["content"] if part["type"] == "image")
    place = root / "asked.webp"
    place.write_bytes(picture)
    vlm = load(model, device=recipe.eval.device, dtype=recipe.eval.dtype)
    replies = vlm.generate_batch(
        [q.messages for q in asked], max_new_tokens=recipe.eval.max_new_tokens, temperature=0.0
    )
    grid = Table(title=f"{place}, an unseen drawing, shown to {model}", title_justify="left", box=SIMPLE)
    for head in ("", "question", "answer", "the drawing's name"):
        grid.add_column(head)
    for question, reply in zip(asked, replies, strict=True):
        grid.add_row(
            question.language,
            question.prompt.removeprefix("<image>").strip(),
            reply.text.strip(),
            question.answers[0],
        )
    console.print(grid)


# --- small things


def _settings(stage: str, recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a stage's output."""
    settings = getattr(recipe, stage).model_dump(mode="json")
    if stage == "merge":  # its questions are asked with the settings of the evaluation
        settings["eval"] = _settings("eval", recipe)
    if stage == "card":
        settings |= {"name": recipe.name, "base": recipe.base}
    return {key: value for key, value in settings.items() if key not in _BYSTANDERS.get(stage, ())}


def _merges(recipe: Recipe) -> bool:
    return recipe.merge.enabled and recipe.train.enabled


def _base(recipe: Recipe, root: Path) -> Path:
    if recipe.init is not None:
        return _need(root / "init" / "model", "seavlm build")
    from seavlm.weights.refs import resolve

    return Path(resolve(recipe.base))


def _dev_questions(root: Path) -> Path:
    """The sweep's questions. They must not be the final ones, so without a dev.parquet there is no sweep."""
    return _need(root / "data" / "dev.parquet", "seavlm data samples (with data.n_dev above 0)")


def _need(path: Path, command: str) -> Path:
    if not path.exists():
        raise SeavlmError(f"{path} is missing", hint=f"First run: {command}, or seavlm build for all stages.")
    return path


def _keep_recipe(recipe: Recipe, root: Path) -> None:
    """The recipe with defaults and overrides in it: `seavlm build OUT/recipe.yaml` repeats the run."""
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    manifest.write_text(root / "recipe.yaml", resolved)


def _stamp(folder: Path, fingerprint: str) -> None:
    """Mark a stage's manifest with what it was made for; from now on the stage is done."""
    content = manifest.read_manifest(folder)
    manifest.write_json(folder / manifest.MANIFEST, {**content, "fingerprint": fingerprint})


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Two runs in one folder would write over each other: the second is refused."""
    hint = "Wait for it, or give another folder with --out."
    with manifest.alone(root / ".lock", f"another run is working in {root}", hint):
        yield


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
