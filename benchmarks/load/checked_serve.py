"""`compress serve` itself, in a process that can be asked whether its engine's books are right.

    python -m load.checked_serve REPORT.json serve MODEL --port 0 ...

On SIGUSR1 the engine recomputes all counts of blocks from nothing (`Engine.check`), and what that
found is written to REPORT.json.  The product has no such door; this adds one from outside.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.cli import main


def examine() -> dict[str, Any]:
    """What `check` says of the engine, and its statistics.  It must be idle."""
    from compress.runtime.llm import LLM

    (llm,) = [value for value in gc.get_objects() if type(value) is LLM]
    try:
        llm.engine.check()
        wrong = None
    except AssertionError as error:
        wrong = str(error) or "an assertion failed"
    return {"wrong": wrong, "requests": len(llm.engine.requests), **asdict(llm.statistics())}


if __name__ == "__main__":
    report = Path(sys.argv.pop(1))

    def answer(*_: object) -> None:
        partial = report.with_suffix(".partial")
        partial.write_text(json.dumps(examine()))
        partial.replace(report)

    signal.signal(signal.SIGUSR1, answer)
    main()
