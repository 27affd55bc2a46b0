from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ml import tensor_file

ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5).filter(
        "__metadata__".__ne__
    ),
    st.tuples(st.sampled_from(sorted(tensor_file.TYPES)), st.lists(st.integers(0, 4), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)


@given(ARRAYS)
def test_files_are_those_of_safetensors_both_ways(arrays: dict[str, tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(0)
    wanted = {name: rng.integers(0, 100, shape).astype(kind) for name, (kind, shape) in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        made = tensor_file.create(ours, {name: (kind, tuple(shape)) for name, (kind, shape) in arrays.items()})
        for name, array in wanted.items():
            made[name][...] = array
        del made
        save_file(wanted, theirs)
        for found in (load_file(ours), tensor_file.read(theirs), tensor_file.read(ours)):
            assert found.keys() == wanted.keys()
            for name, array in wanted.items():
                np.testing.assert_array_equal(found[name], array)
                assert found[name].dtype == array.dtype


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 40])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="something else"):
        tensor_file.read(tmp_path / "x")
