"""Which replica a request goes to: what makes a prefix, and how replicas are ranked for it."""

import json
import os
import sys
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client import Counter as Count

from compress.core.errors import InputError
from compress.runtime.server.affinity import affinity_key, busy_last, in_order
from compress.runtime.server.merged_metrics import merged
from compress.runtime.server.replicas import ReplicatedService
from compress.runtime.server.service import ServerSettings

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Hello"}
LONG = "x" * 300


def key(**request):
    return affinity_key(json.dumps(request).encode())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (  # a later turn of a conversation
            {"messages": [SYSTEM, FIRST]},
            {
                "messages": [
                    SYSTEM,
                    FIRST,
                    {"role": "assistant", "content": "Hi"},
                    {"role": "user", "content": "More"},
                ],
                "temperature": 0.5,
                "stream": True,
            },
        ),
        ({"prompt": LONG + "a"}, {"prompt": LONG + "b"}),
        ({"prompt": [*range(256), 1]}, {"prompt": [*range(256), 2]}),
        ({"prompt": ["a", "b"]}, {"prompt": "a"}),
        ({"prompt": [[1, 2], [3]]}, {"prompt": [1, 2]}),
        ({"prompt": "a", "prompt_cache_key": "k"}, {"prompt": "b", "prompt_cache_key": "k"}),
    ],
)
def test_what_begins_alike_has_one_key(one, other):
    assert key(**one) == key(**other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": [SYSTEM, FIRST]}, {"messages": [FIRST]}),
        ({"messages": [SYSTEM, FIRST]}, {"messages": [SYSTEM, {**FIRST, "content": "Bye"}]}),
        ({"prompt": "a" + LONG}, {"prompt": "b" + LONG}),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
        ({"prompt": "1"}, {"prompt": [1]}),
    ],
)
def test_what_begins_otherwise_has_another(one, other):
    assert key(**one) != key(**other)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"text"', b"{}", b'{"prompt": 5}', b'{"prompt": ""}', b"\xff\xfe",
     b'{"messages": []}', b'{"messages": {}}', b"[" * 100_000, b'{"model": "m"}'],
)  # fmt: skip
def test_what_has_no_beginning_has_no_key(body):
    assert affinity_key(body) == ""


@pytest.mark.parametrize(
    "messages",
    [[None], ["text"], [{}], [{"role": ["user"]}], [{"role": {"a": 1}, "content": "\ud800"}]],
)
def test_messages_that_are_not_in_order_do_no_harm(messages):
    assert key(messages=messages) != ""


def test_a_replica_that_goes_moves_only_its_own_keys():
    names = ["a", "b", "c", "d"]
    for number in range(300):
        before = in_order(str(number), names)
        assert sorted(before) == names
        after = in_order(str(number), ["d", "b", "a"])
        assert after == [name for name in before if name != "c"]


def test_keys_are_spread_evenly():
    """Chi-square of 4,000 keys over 4 replicas: p = 0.001 at 16.27 with 3 degrees of freedom."""
    found = Counter(in_order(str(number), "abcd")[0] for number in range(4000))
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 16.27


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ({"a": 0, "b": 0}, "ab"),
        ({"a": 1, "b": 0}, "ab"),  # a has room: ceil(1.25 * 2 / 2) = 2
        ({"a": 2, "b": 0}, "ba"),  # ceil(1.25 * 3 / 2) = 2
        ({"a": 5, "b": 4}, "ab"),  # ceil(1.25 * 10 / 2) = 7
        ({"a": 50, "b": 50}, "ab"),
        ({"a": 70, "b": 40}, "ba"),  # 70 = ceil(1.25 * 111 / 2)
        ({"a": 9}, "a"),
        ({"a": 9, "b": 8, "c": 0}, "cba"),  # ceil(1.25 * 18 / 3) = 8: of two, the lesser first
    ],
)
def test_a_replica_with_more_than_its_share_comes_last(loads, expected):
    assert busy_last(list(loads), loads) == list(expected)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(InputError, match=r"pip install 'compress-llm\[ray\]'"):
        ReplicatedService(ServerSettings(("m",)), 2)


def test_metrics_of_replicas_are_told_apart():
    def text(hits, rejected):
        registry = CollectorRegistry()
        Count("compress:hits", "Hits.", registry=registry).inc(hits)
        Gauge("compress:running", "Running.", ["model_name"], registry=registry).labels("m").set(2)
        Count("compress:requests_rejected", "Refused.", registry=registry).inc(rejected)
        Gauge("process_bytes", "Bytes.", registry=registry).set(hits)
        return generate_latest(registry)

    lines = merged(text(0, 7), {"0": text(3, 1), "1": text(4, 1)}).decode().splitlines()
    assert "compress:replicas 2.0" in lines
    assert 'compress:hits_total{replica="0"} 3.0' in lines
    assert 'compress:hits_total{replica="1"} 4.0' in lines
    assert 'compress:running{model_name="m",replica="1"} 2.0' in lines
    assert [line for line in lines if "requests_rejected_total" in line and line[0] != "#"] == [
        "compress:requests_rejected_total 7.0"
    ]
    assert {"process_bytes 0.0", 'process_bytes{replica="0"} 3.0'} <= set(lines)
    assert len([line for line in lines if line.startswith("# TYPE compress:hits_total")]) == 1
