"""Streams through torch's worker processes: which recordings come, decoded, and again after a stop."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import streamed

from resonance.data.audio_context import AudioContext
from resonance.data.augment import Augmentation
from resonance.data.batches import ClipMaker, Collator
from resonance.data.choice import Choice
from resonance.data.clip_stream import ClipStream, Layout, Progress, Step, step_loader
from resonance.data.samples import Source
from resonance.data.sources import open_source
from resonance.data.tokens import LabelTokenizer
from resonance.errors import DataError

CLIPS = 23


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> LabelTokenizer:
    from resonance.model.load import load_tokenizer

    return LabelTokenizer(*load_tokenizer(str(tiny_model)), "en")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("shards")
    for i, (first, count) in enumerate(((0, 9), (9, 2), (11, 12))):
        streamed.write_tar(folder / f"{i}.tar", streamed.clips(first, count))
    return open_source(folder)


def stream(
    source: Source,
    tokenizer: LabelTokenizer,
    *,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    skip: bool = False,
    **changes: Any,
) -> ClipStream:
    layout = Layout(
        seed=7, rank=rank, ranks=ranks, workers=workers, **{"accumulation": 1, "batch": 2, "buffer": 12} | changes
    )
    make = ClipMaker(tokenizer, Augmentation(speed=0.1, max_seconds=30.0, gain_db=3), 0.0)
    collate = Collator(AudioContext("auto", 0.6), 80, tokenizer.special("<|endoftext|>"))
    return ClipStream(source, make, collate, Choice(0.1, 30.0, None), layout, skip=skip)


def said(step: Step, tokenizer: LabelTokenizer) -> list[str]:
    found = []
    for batch in step.batches:
        for labels in batch["labels"]:
            ids = [i for i in labels.tolist() if i >= 0]
            found.append(tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


def steps(one: ClipStream) -> Iterator[Step]:
    return iter(step_loader(one, pin_memory=False))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on two processors
@pytest.mark.parametrize(("ranks", "workers"), ((1, 0), (1, 3), (3, 0), (2, 2)))
def test_workers_of_all_ranks_give_each_recording_once_in_an_epoch(
    shards: Source, tokenizer: LabelTokenizer, ranks: int, workers: int
) -> None:
    readers = ranks * max(workers, 1)
    found: Counter[str] = Counter()
    for rank in range(ranks):
        one = stream(shards, tokenizer, rank=rank, ranks=ranks, workers=workers, batch=1)
        done: dict[int, int] = {}
        shares = {
            n: CLIPS * (rank * max(workers, 1) + n + 1) // readers - CLIPS * (rank * max(workers, 1) + n) // readers
            for n in range(max(workers, 1))
        }
        for step in steps(one):
            if done.get(step.reader, 0) < shares[step.reader]:
                found.update(said(step, tokenizer))
                done[step.reader] = done.get(step.reader, 0) + 1
            elif done == shares:
                break
    assert found == {f"clip {i}": 1 for i in range(CLIPS)}


@pytest.mark.parametrize("workers", (0, 2))
def test_batches_after_a_stop_are_bit_for_bit_those_of_a_run_that_was_not_stopped(
    shards: Source, tokenizer: LabelTokenizer, workers: int
) -> None:
    whole = list(itertools.islice(steps(stream(shards, tokenizer, workers=workers)), 14))
    for stopped in (1, 4, 7):  # with two workers it is the other's turn after an odd number
        again = stream(shards, tokenizer, workers=workers)
        again.begun = Progress(stopped, {step.reader: step.standing for step in whole[:stopped]})
        for one, other in zip(whole[stopped:], steps(again), strict=False):
            assert (one.reader, one.standing) == (other.reader, other.standing)
            for batch, same in zip(one.batches, other.batches, strict=True):
                assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_half_the_batch_with_twice_the_accumulation_is_the_same_recordings(
    shards: Source, tokenizer: LabelTokenizer
) -> None:
    for one, two in zip(
        itertools.islice(steps(stream(shards, tokenizer, batch=4)), 10),
        steps(stream(shards, tokenizer, batch=2, accumulation=2)),
        strict=False,
    ):
        assert len(one.batches) == 1 and len(two.batches) == 2
        features = torch.cat([batch["input_features"] for batch in two.batches])
        assert torch.equal(one.batches[0]["input_features"], features)
        assert said(one, tokenizer) == said(two, tokenizer)


def test_a_damaged_recording_is_named_or_left_out_when_told_to(
    tokenizer: LabelTokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    members = streamed.clips(0, 8)
    members[6] = ("0003.wav", streamed.wav()[:2000])
    members[8] = ("0004.wav", b"not a recording")
    members[11] = ("0005.json", b'{"text": "a recording without text", ')
    source = open_source(streamed.write_tar(tmp_path / "a.tar", members))
    with pytest.raises(DataError, match=r"a\.tar/000[345]"):
        list(itertools.islice(steps(stream(source, tokenizer)), 8))
    found = Counter(
        text
        for step in itertools.islice(steps(stream(source, tokenizer, skip=True)), 5)
        for text in said(step, tokenizer)
    )
    assert {"clip 3", "clip 4", "clip 5"}.isdisjoint(found) and len(found) == 5
    told = capfd.readouterr().err
    assert all(f"a.tar/000{i}" in told for i in (3, 4, 5)) and told.count("Left out:") >= 3


def test_a_recording_longer_than_listed_is_refused_instead_of_cut(tokenizer: LabelTokenizer, tmp_path: Path) -> None:
    members = [("1.wav", streamed.wav(3.0)), ("1.json", b'{"text": "long", "duration": 0.5}')]
    one = stream(open_source(streamed.write_tar(tmp_path / "a.tar", members)), tokenizer)
    one.choice = Choice(0.1, 1.0, None)
    with pytest.raises(DataError, match=r"a\.tar/1\.wav: 3\.00 seconds long, but listed with 0\.50"):
        next(steps(one))


def test_a_text_too_long_for_the_decoder_names_shard_and_key(tokenizer: LabelTokenizer, tmp_path: Path) -> None:
    members = [("talk.wav", streamed.wav()), ("talk.txt", b"x" * 500)]
    source = open_source(streamed.write_tar(tmp_path / "a.tar", members))
    with pytest.raises(DataError, match=r"a\.tar/talk\.wav.*tokens long"):
        next(steps(stream(source, tokenizer)))


def test_the_global_random_state_is_left_alone(shards: Source, tokenizer: LabelTokenizer) -> None:
    before = torch.get_rng_state()
    next(steps(stream(shards, tokenizer, workers=1)))
    assert torch.equal(before, torch.get_rng_state())
