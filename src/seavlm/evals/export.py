"""The replies as `lmms-eval --log_samples` writes them: a JSONL file a task, for tools that read those.

Its samples have doc_id, target, filtered_resps (the answer as read), resps (the reply, where it is not the
same), input, doc_hash, prompt_hash, target_hash, and a key for each metric; ours are `acc` (0..1) and
`seavlm`, with what its schema has no place for. The hashes are SHA-256 of the text, as there. results.json
beside them has its keys.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from seavlm.evals.scores import Results

_MORE = ("id", "language", "concept", "image_sha256", "verdict", "language_ok", "measures", "error")


def to_lmms_eval(results: Results, out: Path, *, stamp: str = "seavlm") -> list[Path]:
    """Write OUT/MODEL/STAMP_samples_TASK.jsonl for each task, and STAMP_results.json; return the paths."""
    folder = out / "".join(c if c.isalnum() or c in "._-" else "_" for c in results.name).strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in results.records:
        tasks[record["task"].replace("/", "_")].append(record)
    written = []
    for task, records in tasks.items():
        path = folder / f"{stamp}_samples_{task}.jsonl"
        lines = [json.dumps(_sample(i, record), ensure_ascii=False) for i, record in enumerate(records)]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        written.append(path)
    summary = {
        "results": {
            task.replace("/", "_"): {
                "alias": task,
                "acc,none": cell.accuracy,
                "acc_stderr,none": (cell.high - cell.low) / (2 * 1.96),
            }
            for task, cell in results.tasks.items()
        },
        "higher_is_better": {task: {"acc": True} for task in tasks},
        "n-samples": {
            task: {"original": len(found), "effective": len(found)} for task, found in tasks.items()
        },
        "task_hashes": {
            task: _hash(
                "".join(f"sample_{i}{_sample(i, record)['doc_hash']}" for i, record in enumerate(found))
            )
            for task, found in tasks.items()
        },
        "model_name": results.name,
        "total_evaluation_time_seconds": str(results.seconds),
        "seavlm": results.about,
    }
    path = folder / f"{stamp}_results.json"
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*written, path]


def _sample(index: int, record: dict[str, Any]) -> dict[str, Any]:
    target = record["answers"][0] if record["answers"] else record["checks"]
    parsed, reply = record["parsed"], record["reply"]
    sample = {
        "doc_id": index,
        "target": target,
        "filtered_resps": [parsed if parsed is not None else ""],
        "resps": [[reply]],
        "doc_hash": _hash(
            json.dumps([record["id"], record["prompt"], record["image_sha256"]], ensure_ascii=False)
        ),
        "prompt_hash": _hash(record["prompt"]),
        "target_hash": _hash(target),
        "input": record["prompt"],
        "acc": record["score"],
        "seavlm": {key: record[key] for key in _MORE},
    }
    if parsed == reply:  # it leaves out what says the same twice
        del sample["resps"]
    return sample


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
