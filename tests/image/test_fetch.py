from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from PIL import Image

from seavlm.errors import SeavlmError
from seavlm.image.decode import load_part
from seavlm.image.fetch import fetch, is_public_address


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255",
        "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.8", "192.0.2.1",
        "198.18.0.1", "198.51.100.7", "203.0.113.9", "192.88.99.1", "224.0.0.1", "239.255.255.255",
        "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8",
        "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1",
        "2001:db8::1", "2001:10::1", "2002:7f00:1::",
        "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00::1", "fe80::1", "fe80::1%eth0", "fec0::1",
        "ff02::1", "ff0e::1", "4000::1", "2606:4700::1%eth0",
        "", "localhost", "1.2.3", "0x7f.1", "2130706433", "08.8.8.8",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(address):
    assert not is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "93.184.215.14",
        "172.32.0.1",
        "100.128.0.1",
        "2606:4700::1111",
        "2a00:1450:4001::65",
    ],
)
def test_addresses_that_are_public(address):
    assert is_public_address(address)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Good and bad behaviour by path; what was asked for is remembered."""

    seen: ClassVar[list[tuple[str, str]]] = []

    def log_message(self, *args) -> None:
        pass

    def reply(self, body: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is None or length >= 0:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        Handler.seen.append((self.path, self.headers["Host"]))
        path, _, query = self.path.partition("?")
        if path == "/a.png":
            self.reply(png())
        elif path == "/to":
            self.reply(b"", status=302, Location=query)
        elif path == "/loop":
            self.reply(b"", status=301, Location="/loop")
        elif path == "/says-big":
            self.reply(b"x", length=10**12)
        elif path == "/is-big":
            self.send_response(200)
            self.end_headers()
            for _ in range(10_000):
                self.wfile.write(bytes(65536))
        elif path == "/short":
            self.reply(b"x" * 10, length=100)
        elif path == "/slow-head":
            while True:
                self.wfile.write(b"X")
                time.sleep(0.05)
        elif path == "/slow-body":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        else:
            self.reply(b"", status=404)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args) -> None:
        """Clients that hang up are what these tests are about."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    Handler.protocol_version = "HTTP/1.1"
    running = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def get(server):
    Handler.seen.clear()
    port = server.server_address[1]

    def get(path: str, **options) -> bytes:
        options = {"address_ok": lambda ip: ip == "127.0.0.1", "ports": (port,), **options}
        return fetch(path if path.startswith("http") else f"http://127.0.0.1:{port}{path}", **options)

    get.port = port
    return get


def test_a_picture(get):
    assert get("/a.png") == png()
    assert get("/chunked") == b"abcde"
    assert get("/a.png?x=1#part") == png()
    assert Handler.seen[-1] == ("/a.png?x=1", f"127.0.0.1:{get.port}")


def test_redirects(get):
    assert get("/to?/a.png") == png()
    assert get(f"/to?http://127.0.0.1:{get.port}/a.png") == png()
    assert get("/to?a.png") == png()  # relative
    with pytest.raises(SeavlmError, match="redirects more than 3 times"):
        get("/loop")
    assert len([path for path, _ in Handler.seen if path == "/loop"]) == 4


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("http://127.0.0.2:{port}/a.png", "public address"),
        ("http://[::1]:{port}/a.png", "public address"),
        ("http://[::ffff:127.0.0.1]:{port}/a.png", "public address"),
        ("http://169.254.169.254:{port}/latest/meta-data", "public address"),
        ("//10.0.0.1:{port}/x", "public address"),
        ("http://127.0.0.1:1/x", "uses port 1"),
        ("file:///etc/passwd", "not a plain"),
        ("ftp://127.0.0.1/x", "not a plain"),
        ("http://user@127.0.0.1:{port}/a.png", "not a plain"),
        ("http://a\\@127.0.0.1:{port}/a.png", "not a plain"),
    ],
)
def test_each_redirect_is_checked_again(target, expected, get):
    with pytest.raises(SeavlmError, match=expected):
        get("/to?" + target.format(port=get.port))
    assert [path for path, _ in Handler.seen if not path.startswith("/to")] == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "127.1", "[::1]", "0.0.0.0"]
)
def test_nothing_private_by_default(host, server):
    Handler.seen.clear()
    with pytest.raises(SeavlmError, match=r"does not lead to a public address|is not known"):
        fetch(f"http://{host}:{server.server_address[1]}/a.png", ports=(server.server_address[1],))
    assert Handler.seen == []


@pytest.mark.parametrize(
    "url",
    [
        "http://a\\@127.0.0.1/", "http://user:pass@127.0.0.1/", "http://127.0.0.1@127.0.0.2/", "http:///x",
        "http://",
        "https://exa mple.org/", "http://example.org/\r\nHost: x", "http://ex\tample.org/", "http://exämple.org/",
        "http://%31%32%37.0.0.1/", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://[::1",
        "http://[fe80::1%25eth0]/", "http://[v1.a]/", "file:///etc/passwd", "gopher://127.0.0.1/",
        "HTTP//example.org", "http://a..b/", "http://a/" + "x" * 9000,
        "http://example.org<script>/", "javascript:alert(1)", "http://-@/", "http://①②⑦.⓪.⓪.①/",
    ],
)  # fmt: skip
def test_urls_that_are_not_plain(url, monkeypatch):
    looked_up: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: looked_up.append(host) or [])
    with pytest.raises(SeavlmError, match="not a plain") as caught:
        fetch(url, ports=range(65536))
    assert looked_up == []
    assert "\n" not in str(caught.value)


def test_other_ports_are_refused():
    for url in ("http://example.org:22/", "https://example.org:6379/"):
        with pytest.raises(SeavlmError, match="Only ports 80 and 443"):
            fetch(url)


def test_names_are_resolved_once_and_the_checked_address_is_used(get, monkeypatch):
    """A name that would lead elsewhere the second time (DNS rebinding)."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]

    def getaddrinfo(host, port, *args, **options):
        if host != "pictures.example":
            return real(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers.pop(0)]

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert get(f"http://pictures.example:{get.port}/a.png") == png()
    assert answers == [["10.0.0.1"]]
    assert Handler.seen == [("/a.png", f"pictures.example:{get.port}")]


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    ips = ["8.8.8.8", "127.0.0.1"]
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ips]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answer)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("a connection was made"))
    with pytest.raises(SeavlmError, match="public address"):
        fetch("http://mixed.example/")


def test_size_is_capped(get):
    with pytest.raises(SeavlmError, match="more than 1,000,000 bytes"):
        get("/says-big", max_bytes=1_000_000)
    with pytest.raises(SeavlmError, match="more than 1,000,000 bytes"):
        get("/is-big", max_bytes=1_000_000)
    with pytest.raises(SeavlmError, match="ended before all of it came"):
        get("/short")


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_dripping_servers_meet_the_deadline(path, get):
    start = time.monotonic()
    with pytest.raises(SeavlmError, match="took too long"):
        get(path, timeout_s=0.5)
    assert time.monotonic() - start < 3


def test_slow_name_servers_meet_the_deadline(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(2) or [])
    start = time.monotonic()
    with pytest.raises(SeavlmError, match="took too long"):
        fetch("http://slow.example/", timeout_s=0.3)
    assert time.monotonic() - start < 2


def test_status_and_dead_hosts(get):
    with pytest.raises(SeavlmError, match="status 404"):
        get("/nothing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SeavlmError, match="cannot be fetched"):
        get(f"http://127.0.0.1:{port}/", ports=(port,))


def test_tls_is_checked(server):
    """A server that does not speak TLS, asked to."""
    port = server.server_address[1]
    with pytest.raises(SeavlmError, match=r"cannot be fetched|took too long"):
        fetch(f"https://127.0.0.1:{port}/", ports=(port,), address_ok=lambda ip: True, timeout_s=2)


def test_load_part_fetches_only_when_allowed(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("seavlm.image.fetch.fetch", lambda url, **_: asked.append(url) or png())
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(SeavlmError, match="URLs is off"):
        load_part(part)
    assert asked == []
    assert load_part(part, allow_urls=True).size == (8, 8)
    assert asked == ["https://example.org/a.png"]
