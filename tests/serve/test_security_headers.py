"""What browsers are told about every answer, and which web pages may ask where there are no tokens."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from resonance.config_serve import ServeConfig
from resonance.serve.origins import OwnPagesOnly
from resonance.serve.security_headers import SecurityHeaders


async def fine(request: Request) -> Response:
    return PlainTextResponse("ok", headers={"Cache-Control": "max-age=60"} if "cached" in request.url.path else {})


async def faulty(_request: Request) -> Response:
    raise HTTPException(418)


async def listen(socket: WebSocket) -> None:
    await socket.accept()
    await socket.close()


def client(address: str = "http://127.0.0.1:8000", **settings: Any) -> TestClient:
    routes: list[Any] = [Route(path, fine) for path in ("/x", "/cached", "/docs")]
    app = Starlette(routes=[*routes, Route("/faulty", faulty), WebSocketRoute("/listen", listen)])
    app.add_middleware(OwnPagesOnly, config=ServeConfig(model="m", **settings))
    app.add_middleware(SecurityHeaders)
    return TestClient(app, base_url=address)


@pytest.mark.parametrize("path", ["/x", "/faulty", "/nowhere"])
def test_every_answer_tells_browsers_to_do_nothing_with_it(path: str) -> None:
    headers = client().get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"].startswith("default-src 'none'; frame-ancestors 'none'")
    assert "strict-transport-security" not in headers


def test_behind_tls_browsers_are_told_to_keep_to_it() -> None:
    assert "max-age=" in client("https://example.org").get("/x").headers["strict-transport-security"]


def test_an_answer_may_have_a_header_of_its_own() -> None:
    assert client().get("/cached").headers.get_list("cache-control") == ["max-age=60"]


def test_the_page_of_the_routes_may_load_its_script() -> None:
    policy = client().get("/docs").headers["content-security-policy"]
    assert "script-src" in policy and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://127.0.0.1:8000"}, {"Host": "localhost:8000"}])
def test_programs_and_own_pages_may_ask_without_tokens(headers: dict[str, str]) -> None:
    assert client(auth="off").get("/x", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:9999"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "evil.example:8000"},
        {"Host": "[::1"},
        {"Host": "127.0.0.1.evil.example"},
    ],
)
def test_pages_of_others_may_not_ask_without_tokens(headers: dict[str, str]) -> None:
    answer = client(auth="off").get("/x", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_page")
    assert answer.headers["x-content-type-options"] == "nosniff"
    with pytest.raises(WebSocketDisconnect), client(auth="off").websocket_connect("/listen", headers=headers):
        pass


def test_pages_that_are_named_may_ask() -> None:
    named = client(auth="off", cors_origins=["https://mine.example"])
    assert named.get("/x", headers={"Origin": "https://mine.example"}).status_code == 200
    assert named.get("/x", headers={"Origin": "https://other.example"}).status_code == 403


def test_with_tokens_or_in_public_other_names_are_fine() -> None:
    assert client(auth="token").get("/x", headers={"Host": "voices.example", "Origin": "null"}).status_code == 200
    public = client(auth="off", insecure=True, host="0.0.0.0")
    assert public.get("/x", headers={"Host": "voices.example"}).status_code == 200
    assert public.get("/x", headers={"Host": "voices.example", "Origin": "https://evil.example"}).status_code == 403
