"""What is known of a model: the manifests of its stages and parents, and the runs that measured it.

A model's folder tells how it was made (its manifest.json, or that of the stage whose `model` it is), and the
hashes in there tell what it was made from: parents and data are followed where they lie on this machine. A
stage or run that is given must belong to the model, or to one of its parents; that is seen by the SHA-256 of
the models. No torch, no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seavlm import manifest
from seavlm.errors import SeavlmError

Manifest = Mapping[str, Any]
STAGES = ("init", "data", "train", "delta", "sweep", "merge", "quantize", "eval")
"""In the order in which a model is made."""
HINT = "Give a model's folder, and those of its stages, its sweep and its `seavlm eval --out` runs."


@dataclass(frozen=True)
class Stage:
    """A stage of a model's making, or of a parent's."""

    kind: str
    made: Manifest
    whose: str = ""
    """What the parent is called; "" for the model itself."""
    note: str = ""
    """What tells it from others of its kind: the suite that was asked."""

    @property
    def label(self) -> str:
        return (
            f"{self.kind}{f' ({self.note})' if self.note else ''}{f' of {self.whose}' if self.whose else ''}"
        )

    @property
    def metrics(self) -> Manifest:
        return self.made.get("metrics", {})


@dataclass
class Facts:
    """All that a card is written from."""

    name: str
    base: str = ""
    """The reference of the global parent, or of what was fine-tuned."""
    stages: list[Stage] = field(default_factory=list)
    """In the order in which they were made, the parents' after the model's own."""
    parents: dict[str, str] = field(default_factory=dict)
    """What a parent is called -> its SHA-256 ("" if its merge has not noted it)."""
    evaluations: list[Evaluation] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What was not followed, and why."""

    def of(self, kind: str) -> list[Stage]:
        """The stages of a kind: of the model's own making, and of its parents'."""
        return [stage for stage in self.stages if stage.kind == kind]

    def first(self, kind: str) -> Manifest:
        """The manifest of the model's own stage, else of a parent's; empty if there is none."""
        return next((stage.made for stage in self.of(kind)), {})


@dataclass
class Evaluation:
    """Models that were asked the same questions. Each of `models` has the contents of a results.json."""

    models: dict[str, Any]
    final: str
    """Which of them the card is about."""
    ahead: dict[str, Any] = field(default_factory=dict)
    """Another model -> language or suite -> the final one's lead, with its interval."""
    remote: bool = False
    """Asked through an endpoint, whose weights nobody has compared with the model's."""


@dataclass
class _Found:
    """A folder and its manifest."""

    folder: Path
    made: Manifest

    @property
    def stage(self) -> str:
        return str(self.made["stage"])

    @property
    def inputs(self) -> Mapping[str, str]:
        return self.made.get("inputs", {})


def gather(
    model: Path,
    folders: Sequence[Path],
    *,
    name: str = "",
    resolve: Callable[[str], Path | None] = lambda reference: None,
    compare: Callable[[Path, Path], dict[str, Any]] | None = None,
) -> Facts:
    """The facts of the model at `model`.

    folders: of stages and runs, or folders that hold such. resolve: a model reference -> its place, if it is
    on this machine. compare: of the folders of two runs of the same questions, the first one's lead.
    SeavlmError when there is no manifest at all, for a broken one, one of another version, and for a run or
    stage that belongs to another model.
    """
    story = _Story(model, name or _name(model), resolve)
    story.follow(model, "")
    given = [found for folder in folders for found in _expanded(folder)]
    order = (
        "merge",
        "train",
        "init",
        "delta",
        "quantize",
        "sweep",
        "eval",
        "data",
    )  # what says what belongs, first
    for found in sorted((one for one in given if one.stage in order), key=lambda one: order.index(one.stage)):
        story.add(found)
    if not story.facts.stages and not story.runs:
        raise SeavlmError(f"there is no manifest to write a card from: {model} has none", hint=HINT)
    return story.told(compare)


class _Story:
    """Facts in the making. `known`: SHA-256 of the model and its parents -> what they are called."""

    def __init__(self, model: Path, name: str, resolve: Callable[[str], Path | None]) -> None:
        self.facts = Facts(name)
        self.model, self.resolve = model, resolve
        self.subject = manifest.sha256_tree(model)
        self.known = {self.subject: name}
        self.runs: list[tuple[str, Path, dict[str, Any], bool]] = []  # whose, where, results, remote
        self.groups: list[Evaluation] = []

    # --- how it was made

    def follow(self, model: Path, whose: str) -> None:
        """Take in the stages that made a model; `whose` is what to call it, "" for the card's own."""
        for found in _makers(model):
            self.take(found, whose)

    def take(self, found: _Found, whose: str) -> None:
        stage, made = found.stage, found.made
        if stage not in STAGES or (whose and stage == "eval"):
            return
        note = ""
        if stage == "eval":
            self.results(found)
            asked = found.inputs.get("model", self.subject)
            whose = "" if asked == self.subject else short(self.known.get(asked, ""))
            note = str(made.get("recipe", {}).get("suite") or "")
            note = Path(note).name if "/" in note else note
        new = Stage(stage, made, whose, note)
        self.facts.stages = [one for one in self.facts.stages if one.label != new.label or stage == "sweep"]
        self.facts.stages.append(new)
        for picture in ("sweep.png", "pareto.png", "loss.png"):
            path = found.folder / picture
            if not whose and path.is_file() and picture not in {one.name for one in self.facts.pictures}:
                self.facts.pictures.append(path)
        if stage == "train":
            self.trained(found, whose)
        if stage == "merge":
            self.merged(found, whose)
        if stage == "quantize":
            self.parent("the model before it was quantised", found.inputs.get("model", ""), whose)

    def trained(self, found: _Found, whose: str) -> None:
        base = str(found.made.get("base") or "")
        if "base" in found.inputs:
            self.parent(base or "the base model", found.inputs["base"], whose)
        if base and not self.facts.base and not whose:
            self.facts.base = base
        for beside in _siblings(found.folder):
            if beside.stage == "data" and _holds(beside, found.inputs.get("data", "")):
                self.take(beside, whose)

    def merged(self, found: _Found, whose: str) -> None:
        references = parents_of(found.made)
        if references and not whose:
            self.facts.base = global_parent(found.made, references)
        for label, reference in references.items():
            digest = str(found.inputs.get(label, ""))
            self.parent(reference, digest, whose)
            place = self.resolve(reference)
            if place is None:
                continue
            if digest and manifest.sha256_tree(place) != digest:
                self.facts.remarks.append(f"{reference} has changed since it was merged: not followed")
            elif not whose:
                self.follow(place, short(reference))
        if not references:  # a build's, whose parents are its own
            for label in ("global", "regional"):
                self.parent(f"the {label} parent", found.inputs.get(label, ""), whose)
            for beside in _siblings(found.folder):
                if beside.stage == "train" and _is(beside.folder / "model", found.inputs.get("regional", "")):
                    self.take(beside, whose)

    def parent(self, name: str, digest: str, whose: str) -> None:
        if digest:
            self.known.setdefault(digest, name)
        if not whose and not (digest and digest in self.facts.parents.values()):
            self.facts.parents.setdefault(name, digest)

    # --- what is given

    def add(self, found: _Found) -> None:
        """A stage or run that was given, once it is seen to belong here."""
        stage, whose = found.stage, self.owner(found)
        if whose is None:
            raise SeavlmError(
                f"{found.folder} ({stage}) belongs to another model than {self.model}",
                hint="Give what is of one model or its parents. If the model has changed, run it again.",
            )
        self.take(found, whose)

    def owner(self, found: _Found) -> str | None:
        """Whose stage this is: "" for the model's own; None for a stranger's."""
        hashes = set(found.inputs.values())
        if found.stage == "eval":
            asked = found.inputs.get("model")
            if asked is None and found.made.get("metrics", {}).get("carbon", {}).get("unknown"):
                return ""  # behind an endpoint
            return "" if (asked in self.known if asked else self.subject in hashes) else None
        if found.stage == "sweep":
            return "" if self.subject in hashes or hashes <= set(self.known) else None
        if found.stage == "delta":
            if parent := self.known.get(manifest.sha256_tree(found.folder)):  # the model was written from it
                return short(parent)
            return "" if not hashes or found.inputs.get("tuned") in self.known else None
        if found.stage == "data":
            trained = [one.made.get("inputs", {}).get("data", "") for one in self.facts.of("train")]
            questions = [one.made.get("inputs", {}).get("questions", "") for one in self.facts.of("eval")]
            return "" if not trained or any(_holds(found, one) for one in trained + questions) else None
        places = [
            place for place in (found.folder / "model", found.folder) if (place / "config.json").is_file()
        ]
        digest = manifest.sha256_tree(places[0]) if places else ""
        if digest not in self.known:
            return None
        regional = {one.made.get("inputs", {}).get("regional") for one in self.facts.of("merge")}
        bases = {one.made.get("inputs", {}).get("base") for one in self.facts.of("train") if not one.whose}
        own = digest == self.subject or digest in regional or (found.stage == "init" and digest in bases)
        return "" if own else short(self.known[digest])

    def results(self, found: _Found) -> None:
        results = manifest.read_json(found.folder / "results.json")
        if "models" in results:  # a build's: parents and model together
            self.groups.append(Evaluation(results["models"], results["final"], results.get("ahead", {})))
            return
        whose = self.known.get(found.inputs.get("model", ""), self.facts.name)
        self.runs.append((whose, found.folder, results, "model" not in found.inputs))

    def told(self, compare: Callable[[Path, Path], dict[str, Any]] | None) -> Facts:
        mine = [run for run in self.runs if run[0] == self.facts.name]
        for _, folder, results, remote in mine:
            name = self.facts.name
            group = Evaluation({name: results}, name, remote=remote)
            for whose, other, theirs, _ in self.runs:
                if whose != name and theirs.get("suite") == results.get("suite"):
                    group.models[short(whose)] = theirs
                    if compare is not None:
                        group.ahead[short(whose)] = compare(folder, other)
            self.groups.append(group)
        if self.runs and not mine and not self.groups:
            raise SeavlmError(
                f"none of the runs is of {self.model}",
                hint="Its parents were asked, it was not: seavlm eval.",
            )
        self.facts.evaluations = self.groups
        self.facts.stages.sort(key=lambda stage: (bool(stage.whose), STAGES.index(stage.kind)))
        return self.facts


# --- manifests


def parents_of(made: Manifest) -> dict[str, str]:
    """A merge's parents: their labels among its inputs -> what the recipe calls them."""
    if "parents" in made:
        return dict(made["parents"])
    recipe = made.get("recipe", {})
    if "regional" in recipe:
        named = [recipe["regional"], recipe["global"]]
    elif "parents" in recipe:
        named = recipe["parents"]
    else:
        named = [one["model"] for one in recipe.get("models", [])]
    return {f"parent_{place}": str(one) for place, one in enumerate(named)}


def global_parent(made: Manifest, references: Mapping[str, str]) -> str:
    recipe = made.get("recipe", {})
    return str(recipe.get("global") or recipe.get("base_model") or list(references.values())[-1])


def short(reference: str) -> str:
    """A model's name without the folders that it lies in; an id of the hub stays whole."""
    path = Path(reference).expanduser()
    return _name(path) if "/" in reference and not on_hub(reference) else reference


def on_hub(reference: str) -> bool:
    """Whether this looks like an id of the hub (owner/name), not a path or a built-in name."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", reference)) and not (
        Path(reference).exists() or Path(reference).parent.exists()
    )


def _name(model: Path) -> str:
    """What a model's folder is called; of a stage's `model`, what the stages' folder is. In the hub's cache
    and in seavlm's own, what the model is called there.
    """
    place = model.absolute()
    if cached := next((part for part in place.parts if part.startswith("models--")), ""):
        return "/".join(cached.split("--")[1:])
    if place.parent.name == "models":
        return re.sub(r"-[0-9a-f]{12}$", "", place.name)
    if place.name == "model" and place.parent.name:
        place = place.parent
        if place.name in STAGES and place.parent.name:
            place = place.parent
    return place.name.removesuffix(".gguf")


def _makers(model: Path) -> list[_Found]:
    """The stages whose work a model is: the one in whose folder it lies as `model`, else its own manifest."""
    own = _manifests(model) if model.is_dir() and (model / manifest.MANIFEST).is_file() else []
    around = model.parent / manifest.MANIFEST
    stage = _manifests(model.parent) if model.name == "model" and around.is_file() else []
    stage = [found for found in stage if found.stage in ("init", "train", "merge")]
    return [*(found for found in own if found.stage not in {one.stage for one in stage}), *stage]


def _manifests(folder: Path) -> list[_Found]:
    """A folder's manifest; of a model that a build has made, those of all its stages."""
    path = folder / manifest.MANIFEST
    content = manifest.read_json(path)
    several = "stage" not in content and content and all(isinstance(one, dict) for one in content.values())
    found = [_Found(folder, made) for made in (content.values() if several else [content])]
    for one in found:
        made = one.made
        if not isinstance(made.get("stage"), str):
            raise SeavlmError(f"{path} is not a manifest: it has no stage", hint="Run its stage again.")
        kinds = (made.get("inputs", {}), made.get("metrics", {}), made.get("recipe", {}))
        if not all(isinstance(part, dict) for part in kinds):
            version = (made.get("versions") or {}).get("seavlm", "unknown")
            raise SeavlmError(
                f"{path} is a manifest of another version of seavlm ({version})", hint="Run its stage again."
            )
    if several:  # results and plots lie elsewhere
        found = [one for one in found if one.stage != "eval"]
    return found


def _expanded(folder: Path) -> list[_Found]:
    """The manifests of a folder, or of those in it (a build's). SeavlmError when there is none."""
    if not folder.is_dir():
        raise SeavlmError(f"there is no folder {folder}", hint=HINT)
    if (folder / manifest.MANIFEST).is_file():
        return _manifests(folder)
    inside = [one for one in sorted(folder.iterdir()) if (one / manifest.MANIFEST).is_file()]
    if not inside:
        raise SeavlmError(
            f"there is no manifest in {folder}",
            hint="Give what a command wrote. The same `seavlm eval` again writes it, asking nothing twice.",
        )
    return [found for one in inside for found in _manifests(one)]


def _siblings(folder: Path) -> list[_Found]:
    """The stages beside a stage; what cannot be read is none."""
    found = []
    for beside in sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []:
        if beside != folder and beside.is_dir() and (beside / manifest.MANIFEST).is_file():
            try:
                found += _manifests(beside)
            except SeavlmError:
                continue
    return found


def _holds(data: _Found, digest: str) -> bool:
    """Whether a data stage has made the file of this hash."""
    return bool(digest) and digest in data.made.get("files", {}).values()


def _is(model: Path, digest: str) -> bool:
    return bool(digest) and (model / "config.json").is_file() and manifest.sha256_tree(model) == digest
