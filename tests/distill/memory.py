"""How much memory a call takes, by the record of PyTorch's CPU allocator."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call holds at once, of all that is allocated since it began.

    The profiler records every allocation and release, of temporaries inside operators too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    changes = [
        (e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e["name"] == "[memory]"
    ]
    for _, _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak
