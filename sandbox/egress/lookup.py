"""Names of hosts to addresses, looked up once: what is checked is what is dialled."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping

Hosts = Mapping[str, tuple[str, int | None]]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Held to be global, but they are the clouds' own (metadata of Azure, of Oracle), or ways to
# say an IPv4 address.
_LOCAL = (
    ipaddress.IPv4Network("168.63.129.16/32"),
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv6Network("::/96"),
    ipaddress.IPv6Network("64:ff9b:1::/48"),
)


class PrivateAddress(Exception):
    """A name leads to where no sandbox may go."""


async def look_up(name: str, port: int, hosts: Hosts) -> tuple[str, int]:
    """Where to dial for a host.

    Args:
        name: The host's.
        port: The one asked for.
        hosts: Names that the operator resolves, with their own port or None; trusted.

    Raises:
        PrivateAddress: one of the name's addresses is not on the internet.
        OSError: there is no such name.
    """
    if name in hosts:
        address, other = hosts[name]
        return address, other or port
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    # IPv4 first: many hosts have no route for the other.
    addresses = [str(to[0]) for *_, to in sorted(found, key=lambda info: info[0])]
    if not all(map(is_public, addresses)):
        raise PrivateAddress
    return addresses[0], port


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's: no host, no neighbour, no metadata."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner and not inner.is_global:
            return False
    if any(ip in network for network in _LOCAL if network.version == ip.version):
        return False
    return ip.is_global and not ip.is_multicast
