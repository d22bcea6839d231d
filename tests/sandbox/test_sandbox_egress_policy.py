"""Verdicts on requests, however they are written; no network, no sandbox."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox.api import parse
from sandbox.client import Egress, SandboxRefused, SandboxSpec
from sandbox.egress.blocks import prefix_of
from sandbox.egress.lookup import PrivateAddress, is_public, look_up
from sandbox.egress.policy import Policy, Request, Verdict
from sandbox.egress.urls import BadUrl, host_of, is_address

ASKED = {
    "allow": ["github.com", "*.github.com", "*.githubusercontent.com", "mirror.example", "hf.co"],
    "block": [
        "https://github.com/Org/Repo",
        "https://huggingface.co/org/m",
        "http://mirror.example/x/",
    ],
    "packages": ["pypi", "npm"],
    "block_packages": ["Klong_JAX", "@org/thing"],
}
POLICY = Policy(ASKED)


def judge(url: str, policy: Policy = POLICY, method: str = "GET", **more: object) -> Verdict:
    scheme, _, rest = url.partition("://")
    host, slash, target = rest.partition("/")
    port = {"http": 80, "https": 443}[scheme]
    host, _, given_port = host.partition(":") if not host.startswith("[") else (host, "", "")
    return policy.judge(
        Request(
            scheme,
            host,
            int(given_port) if given_port else port,
            method,
            f"{slash}{target}",
            **more,  # type: ignore[arg-type]
        )
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://github.com/other/repo", "host"),
        ("https://github.com/org/repo2", "host"),
        ("https://github.com/org/repo-docs", "host"),
        ("https://api.github.com/repos/org/repo2/zipball", "host"),
        ("https://gist.github.com/a", "host"),
        ("https://evil.example/", "not_allowed"),
        ("https://github.com.evil.example/", "not_allowed"),
        ("https://notgithub.com/", "not_allowed"),
        ("https://github.com/org/repo", "blocked"),
        ("http://www.github.com/org/repo", "blocked"),
        ("https://github.com/org/repo.git/info/refs?service=git-upload-pack", "blocked"),
        ("https://github.com/org/repo/archive/main.zip", "blocked"),
        ("https://raw.githubusercontent.com/org/repo/main/a.py", "blocked"),
        ("https://media.githubusercontent.com/media/org/repo/main/a", "blocked"),
        ("https://api.github.com/repos/org/repo/contents", "blocked"),
        ("https://api.github.com/repositories/1234", "blocked"),
        ("https://api.github.com/graphql", "blocked"),
        ("https://codeload.github.com/org/repo/tar.gz/main", "blocked"),
        ("https://uploads.github.com/repos/org/repo/releases", "blocked"),
        ("https://org.github.io/repo/", "blocked"),
        ("https://cdn.jsdelivr.net/gh/org/repo@main/a.py", "blocked"),
        ("https://hf.co/org/m/resolve/main/x", "blocked"),
        ("https://mirror.example/x", "blocked"),
        ("https://mirror.example/?u=https%3A%2F%2Fgithub.com%2Forg%2Frepo", "blocked"),
        ("https://mirror.example/web/2020id_/https://github.com/org/repo", "blocked"),
        ("https://mirror.example/?u=git@github.com:org/repo.git", "blocked"),
        ("https://mirror.example/?u=github.com/org/repo2", "host"),
        ("https://mirror.example/?u=https://github.com/./org/x/../repo", "blocked"),
        ("https://mirror.example/?u=https://github.com/%252e/org/repo", "blocked"),
        ("https://mirror.example/?u=https:%5C%5Cgithub.com%5Corg%5Crepo", "blocked"),
        ("https://mirror.example/?u=https://git%09hub.com/org/repo", "blocked"),
        ("https://mirror.example/?u=https://github.com./org/repo", "blocked"),
        ("https://mirror.example/?u=https://github.com/../../org/repo", "blocked"),
        ("https://mirror.example/github.com/!org/repo/@v/list", "blocked"),
        ("https://cdn.jsdelivr.net/combine/gh/org/repo@1/a.js", "blocked"),
        ("https://github.com:8443/a", "port"),
        ("http://github.com:443/a", "port"),
        ("https://github.com:22/a", "port"),
        ("https://140.82.112.3/org/repo", "address"),
        ("https://2356322307/", "address"),
        ("https://0x8c527003/", "address"),
        ("https://0214.0122.0160.03/", "address"),
        ("https://[::1]/", "address"),
        ("https://localhost/", "malformed"),
        ("https://github.com../a", "malformed"),
        ("https://gith\u016bb.com/a", "malformed"),
        ("https://github.com/a%00b", "malformed"),
        ("https://github.com/a\u200b%0ab", "malformed"),
        ("https://github.com/%c0%ae", "malformed"),
        ("https://github.com/" + "%" + "25" * 9 + "6f", "malformed"),
        ("https://github.com/" + "a" * 20_000, "malformed"),
        ("https://github.com", "malformed"),
    ],
)
def test_verdicts(url: str, reason: str) -> None:
    verdict = judge(url)
    assert verdict.reason == reason and verdict.allowed == (reason == "host")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://pypi.org/simple/", "package"),
        ("https://pypi.org/simple/flask/", "package"),
        ("https://pypi.org/pypi/flask/json", "package"),
        ("https://pypi.org/manage/account/", "not_allowed"),
        ("https://pypi.org/simple/../account", "not_allowed"),
        ("https://files.pythonhosted.org/packages/a/b/klong-1.0.tar.gz", "package"),
        ("https://files.pythonhosted.org/packages/a/b/klong_jax_tools-1.0.tar.gz", "package"),
        ("https://files.pythonhosted.org/p/klong_jax-1.0-py3-none-any.whl", "blocked_package"),
        ("https://files.pythonhosted.org/p/klong.jax-1.0.tar.gz.metadata", "blocked_package"),
        ("https://files.pythonhosted.org/packages/a/b/KLONG%2dJAX-v1.zip", "blocked_package"),
        ("https://pypi.org/simple/klong-jax/", "blocked_package"),
        ("https://pypi.org/simple/Klong.._JAX/", "blocked_package"),
        ("https://pypi.org/simple/kl%256fng_jax", "blocked_package"),
        ("https://pypi.org/pypi/klong_jax/0.1/json", "blocked_package"),
        ("https://mirror.example/pypi/web/simple/klong_jax/", "blocked_package"),
        ("https://mirror.example/any/klong_jax-0.1.tar.gz", "blocked_package"),
        ("https://registry.npmjs.org/left-pad", "package"),
        ("https://registry.npmjs.org/left-pad/-/left-pad-1.0.0.tgz", "package"),
        ("https://registry.npmjs.org/@org%2fthing", "blocked_package"),
        ("https://registry.npmjs.org/@Org/thing/-/thing-1.0.0.tgz", "blocked_package"),
    ],
)  # fmt: skip
def test_packages(url: str, reason: str) -> None:
    assert judge(url).reason == reason


def test_an_index_is_for_reading_and_may_be_another() -> None:
    assert judge("https://pypi.org/simple/flask/", method="POST").reason == "not_allowed"
    policy = Policy(ASKED, pypi="https://mirror.internal.example/api/pypi/simple/")
    assert judge("https://mirror.internal.example/api/pypi/simple/flask/", policy).allowed
    assert judge(
        "https://mirror.internal.example/api/pypi/f/flask-1-py3-none-any.whl", policy
    ).allowed
    assert not judge("https://mirror.internal.example/other/", policy).allowed
    assert not judge("https://pypi.org/simple/flask/", policy).allowed


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"names": ["github.com"]}, "host"),
        ({"names": ["GitHub.com.", "github.com:443"]}, "host"),
        ({"names": ["github.com", "evil.example"]}, "other_host"),
        ({"names": ["gist.github.com"]}, "other_host"),
        ({"names": ["github.com:80"]}, "other_host"),
        ({"names": ["user@github.com"]}, "malformed"),
        ({"names": ["github.com:"]}, "malformed"),
        ({"headers": frozenset(["upgrade"])}, "protocol"),
        ({"headers": frozenset(["sec-websocket-key"])}, "protocol"),
        ({"method": "CONNECT"}, "method"),
        ({"method": "PRI"}, "method"),
    ],
)
def test_what_else_a_request_says(more: dict[str, object], reason: str) -> None:
    assert judge("https://github.com/a", **more).reason == reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("authority", "reason"),
    [
        ("github.com:443", "tunnel"),
        ("GITHUB.com.:443", "tunnel"),
        ("pypi.org:443", "tunnel"),
        ("files.pythonhosted.org:443", "tunnel"),
        ("github.com:22", "port"),
        ("github.com:9418", "port"),
        ("github.com", "port"),
        ("10.0.0.1:443", "address"),
        ("[fe80::1]:443", "address"),
        ("evil.example:443", "not_allowed"),
        ("a@github.com:443", "malformed"),
    ],
)
def test_tunnels(authority: str, reason: str) -> None:
    verdict = POLICY.tunnel(authority)
    assert verdict.reason == reason and verdict.allowed == (reason == "tunnel")


def _encode(text: str, chosen: list[bool]) -> str:
    pairs = zip(text, chosen * len(text), strict=False)
    return "".join(f"%{ord(c):02x}" if yes and c != "%" else c for c, yes in pairs)


@st.composite
def disguises(draw: st.DrawFn, path: tuple[str, ...]) -> str:
    """A URL of github.com that means a path to some server, in some disguise."""
    draw_bits = st.lists(st.booleans(), min_size=1, max_size=7)
    words = []
    for word in path:
        cased = "".join(
            c.upper() if up else c for c, up in zip(word, draw(draw_bits) * 9, strict=False)
        )
        words.append(
            draw(st.sampled_from(["", "./", "//", "zz/../", "zz/yy/../../", "zz\\..\\"])) + cased
        )
        words[-1] += draw(st.sampled_from(["", ";v=1", ";"]))
    text = draw(st.sampled_from(["/", "//", "/../"])) + "/".join(words)
    for _ in range(draw(st.integers(0, 3))):
        text = _encode(text, draw(draw_bits)).replace("%25", "%") if draw(st.booleans()) else text
        text = text.replace("%", "%25") if "%" in text and draw(st.booleans()) else text
    host = draw(st.sampled_from(["github.com", "GitHub.COM", "github.com."]))
    tail = draw(st.sampled_from(["", "/", ".git", "/tree/main", "?a=b", "/%2e", "\\x"]))
    return f"https://{host}/{text.lstrip('/')}{tail}"


@settings(deadline=None)
@given(disguises(("org", "repo")))
@example("https://github.com/org/x/%252e%252e/repo")
@example("https://github.com/\uff4frg/repo")
def test_no_disguise_of_a_blocked_url_passes(url: str) -> None:
    assert judge(url).reason == "blocked"


@settings(deadline=None)
@given(disguises(("org", "other")))
def test_a_disguise_of_another_url_is_not_blocked(url: str) -> None:
    assert judge(url).allowed


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_is_asked_gets_a_verdict(host: str, target: str) -> None:
    verdict = POLICY.judge(Request("https", host, 443, "GET", target, [host]))
    assert verdict.reason
    POLICY.tunnel(host)


@settings(deadline=None)
@given(st.text(alphabet="0123456789abcdefx.:[]", min_size=1, max_size=12))
def test_what_python_takes_for_an_address_is_no_name(text: str) -> None:
    try:
        socket.inet_aton(text)
    except OSError:
        return
    assert is_address(text)
    with pytest.raises(BadUrl):
        host_of(text)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("::127.0.0.1", False),
        ("64:ff9b:1::7f00:1", False),
    ],
)
def test_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_a_name_that_leads_to_this_host_is_not_dialled() -> None:
    with pytest.raises(PrivateAddress):
        asyncio.run(look_up("localhost", 80, {}))
    told = {"mirror.example": ("127.0.0.1", 81)}
    assert asyncio.run(look_up("mirror.example", 80, told)) == ("127.0.0.1", 81)


@pytest.mark.parametrize(
    ("egress", "said"),
    [
        ('{"allow": ["https://a.org"]}', "egress.allow.0: .*is no host's name"),
        ('{"allow": ["127.0.0.1"]}', "egress.allow.0: "),
        ('{"allow": ["a.*"]}', "egress.allow.0: "),
        ('{"block": ["github.com/a/b"]}', "egress.block.0: .*write it as https://HOST/PATH"),
        ('{"block": ["https://a.org:80/b"]}', "egress.block.0: .*without user, port and query"),
        ('{"block": ["https://a.org/b?c"]}', "egress.block.0: "),
        ('{"packages": ["cargo"]}', "egress.packages.0: "),
        ('{"block_packages": ["a b"]}', "egress.block_packages.0: .*is no package's name"),
        ('{"deny": []}', "egress.deny: "),
    ],
)
def test_bad_policies_are_refused_by_field(egress: str, said: str) -> None:
    with pytest.raises(SandboxRefused, match=said):
        parse(SandboxSpec, f'{{"egress": {egress}}}')


def test_a_policy_may_hold_patterns() -> None:
    spec = SandboxSpec(egress=Egress(allow=("*", "*.org", "a.org"), block=("https://a.org",)))
    assert (
        parse(
            SandboxSpec,
            '{"egress": {"allow": ["*", "*.org", "a.org"], "block": ["https://a.org"]}}',
        )
        == spec
    )
    assert prefix_of("HTTPS://WWW.A.org/%41/../b/").path == "/b"
    everything = Policy({**ASKED, "allow": ["*"]})
    assert judge("https://any.example/", everything).allowed
    assert judge("https://github.com/org/repo", everything).reason == "blocked"
