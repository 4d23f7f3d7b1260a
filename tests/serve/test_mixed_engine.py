"""People mixed in one batch are understood as each would be alone, by the adapter that is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from resonance.data.audio import read_audio
from resonance.errors import DataError, ModelError
from resonance.export.check import DEMO_SPEAKER
from resonance.model.builtin import folder_of
from resonance.model.lora_weights import LoadedAdapter, read_adapter
from resonance.transcribe import mixed_engine, torch_engine
from resonance.transcribe.mixed_engine import MixedRecognizer, Row, load_mixed
from resonance.transcribe.phrases import PhraseHelp
from resonance.transcribe.recognizer import DecodeSettings, Transcript
from resonance.transcribe.torch_engine import load_recognizer

KINDS = {  # name to rank, layers, and the language it was trained for
    "alice": (4, ("q_proj", "v_proj"), "en"),
    "bo": (16, ("all-linear",), "zh"),
    "chen": (1, ("fc1", "k_proj", "out_proj"), None),
    "dana": (8, ("fc2", "q_proj"), "de"),
}


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """All at the audio context of a clip of 1.5 to 1.6 s."""
    files = sorted((DEMO_SPEAKER / "audio").glob("*.*"))[:3]
    return [np.resize(read_audio(file), 24_600 + 100 * i) for i, file in enumerate(files)]


@pytest.fixture(scope="module")
def folders(
    openai_shaped: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(root / name, base=openai_shaped, rank=rank, seed=i, target_modules=layers, language=language)
        for i, (name, (rank, layers, language)) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def engine(openai_shaped: Path) -> MixedRecognizer:
    return load_mixed(str(openai_shaped), device="cpu")


@pytest.fixture(scope="module")
def people(engine: MixedRecognizer, folders: dict[str, Path]) -> dict[str, LoadedAdapter | None]:
    loaded = {name: read_adapter(folder, name=name, version="1", base=engine) for name, folder in folders.items()}
    return {**loaded, "base": None}


def rows_of(
    people: dict[str, LoadedAdapter | None], clips: Sequence[np.ndarray], settings: DecodeSettings
) -> list[Row]:
    """Everybody says everything; the base model hears it at its own context, so it is left out."""
    return [Row(clip, people[name], settings) for clip in clips for name in KINDS]


def texts(found: Sequence[Transcript]) -> list[str]:
    return [transcript.text for transcript in found]


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Callable[[str, np.ndarray, DecodeSettings], Transcript]:
    """What PEFT makes of it: one model, one adapter, one clip."""
    loaded = {name: load_recognizer(str(folder), device="cpu") for name, folder in folders.items()}

    def transcribe(name: str, clip: np.ndarray, settings: DecodeSettings) -> Transcript:
        (found,) = loaded[name].transcribe([clip], settings)
        return found

    return transcribe


@pytest.mark.parametrize(
    "settings",
    [
        DecodeSettings(),
        DecodeSettings("en"),
        DecodeSettings("en", num_beams=3, max_new_tokens=10),
        DecodeSettings("en", prompt="what was said before"),
        DecodeSettings("en", temperatures=(0.0, 0.6), log_prob_threshold=-0.02, max_new_tokens=12),
        DecodeSettings("en", times="segment"),
        DecodeSettings("en", times="word"),
        DecodeSettings("en", scores=True, task="translate"),
    ],
    ids=["own language", "greedy", "beams", "prompt", "fallback", "segments", "words", "translate"],
)
def test_mixed_people_are_understood_as_each_is_alone_with_peft(
    settings: DecodeSettings,
    engine: MixedRecognizer,
    people: dict[str, LoadedAdapter | None],
    clips: list[np.ndarray],
    alone: Callable[[str, np.ndarray, DecodeSettings], Transcript],
) -> None:
    found = engine.transcribe(rows_of(people, clips, settings))
    wanted = [alone(name, clip, settings) for clip in clips for name in KINDS]
    assert texts(found) == texts(wanted)
    assert [t.language for t in found] == [t.language for t in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.timed == other.timed and one.temperature == other.temperature
        assert [(s.start, s.end, s.text) for s in one.segments] == [(s.start, s.end, s.text) for s in other.segments]
        if one.mean_log_prob is not None:
            assert one.mean_log_prob == pytest.approx(other.mean_log_prob, abs=1e-4)
    assert len(set(texts(found))) > len(clips) * 2  # the adapters do say different things


def test_everybody_s_own_phrases_and_settings_share_a_batch(
    engine: MixedRecognizer,
    people: dict[str, LoadedAdapter | None],
    clips: list[np.ndarray],
    alone: Callable[[str, np.ndarray, DecodeSettings], Transcript],
) -> None:
    helps = [PhraseHelp(("water", "good night"), only=True, threshold=0.0), PhraseHelp(("yes", "no", "later"))]
    kinds = [
        DecodeSettings("en", phrases=helps[0]),
        DecodeSettings("en", phrases=helps[1], scores=True),
        DecodeSettings(None, num_beams=2, max_new_tokens=10),
        DecodeSettings("de", prompt="anders"),
    ]
    rows = [Row(clip, people[name], kinds[(i + j) % 4]) for i, clip in enumerate(clips) for j, name in enumerate(KINDS)]
    wanted = [alone(name, clip, kinds[(i + j) % 4]) for i, clip in enumerate(clips) for j, name in enumerate(KINDS)]
    found = engine.transcribe(rows)
    assert texts(found) == texts(wanted)
    assert [t.phrase for t in found] == [t.phrase for t in wanted] and any(t.phrase for t in found)
    assert [t.phrase_score for t in found] == pytest.approx([t.phrase_score for t in wanted], abs=1e-4)


def test_after_an_exception_in_the_middle_of_a_batch_nobody_answers_in_another_s_name(
    engine: MixedRecognizer,
    people: dict[str, LoadedAdapter | None],
    clips: list[np.ndarray],
    alone: Callable[[str, np.ndarray, DecodeSettings], Transcript],
) -> None:
    """The common mistake (peft issue 3475): hooks of the failed call serve the next one of the same size."""
    settings = DecodeSettings("en")
    layer = engine.whisper.model.model.decoder.layers[1].fc2
    calls = 0

    def fail(*_args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")

    hook = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.transcribe(rows_of(people, clips, settings))
    hook.remove()
    assert engine.mixture.rows == ()
    plain = torch.randn(24, 5, engine.whisper.model.config.d_model)
    attention = engine.whisper.model.model.encoder.layers[0].self_attn.q_proj
    assert torch.equal(attention(plain), attention.base(plain))
    names = list(KINDS)
    for name, clip in zip(names, clips, strict=False):
        (found,) = engine.transcribe([Row(clip, people[name], settings)])
        assert found.text == alone(name, clip, settings).text


def test_the_language_is_found_out_with_the_speaker_s_own_adapter(
    engine: MixedRecognizer,
    people: dict[str, LoadedAdapter | None],
    clips: list[np.ndarray],
    openai_shaped: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The common mistake is to ask the base model."""
    folders = [
        make_adapter(
            tmp_path / str(seed),
            base=openai_shaped,
            seed=seed,
            target_modules=("all-linear",),
            scale=3.0,
            language=None,
        )
        for seed in range(4)
    ]
    loaded = [read_adapter(folder, name=folder.name, version="1", base=engine) for folder in folders]
    wanted = [
        load_recognizer(str(folder), device="cpu").transcribe([clips[0]], DecodeSettings())[0] for folder in folders
    ]
    found = engine.transcribe([Row(clips[0], adapter, DecodeSettings()) for adapter in loaded])
    assert [t.language for t in found] == [t.language for t in wanted]
    assert len({t.language for t in found}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        DecodeSettings(scores=True),
        DecodeSettings("en", num_beams=2, max_new_tokens=10),
        DecodeSettings("en", times="word"),
        DecodeSettings("en", phrases=PhraseHelp(("water", "good night"), only=True, threshold=0.0)),
        DecodeSettings("en", temperatures=(0.0, 0.6), log_prob_threshold=-0.02, max_new_tokens=12),
    ],
    ids=["own language", "beams", "words", "phrases", "fallback"],
)
def test_clips_of_every_length_share_a_batch_and_none_hears_what_fills_it_up(
    settings: DecodeSettings,
    engine: MixedRecognizer,
    people: dict[str, LoadedAdapter | None],
    openai_shaped: Path,
    clips: list[np.ndarray],
    alone: Callable[[str, np.ndarray, DecodeSettings], Transcript],
) -> None:
    """The base model among them, with its 30 s."""
    some = [np.resize(clips[i % 3], length) for i, length in enumerate((20_000, 900, 47_000, 24_000))]
    base = load_recognizer(str(openai_shaped), device="cpu")
    pairs = list(zip([*KINDS, "base"], [*some, some[0]], strict=True))
    found = engine.transcribe([Row(clip, people[name], settings) for name, clip in pairs])
    wanted = [
        base.transcribe([clip], settings)[0] if name == "base" else alone(name, clip, settings) for name, clip in pairs
    ]
    assert texts(found) == texts(wanted)
    assert [t.language for t in found] == [t.language for t in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert [(w.start, w.end) for s in one.segments for w in s.words] == [
            (w.start, w.end) for s in other.segments for w in s.words
        ]
        if other.mean_log_prob is not None:
            assert one.mean_log_prob == pytest.approx(other.mean_log_prob, abs=1e-4)


def test_phrases_of_all_lengths_are_decoded_together_and_not_with_half_a_minute(
    engine: MixedRecognizer, people: dict[str, LoadedAdapter | None]
) -> None:
    sizes = [engine.batch_positions(samples, people["bo"]) for samples in (1_000, 30_000, 80_000, 200_000, 460_000)]
    assert sizes == [300, 300, 300, 750, 1500] and engine.batch_positions(1_000, None) == 1500


def test_what_no_clip_can_be_decoded_with_is_said_before_one_is(engine: MixedRecognizer, openai_shaped: Path) -> None:
    with pytest.raises(DataError, match="tlh"):
        engine.check(DecodeSettings("tlh"), None)
    with pytest.raises(DataError, match="Shorten it"):
        engine.check(DecodeSettings("en", phrases=PhraseHelp(("long " * 500,))), None)
    engine.check(DecodeSettings("de", num_beams=3, phrases=PhraseHelp(("kurz",))), None)


def test_an_adapter_is_not_served_as_the_base(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="Serve its base model"):
        load_mixed(str(folders["alice"]), device="cpu")


@pytest.mark.parametrize("times", ["none", "segment"])
def test_texts_that_end_at_different_times_stay_with_their_adapters(
    times: Literal["none", "segment"],
    make_adapter: Callable[..., Path],
    clips: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a model that ends its texts, a batch gets shorter while it is decoded; not all adapters know of times."""
    for module in (mixed_engine, torch_engine):  # the random ones have not forgotten all of it: 0.57 to 1.0
        monkeypatch.setattr(module, "WRITES_TIMES", 0.9)
    base = Path(folder_of("resonance/nano"))
    engine = load_mixed(str(base), device="cpu")
    scales = (0.05, 0.1, 0.3, 2.0)
    folders = [
        make_adapter(tmp_path / str(i), base=base, seed=i, rank=1 + i, target_modules=("all-linear",), scale=scale)
        for i, scale in enumerate(scales)
    ]
    loaded = [read_adapter(folder, name=folder.name, version="1", base=engine) for folder in folders]
    settings = DecodeSettings("en", times=times, scores=True)
    found = engine.transcribe([Row(clip, adapter, settings) for clip in clips for adapter in loaded])
    people = [load_recognizer(str(folder), device="cpu") for folder in folders]
    wanted = [person.transcribe([clip], settings)[0] for clip in clips for person in people]
    assert texts(found) == texts(wanted)
    assert [t.timed for t in found] == [t.timed for t in wanted]
    assert len({len(text.split()) for text in texts(found)}) > 2
    if times == "segment":
        assert {t.timed for t in found} == {True, False}
