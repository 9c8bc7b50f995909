"""Groups of a file that are decoded ahead: in order, few at a time, errors at their turn."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from karikomi.errors import BadFile
from karikomi.pack import load, reader, save
from karikomi.pack.groups import on_cores


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_results_come_in_order_and_few_are_at_work(cores, monkeypatch):
    monkeypatch.setattr(on_cores, "cores", lambda: cores)
    drawn, taken, most = 0, 0, 0
    gate = threading.Event()

    def numbers():
        nonlocal drawn, most
        for number in range(20):
            drawn += 1
            most = max(most, drawn - taken)
            if number == 1:
                gate.set()
            yield number

    def slow_first(number: int) -> int:
        if number == 0 and cores > 1:
            assert gate.wait(5)  # the second one is drawn while the first is at work
        return number**2

    found = []
    for square in on_cores.ahead(slow_first, numbers()):
        found.append(square)
        taken += 1
    assert found == [number**2 for number in range(20)]
    assert most <= on_cores.AHEAD


def test_an_error_is_raised_at_the_turn_of_its_item(monkeypatch):
    monkeypatch.setattr(on_cores, "cores", lambda: 2)
    results = on_cores.ahead(lambda number: 1 // number, [2, 1, 0, 3])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_file_of_several_large_groups_is_the_same_with_and_without_threads(
    cores, tmp_path, monkeypatch
):
    monkeypatch.setattr(on_cores, "cores", lambda: cores)
    monkeypatch.setattr(reader, "MANY", 1000)
    generator = np.random.default_rng(0)
    arrays = {f"w{i}": generator.normal(size=3000).astype(np.float32) for i in range(5)}
    path = save(arrays, tmp_path / "a.karikomi")
    found = load(path)
    assert list(found) == list(arrays)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(BadFile, match="CRC32"):
        load(path)
