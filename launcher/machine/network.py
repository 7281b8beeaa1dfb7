"""Finds the network interface of this host that has a given address."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h; man netdevice
_NAME = struct.Struct("16s24x")  # struct ifreq
_ADDRESS = struct.Struct("16x4x4s16x")  # the same with a sockaddr_in in it


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def interface_with(address: str) -> str | None:
    """The name of the interface whose first address this is; None if there is none."""
    if is_loopback(address):
        return "lo"
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((name for digits, *_, name in rows if digits == wanted.packed.hex()), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, _NAME.pack(name.encode()))
                if _ADDRESS.unpack(answer)[0] == wanted.packed:
                    return name
    return None
