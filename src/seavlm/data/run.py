"""The data stage: a recipe's `data` section in; train, dev and eval.parquet and manifest.json out."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from seavlm import recipe
from seavlm.data.pictures import BUILTIN, FAMILIES, load_pictures
from seavlm.data.samples import Row, read_samples, write_samples
from seavlm.data.tasks import TEMPLATES, TOOLS, Split, make_samples
from seavlm.data.tools import QUESTIONS, read_conversations
from seavlm.errors import SeavlmError
from seavlm.manifest import sha256_file, write_manifest
from seavlm.text.language import LANGUAGES

SPLITS: tuple[Split, ...] = ("train", "dev", "eval")


def run(cfg: recipe.Data, *, out: Path, seed: int, progress: bool = True) -> dict[str, Any]:
    """Write the samples of `cfg` to the folder `out`, whole or not at all; return the stage's metrics.

    train.parquet holds cfg.n samples drawn by cfg.families; dev.parquet (for the merge sweep) and
    eval.parquet hold questions on the art families that are never trained on, and share no concept with
    each other. cfg.source may be a folder with files of those names (dev.parquet may be missing there),
    which are read through and written anew. metrics: for each split its rows, rows per task and language,
    distinct pictures, bytes.
    """
    from rich.progress import Progress

    started = time.monotonic()
    hashes = inputs(cfg)
    out = Path(out)
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    metrics: dict[str, Any] = {}
    try:
        with Progress(disable=not progress, transient=True) as bar:
            for split in SPLITS:
                rows, total = _source(cfg, split, seed)
                if rows is None:
                    continue
                counter = _Counter()
                stream: Iterable[Row] = counter.watch(rows)
                stream = bar.track(stream, total=total, description=f"{split} samples")
                write_samples(partial / f"{split}.parquet", stream)
                metrics[split] = counter.metrics() | {"bytes": (partial / f"{split}.parquet").stat().st_size}
        write_manifest(
            partial,
            stage="data",
            recipe=cfg.model_dump(mode="json"),
            seed=seed,
            inputs=hashes,
            metrics=metrics,
            extra={
                "files": {p.name: sha256_file(p) for p in sorted(partial.glob("*.parquet"))},
                "sources": _origins() if cfg.source == "pictures" else [],
            },
            duration_s=round(time.monotonic() - started, 2),
        )
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metrics


def inputs(cfg: recipe.Data) -> dict[str, str]:
    """Name -> SHA-256 of every file that decides the samples. SeavlmError when `cfg.source` lacks one."""
    if cfg.source == "pictures":
        paths = [BUILTIN / "pictures.parquet", BUILTIN / "flags.parquet", TEMPLATES]
        if TOOLS in {**cfg.tasks, **(cfg.eval_tasks or {})}:
            paths.append(QUESTIONS)
    else:
        paths = [path for split in SPLITS if (path := _own(cfg, split))]
        if not {"train", "eval"} <= {path.stem for path in paths}:
            raise SeavlmError(
                f"data.source is {cfg.source!r}, but train.parquet and eval.parquet are not both there",
                hint="Give a folder with both, or with train.jsonl and eval.jsonl (conversations as OpenAI "
                'has them), or "pictures" for the built-in set.',
            )
    return {path.name: sha256_file(path) for path in paths}


def _own(cfg: recipe.Data, split: Split) -> Path | None:
    """The user's file of a split."""
    known = (Path(cfg.source) / f"{split}.{ending}" for ending in ("parquet", "jsonl"))
    return next((path for path in known if path.is_file()), None)


def _source(cfg: recipe.Data, split: Split, seed: int) -> tuple[Iterator[Row] | None, int | None]:
    """The rows of a split, None where there are none to write, and how many to expect where that is known."""
    if cfg.source != "pictures":
        path = _own(cfg, split)
        if path is None:
            return None, None
        return (read_samples(path) if path.suffix == ".parquet" else read_conversations(path)), None
    n = {"train": cfg.n, "dev": cfg.n_dev, "eval": cfg.n_eval}[split]
    if n == 0:
        return None, 0
    trained = split == "train"
    rows = make_samples(
        load_pictures(),
        split=split,
        tasks=cfg.tasks if trained else cfg.eval_tasks or cfg.tasks,
        languages=[code for code, share in cfg.languages.items() for _ in range(share)]
        if trained
        else cfg.eval_languages or list(LANGUAGES),
        families=(cfg.families or [f for f in FAMILIES if f not in cfg.eval_families])
        if trained
        else cfg.eval_families,
        concepts=cfg.concepts,
        task_concepts=cfg.task_concepts if trained else None,
        n=n,
        seed=seed,
    )
    return rows, n


def _origins() -> list[dict[str, str]]:
    """Who made the built-in pictures and names, under which licence: for the model card."""
    from seavlm.data.build_pictures import PACKAGES

    return [
        {
            "what": package.what,
            "author": package.author,
            "package": f"{package.name} {package.version}",
            "licence": package.licence,
            "url": package.url,
        }
        for package in PACKAGES.values()
    ]


class _Counter:
    """Counts the rows that pass."""

    def __init__(self) -> None:
        self.rows = 0
        self.by: dict[str, Counter[str]] = {"tasks": Counter(), "languages": Counter()}
        self.pictures: set[int] = set()

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows += 1
            self.by["tasks"][row["task"]] += 1
            self.by["languages"][row["language"]] += 1
            self.pictures.update(hash(image["bytes"]) for image in row["images"])
            yield row

    def metrics(self) -> dict[str, Any]:
        counts = {name: dict(sorted(counter.items())) for name, counter in self.by.items()}
        return {"rows": self.rows, "pictures": len(self.pictures), **counts}
