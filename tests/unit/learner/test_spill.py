from __future__ import annotations

import random
import tracemalloc

import pyarrow as pa
import pytest

from learner import spill
from learner.spill import DiskList, SortedSpill, merged, no_room, write_run


def test_records_come_back_in_order_of_their_keys_whatever_the_memory(tmp_path):
    keys = [(f"p{number}", number % 3) for number in range(500)]
    random.Random(0).shuffle(keys)
    for memory_bytes in (1 << 20, 3000, 1):  # in memory, some runs, several levels of runs
        with SortedSpill[str](tmp_path, memory_bytes=memory_bytes) as sorted_:
            for key in keys:
                sorted_.add(key, f"record of {key}")
            wanted = [f"record of {key}" for key in sorted(keys)]
            assert list(sorted_) == wanted
            assert list(sorted_) == wanted


def test_spill_leaves_nothing_on_the_disk(tmp_path):
    with SortedSpill[int](tmp_path, memory_bytes=1) as sorted_:
        for number in range(40):
            sorted_.add(number, number)
        assert sum(1 for _ in sorted_) == 40
    assert not list(tmp_path.iterdir())


def test_memory_of_spilled_records_grows_slower_than_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "_BUFFER_BYTES", 1 << 10)

    def sort(count):
        tracemalloc.start()
        with SortedSpill[bytes](tmp_path, memory_bytes=1 << 14) as records:
            for number in range(count):
                records.add(number * 7919 % count, bytes(1000))
            assert sum(1 for _ in records) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    sort(10)
    assert sort(4000) < 2.0 * sort(400)


def test_disk_list_is_a_list(tmp_path):
    records: DiskList[dict[str, int]] = DiskList(tmp_path)
    assert len(records) == 0
    for number in range(10):
        records.append({"n": number})
    assert records[3] == {"n": 3}
    assert [record["n"] for record in records] == list(range(10))
    records.append({"n": 10})
    assert records[10] == {"n": 10}
    with pytest.raises(IndexError, match="record 11 of 11"):
        records[11]
    records.hide()
    assert not list(tmp_path.iterdir())
    assert records[3] == {"n": 3}


def test_failed_write_names_the_path_and_what_is_free(tmp_path):
    said = no_room(OSError(28, "No space left on device"), tmp_path / "not" / "there")
    assert f"cannot write {tmp_path / 'not' / 'there'}: [Errno 28] No space left" in said
    assert "GiB free on that disk" in said


KEYS = ("name", "number")
ROWS = pa.schema([("name", pa.string()), ("number", pa.int64()), ("texts", pa.list_(pa.string()))])


def runs_of(folder, tables, count):
    """The tables shared out to so many runs."""
    paths = [folder / str(number) for number in range(count)]
    for number, path in enumerate(paths):
        write_run(tables[number::count], path, keys=KEYS)
    return paths


@pytest.mark.parametrize("count", [1, 3, 7])
def test_runs_are_merged_in_order_and_what_is_of_one_name_stays_together(
    tmp_path, monkeypatch, count
):
    monkeypatch.setattr(spill, "BATCH_BYTES", 200)
    monkeypatch.setattr(spill, "BLOCK_BYTES", 1500)
    # The last name has more rows than a batch, and is in each run.
    rows = [(f"p{n % 40:02d}", n, ["text"] * (n % 3)) for n in range(160)]
    rows += [("p99", n, []) for n in range(60)]
    random.Random(0).shuffle(rows)
    tables = [
        pa.Table.from_pylist(
            [dict(zip(ROWS.names, row, strict=True)) for row in rows[at : at + 10]], schema=ROWS
        )
        for at in range(0, len(rows), 10)
    ]
    found = list(merged(runs_of(tmp_path, tables, count), keys=KEYS))
    assert [tuple(row.values()) for table in found for row in table.to_pylist()] == sorted(rows)
    assert len(found) > 1
    names = [set(table["name"].to_pylist()) for table in found]
    assert sum(map(len, names)) == len(set.union(*names))


def test_no_runs_are_merged_to_nothing():
    assert list(merged([], keys=KEYS)) == []
