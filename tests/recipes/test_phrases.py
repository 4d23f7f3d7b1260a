from __future__ import annotations

import re

import numpy as np
from recipes.nano import phrases


def test_no_phrase_is_on_both_sides() -> None:
    random = np.random.default_rng(0)
    trained = {phrases.draw(language, random) for language in ("en", "zh") for _ in range(3000)}
    held_out = {phrases.draw(language, random, "held out") for language in ("en", "zh") for _ in range(300)}
    assert len(trained) > 3000
    assert not trained & held_out


def test_one_phrase_in_twenty_is_held_out() -> None:
    share = sum(phrases.held_out(f"phrase {i}") for i in range(4000)) / 4000
    assert 0.04 < share < 0.065


def test_spaces_do_not_put_a_phrase_on_the_other_side() -> None:
    assert all(phrases.held_out(f"我要 pizza {i}") == phrases.held_out(f"我要pizza{i}") for i in range(200))


def test_phrases_are_plain_and_short() -> None:
    random = np.random.default_rng(1)
    for _ in range(2000):
        english = phrases.draw("en", random)
        assert re.fullmatch(r"[a-z']+( [a-z']+){0,8}", english), english
        mandarin = phrases.draw("zh", random)
        assert re.fullmatch(r"[一-鿿a-z ]+", mandarin), mandarin
        assert phrases.length(mandarin) <= 14


def test_the_vocabulary_is_wide_and_all_of_it_is_said() -> None:
    words, characters = phrases.vocabulary()
    assert len(words) >= 500
    assert len(characters) >= 500
    random = np.random.default_rng(2)
    english = {word for _ in range(20_000) for word in phrases.draw("en", random).split()}
    mandarin = set("".join(phrases.draw("zh", random) for _ in range(20_000)))
    assert len(set(words) - english) < 15  # a few are only in mixed phrases
    assert not set(characters) - mandarin
