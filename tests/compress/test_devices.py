"""Devices by name, from files, and this machine's processor."""

import json

import pytest

from compress.core.errors import InputError
from compress.devices import COMPUTE, DEVICES, Efficiency, find_device, this_cpu


def test_table():
    assert set(DEVICES) == {"h100", "h200", "a100", "l4", "4090"}
    for name, device in DEVICES.items():
        assert find_device(name) is device
        assert device.name == name
        assert "NVIDIA" in device.source
        assert device.efficiency == Efficiency(1, 1, 0)
        # 8-bit units are twice as fast as bf16's, or four times
        for compute in ("fp8", "int8"):
            assert device.rate(compute) / device.rate("bf16") == pytest.approx(2, rel=0.01) or (
                (name, compute) in {("4090", "int8"), ("a100", "fp8")}
            )
    assert DEVICES["a100"].rate("fp8") == DEVICES["a100"].rate("bf16")
    assert DEVICES["h100"].bandwidth == 3.35e12


def test_this_cpu():
    one, many = this_cpu(1), this_cpu(1000)
    assert find_device("cpu").name == "cpu"
    assert one.memory > 1e8
    assert 5e9 < one.bandwidth < many.bandwidth < 1e12
    assert many.rate("bf16") == 1000 * one.rate("bf16")
    assert "guess" in one.source


YAML = """
memory: 48GB
bandwidth: 864.0e9
rates: {bf16: 362e12, fp8: 733.0e+12}
link: 32000000000
efficiency: {bandwidth: 0.8, overhead: 0.001}
"""


def test_files(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text(YAML)
    card = find_device(str(path))
    assert (card.name, card.memory, card.bandwidth) == ("card", 48_000_000_000, 864e9)
    assert dict(card.rates) == {"bf16": 362e12, "fp8": 733e12}
    assert card.efficiency == Efficiency(0.8, 1, 0.001)
    assert card.source == str(path)
    values = {"name": "mine", "memory": 1e9, "bandwidth": 1e9, "rates": {"bf16": 1e12}}
    other = tmp_path / "card.json"
    other.write_text(json.dumps(values, indent="\t"))
    assert find_device(str(other)).name == "mine"


GOOD = {"memory": 1, "bandwidth": 1, "rates": {"bf16": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 0}, "memory = 0"),
        ({"memory": "many"}, "'many' is no size"),
        ({"memory": [1]}, "valid integer"),
        ({"bandwidth": -1}, "bandwidth = -1"),
        ({"bandwidth": "fast"}, "valid number"),
        ({"bandwidth": float("nan")}, "bandwidth = nan"),
        ({"rates": {}}, "need one for bf16"),
        ({"rates": {"bf16": 1, "fp4": 2}}, "have 'fp4'; allowed are " + ", ".join(COMPUTE)),
        ({"rates": {"bf16": float("inf")}}, "rate of bf16 = inf"),
        ({"rates": 5}, "rates = 5"),
        ({"link": 0}, "link = 0"),
        ({"speed": 1}, "unknown key 'speed'"),
        ({"efficiency": {"bandwidth": 0}}, "efficiency's bandwidth = 0"),
        ({"efficiency": {"overhead": -1}}, "overhead = -1"),
    ],
)
def test_wrong_files(tmp_path, change, message):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(InputError) as refusal:
        find_device(str(path))
    assert message in str(refusal.value)
    assert "card.json" in str(refusal.value) or "no size" in message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot read"),
        ("a.yaml", "a: [", "not readable YAML"),
        ("a.yaml", "- 1", "holds a list"),
        ("a.yaml", "memory: 1", "lacks bandwidth, rates"),
        ("a.yaml", "memory: 1\nmemory: 2", "memory"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        find_device(str(tmp_path / name))


def test_unknown():
    with pytest.raises(InputError, match="did you mean 'h100'"):
        find_device("h1000")
    with pytest.raises(InputError, match="cannot read"):
        find_device("nowhere/card.yaml")
