"""Hostile programs of a sandbox with egress: every way around the list of blocked URLs.

Its policy allows `OPEN` and github.com, and blocks https://github.com/org/secret and the package
`secret`. Real hosts' names lead to a server of the tests, which answers everything; what it says
it was asked for is what got through.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import time
from urllib.parse import urlsplit

from hostile import attack

OPEN = "open.example"

_BY = "verdict on each request"


def _dial() -> socket.socket:
    proxy = urlsplit(os.environ["HTTPS_PROXY"])
    assert proxy.hostname
    return socket.create_connection((proxy.hostname, proxy.port or 0), timeout=10)


def _answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer; a connection that ends without one has the status 0."""
    file = sock.makefile("rb")
    try:
        line = file.readline()
        if not line:
            return 0, {}, b""
        headers = {}
        for header in iter(file.readline, b"\r\n"):
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        length = headers.get("content-length")
        body = file.read(int(length)) if length else b""
    except socket.timeout:  # noqa: UP041 - another error before Python 3.10
        return -1, {}, b""
    except OSError:
        return 0, {}, b""
    return int(line.split()[1]), headers, body


def _word(sock: socket.socket) -> str:
    """What became of a request, in a word."""
    status, headers, body = _answer(sock)
    if status == 200:
        return "reached " + json.loads(body)["path"]
    return headers.get("x-klong-egress") or {0: "cut off", -1: "silence"}.get(status, str(status))


def _tunnel(host: str, port: int = 443, sni: str = "") -> socket.socket:
    """A TLS connection through a tunnel, or a plain one to another port."""
    sock = _dial()
    sock.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    status, headers, _ = _answer(sock)
    if status != 200:
        raise RefusedTunnel(headers.get("x-klong-egress", str(status)))
    if port != 443:
        return sock
    return ssl.create_default_context().wrap_socket(sock, server_hostname=sni or host)


class RefusedTunnel(Exception):
    """The proxy's reason."""


def ask(host: str, target: str, *headers: str, sni: str = "", verb: str = "GET") -> str:
    """What becomes of one request through a tunnel of its own."""
    try:
        sock = _tunnel(host, sni=sni)
    except RefusedTunnel as refused:
        return str(refused)
    except ssl.SSLError:
        return "cut off"
    lines = [f"{verb} {target} HTTP/1.1", *(headers or [f"Host: {host}"]), "", ""]
    sock.sendall("\r\n".join(lines).encode())
    return _word(sock)


def _all(*words: str) -> str:
    return ", ".join(sorted(set(words)))


@attack("go out by what is allowed", "reached /a", _BY)
def _() -> str:
    plain = _dial()
    plain.sendall(f"GET http://{OPEN}/a HTTP/1.1\r\nHost: {OPEN}\r\n\r\n".encode())
    return _all(ask(OPEN, "/a"), ask("github.com", "/a"), _word(plain))


@attack("reach another host, or one whose name ends alike", "not_allowed", "list of hosts")
def _() -> str:
    hosts = ("evil.example", f"x{OPEN}", f"{OPEN}.evil.example", "gist.github.com.evil.example")
    return _all(*[ask(host, "/a") for host in hosts])


@attack("reach an address: as usual, decimal, hexadecimal, of IPv6", "address", "names alone")
def _() -> str:
    hosts = ("169.254.169.254", "127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:7f00:1]")
    return _all(*[ask(host, "/a") for host in hosts])


@attack("reach the ports of ssh, of git, of others", "port", "80 and 443 alone")
def _() -> str:
    words = []
    for port in (22, 9418, 8443, 53):
        try:
            words.append(_word(_tunnel("github.com", port)))
        except RefusedTunnel as refused:
            words.append(str(refused))
    return _all(*words)


@attack("reach a name of this host's own", "malformed", "names of the internet alone")
def _() -> str:
    return _all(*[ask(host, "/a") for host in ("localhost", "sandbox", "metadata")])


@attack("speak another protocol in a tunnel", "400", "HTTP alone, in TLS or not")
def _() -> str:
    words = []
    for port, hello in ((80, b"SSH-2.0-x\r\n\r\n"), (80, b"\x00\x01\x02\x03\r\n\r\n")):
        sock = _tunnel("github.com", port)
        sock.sendall(hello)
        words.append(_word(sock))
    sock = _tunnel("github.com")
    sock.sendall(b"\x10\x00\x00 git-upload-pack\r\n\r\n")
    return _all(*words, _word(sock))


@attack("turn HTTP into a WebSocket, HTTP/2 or a tunnel in a tunnel", "400, protocol", _BY)
def _() -> str:
    host = f"Host: {OPEN}"
    web = ask(OPEN, "/a", host, "Connection: Upgrade", "Upgrade: websocket")
    two = ask(OPEN, "/a", host, "Connection: Upgrade", "Upgrade: h2c")
    return _all(web, two, ask(OPEN, f"{OPEN}:443", host, verb="CONNECT"))


@attack("ask for a blocked URL, its git, archives, pages", "blocked", "blocked prefixes")
def _() -> str:
    tails = ("", "/", ".git", ".git/info/refs?service=git-upload-pack", "/archive/main.zip", "?a")
    return _all(*[ask("github.com", f"/org/secret{tail}") for tail in tails])


@attack("ask for it with other case, dots, slashes, encodings", "blocked", "every reading counts")
def _() -> str:
    targets = (
        "/ORG/Secret",
        "/org/%73ecret",
        "/org%2fsecret",
        "/%256frg/secret",
        "/a/../org/secret",
        "/a/%2e%2e/org/secret",
        "/org/x/%252e%252e/secret",
        "//org///secret",
        "/org\\secret",
        "/./org/./secret",
        "/org;v=1/secret",
        "/org/secret#",
    )
    # The last has no business in a request.
    words = [ask("github.com", target) for target in targets]
    assert words.pop() == "malformed", words
    return _all(*words)


@attack(
    "ask for it by the host in capitals, with a dot at its end", "blocked", "one form of a name"
)
def _() -> str:
    hosts = ("GitHub.Com", "github.com.", "www.github.com")
    return _all(*[ask(host, "/org/secret", f"Host: {host}") for host in hosts])


@attack("ask the raw, api, codeload and other hosts for it", "blocked", "known copies are blocked")
def _() -> str:
    return _all(
        ask("raw.githubusercontent.com", "/org/secret/main/a.py"),
        ask("api.github.com", "/repos/org/secret/zipball"),
        ask("api.github.com", "/repositories/42"),
        ask("api.github.com", "/graphql", verb="POST"),
        ask("codeload.github.com", "/org/secret/zip/refs/heads/main"),
        ask("media.githubusercontent.com", "/media/org/secret/main/a"),
    )


@attack("ask an archive or a proxy on an allowed host for it", "blocked", "also as an argument")
def _() -> str:
    return _all(
        ask(OPEN, "/web/2020/https://github.com/org/secret"),
        ask(OPEN, "/get?url=https%3A%2F%2Fgithub.com%2Forg%2Fsecret"),
    )


@attack(
    "swap hosts: in Host, twice, in the handshake, in the target", "other_host", "all must agree"
)
def _() -> str:
    return _all(
        ask(OPEN, "/org/secret", "Host: github.com"),
        ask(OPEN, "/org/secret", f"Host: {OPEN}", "Host: github.com"),
        ask(OPEN, "/org/secret", sni="github.com"),
        ask(OPEN, "http://github.com/org/secret"),
    )


@attack(
    "name another URL in a header that servers heed", "reached /a", "such headers are taken off"
)
def _() -> str:
    sock = _tunnel(OPEN)
    more = "X-Original-URL: /org/secret\r\nX-Forwarded-Host: github.com\r\n"
    sock.sendall(f"GET /a HTTP/1.1\r\nHost: {OPEN}\r\n{more}\r\n".encode())
    _, _, body = _answer(sock)
    seen = json.loads(body)
    return f"reached {seen['path']}" + "".join(n for n in seen["headers"] if n.startswith("x-"))


@attack("be redirected to it", "blocked", _BY)
def _() -> str:
    sock = _tunnel(OPEN)
    sock.sendall(f"GET /redirect HTTP/1.1\r\nHost: {OPEN}\r\n\r\n".encode())
    status, headers, _ = _answer(sock)
    to = urlsplit(headers["location"])
    assert status == 302 and to.hostname, headers
    return ask(to.hostname, to.path)


@attack("smuggle a second request in a first", "400, blocked", "one reading of a message's end")
def _() -> str:
    secret = "GET /org/secret HTTP/1.1\r\nHost: github.com\r\n\r\n"
    both = _tunnel("github.com")
    head = "POST /a HTTP/1.1\r\nHost: github.com\r\nContent-Length: 4\r\n"
    both.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{secret}".encode())
    # One after the other is none; the second is judged like any.
    piped = _tunnel("github.com")
    piped.sendall(f"GET /a HTTP/1.1\r\nHost: github.com\r\n\r\n{secret}".encode())
    first, file = piped, piped.makefile("rb")
    text = b""
    with contextlib.suppress(OSError):
        first.settimeout(2)
        while b"X-Klong-Egress" not in text and (line := file.readline()):
            text += line
    second = "blocked" if b"X-Klong-Egress: blocked" in text else repr(text[-80:])
    return _all(_word(both), second)


@attack(
    "take a blocked package, by page, by file, from another host", "blocked_package", "its name"
)
def _() -> str:
    return _all(
        ask("pypi.org", "/simple/Secret/"),
        ask("pypi.org", "/pypi/secret/json"),
        ask("files.pythonhosted.org", "/packages/aa/secret-1.0-py3-none-any.whl"),
        ask("files.pythonhosted.org", "/packages/aa/%53ecret-1.0.tar.gz"),
        ask(OPEN, "/mirror/secret-1.0.tar.gz"),
    )


@attack("use an index for something else", "not_allowed", "its pages and files alone, for reading")
def _() -> str:
    other = ask("pypi.org", "/manage/account/")
    return _all(other, ask("pypi.org", "/simple/demo/", "Host: pypi.org", verb="DELETE"))


@attack("forget the proxy", "ENETUNREACH", "no network device")
def _() -> str:
    socket.create_connection(("93.184.216.34", 443), timeout=5)
    return "connected"


@attack("say a head without end", "cut off", "256 kB of it")
def _() -> str:
    sock = _dial()
    with contextlib.suppress(OSError):
        for _ in range(200):
            sock.sendall(b"x" * 10_000)
    return _word(sock)


@attack("open connections without end", "works again", "64 at once in the relay, 96 in the proxy")
def _() -> str:
    socks = []
    with contextlib.suppress(OSError):
        for _ in range(300):
            sock = socket.socket()
            sock.settimeout(0.2)
            socks.append(sock)
            sock.connect(("127.0.0.1", 3128))
            sock.sendall(b"GET http://")
    for sock in socks:
        sock.close()
    return "works again" if ask(OPEN, "/a") == "reached /a" else "does not"


@attack("speak TLS to the proxy itself, time and again", "cut off, reached /a", "a tunnel first")
def _() -> str:
    words = []
    for _ in range(120):
        try:
            with ssl.create_default_context().wrap_socket(_dial(), server_hostname=OPEN):
                words.append("let in")
        except OSError:
            words.append("cut off")
    return _all(*words, ask(OPEN, "/a"))


@attack("kill the relay", "works again", "the agent starts another")
def _() -> str:
    killed, own, pid = 0, {1}, os.getpid()
    while pid > 1:
        own.add(pid)
        with open(f"/proc/{pid}/stat") as stat:
            pid = int(stat.read().rpartition(")")[2].split()[1])
    # Whatever is of the agent, but for what runs this program.
    for name in set(filter(str.isdigit, os.listdir("/proc"))) - set(map(str, own)):
        with contextlib.suppress(OSError):
            os.kill(int(name), signal.SIGKILL)
            killed += 1
    end = time.monotonic() + 5
    while killed and time.monotonic() < end:
        with contextlib.suppress(OSError):
            if ask(OPEN, "/a") == "reached /a":
                return "works again"
        time.sleep(0.05)
    return f"does not; {killed} killed"
