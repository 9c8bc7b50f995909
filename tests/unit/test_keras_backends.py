"""The tests of Keras hold on each backend: one process for each of the others runs all of them."""

from __future__ import annotations

import pytest

from keras_backends import OTHERS, files_of_every_backend, run_under


@pytest.mark.parametrize("backend", OTHERS)
def test_every_file_passes(backend: str) -> None:
    assert "passed" in run_under(backend, *files_of_every_backend())
