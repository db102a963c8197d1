"""Which replica a request should go to, so that the beginning of its prompt is in a cache there.

Turns of one conversation share their first messages, and so do prompts of one template their first
lines.  What they share is hashed to a key.  A key ranks the replicas by the hash of key and name
together (rendezvous hashing: Thaler and Ravishankar, IEEE/ACM Transactions on Networking 6(1),
1998): every key has an order of its own, and when a replica goes or comes only the keys move that
had it, or now have it, first.

A replica that has far more than its share is passed over until it has caught up (consistent hashing
with bounded loads: Mirrokni, Thorup and Zadimoghaddam, SODA 2018), since a prefix that everybody
sends would otherwise keep one replica busy and the others idle.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = 256  # characters or token ids of a prompt that count
MOST_OF_MEAN = 1.25  # a replica may have this many times the mean number of requests


def affinity_key(body: bytes) -> str:
    """Hexadecimal hash of what a request's prompt begins with; "" where that cannot be told.

    `prompt_cache_key` decides where it is given.  Of a conversation it is all messages up to the
    first one of the user's, of a prompt the first PREFIX characters or ids.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # the replica that gets it says what is wrong
    beginning = _beginning(request) if isinstance(request, dict) else None
    if not beginning:
        return ""
    return hashlib.blake2b(json.dumps(beginning).encode(), digest_size=16).hexdigest()


def in_order(key: str, names: Iterable[str]) -> list[str]:
    """`names` of replicas, the one for `key` first."""

    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=16).digest()

    return sorted(names, key=weight)


def busy_last(names: Iterable[str], loads: Mapping[str, int]) -> list[str]:
    """`names` in their order, but those last that have more than their share of the requests.

    `loads` are the requests that each is busy with; one more is to come.  What is over the share
    comes in the order of the load.
    """
    names = list(names)
    most = math.ceil(MOST_OF_MEAN * (sum(loads[name] for name in names) + 1) / max(1, len(names)))
    return sorted(names, key=lambda name: loads[name] if loads[name] >= most else 0)


def _beginning(request: Mapping[str, Any]) -> Any:
    """What requests that share a prefix have in common; None for nothing."""
    if isinstance(request.get("prompt_cache_key"), str):
        return request["prompt_cache_key"]
    messages = request.get("messages")
    if isinstance(messages, list):
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
        end = roles.index("user") + 1 if "user" in roles else len(messages)
        return messages[:end]
    prompt = request.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # several prompts go to one replica; the first decides
    return prompt[:PREFIX] if isinstance(prompt, str | list) else None
