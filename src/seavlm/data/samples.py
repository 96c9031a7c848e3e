"""Samples on disk: Parquet that `datasets` opens and TRL trains on, with every picture stored once.

| column | type |
|---|---|
| id | string |
| task | string |
| language | string |
| messages | list of {role, content: list of {type, text}}; an image part has type "image" and no text |
| images | list of {bytes, path}: the pictures of the image parts, in order |
| meta | string: JSON with concept, family, answer, options ... |

`load_dataset("parquet", data_files=...)` gives `images` as PIL pictures: the schema carries the metadata by
which `datasets` knows its Image feature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from seavlm.errors import SeavlmError

Row = dict[str, Any]
ROW_GROUP = 20_000  # rows; a picture is stored once in each group
_DICTIONARY_LIMIT = 1 << 30  # bytes; above it Parquet would store every copy of a picture

_TEXT = {"dtype": "string", "_type": "Value"}
_FEATURES = {
    "id": _TEXT,
    "task": _TEXT,
    "language": _TEXT,
    "messages": [{"role": _TEXT, "content": [{"type": _TEXT, "text": _TEXT}]}],
    "images": [{"_type": "Image"}],
    "meta": _TEXT,
}
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "task": pa.string(),
        "language": pa.string(),
        "messages": pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()})),
                }
            )
        ),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "meta": pa.string(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def write_samples(path: Path, rows: Iterable[Row]) -> int:
    """Write rows to a Parquet file, whole or not at all, and return their number.

    Rows stream through: ROW_GROUP of them are in memory at a time. Equal rows give equal bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    stream = iter(rows)
    count = 0
    try:
        with pq.ParquetWriter(
            partial,
            SCHEMA,
            compression="zstd",
            dictionary_pagesize_limit=_DICTIONARY_LIMIT,
            write_statistics=False,
        ) as writer:
            while group := list(islice(stream, ROW_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
                count += len(group)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_samples(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file with `messages`, one at a time.

    Columns other than `messages` may be missing (a file made for TRL has `messages` and `images` only):
    `id` is then the row's number, `images` empty, the rest "". SeavlmError when the file cannot be read.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise SeavlmError(
            f"cannot read samples from {path}: {' '.join(str(error).split())}",
            hint="It must be a Parquet file, as `seavlm data samples` writes it.",
        ) from error
    with file:
        if "messages" not in file.schema_arrow.names:
            raise SeavlmError(f"{path} has no column messages, but {', '.join(file.schema_arrow.names)}")
        index = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                defaults: Row = {"id": str(index), "task": "", "language": "", "images": [], "meta": "{}"}
                yield defaults | {name: value for name, value in row.items() if value is not None}
                index += 1
