"""Carries a merge out, on disk: read, merged and written piece by piece, whatever the model's size.

    theta = beta * regional + (1 - beta) * global          (or any method and recipe of `merge.plan`)

No model is built and nothing is dropped: every name and shape of every parent must match, or the list of
those that do not is the error. Equal inputs give equal bits. Threads read and merge a few pieces ahead of the
one that is being hashed and written; memory is a few pieces for each thread.

The output is made beside its place, in NAME.partial, and appears whole or not at all. There a journal notes
every finished file with its hash: after a kill the same merge goes on from there. An error leaves nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seavlm import __version__, manifest
from seavlm.carbon import Meter
from seavlm.engine import kernels
from seavlm.errors import SeavlmError
from seavlm.merge import plan as planning
from seavlm.merge.methods import METHODS, Finish, Piece, check_weights, linear_weights
from seavlm.merge.plan import Plan, Step
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import (
    COPIED,
    GENERATION,
    INDEX,
    SINGLE,
    FileCheckpoint,
    SafetensorsCheckpoint,
    copy_companions,
    disk_errors,
    header_of,
    open_checkpoint,
    plan_shards,
    write_at,
    write_configs,
    write_index,
)

PIECE = 1 << 20  # numbers read and written at a time
BLOCK = 1 << 16  # numbers merged at a time: what a core's cache holds in fp32
WORKERS = max(2, min(4, os.cpu_count() or 2))
SHARD = 5e9
JOURNAL = "merge-journal.json"
LOCK = "merge.lock"
_READ = (".safetensors", ".gguf", ".json", ".jinja", ".model")
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
_WRITTEN = {SINGLE, INDEX, JOURNAL, LOCK, manifest.MANIFEST, *_CONFIGS, *COPIED}


def merge_checkpoints(
    paths: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    dtype: str | torch.dtype | None = None,
) -> dict[str, Any]:
    """Writes the weighted mean of the checkpoints `paths` to the directory `out`; returns its figures.

    weights: one for each parent, summing to 1; for [regional, global] give [beta, 1 - beta]. dtype: of the
    output ("float32", "bfloat16"); None takes the widest of the parents' dtypes. Tokenizer and generation
    files come from the last parent (the global one). Else as `run`.
    """
    places = [Path(path) for path in paths]
    check_weights(weights, len(places))
    parents = [open_checkpoint(place) for place in places]
    return run(planning.weighted_mean(places, parents, weights, dtype), Path(out))


def at_path(path: str | Path) -> tuple[Path, FileCheckpoint]:
    """A parent that is named by its path."""
    return Path(path), open_checkpoint(path)


def merge_recipe(
    raw: Mapping[str, Any],
    out: str | Path,
    *,
    open_parent: Callable[[str], tuple[Path, FileCheckpoint]] = at_path,
    dtype: str | None = None,
    shard_bytes: float = SHARD,
    hash_inputs: bool = True,
) -> dict[str, Any]:
    """Carries out a recipe of `merge.plan`. open_parent: a model reference -> its place and checkpoint."""
    plan = planning.from_recipe(raw, open_parent, dtype)
    return run(plan, Path(out), shard_bytes=shard_bytes, hash_inputs=hash_inputs)


def outlook(plan: Plan, out: Path, shard_bytes: float = SHARD) -> dict[str, Any]:
    """What `run` would do, in bytes: read (once; methods that look at whole tensors first read them two to
    five times), written, files, free at the place (with what a killed merge has left there), largest tensor,
    and memory for the pieces (about 0.2 GB for Python come to it). SeavlmError where it would refuse to
    begin, but for room on the disk.
    """
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial")
    _may_replace(plan, out, partial)
    shapes = {step.name: step.shape for step in plan.steps}
    sizes = {
        step.name: [math.prod(step.shape) * plan.parents[i].dtype(name).itemsize for i, name in step.sources]
        for step in plan.steps
    }
    piece = max(PIECE, *(_columns(plan, step) for step in plan.steps))
    widest = max(sum(plan.parents[i].dtype(name).itemsize for i, name in step.sources) for step in plan.steps)
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    return {
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes.values())),
        "dtype": plan.config.dtype,
        "methods": sorted({step.method for step in plan.steps}),
        "read": sum(map(sum, sizes.values())),
        "written": sum(map(math.prod, shapes.values())) * plan.dtype.itemsize,
        "files": len(plan_shards(shapes, plan.dtype, shard_bytes)),
        "free": shutil.disk_usage(there).free + sum(f.stat().st_size for f in partial.glob("*.safetensors*")),
        "largest_tensor": max(map(math.prod, shapes.values())) * plan.dtype.itemsize,
        "memory": 3 * WORKERS * piece * (widest + plan.dtype.itemsize),
        "notes": plan.notes,
    }


def run(
    plan: Plan,
    out: Path,
    *,
    shard_bytes: float = SHARD,
    hash_inputs: bool = True,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Carries `plan` out into the directory `out`; its figures.

    `out` appears whole or not at all, with manifest.json inside (inputs' and outputs' SHA-256). Figures:
    tensors, parameters, the mean and largest absolute rounding of the fp32 sums to the output's dtype, the
    mean absolute distance of the first source from the last, to read the rounding against, and how many files
    a killed run had finished. hash_inputs False: the manifest has no hashes of the parents, which takes as
    long again as the merge. told: is told how many more bytes are done. SeavlmError for NaN or infinity (with
    the tensor's name), for a disk that is full, for a place that holds something else, and while another
    process writes the same `out`.
    """
    began = time.monotonic()
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial")
    shapes = {step.name: step.shape for step in plan.steps}
    shards = plan_shards(shapes, plan.dtype, shard_bytes)
    made = [folder for folder in out.parents if not folder.exists()]
    meter, whole = Meter(), False
    with disk_errors(out):
        _may_replace(plan, out, partial)
        with manifest.alone(partial / LOCK, f"another merge is writing {partial}"), meter:
            try:
                hashes = [manifest.beside(manifest.sha256_tree, p) for p in plan.places if hash_inputs]
                identity = _identity(plan, shards)
                journal = _write_all(plan, partial, shards, identity, told)
                inputs = [future.result() for future in hashes]
                if _identity(plan, shards) != identity:
                    raise SeavlmError("a parent's files were changed while they were read", hint="Try again.")
                figures = _finish(plan, partial, shards, journal, inputs, began, meter.report())
                _replace_directory(partial, out)
                for name in (JOURNAL, LOCK):
                    (out / name).unlink()
                whole = True
            except KeyboardInterrupt:  # as after a kill: what is finished is kept
                whole = True
                raise
            finally:
                if not whole:
                    shutil.rmtree(partial, ignore_errors=True)
                    for folder in made:
                        with contextlib.suppress(OSError):
                            folder.rmdir()
    return figures


class Merged:
    """A merge that is not written: a `weights.checkpoint.Checkpoint` whose tensors are made when asked for.

    Bits as in the file that `run` would write. home: where its tokenizer and generation_config.json lie;
    spec: the text of its tokenizer.json, where that is none of the parents'.
    """

    def __init__(self, plan: Plan) -> None:
        self.path, self.config, self.plan = plan.places[-1], plan.config, plan
        self.home = plan.tokenizer_home
        content = plan.vocabulary.content if plan.vocabulary is not None else None
        self.spec = None if content is None else json.dumps(content, ensure_ascii=False)
        self._steps = {step.name: step for step in plan.steps}

    def names(self) -> list[str]:
        return list(self._steps)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._steps[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.plan.dtype

    def get(self, name: str) -> Tensor:
        step = self._steps[name]
        result = torch.empty(step.shape, dtype=self.plan.dtype)
        flat = result.view(-1)
        with _workers() as pool:
            finish = pool.submit(_prepare, self.plan, step).result()

            def fill(bounds: tuple[int, int]) -> None:
                _merge(self.plan, step, finish, bounds[0], flat[slice(*bounds)])

            list(pool.map(fill, _bounds(self.plan, step)))
        return result

    def differs(self, other: Merged) -> set[str]:
        """The tensors that are merged in another way than in `other`, of the same parents."""
        return {name for name, step in self._steps.items() if step != other._steps[name]}


# --- the pieces


@dataclass
class Figures:
    """Sums over what was written."""

    elements: int = 0
    rounding_sum: float = 0.0
    rounding_max: float = 0.0
    distance_sum: float = 0.0

    def add(self, other: Figures) -> None:
        self.elements += other.elements
        self.rounding_sum += other.rounding_sum
        self.rounding_max = max(self.rounding_max, other.rounding_max)
        self.distance_sum += other.distance_sum


def _columns(plan: Plan, step: Step) -> int:
    """Columns of a row where pieces are whole rows; 0 where they are not."""
    if plan.vocabulary is not None and step.name == naming.EMBEDDING:
        return step.shape[1]
    return METHODS[step.method].columns(step.settings, step.shape)


def _bounds(plan: Plan, step: Step) -> Iterator[tuple[int, int]]:
    """First element and one past the last of each piece."""
    total = math.prod(step.shape)
    columns = _columns(plan, step) or step.shape[-1]  # whole rows anyway: a delta is cut there, too
    size = max(1, PIECE // columns) * columns
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _read(plan: Plan, step: Step, start: int, stop: int) -> list[Tensor]:
    """The sources' elements of the output's `start` to `stop`, flat, each in its stored dtype."""
    if plan.vocabulary is None or step.name != naming.EMBEDDING:
        return [plan.parents[parent].read(name, start, stop) for parent, name in step.sources]
    columns = step.shape[1]
    first, last = start // columns, stop // columns
    maps = [plan.vocabulary.rows[parent][first:last] for parent, _ in step.sources]
    parts = [
        _gather(plan.parents[parent], name, rows, columns)
        for (parent, name), rows in zip(step.sources, maps, strict=True)
    ]
    there = [torch.from_numpy(rows >= 0) for rows in maps]
    count = torch.stack(there).sum(0)
    if bool((count == len(parts)).all()):
        return [part.reshape(-1) for part in parts]
    wide = [part.float() for part in parts]
    mean = torch.stack(wide).sum(0) / count.clamp(min=1)[:, None]
    leading = [i for i, (parent, _) in enumerate(step.sources) if parent == plan.vocabulary.base]
    for i in leading:
        mean = torch.where(there[i][:, None], wide[i], mean)
    for row, place in plan.vocabulary.given.items():
        if first <= row < last:
            mean[row - first] = 0 if place is None else _embedding(plan.parents[place[0]], place[1], columns)
    return [
        torch.where(mine[:, None], part, mean).reshape(-1) for part, mine in zip(wide, there, strict=True)
    ]


def _embedding(parent: FileCheckpoint, row: int, columns: int) -> Tensor:
    return parent.read(naming.EMBEDDING, row * columns, (row + 1) * columns).float()


def _gather(parent: FileCheckpoint, name: str, rows: np.ndarray, columns: int) -> Tensor:
    """Rows of a matrix [len(rows), columns]; zeros for -1. Neighbours are read in one go."""
    result = torch.zeros(len(rows), columns, dtype=parent.dtype(name))
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1  # row 0 may follow a -1
    for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        if rows[begin] >= 0:
            first = int(rows[begin])
            part = parent.read(name, first * columns, (first + int(end - begin)) * columns)
            result[begin:end] = part.reshape(-1, columns)
    return result


def _blocks(step: Step, parts: list[Tensor], start: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(first element of the tensor, first of the piece, fp32 sources) of what is merged at a time."""
    columns = METHODS[step.method].columns(step.settings, step.shape)
    size = max(1, BLOCK // columns) * columns if columns else BLOCK
    for at in range(0, len(parts[0]), size):
        wide = [part[at : at + size].float() for part in parts]
        yield start + at, at, [x.reshape(-1, columns) for x in wide] if columns else wide


def _prepare(plan: Plan, step: Step) -> Finish:
    """What merges a piece of the step's tensor, once the method has seen as much of it as it needs."""

    def passes() -> Iterator[Piece]:
        for start, stop in _bounds(plan, step):
            for at, _, wide in _blocks(step, _read(plan, step, start, stop), start):
                yield at, wide

    return METHODS[step.method].start(passes, step.settings)


def _merge(plan: Plan, step: Step, finish: Finish, start: int, result: Tensor) -> Figures:
    """Fills `result` (flat, of the output's dtype) with the piece that begins at `start`, rounded once."""
    parts = _read(plan, step, start, start + len(result))
    figures = Figures(elements=len(result))
    if _mean_of_two(step, parts, result, figures):
        return figures
    # A mean's own rounding shows a NaN of any source that is in it; other methods could lose one.
    shown = step.method == "linear" and all(mine["weight"] != 0 for mine in step.settings.each)
    for at, inside, wide in _blocks(step, parts, start):
        if not shown and not math.isfinite(sum(float(x.sum()) for x in wide)):
            _only_numbers(plan, step, parts)
        if len(wide) > 1:
            figures.distance_sum += float((wide[0] - wide[-1]).abs_().sum())
        total = finish(at, wide).reshape(-1)
        piece = result[inside : inside + len(total)]
        piece.copy_(total)  # the one rounding
        if plan.dtype == torch.float32:
            sound = math.isfinite(float(total.sum())) or bool(torch.isfinite(total).all())
        else:
            rounding = total.sub_(piece.float()).abs_()
            largest = float(rounding.max())
            sound = math.isfinite(largest)
            figures.rounding_max = max(figures.rounding_max, largest)
            figures.rounding_sum += float(rounding.sum())
        if not sound:
            _only_numbers(plan, step, parts)
            raise SeavlmError(
                f"{step.name}: the merged tensor is not finite in {plan.config.dtype}",
                hint="Merge to float32, or look at the parents.",
            )
    return figures


def _mean_of_two(step: Step, parts: list[Tensor], result: Tensor, figures: Figures) -> bool:
    """The commonest piece by the compiled kernel, in a fifth of the time: two of bf16 to bf16. The same bits.

    False where it is another piece, there is no kernel, or the result is not finite: then nothing is done.
    """
    if step.method != "linear" or [part.dtype for part in (*parts, result)] != [torch.bfloat16] * 3:
        return False
    function, weights = kernels.mean(), linear_weights(step.settings)
    if function is None or 0.0 in weights:
        return False
    found = np.zeros(3)
    places = [x.data_ptr() for x in (*parts, result)]
    function(*places[:2], *weights, places[2], len(result), found.ctypes.data)
    rounding, largest, distance = found.tolist()
    if not math.isfinite(rounding):
        return False
    figures.rounding_sum, figures.rounding_max, figures.distance_sum = rounding, largest, distance
    return True


def _mean_of_files(
    plan: Plan, step: Step, start: int, result: Tensor, file: int, offset: int
) -> Figures | None:
    """`_mean_of_two` of two files, read and written (to byte `offset` of `file`) without Python in between.

    None where it is another piece, or where anything is amiss: `_merge` then says what.
    """
    parents = [plan.parents[parent] for parent, _ in step.sources]
    if step.method != "linear" or plan.dtype != torch.bfloat16 or len(parents) != 2:
        return None
    if plan.vocabulary is not None and step.name == naming.EMBEDDING:
        return None
    function, weights, places = kernels.mean_of_files(), linear_weights(step.settings), []
    for parent, (_, name) in zip(parents, step.sources, strict=True):
        if isinstance(parent, SafetensorsCheckpoint) and parent.dtype(name) == torch.bfloat16:
            places.append(parent.place(name))
    if function is None or 0.0 in weights or len(places) != 2 or None in places:
        return None
    found = np.zeros(3)
    (a, at_a), (b, at_b) = (place for place in places if place)
    given = (a, at_a + 2 * start, b, at_b + 2 * start, *weights, result.data_ptr(), len(result), file, offset)
    if not function(*given, found.ctypes.data) or not math.isfinite(found[0]):
        return None
    return Figures(len(result), *found.tolist())


def _only_numbers(plan: Plan, step: Step, parts: list[Tensor]) -> None:
    for (parent, name), part in zip(step.sources, parts, strict=True):
        if not bool(torch.isfinite(part).all()):
            tensor = plan.parents[parent].get(name)
            lost, endless = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
            raise SeavlmError(
                f"of {tensor.numel()} numbers of {name} in {plan.places[parent]} "
                f"{lost} are NaN and {endless} infinite",
                hint="That checkpoint is broken.",
            )


# --- reading ahead, writing behind


def ahead(submit: Callable[[Any], Future[Any]], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """The results of submit(item), in order, `depth` of them begun ahead of the one that is given."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone. They are done when the block ends, whichever way."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(WORKERS, "merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _write_file(plan: Plan, path: Path, steps: list[Step], told: Callable[[int], None]) -> dict[str, Any]:
    """A weight file: its pieces are made and written by threads, and hashed here, in order."""
    shapes = {step.name: step.shape for step in steps}
    header, begins = header_of(list(shapes), shapes, plan.dtype, vision=plan.config.vision is not None)
    figures, digest = Figures(), hashlib.sha256(header)
    # Results go into the same memory again and again: fresh pages cost as much as what is written into them.
    rooms: SimpleQueue[Tensor] = SimpleQueue()
    longest = max(PIECE, *(_columns(plan, step) or step.shape[-1] for step in steps))
    for _ in range(2 * WORKERS + 2):  # more than are ahead: nobody waits for one
        rooms.put(torch.empty(longest, dtype=plan.dtype))
    with open(path, "wb", buffering=0) as file, _workers() as pool:
        write_at(file.fileno(), header, 0)

        def prepare(step: Step) -> Future[tuple[Step, Finish]]:
            return pool.submit(lambda: (step, _prepare(plan, step)))

        def jobs() -> Iterator[tuple[Step, Finish, int, int]]:
            for step, finish in ahead(prepare, steps, 1):
                for start, stop in _bounds(plan, step):
                    yield step, finish, start, stop

        def make(step: Step, finish: Finish, start: int, stop: int) -> tuple[Tensor, memoryview, Figures]:
            room = rooms.get()
            result, offset = room[: stop - start], begins[step.name] + start * plan.dtype.itemsize
            data = result.view(torch.uint8).numpy().data
            mine = _mean_of_files(plan, step, start, result, file.fileno(), offset)
            if mine is None:
                mine = _merge(plan, step, finish, start, result)
                write_at(file.fileno(), data, offset)
            return room, data, mine

        for room, data, mine in ahead(lambda job: pool.submit(make, *job), jobs(), 2 * WORKERS):
            digest.update(data)
            rooms.put(room)
            figures.add(mine)
            told(len(data))
    return {"sha256": digest.hexdigest(), "figures": asdict(figures)}


def _write_all(
    plan: Plan,
    partial: Path,
    shards: Mapping[str, list[str]],
    identity: str,
    told: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """The weight files; for each its hash and its figures. Files that a killed run finished stay."""
    journal = _journal(partial, identity)
    kept = len(journal)
    told(sum((partial / file).stat().st_size for file in journal))
    steps = {step.name: step for step in plan.steps}
    left = {file: [steps[name] for name in group] for file, group in shards.items() if file not in journal}
    needed = sum(math.prod(step.shape) for group in left.values() for step in group) * plan.dtype.itemsize
    free = shutil.disk_usage(partial).free + sum(f.stat().st_size for f in partial.glob("*.safetensors.tmp"))
    if needed > free:
        raise SeavlmError(
            f"{partial.parent} has {free:,} bytes free, the weights need {needed:,}", hint="Make room."
        )
    for file, group in left.items():
        unfinished = partial / f"{file}.tmp"
        entry = _write_file(plan, unfinished, group, told)
        os.replace(unfinished, partial / file)
        journal[file] = entry
        manifest.write_json(partial / JOURNAL, {"identity": identity, "files": journal})
    for entry in list(journal.values())[:kept]:
        entry["kept"] = True
    return journal


def _journal(partial: Path, identity: str) -> dict[str, dict[str, Any]]:
    """The finished files of an earlier run of the same merge, read again to see that they are whole."""
    kept: dict[str, dict[str, Any]] = {}
    try:
        found = json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
        files = found["files"] if found["identity"] == identity else {}
        for file, entry in files.items():
            if (partial / file).is_file() and manifest.sha256_file(partial / file) == entry["sha256"]:
                kept[file] = {"sha256": entry["sha256"], "figures": asdict(Figures(**entry["figures"]))}
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    for path in partial.iterdir():
        if path.name not in (*kept, LOCK, JOURNAL):
            path.unlink()
    return kept


def _identity(plan: Plan, shards: Mapping[str, list[str]]) -> str:
    """What must be equal for a killed run's files to be of use: recipe, parents' files, layout, version."""
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino)
        for place in plan.places
        for path in (sorted(place.iterdir()) if place.is_dir() else [place])
        if path.is_file() and path.suffix in _READ
    ]
    said = [
        __version__,
        plan.recipe,
        plan.config.to_dict(),
        plan.seed,
        files,
        list(shards.items()),
        PIECE,
        BLOCK,
    ]
    return manifest.sha256_bytes(json.dumps(said, sort_keys=True, default=str).encode())


# --- the directory


def _finish(
    plan: Plan,
    partial: Path,
    shards: Mapping[str, list[str]],
    journal: Mapping[str, dict[str, Any]],
    inputs: list[str],
    began: float,
    carbon: dict[str, Any],
) -> dict[str, Any]:
    """Everything beside the weights; the figures."""
    figures = Figures()
    for file in shards:
        figures.add(Figures(**journal[file]["figures"]))
    vision = plan.config.vision is not None
    write_index(partial, shards, figures.elements * plan.dtype.itemsize, plan.dtype, vision=vision)
    write_configs(partial, plan.config)
    copy_companions(plan.tokenizer_home, partial)
    _end_and_template(plan, partial)
    elements = max(1, figures.elements)
    report: dict[str, Any] = {
        "tensors": len(plan.steps),
        "parameters": figures.elements,
        "dtype": plan.config.dtype,
        "rounding_mean": figures.rounding_sum / elements,
        "rounding_max": figures.rounding_max,
        "parents_distance_mean": figures.distance_sum / elements,
        "tokenizer_checked": plan.tokenizer_checked,
        "notes": plan.notes,
        "files_kept": sum(bool(entry.get("kept")) for entry in journal.values()),
    }
    if plan.vocabulary is not None:
        report["tokens_added"] = plan.vocabulary.added
        report["rows_filled"] = dict(zip(plan.labels, plan.vocabulary.filled, strict=True))
        if plan.vocabulary.content is not None:
            text = json.dumps(plan.vocabulary.content, ensure_ascii=False, indent=2)
            (partial / "tokenizer.json").write_text(text, encoding="utf-8")
    manifest.write_manifest(
        partial,
        stage="merge",
        recipe=plan.recipe,
        seed=plan.seed,
        inputs=dict(zip(plan.labels, inputs, strict=False)),
        metrics=report | {"carbon": carbon},
        extra={
            "parents": dict(zip(plan.labels, plan.references, strict=True)),
            "outputs": {file: journal[file]["sha256"] for file in shards},
        },
        duration_s=round(time.monotonic() - began, 3),
    )
    return report


def _end_and_template(plan: Plan, partial: Path) -> None:
    """In the files that came from a parent: where the merged model ends, and the recipe's chat template."""
    generation = json.loads((partial / GENERATION).read_text(encoding="utf-8"))
    ends = generation.get("eos_token_id")
    if ends is not None and set(np.atleast_1d(ends).tolist()) != set(plan.config.eos_token_ids):
        generation["eos_token_id"] = list(plan.config.eos_token_ids)
        manifest.write_json(partial / GENERATION, generation)
    if plan.chat_template is not None:
        (partial / "chat_template.json").unlink(missing_ok=True)
        (partial / "chat_template.jinja").write_text(plan.chat_template, encoding="utf-8")


def _may_replace(plan: Plan, out: Path, partial: Path) -> None:
    """SeavlmError where something of the user's would be lost, or where the end is sure to fail."""
    for place in plan.places:
        parent = place.resolve()
        if parent == out:
            raise SeavlmError(
                f"{out} is one of the parents", hint="Choose another place for the merged model."
            )
        if out in parent.parents or parent in out.parents:
            raise SeavlmError(
                f"{out} and the parent {place} lie one in the other",
                hint="Choose a place beside the parents.",
            )
    if out.exists() and not out.is_dir():
        raise SeavlmError(f"{out} is a file", hint="Choose a directory to write to.")
    if out.is_mount():
        raise SeavlmError(
            f"a disk is mounted at {out}, so it cannot be replaced", hint="Give a folder in it."
        )
    held = list(out.iterdir()) if out.is_dir() else []
    if any(entry.is_dir() for entry in held):
        raise SeavlmError(f"{out} holds other directories", hint="Choose a new or empty directory.")
    theirs = [entry.name for entry in held if entry.name in _WRITTEN or entry.suffix == ".safetensors"]
    if theirs and not _merge_made(out):
        raise SeavlmError(f"{out} holds what no merge made ({theirs[0]})", hint="Choose a new directory.")
    if partial.exists() and not (partial / LOCK).exists() and (partial.is_file() or any(partial.iterdir())):
        raise SeavlmError(
            f"{partial} is there and is not of an unfinished merge",
            hint="Move it away, or choose another place.",
        )


def _merge_made(out: Path) -> bool:
    """Whether a merge wrote this folder; a build keeps the manifests of all its stages in one there."""
    try:
        content = json.loads((out / manifest.MANIFEST).read_text(encoding="utf-8"))
        return content.get("stage") == "merge" or "merge" in content
    except (OSError, ValueError, AttributeError):
        return False


def _replace_directory(new: Path, place: Path) -> None:
    """Puts directory `new` at `place`. What was there goes, but for files that no merge writes."""
    old = place.with_name(f"{place.name}.old-{os.getpid()}")
    if not place.exists():
        os.replace(new, place)
        return
    os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException:
        os.replace(old, place)
        raise
    for entry in list(old.iterdir()):
        if entry.name in _WRITTEN or entry.match("model-*-of-*.safetensors"):
            entry.unlink()
        else:
            os.replace(entry, place / entry.name)
    old.rmdir()
