"""Pictures from http(s) URLs, without being led anywhere but the public internet.

The host is resolved once, every address it has is checked, and the connection goes to a checked address
itself, so a second answer of the name server changes nothing. Each redirect goes through the same door. Size
is capped while bytes arrive, and one deadline covers everything, so a server that drips bytes gains no time.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from urllib.parse import urljoin, urlsplit

from seavlm.errors import SeavlmError

MAX_BYTES = 32 * 1024 * 1024
TIMEOUT_S = 15.0
MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}

_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE)
# What `is_global` lets through although it leads elsewhere: tunnels that carry an IPv4 address inside (6to4
# and its relays, Teredo, NAT64), documentation, segment routing.
_REFUSED = tuple(
    ipaddress.ip_network(net)
    for net in (
        "192.0.0.0/24",
        "192.88.99.0/24", "2001::/23", "2002::/16", "64:ff9b::/96", "64:ff9b:1::/48", "3fff::/20",
        "5f00::/16",
    )
)  # fmt: skip
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")


def is_public_address(address: str) -> bool:
    """Whether an IP address is an ordinary one of the public internet.

    False for loopback, private, link-local, carrier-grade NAT, multicast, reserved and documentation
    addresses, for IPv6 forms that hold an IPv4 address (mapped, 6to4, NAT64, Teredo), scoped ones, and what
    is no address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not ip.is_global or ip.is_multicast or ip.is_reserved or any(ip in net for net in _REFUSED):
        return False
    return ip.version == 4 or (ip in _PUBLIC_V6 and getattr(ip, "scope_id", None) is None)


def fetch(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = TIMEOUT_S,
    max_redirects: int = MAX_REDIRECTS,
    address_ok: Callable[[str], bool] = is_public_address,
    ports: Collection[int] = tuple(PORTS.values()),
) -> bytes:
    """The body of `url`. `timeout_s` is for all of it: names, connections, redirects, bytes.

    `address_ok` and `ports` say where connections may go; other values than the defaults are for tests.
    Raises SeavlmError with a text that tells nothing of the network inside.
    """
    deadline = time.monotonic() + timeout_s
    for _ in range(max_redirects + 1):
        answer = _get(url, max_bytes, deadline, address_ok, ports)
        if isinstance(answer, bytes):
            return answer
        if urlsplit(url).scheme == "https" and not answer.lower().startswith("https:"):
            raise SeavlmError(
                "The picture's URL redirects from https to something else", hint="Use another URL."
            )
        url = answer
    raise SeavlmError(
        f"The picture's URL redirects more than {max_redirects} times", hint="Use the final URL."
    )


def _get(
    url: str, max_bytes: int, deadline: float, address_ok: Callable[[str], bool], ports: Collection[int]
) -> bytes | str:
    """One request: the body, or the URL to go on with."""
    scheme, host, port, target = _split(url, ports)
    addresses = _resolve(host, port, deadline)
    if not all(address_ok(address) for address in addresses):
        raise SeavlmError("The picture's URL does not lead to a public address", hint="Use a public URL.")
    connection = _Connection(host, port, addresses[0], deadline, secure=scheme == "https")
    # A socket's timeout is for one read; this ends them all.
    watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), connection.cut)
    watchdog.daemon = True
    watchdog.start()
    try:
        headers = {"User-Agent": "seavlm", "Accept": "image/*", "Accept-Encoding": "identity"}
        headers["Connection"] = "close"
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        if answer.status in _REDIRECTS and (location := answer.getheader("Location")):
            return urljoin(url, location)
        if answer.status != 200:
            raise SeavlmError(f"The picture's URL answers with status {answer.status}", hint="Check the URL.")
        if (answer.length or 0) > max_bytes:
            raise _too_big(max_bytes)
        body = bytearray()
        while chunk := answer.read1(65536):
            body += chunk
            if len(body) > max_bytes:
                raise _too_big(max_bytes)
            _check_time(deadline)
        _check_time(deadline)
        if answer.length:
            raise SeavlmError("The picture's URL ended before all of it came", hint="Try again.")
        return bytes(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        _check_time(deadline)
        raise SeavlmError("The picture's URL cannot be fetched", hint="Check the URL.") from error
    finally:
        watchdog.cancel()
        connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP to an address that was checked; the host's name serves the Host header and the certificate."""

    def __init__(self, host: str, port: int, address: str, deadline: float, *, secure: bool) -> None:
        super().__init__(host, port)
        self.default_port = PORTS["https" if secure else "http"]  # what the Host header leaves out
        self._address, self._deadline, self._secure = address, deadline, secure
        self._raw: socket.socket | None = None

    def connect(self) -> None:
        self.sock = self._raw = socket.create_connection((self._address, self.port), _left(self._deadline))
        if self._secure:
            context = ssl.create_default_context()
            self.sock = self._raw = context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()
        self.sock.settimeout(_left(self._deadline))

    def cut(self) -> None:
        """Ends the connection from another thread: reads in progress return."""
        if self._raw is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._raw, socket.SHUT_RDWR)


def _split(url: str, ports: Collection[int]) -> tuple[str, str, int, str]:
    """(scheme, host, port, target) of a plain URL. What parsers read in different ways is refused."""
    bad = SeavlmError("The picture's URL is not a plain http(s) URL", hint="Write https://host/path.")
    if (
        len(url) > 8192
        or not url.isascii()
        or not url.isprintable()
        or any(letter in url for letter in '\\ <>"')
    ):
        raise bad
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise bad from error
    if parts.scheme not in PORTS or "@" in parts.netloc:
        raise bad
    if "[" in parts.netloc:
        with contextlib.suppress(ValueError):
            host = str(ipaddress.IPv6Address(host))
        if ":" not in host or "%" in host:
            raise bad
    elif not _HOST.fullmatch(host) or len(host) > 253:
        raise bad
    port = PORTS[parts.scheme] if port is None else port
    if port not in ports:
        raise SeavlmError(f"The picture's URL uses port {port}", hint="Only ports 80 and 443 are used.")
    target = parts.path or "/"
    return parts.scheme, host, port, f"{target}?{parts.query}" if parts.query else target


def _resolve(host: str, port: int, deadline: float) -> list[str]:
    """All addresses of `host`. The system's resolver knows no deadline, so it runs beside us."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(answer[4][0]) for answer in answers))

    resolver = threading.Thread(target=ask, daemon=True)
    resolver.start()
    resolver.join(_left(deadline))
    _check_time(deadline)
    if not found:
        raise SeavlmError("The picture's URL names a host that is not known", hint="Check the URL.")
    return found


def _left(deadline: float) -> float:
    _check_time(deadline)
    return max(0.001, deadline - time.monotonic())


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise SeavlmError(
            "The picture's URL took too long to answer", hint="Try again, or send the picture itself."
        )


def _too_big(max_bytes: int) -> SeavlmError:
    return SeavlmError(f"The picture at the URL has more than {max_bytes:,} bytes", hint="Make it smaller.")
