"""Speech from eSpeak NG, and what a room, a microphone and a tired day do to it.

eSpeak NG (GPL 3) is called through ctypes from the PyPI package `espeakng-loader`. Only the recipes need it; the package
neither links to it nor ships it. Everything is drawn from the generator that is passed in: the same seed gives the same audio in
a fresh process (eSpeak NG keeps some state from one phrase to the next).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr

from resonance.units import SAMPLE_RATE

ENGLISH = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
MANDARIN = ("cmn",)
_TRAINED = (
    "m1 m2 m3 m4 m5 m6 m7 f1 f2 f3 f4 croak klatt klatt2 klatt3 klatt4 Alex Alicia Andy Annie Denis Diogo Gene Gene2 "
    "Henrique Hugo Jacky Lee Marco Mario Michael Nguyen Reed RicishayMax RicishayMax3 adam anika announcer antonio "
    "benjamin boris caleb ed edward edward2 fast grandpa gustave ian iven iven3 john kaukovalta marcelo max michel miguel "
    "norbert pablo paul pedro quincy robert robosoft2 robosoft5 sandro shelby steph steph2 travis victor zac"
)
TRAINED = tuple(_TRAINED.split())  # `rob` is left out: eSpeak NG 1.52 crashes on its f
HELD_OUT = ("m8", "f5", "Andrea", "Mike", "david", "linda", "belinda", "klatt5")  # only ever heard in scoring
DEMO = "grandma"  # the demo speaker's, in neither list

# espeak-ng/speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2  # retrieval (1) hands over to a thread and waits 20 ms for each phrase
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8, _PHONEMES = 1, 0x100
_TELL_PHONEMES, _LAST_EVENT, _PHONEME_EVENT = 1, 0, 7


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True, slots=True)
class Voice:
    """One manner of speaking. `rate` is words a minute, `pitch` and `pitch_range` 0-99; `size` shifts pitch and formants."""

    variant: str
    accent: str  # of the English
    rate: int
    pitch: int
    pitch_range: int
    size: float


@functools.cache
def _library() -> tuple[Any, int, list[np.ndarray], list[tuple[float, str]], Any]:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(
        _AUDIO_OUTPUT_SYNCHRONOUS, 400, espeakng_loader.get_data_path().encode(), _TELL_PHONEMES
    )
    parts: list[np.ndarray] = []
    sounds: list[tuple[float, str]] = []

    def receive(samples: Any, count: int, events: Any) -> int:
        if count > 0 and samples:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _LAST_EVENT:
            event = events[index]
            if event.type == _PHONEME_EVENT:
                sounds.append((event.audio_position / 1000, event.name.decode(errors="replace")))
            index += 1
        return 0

    callback = _Callback(receive)  # kept alive by the cache
    library.espeak_SetSynthCallback(callback)
    return library, rate, parts, sounds, callback


@dataclass(frozen=True, slots=True)
class Said:
    """A phrase without the silence around it: float32 [samples] at 16 kHz, and when which sound begins, in seconds."""

    audio: np.ndarray
    sounds: tuple[tuple[float, str], ...]


def say(text: str, language: str, voice: Voice) -> Said:
    """`text` in a voice."""
    return _synthesise(text, language, voice, _UTF8)


def say_phonemes(phonemes: str, language: str, voice: Voice) -> Said:
    """As `say`, of eSpeak NG's own names of sounds."""
    return _synthesise(f"[[{phonemes}]]", language, voice, _UTF8 | _PHONEMES)


def phonemes_of(text: str, language: str, voice: Voice) -> str:
    """eSpeak NG's names of the sounds of `text`, words apart."""
    library = _library()[0]
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int]
    _set_voice(language, voice)
    rest = ctypes.c_char_p(text.encode())
    clauses = []
    while rest.value:
        clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, 0) or b"")
    return b" ".join(clauses).decode()


def _set_voice(language: str, voice: Voice) -> None:
    library = _library()[0]
    name = f"{'cmn' if language == 'zh' else voice.accent}+{voice.variant}"
    if library.espeak_SetVoiceByName(name.encode()) != 0:
        raise ValueError(f"eSpeak NG has no voice {name}")
    for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)):
        library.espeak_SetParameter(parameter, value, 0)


def _synthesise(text: str, language: str, voice: Voice, flags: int) -> Said:
    library, rate, parts, sounds, _callback = _library()
    _set_voice(language, voice)
    parts.clear()
    sounds.clear()
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 0, 0, flags, None, None)
    library.espeak_Synchronize()
    if not parts:
        raise ValueError(f"eSpeak NG said nothing for {text!r} as {voice.variant}")
    audio = np.concatenate(parts).astype(np.float32) / 32768
    audio = soxr.resample(audio, rate * voice.size, SAMPLE_RATE, quality="MQ")
    first, last = spoken_part(audio)
    times = tuple((at / voice.size - first / SAMPLE_RATE, name) for at, name in sounds)
    return Said(audio[first:last], times)


def spoken_part(audio: np.ndarray) -> tuple[int, int]:
    """First and last sample of what is not softer than 1 % of the peak, with 10 ms more on both sides."""
    loud = np.flatnonzero(np.abs(audio) > 0.01 * max(float(np.abs(audio).max(initial=0.0)), 1e-6))
    if not len(loud):
        return 0, len(audio)
    edge = SAMPLE_RATE // 100
    return max(0, int(loud[0]) - edge), int(loud[-1]) + edge


def draw_voice(random: np.random.Generator, variants: tuple[str, ...] = TRAINED) -> Voice:
    return Voice(
        variant=variants[random.integers(len(variants))],
        accent=ENGLISH[random.integers(len(ENGLISH))] if random.random() < 0.6 else "en-us",
        rate=int(random.integers(110, 231)),
        pitch=int(random.integers(15, 86)),
        pitch_range=int(random.integers(15, 91)),
        size=float(random.uniform(0.86, 1.16)),
    )


def add_room(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """With the echo of a made-up room (decay 0.1-0.6 s) and a microphone's frequency response, equally long."""
    seconds = random.uniform(0.1, 0.6)
    impulse = np.zeros(int(seconds * SAMPLE_RATE), dtype=np.float32)
    impulse[0] = 1.0
    delay = int(random.uniform(0.002, 0.02) * SAMPLE_RATE)
    tail = random.standard_normal(len(impulse) - delay).astype(np.float32)
    tail *= np.exp(-6.9 * np.arange(len(tail), dtype=np.float32) / len(tail))
    impulse[delay:] += tail * (random.uniform(0.05, 0.7) / np.sqrt((tail**2).sum()))
    length = _fast_length(len(audio) + len(impulse))
    spectrum = np.fft.rfft(audio, length) * np.fft.rfft(impulse, length) * _response(length, random)
    return np.fft.irfft(spectrum, length)[: len(audio)].astype(np.float32)


def _response(length: int, random: np.random.Generator) -> np.ndarray:
    """A tilt of up to 9 dB over the band, and for some a narrow band such as a telephone's."""
    frequency = np.fft.rfftfreq(length, 1 / SAMPLE_RATE).astype(np.float32)
    gain = 10 ** (random.uniform(-9, 9) / 20 * (frequency / 8000 - 0.5))
    if random.random() < 0.25:
        low, high = random.uniform(80, 300), random.uniform(3000, 7500)
        gain = gain * (1 / (1 + (low / np.maximum(frequency, 1)) ** 6)) * (1 / (1 + (frequency / high) ** 12))
    return gain


def coloured_noise(samples: int, random: np.random.Generator) -> np.ndarray:
    """Noise of unit power whose spectrum falls by 0-12 dB an octave (white, pink, brown and between), some with a hum."""
    length = _fast_length(samples)
    frequency = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    shape = np.maximum(frequency, 50.0) ** -random.uniform(0.0, 2.0)
    spectrum = shape * np.exp(2j * np.pi * random.random(len(shape)))
    noise = np.fft.irfft(spectrum, length)[:samples]
    if random.random() < 0.2:
        hum = random.choice([50.0, 60.0]) * np.arange(1, 6)[:, None]
        noise = noise / noise.std() + np.sin(2 * np.pi * hum * np.arange(samples) / SAMPLE_RATE).sum(0) * 0.3
    return (noise / max(float(noise.std()), 1e-9)).astype(np.float32)


def add_noise(audio: np.ndarray, decibels: float, speech_power: float, random: np.random.Generator) -> np.ndarray:
    """With coloured noise `decibels` below the speech."""
    noise = coloured_noise(len(audio), random)
    return audio + noise * np.float32(np.sqrt(speech_power / 10 ** (decibels / 10)))


@dataclass(frozen=True, slots=True)
class Recording:
    """float32 [samples] at 16 kHz within +-1, each phrase's (start, end) and each sound's start, in seconds."""

    audio: np.ndarray
    phrases: tuple[tuple[float, float], ...]
    sounds: tuple[tuple[float, str], ...]


def record(spoken: list[Said], random: np.random.Generator, *, clean: bool = False) -> Recording:
    """Phrases said one after the other: silence around them, room, noise, level. `clean` leaves room and noise out."""
    pieces: list[np.ndarray] = []
    times: list[tuple[float, float]] = []
    sounds: list[tuple[float, str]] = []
    at = 0
    for index, said in enumerate(spoken):
        pause = int((random.uniform(0.0, 0.6) if index == 0 else random.uniform(0.25, 1.0)) * SAMPLE_RATE)
        pieces += [np.zeros(pause, dtype=np.float32), said.audio]
        start, at = at + pause, at + pause + len(said.audio)
        times.append((start / SAMPLE_RATE, at / SAMPLE_RATE))
        sounds += [(start / SAMPLE_RATE + seconds, name) for seconds, name in said.sounds]
        sounds.append((at / SAMPLE_RATE, "_"))
    pieces.append(np.zeros(int(random.uniform(0.0, 0.6) * SAMPLE_RATE), dtype=np.float32))
    audio = np.concatenate(pieces)
    power = float(np.mean(np.concatenate([said.audio for said in spoken]) ** 2)) + 1e-12
    if not clean:
        if random.random() < 0.35:
            audio = add_room(audio, random)
        if random.random() < 0.6:
            audio = add_noise(audio, 40 - 35 * random.random() ** 2, power, random)
    return Recording(set_level(audio, random.uniform(-36, -12), random), tuple(times), tuple(sounds))


def set_level(audio: np.ndarray, decibels: float, random: np.random.Generator) -> np.ndarray:
    """At a root mean square of `decibels` below full scale, never clipped, with a trace of noise as every recorder has."""
    audio = audio * np.float32(10 ** (decibels / 20) / (float(np.sqrt(np.mean(audio**2))) + 1e-9))
    audio = audio / max(1.0, float(np.abs(audio).max()) / 0.99)
    floor = 10 ** (random.uniform(-90, -66) / 20)
    return (audio + np.float32(floor) * random.standard_normal(len(audio)).astype(np.float32)).astype(np.float32)


def nothing_said(seconds: float, random: np.random.Generator) -> np.ndarray:
    """Silence, noise, or a hum: what a recognizer must answer with no text."""
    samples = int(seconds * SAMPLE_RATE)
    if random.random() < 0.2:
        return np.zeros(samples, dtype=np.float32)
    audio = coloured_noise(samples, random)
    if random.random() < 0.3:  # knocks and clicks
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(samples))
            knock = coloured_noise(1600, random) * np.exp(-np.arange(1600) / random.uniform(50, 400))
            audio[at : at + 1600] += (knock * random.uniform(3, 20))[: samples - at].astype(np.float32)
    return set_level(audio, random.uniform(-70, -20), random)


def _fast_length(samples: int) -> int:
    """A length at least so long whose transform is fast: a multiple of 4096."""
    return -(-samples // 4096) * 4096
