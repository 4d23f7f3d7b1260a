"""`resonance doctor`: what is installed, what this machine can do, and what to install for more."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from rich.cells import cell_len

from resonance import __version__
from resonance.messages import LANGUAGES, _, language
from resonance.units import GIBIBYTE

DISTRIBUTION = "resonance-asr"
SHOWN_FIRST = ("torch", "transformers", "peft")
# Each brings a library of another language, which can be missing or of the wrong kind while pip lists the package.
IMPORTED = ("torch", "transformers", "soundfile", "soxr", "av")
SOUNDFILE_FORMATS = ("WAV", "FLAC", "OGG", "AIFF", "CAF", "W64", "AU")
FFMPEG_CODECS = {
    "mp3": "MP3",
    "aac": "AAC (M4A, MP4)",
    "opus": "Opus (WebM)",
    "alac": "ALAC",
    "wmav2": "WMA",
    "amrnb": "AMR",
}
LOW_DISK_GIB = 5.0  # whisper-small, its checkpoints and a run's logs take about 3 GiB
HUB_TIMEOUT_SECONDS = 10.0
HUB_FILE = "openai/whisper-tiny/resolve/main/config.json"  # 2 kB

Row = tuple[str, str]  # name, what there is to say
NO_NAME = ""  # a row that goes on with the one above it


def print_report(*, ask_hub: bool = False) -> int:
    """Print what this installation can do. Returns 1 where something that is needed is missing or broken, else 0."""
    broken: list[str] = []
    imported = import_needed(broken)
    sections = [
        (_("Machine"), [*machine(), *devices(imported.get("torch"))]),
        (_("Needed packages"), needed(broken)),
        (_("Sound"), [*sound(imported)]),
        (_("Optional packages"), [*optional()]),
        (_("Model hub"), [*hub(ask_hub)]),
        (_("Language of the messages"), messages_language()),
    ]
    width = max(cell_len(name) for _title, rows in sections for name, _text in rows)
    print(f"Resonance {__version__}")
    for title, rows in sections:
        print(f"\n{title}")
        for name, text in rows:
            print(f"  {name}{' ' * (width - cell_len(name))}  {text}".rstrip())
    print()
    if not broken:
        print(_("Everything that is needed is here."))
        return 0
    print(_("Broken:"))
    for problem in broken:
        print(f"  {problem}")
    return 1


def pip() -> str:
    """The pip of the Python that runs this: another one may come first on the path and would install elsewhere."""
    found = shutil.which("pip")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "pip"
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{python} -m pip"


def import_needed(broken: list[str]) -> dict[str, ModuleType]:
    """The packages of `IMPORTED` that can be imported; the others become lines in `broken`."""
    modules = {}
    for name in IMPORTED:
        if importlib.util.find_spec(name) is None:
            continue  # told by `needed`
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:  # whatever a half-installed package raises is what we are here to tell
            broken.append(
                _("{name} is installed but cannot be used ({reason}). Install it again: {command}").format(
                    name=name,
                    reason=first_line(error),
                    command=f"{pip()} install --force-reinstall --no-deps {name}=={metadata.version(name)}",
                )
            )
    return modules


def needed(broken: list[str]) -> list[Row]:
    """Python and the packages of pyproject.toml; those that are missing or too old become lines in `broken`."""
    rows = [("Python", f"{platform.python_version()} ({sys.executable})")]
    versions: dict[str, str] = {}
    try:
        wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        wanted = []
        broken.append(
            _("Resonance itself is not installed. In its folder: {command}").format(
                command=f"{pip()} install --no-deps -e ."
            )
        )
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            versions[requirement.name] = _("missing")
            text = _("{name} is missing. Install it: {command}")
        else:
            if requirement.specifier.contains(versions[requirement.name], prereleases=True):
                continue
            text = _("{name} is {version}, but {wanted} is needed. Install it: {command}")
        broken.append(
            text.format(
                name=requirement.name,
                version=versions[requirement.name],
                wanted=requirement.specifier,
                command=f'{pip()} install "{requirement.name}{requirement.specifier}"',
            )
        )
    rows += [(name, versions.pop(name)) for name in SHOWN_FIRST if name in versions]
    others = [f"{name} {version}" for name, version in sorted(versions.items(), key=lambda v: v[0].lower())]
    half = -(-len(others) // 2)
    return [*rows, (_("others"), ", ".join(others[:half])), (NO_NAME, ", ".join(others[half:]))]


def machine() -> Iterator[Row]:
    """System, processors, memory and disk."""
    import psutil

    yield _("system"), f"{platform.system()} {platform.release()} ({platform.machine()})"
    yield _("processor"), _("{count} cores").format(count=usable_cores())
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = container_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    yield _("memory"), _("{free:.1f} of {total:.1f} GiB free").format(free=free / GIBIBYTE, total=total / GIBIBYTE)
    disk = shutil.disk_usage(Path.cwd()).free / GIBIBYTE
    text = _("{free:.1f} GiB free in the current folder").format(free=disk)
    if disk < LOW_DISK_GIB:
        text += " " + _("(little: a training with its checkpoints takes several)")
    yield _("disk"), text


def usable_cores() -> int:
    """Processors that this process may use: fewer than the machine has in many containers."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def container_limit() -> int | None:
    """Bytes of memory that a container may use (cgroup 2), where there is a limit."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def devices(torch: ModuleType | None) -> Iterator[Row]:
    """Graphics cards that PyTorch can compute on, or why there is none."""
    if torch is None:
        return
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            yield (
                _("GPU {number}").format(number=i),
                _("{name}, {total:.1f} GiB").format(name=card.name, total=card.total_memory / GIBIBYTE),
            )
    elif torch.backends.mps.is_available():
        yield "GPU", _("Apple graphics (MPS), shares the memory above")
    elif shutil.which("nvidia-smi") is None:
        yield "GPU", _("none found: the processor does all the work, which takes many times as long")
    elif torch.version.cuda is None:
        yield (
            "GPU",
            _("an NVIDIA driver is here, but PyTorch {version} was built without CUDA and cannot use the card.").format(
                version=torch.__version__
            ),
        )
        yield (
            NO_NAME,
            _("Choose a CUDA build at https://pytorch.org/get-started/locally/ and install it with {pip}").format(
                pip=pip()
            ),
        )
    else:
        yield (
            "GPU",
            _("PyTorch {version} finds no card. Look at what `nvidia-smi` says; the driver may be too old.").format(
                version=torch.__version__
            ),
        )


def sound(imported: dict[str, ModuleType]) -> Iterator[Row]:
    """The decoders, and what each reads."""
    if "soundfile" in imported:
        soundfile = imported["soundfile"]
        readable = [name for name in SOUNDFILE_FORMATS if name in soundfile.available_formats()]
        yield f"libsndfile {soundfile.__libsndfile_version__}", ", ".join(readable)
    if "av" in imported:
        av = imported["av"]
        readable = [text for codec, text in FFMPEG_CODECS.items() if codec in av.codecs_available]
        version = getattr(av, "ffmpeg_version_info", None) or av.__version__
        yield f"FFmpeg {version}", _("{formats} and the sound of videos").format(formats=", ".join(readable))
    if "soxr" in imported:
        yield f"soxr {imported['soxr'].__version__}", _("any sample rate to 16 kHz")


def optional() -> Iterator[Row]:
    """Packages that are not needed, each with what it is for and the command that installs it."""
    later = _("(for a later version of Resonance)")
    uses = {
        "bitsandbytes": (_("8-bit and 4-bit models: --use_8bit, --use_4bit"), "bitsandbytes>=0.48"),
        "datasets": (_("recordings saved as a Hugging Face dataset"), "datasets>=4.0"),
        "wandb": (_("logs at Weights & Biases: --use_wandb"), "wandb>=0.19"),
        "sagemaker-core": (_("trainings on rented machines of Amazon: resonance sagemaker"), "sagemaker-core"),
        "deepspeed": (_("training on many GPUs") + " " + later, "deepspeed"),
        "ctranslate2": (_("faster transcription on processors: resonance export --to ctranslate2"), "ctranslate2>=4.6"),
        "faster-whisper": (_("a second opinion on what is exported for it"), "faster-whisper>=1.2"),
    }
    for name, (use, requirement) in uses.items():
        try:
            yield name, _("{version} · {use}").format(version=metadata.version(name), use=use)
        except metadata.PackageNotFoundError:
            yield name, _("not installed · {use}").format(use=use)
            yield NO_NAME, f'{pip()} install "{requirement}"'


def hub(ask: bool) -> Iterator[Row]:
    """Where models come from and are kept and, with `ask`, whether a file can be fetched from there now."""
    from huggingface_hub import constants

    yield _("address"), constants.ENDPOINT
    yield _("kept in"), str(constants.HF_HUB_CACHE)
    if not ask:
        yield _("answer"), _("not asked: `resonance doctor --hub` tries it")
        return
    from huggingface_hub import get_session

    began = time.monotonic()
    try:
        if constants.is_offline_mode():
            raise ConnectionError(_("switched off by HF_HUB_OFFLINE"))
        url = f"{constants.ENDPOINT}/{HUB_FILE}"
        get_session().get(url, timeout=HUB_TIMEOUT_SECONDS, follow_redirects=True).raise_for_status()
        yield _("answer"), _("reached in {seconds:.1f} s").format(seconds=time.monotonic() - began)
    except Exception as error:  # every library below has its own; all mean the same here
        yield _("answer"), _("not reached ({reason})").format(reason=first_line(error))
        yield NO_NAME, _("With a network: check connection and proxy, or set HF_ENDPOINT to a mirror of the hub.")
        yield NO_NAME, _("Without: copy a model's folder here and give it with --model_name_or_path.")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def messages_language() -> list[Row]:
    """The language of messages, where it comes from and how to change it."""
    source = next((n for n in ("RESONANCE_LANG", "LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(n)), None)
    names = {"en": "English", "zh-CN": "简体中文", "zh-TW": "繁體中文"}
    set_it = "set" if sys.platform == "win32" else "export"
    rows = [(_("now"), names[language()] + (f" ({source}={os.environ[source]})" if source else ""))]
    for tag in LANGUAGES:
        if tag != language():
            rows.append((_("to change"), f"{set_it} RESONANCE_LANG={tag}  ({names[tag]})"))
    return rows
