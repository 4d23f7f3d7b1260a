"""`resonance data …`: look at recordings and prepare them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resonance.errors import ConfigError
from resonance.messages import _


class Parser(argparse.ArgumentParser):
    """argparse with our error instead of its usage dump, and without abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Flags are accepted with `-` for `_` too, as everywhere."""
        return super().add_argument(
            *dict.fromkeys([*names, *(n.replace("_", "-") for n in names if n[0] == "-")]), **options
        )

    def error(self, message: str) -> Any:
        raise ConfigError([f"{self.prog}: {message}"])


def check(argv: list[str]) -> int:
    parser = Parser("resonance data check", _("Look at every recording and transcript before training."))
    parser.add_argument("path", type=Path, help=_("manifest file or data folder"))
    parser.add_argument("--dataset_dir", type=Path, help=_("folder for paths that are not found beside the manifest"))
    parser.add_argument("--validation_file", type=Path, help=_("validation rows, to find what is on both sides"))
    parser.add_argument("--max_audio_len", type=float, default=30.0, help=_("longest clip in seconds"))
    parser.add_argument("--model_name_or_path", help=_("count the tokens of long texts with this model's tokenizer"))
    parser.add_argument("--fix", type=Path, metavar="OUT", help=_("write the rows without problems to OUT"))
    args = parser.parse_args(argv)
    from rich.console import Console

    from resonance.data.check import check
    from resonance.data.check_report import format_report, write_fixed
    from resonance.data.formats import load_manifest
    from resonance.progress_bar import progress_bar

    rows = load_manifest(args.path, dataset_dir=args.dataset_dir).utterances
    other = (
        load_manifest(args.validation_file, dataset_dir=args.dataset_dir).utterances if args.validation_file else None
    )
    console = Console(markup=False, emoji=False, highlight=False)  # a path may have [brackets] in it
    with progress_bar(Console(stderr=True), _("checking"), len(rows) + len(other or [])) as advance:
        report = check(
            rows,
            max_audio_len=args.max_audio_len,
            count_tokens=token_counter(args.model_name_or_path),
            other=other,
            progress=advance,
        )
    console.print(format_report(report))
    if args.fix:
        for path in write_fixed(report, args.fix):
            console.print(_("Written: {path}").format(path=path), soft_wrap=True)
    return 1 if report.loses_rows else 0


def token_counter(model: str | None) -> Callable[[str], int] | None:
    if model is None:
        return None
    from resonance.data.tokens import LabelTokenizer
    from resonance.model.load import load_tokenizer

    tokenizer, multilingual = load_tokenizer(model)
    return LabelTokenizer(tokenizer, multilingual, None).count


def convert(argv: list[str]) -> int:
    parser = Parser(
        "resonance data convert", _("Any audio or video to 16 kHz mono WAV. The originals stay as they are.")
    )
    parser.add_argument("source", type=Path, metavar="IN", help=_("file or folder"))
    parser.add_argument("target", type=Path, metavar="OUT", help=_("folder for the WAV files"))
    parser.add_argument("--workers", type=int, help=_("processes (one for each processor)"))
    parser.add_argument("--overwrite", action="store_true", help=_("convert again what is there already"))
    args = parser.parse_args(argv)
    from resonance.data.convert import convert_folder, format_summary

    summary = convert_folder(args.source, args.target, workers=args.workers, overwrite=args.overwrite)
    print(format_summary(summary))
    return 1 if summary.failed else 0


def split(argv: list[str]) -> int:
    parser = Parser("resonance data split", _("Divide recordings into training and validation."))
    parser.add_argument("path", type=Path, help=_("manifest file or data folder"))
    parser.add_argument("out", type=Path, metavar="OUT", help=_("folder for train.json and validation.json"))
    parser.add_argument("--dataset_dir", type=Path, help=_("folder for paths that are not found beside the manifest"))
    parser.add_argument("--validation_split", type=float, default=0.1, help=_("share of the validation"))
    parser.add_argument(
        "--split_by",
        choices=("sentence", "speaker", "within_sentence"),
        default="sentence",
        help=_("what never lies on both sides; within_sentence: other takes of trained sentences"),
    )
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    from resonance.data.formats import load_manifest
    from resonance.data.split import split
    from resonance.data.writing import write_manifest
    from resonance.errors import DataError

    rows = load_manifest(args.path, dataset_dir=args.dataset_dir).utterances
    train, validation = split(rows, eval_fraction=args.validation_split, by=args.split_by, seed=args.seed)
    for name in ("train.json", "validation.json"):
        if (args.out / name).exists():
            raise DataError(_("{path} is there already. Choose another folder.").format(path=args.out / name))
    for name, part in (("train.json", train), ("validation.json", validation)):
        write_manifest(args.out / name, part)
        print(_("{count} rows: {path}").format(count=len(part), path=args.out / name))
    return 0


def shard(argv: list[str]) -> int:
    parser = Parser("resonance data shard", _("Write recordings and texts to tar files, to be streamed."))
    parser.add_argument(
        "--train_file", required=True, help=_("list of recordings, data folder, parquet files or address")
    )
    parser.add_argument("--output_dir", type=Path, required=True, help=_("folder for the tar files and their index"))
    parser.add_argument("--dataset_dir", type=Path, help=_("folder for paths that are not found beside the manifest"))
    parser.add_argument("--shard_size", default="500MB", help=_("size of a tar file"))
    parser.add_argument("--clips_per_shard", type=int, help=_("recordings in a tar file, at most"))
    parser.add_argument("--seed", type=int, default=42, help=_("start of the random order"))
    parser.add_argument(
        "--skip_broken", action="store_true", help=_("leave out what cannot be read instead of stopping")
    )
    args = parser.parse_args(argv)
    from rich.console import Console

    from resonance.config_types import memory_bytes
    from resonance.data.samples import rows_in
    from resonance.data.shards import ShardSettings, write_shards
    from resonance.data.sources import open_source
    from resonance.progress_bar import progress_bar

    try:
        size = memory_bytes(args.shard_size)
    except ValueError as error:
        raise ConfigError(
            [_("--shard_size is {value}. {reason}").format(value=args.shard_size, reason=error)]
        ) from error
    if args.clips_per_shard is not None and args.clips_per_shard < 1:
        raise ConfigError([_("--clips_per_shard must be at least 1.")])
    source = open_source(args.train_file, dataset_dir=args.dataset_dir, skip_broken=args.skip_broken, warn=print)
    settings = ShardSettings(size, args.clips_per_shard, args.seed, args.skip_broken)
    with progress_bar(Console(stderr=True), _("writing"), rows_in(source.units) or 0) as advance:
        summary = write_shards(source, args.output_dir, settings, advance)
    for reason in summary.left_out:
        print(_("Left out: {reason}").format(reason=reason))
    text = _("{shards} shards with {samples} recordings ({hours:.2f} h), {reused} of them from an earlier run: {path}")
    index = summary.index
    print(
        text.format(
            shards=len(index.shards),
            samples=index.samples,
            hours=index.seconds / 3600,
            reused=summary.reused,
            path=args.output_dir,
        )
    )
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"check": check, "convert": convert, "split": split, "shard": shard}
