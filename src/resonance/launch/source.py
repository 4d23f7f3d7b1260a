"""The code that a job runs, as one archive: this installation of Resonance and nothing else.

Files are taken by a list of what may go in, not by one of what may not: secrets, recordings and results have no name that
could be on it.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from resonance.errors import MissingExtraError
from resonance.messages import _

SUFFIXES = frozenset({".py", ".html", ".yaml", ".sh", ".typed"})
DATA = ("locales/*.json",)
BUILT_IN_MODELS = {"resonance/nano": "nano/*"}
SCRIPT = "sagemaker_torchrun.sh"


def files(package: Path, model: str = "") -> Iterator[Path]:
    """The files of the package folder that a training needs; those of the built-in model where it starts from that."""
    for init in sorted(package.rglob("__init__.py")):
        yield from (p for p in sorted(init.parent.iterdir()) if p.suffix in SUFFIXES and _may_go(p))
    for pattern in (*DATA, *([BUILT_IN_MODELS[model]] if model in BUILT_IN_MODELS else [])):
        yield from (p for p in sorted(package.glob(pattern)) if _may_go(p))


def _may_go(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and not path.name.startswith(".")


def requirements(extras: Sequence[str] = ()) -> list[str]:
    """What this installation of Resonance needs, with `extras`, in the form of a requirements file."""
    found = []
    for line in _installed().requires or []:
        needed = Requirement(line)
        if needed.name == "torch":
            continue  # the image has its own
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed.marker = None
            found.append(str(needed))
    return found


def _installed() -> metadata.Distribution:
    """What pip knows of this installation. Raises MissingExtraError where it was never installed."""
    try:
        return metadata.distribution("resonance-asr")
    except metadata.PackageNotFoundError:
        text = _("Resonance itself is not installed. In its folder: {command}")
        raise MissingExtraError(text.format(command="pip install --no-deps -e .")) from None


def archive(extras: Sequence[str] = (), model: str = "") -> bytes:
    """A .tar.gz of `resonance/`, its metadata, `requirements.txt` and the start script; the same bytes for the same files."""
    package = Path(__file__).parent.parent
    contents = {
        f"resonance/{path.relative_to(package).as_posix()}": path.read_bytes() for path in files(package, model)
    }
    contents["requirements.txt"] = "".join(f"{line}\n" for line in requirements(extras)).encode()
    # Results name the version that made them, which Python looks up here.
    contents[f"resonance_asr-{_installed().version}.dist-info/METADATA"] = (
        _installed().read_text("METADATA") or ""
    ).encode()
    contents[SCRIPT] = (Path(__file__).with_name(SCRIPT)).read_bytes()
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()
