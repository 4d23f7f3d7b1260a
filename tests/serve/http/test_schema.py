"""schemathesis over our own OpenAPI document: all of its checks, with real recordings, on a real socket.

More examples of everything: RESONANCE_SCHEMA_EXAMPLES=200 pytest tests/serve/http/test_schema.py
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = os.environ.get("RESONANCE_SCHEMA_EXAMPLES", "2")
OURS = Path(__file__).parent


def test_the_service_is_as_its_openapi_document_says(
    running: Any,
    start: Callable[..., Any],
    make_adapter: Callable[..., Path],
    make_wav: Callable[..., bytes],
    openai_shaped: Path,
    spoken: np.ndarray,
    tmp_path: Path,
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for i, part in enumerate((spoken[:4800], spoken[8000:16_000])):
        (files / f"{i}.wav").write_bytes(make_wav(part))
    adapter = make_adapter(tmp_path / "adapters" / "anna", base=openai_shaped, seed=1)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in adapter.iterdir():
            archive.write(path, path.name)
    (files / "adapter.zip").write_bytes(packed.getvalue())
    # A service of its own: anna is deleted and put back all the time.
    places = {"adapters": tmp_path / "adapters", "audit_log": tmp_path / "audit.jsonl", "max_beams": 2}
    found = start(running.config.model_copy(update=places), running.tokens)
    try:
        done = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{found.running.address}/openapi.json"),
                *("--checks", "all", "--max-examples", EXAMPLES, "--seed", "7", "--no-color"),
                *("-H", f"Authorization: Bearer {running.tokens['admin']}", "--request-timeout", "60"),
                *("--max-response-time", "60"),  # on a busy machine
            ],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "PYTHONPATH": str(OURS),
                "SCHEMATHESIS_HOOKS": "schema_hooks",
                "RESONANCE_SCHEMA_FILES": str(files),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        found.stop()
    said = "\n".join(line[:500] for line in (done.stdout + done.stderr).splitlines())  # bodies are in it
    tested = re.search(r"(\d+) generated", said)
    assert done.returncode == 0, said
    assert tested and int(tested[1]) > 200, said
