"""Counts as people write them."""

import re
from decimal import Decimal
from typing import Any

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(value: Any) -> Any:
    """An integer from `200k`, `2M`, `1.5B` or `200_000`; what is no text is handed back.

    For a field's BeforeValidator in configuration dataclasses: raises ValueError.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kmb]?)\s*", value.lower())
    if not found:
        raise ValueError("not a number; write it as 200000, 200k, 2M or 1.5B")
    count = Decimal(found[1]) * UNITS[found[2]]
    if count % 1:
        raise ValueError("not a whole number; write it as 200000, 200k, 2M or 1.5B")
    return int(count)
