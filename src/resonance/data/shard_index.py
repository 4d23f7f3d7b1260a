"""`index.json` beside tar shards: how many samples each has, its size and checksum. Written last, read first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from resonance.data.textfile import write_text_atomic
from resonance.errors import ShardError
from resonance.messages import _

INDEX_FILE = "index.json"
_PLAIN_NAME = re.compile(r"[^/\\.][^/\\]*")  # an index from elsewhere names files beside it and no others


class Shard(BaseModel):
    """One tar file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    samples: int
    bytes: int
    sha256: str
    seconds: float  # of sound


class Index(BaseModel):
    """All shards of one folder, in the order of their names."""

    model_config = ConfigDict(frozen=True)

    format: str = "resonance-shards-1"
    samples: int
    seconds: float
    shards: tuple[Shard, ...]


def write_index(path: Path, shards: list[Shard]) -> Index:
    index = Index(
        samples=sum(shard.samples for shard in shards),
        seconds=round(sum(shard.seconds for shard in shards), 3),
        shards=tuple(shards),
    )
    write_text_atomic(path, [json.dumps(index.model_dump(), indent=1) + "\n"])
    return index


def parse_index(data: bytes, place: str) -> Index:
    """The content of the `index.json` at `place`. Raises ShardError when it is none."""
    try:
        values: Any = json.loads(data)
        index = Index.model_validate(values)
        if index.format != "resonance-shards-1":
            raise ValueError(index.format)
    except (ValueError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ShardError(
            _("{path}: not an index of shards as `resonance data shard` writes it ({reason}).").format(
                path=place, reason=reason
            )
        ) from error
    for shard in index.shards:
        if not _PLAIN_NAME.fullmatch(shard.name):
            raise ShardError(
                _("{path}: names a file outside its own folder: {name}.").format(path=place, name=repr(shard.name))
            )
    return index
