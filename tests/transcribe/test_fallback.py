"""Which of several attempts at a text is kept."""

from __future__ import annotations

from collections.abc import Sequence

from resonance.transcribe.fallback import Decoded, compression_ratio, with_fallback
from resonance.transcribe.recognizer import DecodeSettings

FALLBACK_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LOOP, GOOD, POOR, WORSE = "no no no no no no no no no no no no no no no no no", "hello", "hallo", "hullo"
PROBABILITY = {LOOP: -0.1, GOOD: -0.3, POOR: -1.5, WORSE: -2.5}


def kept(
    attempts: list[list[str]], temperatures: tuple[float, ...] = FALLBACK_TEMPERATURES
) -> tuple[list[str], list[int]]:
    """The texts kept of what each row gives at one temperature after the other, and the rows decoded each time."""
    asked: list[int] = []
    tries = [0] * len(attempts)

    def attempt(rows: Sequence[int], temperature: float) -> list[Decoded]:
        asked.append(len(rows))
        found = []
        for row in rows:
            text = attempts[row][min(tries[row], len(attempts[row]) - 1)]
            tries[row] += 1
            found.append(Decoded([ord(c) for c in text], [PROBABILITY[text]], 0.0, temperature))
        return found

    settings = DecodeSettings(temperatures=temperatures)
    judged = with_fallback(attempt, lambda d: "".join(map(chr, d.ids)), len(attempts), settings)
    return [one.text for one in judged], asked


def test_only_what_looks_wrong_is_decoded_again() -> None:
    assert kept([[GOOD], [LOOP, GOOD], [POOR, LOOP, GOOD]]) == ([GOOD, GOOD, GOOD], [3, 2, 1])


def test_where_nothing_is_right_the_most_probable_that_is_no_loop_is_kept() -> None:
    assert kept([[LOOP, WORSE, POOR, WORSE]])[0] == [POOR]
    assert kept([[POOR, POOR, WORSE, LOOP, LOOP, WORSE]])[0] == [POOR]
    texts, asked = kept([[LOOP]])
    assert texts == [LOOP] and len(asked) == 6


def test_one_temperature_is_one_attempt() -> None:
    assert kept([[LOOP, GOOD], [GOOD]], (0.0,)) == ([LOOP, GOOD], [2])


def test_a_loop_compresses_well_and_speech_does_not() -> None:
    assert compression_ratio(LOOP) > 2.4
    assert compression_ratio("我想喝水" * 20) > 2.4
    assert compression_ratio("The quick brown fox jumps over the lazy dog and runs away.") < 1.5
    assert compression_ratio("") == 0.0


def test_silence_is_not_decoded_again() -> None:
    asked: list[int] = []

    def attempt(rows: Sequence[int], temperature: float) -> list[Decoded]:
        asked.append(len(rows))
        return [
            Decoded([97], [-2.0], probability, temperature) for probability in ([0.9, 0.1] if len(rows) == 2 else [0.1])
        ]

    with_fallback(attempt, lambda d: "a", 2, DecodeSettings(temperatures=(0.0, 0.2, 0.4)))
    assert asked == [2, 1, 1]
