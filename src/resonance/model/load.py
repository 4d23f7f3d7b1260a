"""Whisper checkpoints from a folder or a model hub, ready for training or transcription."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.utils import cached_file

from resonance.errors import MissingExtraError, ModelError
from resonance.messages import _
from resonance.model import exports
from resonance.model.allocator import return_large_blocks
from resonance.model.builtin import folder_of
from resonance.model.context import allow_any_audio_context
from resonance.units import MAX_LABEL_TOKENS

MULTILINGUAL_TOKENS = 51_865  # size of the smallest multilingual vocabulary; `.en` models have one token less
Quantization = Literal["none", "8bit", "4bit"]


@dataclass(frozen=True, slots=True)
class Whisper:
    """A loaded checkpoint and what goes with it."""

    name: str
    model: Any  # WhisperForConditionalGeneration, in eval mode, or a PeftModel around one
    tokenizer: WhisperTokenizer
    feature_extractor: WhisperFeatureExtractor
    fingerprint: str

    @property
    def multilingual(self) -> bool:
        """False for `.en` models, which have no language and task tokens."""
        return is_multilingual(self.model.generation_config, self.model.config)

    @property
    def n_mels(self) -> int:
        return int(self.model.config.num_mel_bins)

    @property
    def window_positions(self) -> int:
        return int(self.model.config.max_source_positions)

    @property
    def max_label_tokens(self) -> int:
        return int(getattr(self.model.config, "max_target_positions", MAX_LABEL_TOKENS))


def load_whisper(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = "none",
    cache_dir: Path | None = None,
) -> Whisper:
    """Load a Whisper checkpoint by hub name or folder onto `device`.

    What is in the local cache is used without asking the hub. Raises ModelError with the way out when the folder is
    incomplete, the name unknown, the hub out of reach or the architecture another one.
    """
    place = folder_of(name)
    check_folder(place)
    return_large_blocks()
    with quiet_libraries():
        options: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(place, **options)
            cached_file(place, "model.safetensors", **options)
        except (OSError, ValueError):
            options["local_files_only"] = False
        try:
            config = AutoConfig.from_pretrained(place, **options)
            if config.model_type != "whisper":
                raise ModelError(
                    _("{name} is a {found} model, not Whisper. Choose a Whisper checkpoint.").format(
                        name=name, found=config.model_type
                    )
                )
            tokenizer = WhisperTokenizer.from_pretrained(place, **options)
            tokenizer.clean_up_tokenization_spaces = (
                False  # meant for other tokenizers; transformers warns at each text
            )
            feature_extractor = WhisperFeatureExtractor.from_pretrained(place, **options)
            model, loaded = WhisperForConditionalGeneration.from_pretrained(
                place,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                **_placement(quantization, device),
                **options,
            )
            fingerprint = weights_fingerprint(place, cache_dir)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(explain(name, error)) from error
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        raise ModelError(
            _("{name} lacks {count} of Whisper's weights (such as {key}). Copy or download it again.").format(
                name=name, count=len(loaded["missing_keys"]), key=min(loaded["missing_keys"])
            )
        )
    if quantization == "none":
        model.to(device)
    allow_any_audio_context(model)
    model.eval()
    return Whisper(name, model, tokenizer, feature_extractor, fingerprint)


def load_tokenizer(name: str, cache_dir: Path | None = None) -> tuple[WhisperTokenizer, bool]:
    """A checkpoint's tokenizer, and whether the model is multilingual, without its weights."""
    place = folder_of(name)
    with quiet_libraries():
        try:
            config = AutoConfig.from_pretrained(place, cache_dir=cache_dir)
            tokenizer = WhisperTokenizer.from_pretrained(place, cache_dir=cache_dir)
        except (OSError, ValueError) as error:
            raise ModelError(explain(name, error)) from error
        try:
            generation = GenerationConfig.from_pretrained(place, cache_dir=cache_dir)
        except (OSError, ValueError):  # old checkpoints have none
            generation = None
    return tokenizer, is_multilingual(generation, config)


def is_multilingual(generation_config: Any, config: Any) -> bool:
    """False for `.en` models. The vocabulary decides where the generation settings say nothing."""
    flag = getattr(generation_config, "is_multilingual", None)
    return bool(flag) if flag is not None else config.vocab_size >= MULTILINGUAL_TOKENS


def check_folder(name: str) -> None:
    """Raise ModelError when `name` is a folder that lacks files, or a path to no folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
            raise ModelError(
                _(
                    "{name}: no such folder. Give a folder with config.json and model.safetensors, or a hub name such as "
                    "openai/whisper-small."
                ).format(name=name)
            )
        return
    if exports.is_ctranslate2(folder) or any(folder.glob("ggml-*.bin")):
        raise not_for_torch(folder)
    missing = [f for f in ("config.json", "tokenizer.json", "preprocessor_config.json") if not (folder / f).is_file()]
    if "tokenizer.json" in missing and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        missing.remove("tokenizer.json")
    if "preprocessor_config.json" in missing and (folder / "processor_config.json").is_file():
        missing.remove("preprocessor_config.json")
    if not any(folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    for file in sorted(folder.glob("*.json")):
        # transformers goes on without a generation_config.json that it cannot read: no language, no suppressed tokens.
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ModelError(
                _("{path} is damaged: not valid JSON. Copy or download it again.").format(path=file)
            ) from None
    if missing:
        raise ModelError(
            _("The model folder {folder} is incomplete; missing: {names}. Copy or download it again.").format(
                folder=folder, names=", ".join(missing)
            )
        )


def not_for_torch(folder: Path) -> ModelError:
    """Why PyTorch does not take a folder that was exported for other programs, and what it takes."""
    record = exports.read_record(folder)
    if record is None:
        return ModelError(
            _(
                "{folder} is a model for other programs, which PyTorch cannot read. Give the model that it was made from."
            ).format(folder=folder)
        )
    text = _("{folder} is a model for {format}, which PyTorch cannot read. It was made from {source}: give that.")
    name = {"ctranslate2": "CTranslate2", "ggml": "whisper.cpp", "hf": "Hugging Face"}[record.format]
    return ModelError(text.format(folder=folder, format=name, source=record.source))


def explain(name: str, error: Exception) -> str:
    """What a failed load means for the user."""
    from huggingface_hub import constants

    text = f"{error} {error.__cause__ or ''}"
    if "couldn't connect" in text or "Connection" in type(error.__cause__).__name__ or "offline mode" in text:
        return _(
            "{name} is not on this machine, and the model hub at {address} cannot be reached.\n"
            "  With a network: check the connection or proxy, or set HF_ENDPOINT to a mirror of the hub.\n"
            "  Without: download it on another machine with `hf download {name} --local-dir whisper`, copy the folder here "
            "and give that folder in place of the name."
        ).format(name=name, address=constants.ENDPOINT)
    if "not a valid model identifier" in text or "Repository Not Found" in text or "404" in text:
        return _("{name} is neither a folder here nor a model at {address}. Check the spelling.").format(
            name=name, address=constants.ENDPOINT
        )
    if "gated" in text or "401" in text or "403" in text:
        return _("{name} needs permission: log in with `hf auth login` using an account that may read it.").format(
            name=name
        )
    if "safetensors" in text and "no file named" in text:
        return _(
            "{name} has no safetensors weights, and other formats can run code when they are read. Convert it first "
            "(https://huggingface.co/spaces/safetensors/convert)."
        ).format(name=name)
    return _("The weights of {name} cannot be loaded: {reason}").format(name=name, reason=str(error).strip())


def weights_fingerprint(name: str, cache_dir: Path | None = None) -> str:
    """SHA-256 over each weight's name, shape and first row in float16, whatever precision the file has.

    Fine-tuning and merging change every row of what they touch, so the first rows tell checkpoints apart at a
    thousandth of the reading.
    """
    from safetensors import safe_open

    options: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": True}
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **options)
    single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False, **options)
    if single is None and index is not None:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        files = [str(Path(index).parent / shard) for shard in shards]
    elif single is not None:
        files = [single]
    else:
        raise OSError(_("no file named model.safetensors in {name}").format(name=name))
    rows: dict[str, bytes] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a dict
                if key == "proj_out.weight":  # tied to the token embedding; some files repeat it
                    continue
                part = weights.get_slice(key)
                first = part[:1].to(torch.float16).contiguous()
                rows[key.removeprefix("model.")] = (
                    str(part.get_shape()).encode() + first.view(torch.uint8).numpy().tobytes()
                )
    digest = hashlib.sha256()
    for key in sorted(rows):
        digest.update(key.encode() + rows[key])
    return digest.hexdigest()


def _placement(quantization: Quantization, device: torch.device) -> dict[str, Any]:
    if quantization == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            _('{bits} weights need bitsandbytes: pip install "resonance-asr[quant]"').format(bits=quantization)
        ) from None
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        )
    return {"quantization_config": settings, "device_map": {"": device}}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No retry messages and progress bars of the libraries below: our own message says what matters."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as model_logging

    loggers = [logging.getLogger("huggingface_hub.utils._http")]
    levels = [logger.level for logger in loggers]
    verbosity, hub_verbosity = model_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = model_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    model_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        model_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            model_logging.enable_progress_bar()


def choose_device(wanted: Literal["auto", "cuda", "cpu"] = "auto") -> torch.device:
    """The device to run on. Raises ModelError when CUDA is asked for and absent."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # of several processes each has its own
    if wanted == "cuda":
        raise ModelError(
            _(
                "--device cuda: PyTorch {version} sees no CUDA GPU here. Use --device cpu, or install a CUDA build of "
                "PyTorch and check `nvidia-smi`."
            ).format(version=torch.__version__)
        )
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
