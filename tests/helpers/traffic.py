"""The bytes that a process has sent over its TCP connections."""

from __future__ import annotations

import os
import socket
import stat
import struct

BYTES_ACKED = 120  # where it stands in Linux's struct tcp_info


def bytes_sent() -> int:
    """So far, over the connections that are open."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
        except OSError:
            continue
    return total
