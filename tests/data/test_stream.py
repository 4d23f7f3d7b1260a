"""Over all readers each sample once in an epoch; and on at the very next one."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import streamed

from resonance.data.lists import HeldList
from resonance.data.samples import Sample, Source, Unit
from resonance.data.sources import TarShards, open_source
from resonance.data.stream import Reading, Standing, share, strided
from resonance.errors import DataError

SHARDS = (5, 1, 9, 3, 12)  # samples


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Five tar files of different lengths, counted."""
    folder = tmp_path_factory.mktemp("uneven")
    first = 0
    for i, count in enumerate(SHARDS):
        streamed.write_tar(folder / f"{i}.tar", streamed.clips(first, count, duration=0.2))
        first += count
    return open_source(folder)


def uncounted(source: Source) -> TarShards:
    """As shards on another machine are: nobody knows how many samples are in them."""
    return TarShards(source.name, [Unit(unit.name, None) for unit in source.units], None, [""] * len(source.units))


EVERY = {f"clip {i}" for i in range(sum(SHARDS))}


@pytest.mark.parametrize("ranks", (1, 2, 3))
@pytest.mark.parametrize("workers", (0, 1, 2, 3))
@pytest.mark.parametrize("counted", (True, False))
def test_every_sample_comes_once_in_each_epoch_over_all_ranks_and_workers(
    uneven: Source, ranks: int, workers: int, counted: bool
) -> None:
    source = uneven if counted else uncounted(uneven)
    readers = ranks * max(workers, 1)
    found = Counter(
        itertools.chain.from_iterable(
            streamed.heard(streamed.reader(source, number, readers, group=2, buffer=8), 2) for number in range(readers)
        )
    )
    for epoch in (0, 1):
        assert {text for e, text in found if e == epoch} == EVERY
    assert all(count == 1 for (epoch, _text), count in found.items() if epoch < 2)


@pytest.mark.parametrize("count", (1, 99, 100, 101, 1234))
@pytest.mark.parametrize("readers", (1, 2, 3, 7))
def test_lists_are_shared_out_in_equal_parts(count: int, readers: int) -> None:
    source = HeldList(streamed.manifest(count))
    for epoch in (0, 1):
        shares = [share(source.units, Reading(1, n, readers, 4, 100), epoch) for n in range(readers)]
        sizes = [sum(len(part.numbers) for part in parts) for parts in shares]
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
        every = Counter((part.unit, number) for parts in shares for part in parts for number in part.numbers)
        assert len(every) == count and set(every.values()) == {1}


def test_the_order_changes_with_the_epoch_and_the_seed_and_is_the_same_otherwise() -> None:
    source = HeldList(streamed.manifest(500))
    one = streamed.heard(streamed.reader(source, 0, 1), 2)
    assert one == streamed.heard(streamed.reader(source, 0, 1), 2)
    first, second = ([text for epoch, text in one if epoch == e] for e in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    assert [text for epoch, text in streamed.heard(streamed.reader(source, 0, 1, seed=2), 1)] != first
    assert first != [f"clip {i}" for i in range(500)]


@pytest.mark.parametrize("source", ("list", "tar", "tar without counts"))
def test_from_any_place_it_goes_on_at_the_very_next_group(source: str, uneven: Source) -> None:
    read = HeldList(streamed.manifest(57)) if source == "list" else uneven if source == "tar" else uncounted(uneven)
    for number in (0, 1):
        whole = list(itertools.islice(streamed.reader(read, number, 2, group=3, buffer=12).groups(), 30))
        for stopped in range(29):
            again = streamed.reader(read, number, 2, group=3, buffer=12).groups(whole[stopped][1])
            for (group, standing), (group_again, standing_again) in zip(whole[stopped + 1 :][:6], again, strict=False):
                assert streamed.texts(group) == streamed.texts(group_again)
                assert standing == standing_again


def test_groups_are_of_similar_length() -> None:
    groups = itertools.islice(
        streamed.reader(HeldList(streamed.manifest(2000)), 0, 1, group=8, buffer=400).groups(), 200
    )
    padded = spoken = 0.0
    for group, _standing in groups:
        padded += len(group) * max(drawn.seconds for drawn in group)
        spoken += sum(drawn.seconds for drawn in group)
    assert spoken / padded > 0.85  # 13 lengths from 1 to 13 s; drawn without their lengths it would be 0.6


def test_an_epoch_that_does_not_fill_its_last_group_is_filled_from_the_next() -> None:
    groups = list(itertools.islice(streamed.reader(HeldList(streamed.manifest(10)), 0, 1, group=4).groups(), 5))
    epochs = [[epoch for epoch, _text in streamed.texts(group)] for group, _standing in groups]
    assert all(len(group) == 4 for group in epochs)
    assert sorted(itertools.chain(*epochs)) == [0] * 10 + [1] * 10


def test_fewer_parts_than_readers_are_read_by_all_in_turns(uneven: Source) -> None:
    few = uncounted(uneven)
    assert strided(few.units, 6) and not strided(few.units, 5) and not strided(uneven.units, 6)
    found = [streamed.heard(streamed.reader(few, n, 6, group=1, buffer=2), 1) for n in range(6)]
    assert all(found)
    assert {text for one in found for epoch, text in one if epoch == 0} == EVERY


def test_a_reader_without_anything_to_read_says_so() -> None:
    source = HeldList(streamed.manifest(2))
    with pytest.raises(DataError, match=r"reader 1 of 3 .* fewer --dataloader_num_workers"):
        next(streamed.reader(source, 0, 3).groups())

    one = streamed.reader(source, 0, 1)
    one.keep = lambda sample: None
    with pytest.raises(DataError, match=r"list\.jsonl: nothing in it can be trained on"):
        next(one.groups())


def test_what_is_left_out_is_counted_once_also_after_a_stop() -> None:
    def even(sample: Sample) -> Sample | None:
        return sample if sample.number % 2 == 0 else None

    source = HeldList(streamed.manifest(100))
    one = streamed.reader(source, 0, 1, group=5, buffer=20)
    one.keep = even
    found = list(itertools.islice(one.groups(), 40))  # four epochs of 50
    again = streamed.reader(source, 0, 1, group=5, buffer=20)
    again.keep = even
    after = list(itertools.islice(again.groups(found[14][1]), 25))
    assert [standing for _group, standing in after] == [standing for _group, standing in found[15:]]
    assert found[38][1].left_out in (189, 190)  # every second one, before the last pool


def test_memory_is_bounded_by_bytes_too(monkeypatch: pytest.MonkeyPatch, uneven: Source) -> None:
    from resonance.data import stream

    monkeypatch.setattr(stream, "BUFFER_BYTES", 40_000)  # a clip has 6,400 to 8,400
    one = streamed.reader(uneven, 0, 1, group=2, buffer=1000)
    held = [standing.done for _group, standing in itertools.islice(one.groups(), 10)]
    assert max(held) <= 2  # groups in a pool
    assert Standing() == Standing((0, 0, 0), 0, 0)
