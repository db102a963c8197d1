"""uvicorn's way of reading HTTP, with a bound on the head of a request.

Of its two parsers, h11 has a bound of 64 KiB.  httptools, which uvicorn prefers where it is
installed, has none: whoever reaches the port, without any key, could fill the memory.
"""

from __future__ import annotations

import asyncio

LONGEST_HEAD = 64 << 10  # bytes of request line and headers; a little more may be let through


def http_protocol() -> type[asyncio.Protocol]:
    """What uvicorn takes for `http`."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol

        return H11Protocol

    class BoundedProtocol(HttpToolsProtocol):
        """Refuses a head that is too long."""

        head: int | None = None  # bytes so far of a head that is not whole
        began = False  # with the data that came last, which may hold others' bytes too

        def on_message_begin(self) -> None:
            self.head, self.began = 0, True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.head = None
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            self.began = False
            super().data_received(data)
            if self.head is None or self.began or self.transport.is_closing():
                return
            self.head += len(data)
            if self.head > LONGEST_HEAD:
                self.send_400_response(f"The head is longer than {LONGEST_HEAD} bytes.")

    return BoundedProtocol
