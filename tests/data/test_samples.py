"""Sample files: what comes back, what `datasets` and TRL see in them, and what they cost."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from seavlm.data import samples
from seavlm.data.samples import read_samples, write_samples
from seavlm.errors import SeavlmError


def picture(seed: int, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    noise = random.Random(seed).randbytes(size * size * 3)
    Image.frombytes("RGB", (size, size), noise).save(buffer, "PNG")
    return buffer.getvalue()


def row(index: int, image: bytes) -> dict[str, Any]:
    return {
        "id": f"r{index}",
        "task": "name",
        "language": "lo",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}, {"type": "text", "text": "ນີ້ແມ່ນຫຍັງ?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "ຊ້າງ"}]},
        ],
        "images": [{"bytes": image, "path": None}],
        "meta": json.dumps({"answer": "ຊ້າງ"}, ensure_ascii=False),
    }


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row(index, picture(index)) for index in range(5)]
    assert write_samples(tmp_path / "a.parquet", iter(rows)) == 5
    assert list(read_samples(tmp_path / "a.parquet")) == rows


def test_datasets_opens_it_with_decoded_pictures(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", [row(0, picture(9))])
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    opened = table[0]
    assert isinstance(opened["images"][0], Image.Image)
    assert opened["images"][0].size == (64, 64)
    assert opened["images"][0].tobytes() == Image.open(io.BytesIO(picture(9))).tobytes()
    assert opened["messages"] == row(0, b"")["messages"]


def test_trl_finds_an_open_place_for_every_picture(tmp_path: Path) -> None:
    """TRL's `prepare_multimodal_messages` counts the parts of type "image" without a key "image" of their
    own, wants as many as there are images, and knows the roles system, user, assistant and tool.
    """
    write_samples(tmp_path / "a.parquet", [row(0, picture(1))])
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    opened = table[0]
    open_places = [
        part
        for message in opened["messages"]
        for part in message["content"]
        if part["type"] == "image" and "image" not in part
    ]
    assert len(open_places) == len(opened["images"]) == 1
    assert [message["role"] for message in opened["messages"]] == ["user", "assistant"]


def test_equal_pictures_are_stored_once(tmp_path: Path) -> None:
    image = picture(1, size=300)  # some 270 kB; 200 copies of it are far beyond Parquet's default dictionary
    other = picture(2, size=300)
    write_samples(tmp_path / "a.parquet", [row(i, image if i % 2 else other) for i in range(200)])
    assert (tmp_path / "a.parquet").stat().st_size < 1.2 * (len(image) + len(other)) + 20_000
    wide = [picture(i, size=200) for i in range(60)]  # over 2 MB of distinct pictures, each twice
    write_samples(tmp_path / "b.parquet", [row(i, wide[i % 60]) for i in range(120)])
    assert (tmp_path / "b.parquet").stat().st_size < 1.1 * sum(map(len, wide)) + 20_000


def test_row_groups_do_not_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ROW_GROUP", 3)
    rows = [row(index, picture(index)) for index in range(8)]
    write_samples(tmp_path / "a.parquet", rows)
    assert list(read_samples(tmp_path / "a.parquet")) == rows


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_samples(tmp_path / f"{name}.parquet", [row(i, picture(i)) for i in range(4)])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield row(0, b"x")
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_samples(tmp_path / "a.parquet", broken())
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_trl_alone_can_be_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"messages": row(0, b"")["messages"]}])
    table.to_parquet(tmp_path / "trl.parquet")
    (only,) = read_samples(tmp_path / "trl.parquet")
    assert (only["id"], only["images"], only["meta"]) == ("0", [], "{}")
    assert only["messages"][1]["content"][0]["text"] == "ຊ້າງ"


@pytest.mark.parametrize("content", [b"not a table", b""])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(SeavlmError, match=r"cannot read samples from .*a\.parquet") as error:
        list(read_samples(tmp_path / "a.parquet"))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(SeavlmError, match="cannot read samples"):
        list(read_samples(tmp_path / "none.parquet"))
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(SeavlmError, match="no column messages, but text"):
        list(read_samples(tmp_path / "text.parquet"))
