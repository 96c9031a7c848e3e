"""Models that no file holds, from their references: `merge.yaml`, `out/delta`, `out/delta@0.3`."""

from __future__ import annotations

from pathlib import Path

from seavlm.errors import SeavlmError
from seavlm.merge import plan as planning
from seavlm.merge.delta import delta_plan, open_delta
from seavlm.merge.stream import Merged
from seavlm.recipe import is_merge, read_mapping
from seavlm.weights.checkpoint import FileCheckpoint, open_checkpoint
from seavlm.weights.refs import Unwritten, resolve, unwritten


def open_unwritten(found: Unwritten) -> Merged:
    """The model, its tensors made when they are asked for. SeavlmError as `seavlm merge` has them."""
    if found.beta is not None:
        return Merged(delta_plan(open_delta(found.path), beta=found.beta))
    raw = read_mapping(found.path)
    if not is_merge(raw):
        raise SeavlmError(
            f"{found.path} is no merge recipe", hint="Such as docs/merge.yaml; or give a model."
        )
    return Merged(planning.from_recipe(raw, open_parent))


def open_parent(ref: str | Path) -> tuple[Path, FileCheckpoint]:
    """A parent of a merge and its place: a model on disk, or the tuned model of a delta."""
    found = unwritten(ref)
    if found is None or found.beta is None:
        place = resolve(ref)
        return place, open_checkpoint(place)
    if found.beta != 1:
        raise SeavlmError(f"{ref} is a merge itself", hint="Give its delta alone, and the share as a weight.")
    return found.path, open_delta(found.path)
