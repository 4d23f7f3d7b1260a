"""A client that goes away while it sends is no fault of the service."""

from __future__ import annotations

import socket
import time
from typing import Any
from urllib.parse import urlsplit


def counted(running: Any, status: int) -> float:
    shown = running.service.metrics.exposition()[0].decode().splitlines()
    name = f'resonance_requests_total{{route="/transcribe",status="{status}"}} '
    return sum(float(line.removeprefix(name)) for line in shown if line.startswith(name))


def test_a_client_that_leaves_in_the_middle_of_an_upload_is_not_counted_as_a_fault(running: Any) -> None:
    before = {status: counted(running, status) for status in (499, 500)}
    place = urlsplit(running.address)
    head = (
        f"POST /transcribe HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {running.tokens['all']}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    )
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head.encode() + bytes(5000))
        time.sleep(0.3)
    until = time.monotonic() + 20
    while counted(running, 499) == before[499]:
        assert time.monotonic() < until, "it was never counted"
        time.sleep(0.05)
    assert counted(running, 500) == before[500]
