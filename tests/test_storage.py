"""Directories appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dfpo_core.errors import UserError
from dfpo_core.storage import atomic_directory


def test_an_interrupted_write_leaves_the_old_directory_and_no_rubbish(tmp_path):
    target = tmp_path / "policy"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as partial:
        (partial / "new").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert (target / "old").read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "deep" / "out"
    with atomic_directory(output) as folder:
        (folder / "a").write_text("1")
        assert not output.exists()
    with pytest.raises(RuntimeError), atomic_directory(output) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (output / "a").read_text() == "1"
    with atomic_directory(output) as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in output.iterdir()] == ["b"] and list(output.parent.iterdir()) == [output]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    problem = "cannot be written .*; give a folder that can be written"
    with pytest.raises(UserError, match=problem), atomic_directory(tmp_path / "file" / "x"):
        pass


def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path):
    script = f"""
import resource, pyarrow as pa, pyarrow.parquet as pq
from dfpo_core.storage import atomic_directory
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the kernel refuses the 4097th byte of a file
with atomic_directory({str(tmp_path / "out")!r}) as folder:
    pq.write_table(pa.table({{"x": [str(i * 7919) for i in range(20000)]}}), folder / "train.parquet")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert f"UserError: {tmp_path / 'out'}: no space left on the disk; free some space or choose another home" in done.stderr
    assert list(tmp_path.iterdir()) == []
