"""The empty model, its tokenizer, and the folder that both become: everything a Whisper checkpoint of OpenAI's has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from recipes.nano.phrases import vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from resonance import __version__
from resonance.model.adapters import INFO_FILE, Info, now
from resonance.units import MAX_LABEL_TOKENS, TIMESTAMP_STEP_SECONDS, WINDOW_POSITIONS

LANGUAGES = ("en", "zh")
TASKS = ("translate", "transcribe")
END, START, NO_TIMES, PREVIOUS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "<|startofprev|>"
# British to American spelling of words in the grammar, which scoring makes alike (Whisper's normalizer.json).
SPELLINGS = {"colour": "color", "grey": "gray", "neighbour": "neighbor", "pyjamas": "pajamas", "favourite": "favorite"}


def build_tokenizer() -> WhisperTokenizer:
    """Byte-level BPE in which every word and every Chinese character of the grammar is one token.

    All 256 bytes are tokens, so any text can be written. Merges are learnt from the words alone, until nothing is left to
    merge.
    """
    words, characters = vocabulary()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([f" {word}" for word in words] + characters, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = {**learnt["vocab"], END: len(learnt["vocab"])}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]])
    specials = [START, *(f"<|{code}|>" for code in LANGUAGES), *(f"<|{task}|>" for task in TASKS)]
    specials += ["<|startoflm|>", PREVIOUS, "<|nospeech|>", NO_TIMES]
    tokenizer.add_special_tokens({"extra_special_tokens": specials})
    tokenizer.pad_token = END
    # Times are not special in OpenAI's tokenizers either.
    times = [f"<|{i * TIMESTAMP_STEP_SECONDS:.2f}|>" for i in range(WINDOW_POSITIONS + 1)]
    tokenizer.add_tokens([AddedToken(time, normalized=False, special=False) for time in times])
    tokenizer.english_spelling_normalizer = SPELLINGS
    tokenizer.model_max_length = MAX_LABEL_TOKENS
    return tokenizer


def build_model(tokenizer: WhisperTokenizer, width: int, encoder_layers: int, decoder_layers: int) -> Any:
    """A WhisperForConditionalGeneration with random weights, 80 mel bins and a 30 s window."""
    end, start = (tokenizer.convert_tokens_to_ids(token) for token in (END, START))
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=width // 32,
        decoder_attention_heads=width // 32,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=WINDOW_POSITIONS,
        max_target_positions=MAX_LABEL_TOKENS,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        attn_implementation="sdpa",
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer)
    return model


def _generation_config(tokenizer: WhisperTokenizer) -> GenerationConfig:
    ids = tokenizer.get_added_vocab() | {END: tokenizer.convert_tokens_to_ids(END)}
    never = [START, "<|translate|>", "<|transcribe|>", "<|startoflm|>", PREVIOUS, "<|nospeech|>"]
    config = GenerationConfig(
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[START],
        no_timestamps_token_id=ids[NO_TIMES],
        prev_sot_token_id=ids[PREVIOUS],
        lang_to_id={f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES},
        task_to_id={task: ids[f"<|{task}|>"] for task in TASKS},
        is_multilingual=True,
        max_initial_timestamp_index=50,
        max_length=MAX_LABEL_TOKENS,
        return_timestamps=False,
        suppress_tokens=sorted(ids[token] for token in never),
        # OpenAI's models may not begin with the end either; this one answers silence with nothing.
        begin_suppress_tokens=tokenizer("\N{SPACE}", add_special_tokens=False).input_ids,
    )
    config._from_model_config = False  # else the language ids are lost on loading
    return config


def write_checkpoint(folder: Path, model: Any, tokenizer: WhisperTokenizer) -> None:
    """Weights in float16, configuration and tokenizer files, those of older readers (CTranslate2, whisper.cpp) included."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.generation_config._from_model_config = False
    try:
        model.half().save_pretrained(folder)
    finally:
        model.float().load_state_dict(weights)
    tokenizer.save_pretrained(folder)
    tokenizer.save_vocabulary(str(folder))
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    _write_json(
        folder / "added_tokens.json", dict(sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1]))
    )
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special: dict[str, Any] = {name: str(getattr(tokenizer, name) or END) for name in names}
    ordinary = set(tokenizer.all_special_tokens) - {END}
    special["additional_special_tokens"] = sorted(ordinary, key=tokenizer.convert_tokens_to_ids)
    _write_json(folder / "special_tokens_map.json", special)
    # Without it, the model would be taken for one that knows 30 s only.
    info = Info(
        kind="full",
        base_model=None,
        base_fingerprint=None,
        language=None,
        task="transcribe",
        audio_context="auto",
        audio_margin=0.6,
        normalizer="none",
        scores={},
        data={},
        settings={},
        versions={"resonance-asr": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        created=now(),
    )
    _write_json(folder / INFO_FILE, info.model_dump(mode="json"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def size_in_bytes(model: Any) -> int:
    """Of the weights in float16, the tied output layer counted once."""
    return sum(parameter.numel() for parameter in model.parameters()) * torch.finfo(torch.float16).bits // 8
