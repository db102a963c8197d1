"""The socket of a server: made before anything that takes time is imported or loaded."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from compress.core.errors import InputError, reason_of

BACKLOG = 2048  # connections that may wait to be taken
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody else can have the port.  InputError if it cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host}: {reason_of(error)}; give an address of this machine"
        ) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        remedy = {
            errno.EADDRINUSE: "choose another, or 0 for any that is free",
            errno.EACCES: "choose one above 1023",
            errno.EADDRNOTAVAIL: "give an address of this machine",
        }.get(error.errno or 0, "choose another")
        reason = os.strerror(error.errno or 0)
        raise InputError(f"cannot listen on {host} port {port}: {reason}; {remedy}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where the server is."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
