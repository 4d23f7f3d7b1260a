"""Cues that can be read: short enough, one after the other, nothing lost."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

from resonance.transcribe.subtitles import Layout, columns, cues, srt, vtt

ENGLISH = "This is a rather long sentence, which goes on and on. Then there is another; and one more after it."
CHINESE = "今天天气很好，我们去公园散步，看到了很多花和树。然后我们回家吃饭，他说“你好”，hello world 再见。"


def segment(start: float, end: float, text: str, words: list[tuple[float, float, str]] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"start": start, "end": end, "text": text}
    if words:
        found["words"] = [{"start": a, "end": b, "word": word, "confidence": 0.9} for a, b, word in words]
    return found


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("layout", [Layout(), Layout(20, 1, 3.0), Layout(8, 2, 0.7), Layout(200, 5, 60.0)])
def test_any_segments_become_cues_that_fit_and_follow_each_other(layout: Layout) -> None:
    draw = random.Random(0)
    for _round in range(40):
        segments, now = [], 0.0
        for _segment in range(6):
            start = max(now + draw.choice([-0.5, 0.0, 0.0, 1.0]), 0.0)  # also out of order
            now = start + draw.choice([0.0, 0.02, 1.0, 5.0, 30.0])
            source = draw.choice([ENGLISH, CHINESE, "Yes.", "http://example.org/" + "x" * 90])
            segments.append(segment(start, now, source[: draw.randrange(1, len(source) + 1)]))
        made = cues({"duration": now, "segments": segments}, layout)
        assert squeezed("".join("".join(cue.lines) for cue in made)) == squeezed("".join(s["text"] for s in segments))
        assert all(cue.start < cue.end <= cue.start + layout.seconds * 1000 + 1 for cue in made)
        assert all(a.end <= b.start for a, b in itertools.pairwise(made))
        assert all(1 <= len(cue.lines) <= layout.line_count for cue in made)
        if total := round(now * 1000):
            assert made[-1].end <= max(total, len(made))  # ms; at least one for each
            shortest = min(500, int(layout.seconds * 1000), total // len(made))
            assert all(cue.end - cue.start >= shortest for cue in made)
        # Closing punctuation may hang over by the characters that it must not be parted from.
        assert all(columns(line) <= layout.line_length + 8 for cue in made for line in cue.lines)


def test_words_with_times_say_when_a_long_segment_is_divided() -> None:
    words = [(i * 1.0, i * 1.0 + 0.5, f" word{i}") for i in range(12)]
    (first, second) = cues({"segments": [segment(0, 11.5, "".join(w for _a, _b, w in words), words)]}, Layout())
    assert (first.start, first.end) == (0, 6500) and first.lines == ("word0 word1 word2 word3 word4 word5 word6",)
    assert (second.start, second.end) == (7000, 11500)


def test_without_word_times_a_long_segment_is_divided_in_proportion_to_its_width() -> None:
    made = cues({"segments": [segment(10.0, 20.0, "aaaa bbbb 天天天天 cccc")]}, Layout(9, 1, 60.0))
    assert [cue.lines for cue in made] == [("aaaa bbbb",), ("天天天天",), ("cccc",)]
    assert made[0].start == 10_000 and made[-1].end == 20_000
    assert made[1].end - made[1].start == pytest.approx(10_000 * 9 / 23, abs=2)  # four wide characters and a space


def test_a_wide_character_counts_as_two_and_a_line_does_not_begin_with_a_full_stop() -> None:
    assert (columns("ab"), columns("我想"), columns("e\u0301"), columns("ﾊ")) == (2, 4, 1, 1)
    made = cues({"segments": [segment(0, 2, "我想喝水。谢谢。")]}, Layout(8, 2, 7.0))
    assert [cue.lines for cue in made] == [("我想喝", "水。"), ("谢谢。",)]


def test_a_division_falls_behind_punctuation_where_that_is_not_too_early() -> None:
    made = cues({"segments": [segment(0, 6, "one two three, four five six seven")]}, Layout(20, 1, 7.0))
    assert [cue.lines[0] for cue in made] == ["one two three,", "four five six seven"]


def test_a_coarse_time_is_no_reason_to_stay_longer_than_asked_and_none_to_flash() -> None:
    made = cues({"duration": 60.0, "segments": [segment(0, 30, "Hello"), segment(40.0, 40.0, "Bye")]}, Layout())
    assert [(cue.start, cue.end) for cue in made] == [(0, 7000), (40_000, 40_500)]


def test_segments_that_were_clamped_to_the_end_are_read_within_the_recording() -> None:
    short = [segment(0.0, 2.8, "Good morning."), segment(3.0, 3.0, "Bye.")]
    (cue,) = cues({"duration": 3.0, "segments": short}, Layout())
    assert (cue.start, cue.end, cue.lines) == (0, 3000, ("Good morning. Bye.",))

    many = [segment(0.0, 3.0, ENGLISH[:70]), *(segment(3.0, 3.0, f"sentence number {i}") for i in range(8))]
    made = cues({"duration": 3.0, "segments": many}, Layout())
    assert made[-1].end == 3000 and all(cue.end - cue.start >= 500 for cue in made)
    assert " ".join(" ".join(cue.lines) for cue in made) == " ".join(s["text"] for s in many)


def test_a_flash_joins_what_is_near_and_else_takes_time_from_the_cue_before() -> None:
    before, flash, after = segment(0, 3, "one"), segment(3.0, 3.1, "two"), segment(3.1, 6, "three")
    assert shown([before, flash, after]) == [(0, 3100, "one two"), (3100, 6000, "three")]
    assert shown([flash, after]) == [(3000, 6000, "two three")]
    assert shown([segment(0, 1, "我们"), segment(1, 1, "你好"), segment(1, 3, "x")])[0] == (0, 1000, "我们你好")
    # Neither fits: the line is full.
    full, full_too = segment(0, 3, "o" * 84), segment(3.1, 6, "t" * 84)
    assert [cue[:2] for cue in shown([full, flash, full_too])] == [(0, 2600), (2600, 3100), (3100, 6000)]


def shown(segments: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [
        (cue.start, cue.end, " ".join(cue.lines)) for cue in cues({"duration": 6.0, "segments": segments}, Layout())
    ]


def test_times_behind_the_end_of_the_recording_are_brought_into_it() -> None:
    row = {"duration": 2.0, "segments": [segment(0.0, 1.0, "a" * 80), segment(2.5, 9.0, "b" * 80)]}
    assert cues(row, Layout())[-1].end == 2000


def test_subrip_and_webvtt_look_as_players_expect() -> None:
    row = {
        "duration": 360_002.0,
        "segments": [segment(0.0, 1.2345, "a < b & c --> d"), segment(360_000.0, 360_001.9996, "end")],
    }
    assert "".join(srt(row, Layout())) == (
        "1\n00:00:00,000 --> 00:00:01,234\na < b & c -> d\n\n2\n100:00:00,000 --> 100:00:02,000\nend\n\n"
    )
    assert "".join(vtt(row, Layout())) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.234\na &lt; b &amp; c --&gt; d\n\n100:00:00.000 --> 100:00:02.000\nend\n\n"
    )


def test_silence_gives_no_cue() -> None:
    assert "".join(srt({"duration": 3.0, "text": "", "segments": []}, Layout())) == ""
    assert (
        "".join(vtt({"duration": 3.0, "segments": [segment(0, 1, " "), segment(1, 2, "\u200b")]}, Layout()))
        == "WEBVTT\n\n"
    )
