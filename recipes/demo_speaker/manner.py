"""How the demo speaker speaks: slow, with imprecise consonants, breaks, a tremor and audible breath.

It imitates what listeners hear in dysarthria closely enough to try the software out. It is no model of any person or
illness.
"""

from __future__ import annotations

import re

import numpy as np
from recipes.nano import speech

from resonance.units import SAMPLE_RATE

# Places of articulation move forward and friction is lost, always in the same way: what a listener can get used to.
# Names of sounds are eSpeak NG's; longer ones stand first.
ENGLISH = {"tS": "ts", "dZ": "d", "k": "t", "g": "d", "S": "s", "s": "T", "z": "D", "r": "w", "l": "w"}
MANDARIN = {
    "tS;h": "tsh",
    "tS;": "ts",
    "S;": "s",
    "ts.h": "tsh",
    "ts.": "ts",
    "s.": "s",
    "kh": "th",
    "k": "t",
    "l": "n",
}
CONSTANCY = 0.95  # share of the sounds that are changed; the speaker gets the others right

VOICE = speech.Voice(variant=speech.DEMO, accent="en-gb-scotland", rate=100, pitch=30, pitch_range=25, size=0.92)


def speak(text: str, language: str, random: np.random.Generator) -> speech.Said:
    """One take of a phrase. Each take is a little different."""
    voice = speech.Voice(
        variant=VOICE.variant,
        accent=VOICE.accent,
        rate=VOICE.rate + int(random.integers(-6, 7)),
        pitch=VOICE.pitch + int(random.integers(-5, 6)),
        pitch_range=VOICE.pitch_range,
        size=VOICE.size * float(random.uniform(0.985, 1.015)),
    )
    sounds = imprecise(speech.phonemes_of(text, language, voice), language, random)
    audio = speech.say_phonemes(sounds, language, voice).audio
    for change in (smear, tremble, breathe, pause):
        audio = change(audio, random)
    return speech.Said(audio, ())


def imprecise(sounds: str, language: str, random: np.random.Generator) -> str:
    table = MANDARIN if language == "zh" else ENGLISH
    pattern = "|".join(re.escape(sound) for sound in sorted(table, key=len, reverse=True))
    return re.sub(pattern, lambda found: table[found[0]] if random.random() < CONSTANCY else found[0], sounds)


def smear(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Sounds run into each other over 24 ms, and the hiss of consonants above 2.5 kHz is 6-10 dB weaker."""
    window, hop = 512, 128
    frames, edges = _frames(audio, window, hop)
    spectrum = np.fft.rfft(frames)
    size = np.abs(spectrum)
    kernel = np.hanning(5)[1:-1]
    smooth = np.apply_along_axis(np.convolve, 0, size, kernel / kernel.sum(), mode="same")
    frequency = np.fft.rfftfreq(window, 1 / SAMPLE_RATE)
    weaker = 10 ** (-random.uniform(6, 10) / 20 / (1 + np.exp(-(frequency - 2500) / 300)))
    return _joined(np.fft.irfft(spectrum * (smooth / np.maximum(size, 1e-7)) * weaker), edges, hop)


def tremble(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Loudness and pitch go up and down four to seven times a second; loudness also drifts and fades towards the end."""
    seconds = np.arange(len(audio)) / SAMPLE_RATE
    rate = random.uniform(4.2, 6.5)
    phase = 2 * np.pi * rate * seconds + random.uniform(0, 2 * np.pi)
    # A sine of this size in time makes the pitch swing by 2.5 %.
    warped = np.interp(seconds + 0.025 / (2 * np.pi * rate) * np.sin(phase), seconds, audio)
    knots = np.linspace(0, max(seconds[-1], 0.1), 5)
    drift = np.interp(seconds, knots, random.uniform(-3, 3, 5) - np.linspace(0, 4, 5))
    return (warped * (1 - 0.15 * (1 + np.sin(1.03 * phase))) * 10 ** (drift / 20)).astype(np.float32)


def breathe(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Breath that leaks while speaking, 19-23 dB below the voice, and is drawn in before it."""
    noise = speech.coloured_noise(len(audio), random)
    envelope = np.sqrt(np.convolve(audio**2, np.ones(1600) / 1600, mode="same"))
    leaking = audio + noise * envelope * 10 ** (-random.uniform(19, 23) / 20)
    drawn = int(random.uniform(0.15, 0.4) * SAMPLE_RATE)
    breath = speech.coloured_noise(drawn, random) * np.sin(np.linspace(0, np.pi, drawn)) ** 2
    return np.concatenate([breath * float(envelope.max()) * 10 ** (-26 / 20), leaking]).astype(np.float32)


def pause(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One break in two seconds or so, 60-200 ms, at soft places: inside words as well as between them."""
    hop = 160
    loudness = np.array([float(np.mean(audio[i : i + 400] ** 2)) for i in range(0, len(audio) - 400, hop)])
    inside = np.arange(30, len(loudness) - 15)
    for _ in range(int(random.poisson(len(audio) / SAMPLE_RATE / 2.2))):
        if len(inside) < 5:
            break
        offered = random.choice(inside, 5)
        at = int(offered[np.argmin(loudness[offered])]) * hop
        silence = 0.002 * random.standard_normal(int(random.uniform(0.06, 0.2) * SAMPLE_RATE))
        fade = np.ones(len(audio))
        fade[max(0, at - 240) : at] = np.linspace(1, 0.1, at - max(0, at - 240))
        fade[at : at + 480] = np.linspace(0.1, 1, len(fade[at : at + 480]))  # a weak onset
        audio = audio * fade
        audio = np.concatenate([audio[:at], silence, audio[at:]])
        loudness = np.insert(loudness, at // hop, np.full(len(silence) // hop, np.inf))
        inside = np.arange(30, len(loudness) - 15)
    return audio.astype(np.float32)


def _frames(audio: np.ndarray, window: int, hop: int) -> tuple[np.ndarray, tuple[int, int]]:
    padded = np.pad(audio, (window, window + hop))
    count = (len(padded) - window) // hop + 1
    index = np.arange(window) + hop * np.arange(count)[:, None]
    return padded[index] * np.hanning(window), (window, window + len(audio))


def _joined(frames: np.ndarray, edges: tuple[int, int], hop: int) -> np.ndarray:
    """Overlapping frames [count, window] added up again; hann windows at a quarter's hop sum to 2."""
    window = frames.shape[1]
    audio = np.zeros(hop * (len(frames) - 1) + window)
    for i, frame in enumerate(frames):
        audio[i * hop : i * hop + window] += frame / 2
    return audio[edges[0] : edges[1]].astype(np.float32)
