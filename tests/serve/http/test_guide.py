"""What docs/how-to-serve tells people to send is sent, and what it lists is what there is."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from resonance import serve
from resonance.config_serve import ServeConfig
from resonance.serve.front_metrics import FrontMetrics

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "docs" / f"how-to-serve{tag}.md" for tag in ("", ".zh-CN", ".zh-TW")]
GUIDE = PAGES[0]
FOREIGN = {"name", "patient", "admin", "base", "days", "head", "build-arg"}  # flags of other commands


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def curls() -> list[list[str]]:
    lines = [line for block in blocks(GUIDE, "bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("curl ")]


@pytest.fixture
def guide(running: Any) -> Iterator[Path]:
    """The adapter of the guide's person, who is called `guide` here: that of anna is for other tests."""
    folder = running.config.adapters / "guide"
    shutil.copytree(running.config.adapters / "anna", folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            if path.is_file():
                archive.write(path, path.name)
    return buffer.getvalue()


def test_every_request_of_the_guide_is_answered(running: Any, guide: Path, recording: bytes) -> None:
    adapter = zipped(guide)
    sent = curls()
    assert len(sent) >= 9
    for words in sent:
        if not guide.exists():  # one of the requests deletes it
            shutil.copytree(running.config.adapters / "anna", guide)
        method, headers, data, files, url = None, {}, {}, {}, ""
        rest = iter(word.replace("anna", "guide") for word in words)
        for word in rest:
            if word == "-X":
                method = next(rest)
            elif word == "-H":
                name, _colon, value = next(rest).partition(": ")
                who = "admin" if "$ADMIN" in value else "all"
                headers[name] = value.replace("$ADMIN", running.tokens[who]).replace("$TOKEN", running.tokens[who])
            elif word == "-F":
                name, _equals, value = next(rest).partition("=")
                if value.startswith("@"):
                    files[name] = (value[1:], adapter if value.endswith(".zip") else recording)
                else:
                    data.setdefault(name, []).append(value)
            else:
                url = word
        path = urlsplit(url).path
        with running.client(None) as client:
            answer = client.request(
                method or ("POST" if files else "GET"), path, headers=headers, data=data, files=files or None
            )
        assert answer.status_code in (200, 201), f"{words}: {answer.status_code} {answer.text}"


def test_the_python_of_the_guide_runs(
    running: Any,
    guide: Path,
    recording: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (code,) = blocks(GUIDE, "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recording.wav").write_bytes(recording)
    for old, new in (("http://127.0.0.1:8000", running.address), ("rsn_…", running.tokens["all"]), ("anna", "guide")):
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    names["client"].close()
    assert capsys.readouterr().out.endswith("\n")


def test_the_client_that_listens_prints_what_is_said(running: Any, spoken: np.ndarray) -> None:
    sound = (spoken * 32767).astype("<i2").tobytes() + bytes(32_000)
    command = [sys.executable, ROOT / "examples" / "listen.py", "--patient", "anna", "--language", "en"]
    command += ["--address", running.address.replace("http", "ws") + "/listen"]
    environment = {**os.environ, "TOKEN": running.tokens["anna"]}
    done = subprocess.run(command, input=sound, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()

    refused = subprocess.run(
        command, input=sound, capture_output=True, env=environment | {"TOKEN": "rsn_no"}, timeout=60
    )
    assert refused.returncode == 1 and b"Traceback" not in refused.stderr, refused.stderr.decode()


def codes_in_source() -> set[str]:
    """Codes that a ServiceError is given, as far as they stand there as a text."""
    found = set()
    for path in Path(serve.__path__[0]).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            given = [node.args[1]] if name == "ServiceError" and len(node.args) > 1 else []
            given += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            found |= {one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_guide_lists_every_code_and_no_other(page: Path) -> None:
    rows = re.findall(r"^\| [45]\d\d[^|]*\| ([^|]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    source = "".join(path.read_text(encoding="utf-8") for path in Path(serve.__path__[0]).glob("*.py"))
    assert codes_in_source() - listed == set()
    assert {code for code in listed if f'"{code}"' not in source} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_guide_names_settings_and_figures_that_there_are(page: Path, running: Any) -> None:
    text = page.read_text(encoding="utf-8")
    known = {name.replace("_", "-") for name in ServeConfig.model_fields}
    known |= FOREIGN
    for flag in re.findall(r"`--([\w-]+)", text):
        assert flag.replace("_", "-") in known, flag
    figures = re.findall(r"`(resonance_\w+|_\w+)`", text.partition("`GET /metrics`")[2])
    shown = running.service.metrics.exposition()[0].decode()
    for figure in figures:
        name = figure if figure.startswith("resonance_") else f"resonance_adapters{figure}"
        assert f"# TYPE {name} " in shown, name


def test_the_figures_of_several_copies_are_one_text(running: Any) -> None:
    front = FrontMetrics()
    front.request("/transcribe", 200, 0.1)
    text = running.service.metrics.exposition()[0]
    front.copies = {"a": text, "b": text}
    merged = front.exposition()[0].decode()
    assert 'resonance_requests_total{route="/transcribe",status="200"} 1.0' in merged
    for copy in "ab":
        assert re.search(rf'^resonance_windows_total{{copy="{copy}"}} \d', merged, re.MULTILINE)
        assert re.search(rf'^resonance_batch_windows_bucket{{copy="{copy}",le="\+Inf"}} \d', merged, re.MULTILINE)
    assert merged.count("# TYPE resonance_batch_windows histogram") == 1


def deployed() -> Any:
    spec = importlib.util.spec_from_file_location("test_deploy", ROOT / "tests" / "test_deploy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with contextlib.suppress(KeyError):
        spec.loader.exec_module(module)
    return module


def test_what_the_files_under_deploy_ask_for_are_routes(running: Any) -> None:
    paths = {"/listen", *running.server.config.app.openapi()["paths"]}
    _server, places = deployed().tls()
    assert {"/health", "/ready"} <= paths
    for name in places:
        if name[1] == "=":
            assert name[2] in paths
        elif name[1] == "~":
            assert any(re.search(name[2], path) for path in paths)
