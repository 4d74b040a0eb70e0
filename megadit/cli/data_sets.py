"""`megadit data` over tars and data sets that are there: index, caption, stats, verify, preview."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megadit.cli.progress import progress_bar

if TYPE_CHECKING:
    from megadit.data.indexing.dataset import Indexed

DataSet = Annotated[str, typer.Argument(metavar="URL", help="s3://bucket/prefix or folder of a data set.")]
Workers = Annotated[int, typer.Option(min=1, help="Files read side by side.")]
KeyField = Annotated[
    str | None, typer.Option(help="Field of the keys in a table.  [default: key, image, file_name or id]")
]
CaptionField = Annotated[str | None, typer.Option(help="Field of the captions in a table.  [default: caption or text]")]


def data_index(
    tars: Annotated[str, typer.Argument(help="s3://bucket/prefix or a folder; may end in a pattern: .../sa_*.tar.")],
    destination: Annotated[str, typer.Argument(help="s3://bucket/prefix or a folder; gets the index.")],
    match: Annotated[str, typer.Option(metavar="PATTERN", help="Names of the tars.")] = "*.tar",
    members: Annotated[
        str, typer.Option(help="Kinds of members that a sample must have: a picture, and json or txt.")
    ] = "jpg,json",
    captions: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Captions: .tar.gz of KEY.txt, .jsonl or .parquet.")
    ] = None,
    caption_key_field: KeyField = None,
    caption_field: CaptionField = None,
    checklist: Annotated[
        str | None, typer.Option(metavar="FILE", help="md5 or sha256 and name of each tar, one a line.")
    ] = None,
    gunzip_to: Annotated[
        str | None, typer.Option(metavar="URL", help="Where to write tars that are compressed, as plain ones.")
    ] = None,
    workers: Workers = 4,
) -> None:
    """Make a data set of tars where they lie: each is read once, none is copied or changed.

    What was read stays in DESTINATION/parts: the same command goes on after a break, and reads again what has changed.
    Samples without a member or a caption are left out and counted.

    \b
    Examples:
      megadit data index 's3://sa-1b/sa_*.tar' s3://mine/sa-1b --checklist checklist.chk
      megadit data index photos/ /data/photos --members jpg,txt
    """
    from megadit.data.indexing.captions import CaptionTable
    from megadit.data.indexing.dataset import index

    table = CaptionTable(captions, caption_key_field, caption_field) if captions else None
    indexed = index(
        tars,
        destination,
        match=match,
        members=members.split(","),
        captions=table,
        checklist=checklist,
        gunzip_to=gunzip_to,
        workers=workers,
        bars=progress_bar,
    )
    print(f"read {indexed.num_read} tars")
    _print_indexed(indexed, destination)


def data_caption(
    destination: Annotated[str, typer.Argument(metavar="URL", help="A data set made by `megadit data index`.")],
    table: Annotated[str, typer.Argument(help="Captions: .tar.gz of KEY.txt, .jsonl or .parquet.")],
    caption_key_field: KeyField = None,
    caption_field: CaptionField = None,
) -> None:
    """Join captions to an indexed data set by key, in place of those that it has. No tar is read.

    A key is a name without folders, up to its first dot. Samples without a caption are left out.

    \b
    Example:
      megadit data caption s3://mine/sa-1b SA1B_caption.tar.gz
    """
    from megadit.data.indexing.captions import CaptionTable
    from megadit.data.indexing.dataset import add_captions

    captions = CaptionTable(table, caption_key_field, caption_field)
    _print_indexed(add_captions(destination, captions, progress_bar), destination)


def data_stats(url: DataSet) -> None:
    """Print counts, sizes, resolutions, aspect ratios, lengths of captions and classes of a data set.

    \b
    Example:
      megadit data stats s3://mine/sa-1b
    """
    from megadit.data.inspect import format_stats, stats

    print(format_stats(stats(url)))


def data_verify(
    url: DataSet,
    sample_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the samples to read.")] = 1.0,
    workers: Workers = 4,
) -> None:
    """Read a data set and compare every member with its CRC-32, every tar with its ETag and sha256.

    Prints what is wrong, one line each; exit code 1 if anything is.

    \b
    Example:
      megadit data verify s3://mine/sa-1b --sample-share 0.01
    """
    from megadit.data.inspect import verify

    problems = verify(url, sample_share, workers, progress_bar)
    for problem in problems:
        print(problem)
    if problems:
        raise ValueError(f"{url}: something is wrong (above)")
    print(f"{url} is sound" if sample_share == 1 else f"{url}: nothing wrong in {sample_share:.3g} of the samples")


def data_preview(
    url: DataSet,
    out: Annotated[Path, typer.Argument(metavar="OUT.png", help="File to write.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice.")] = 0,
) -> None:
    """Draw some pictures of a data set with their captions.

    \b
    Example:
      megadit data preview s3://mine/sa-1b sheet.png --num 48
    """
    from megadit.data.preview import preview

    print(f"wrote {preview(url, out, num, seed)} pictures to {out}")


def _print_indexed(indexed: "Indexed", destination: str) -> None:
    manifest = indexed.manifest
    captioned = "with captions" if "txt" in manifest.members else "without captions"
    print(f"{destination}: {manifest.num_samples:,} samples in {len(manifest.shards):,} tars, {captioned}")
    for reason, count in sorted(manifest.left_out.items()):
        print(f"left out: {count:,} samples ({reason})")
    for kind, count in sorted(indexed.others.items()):
        print(f"not used: {count:,} members of the tars ({f'.{kind}' if kind else 'without a suffix'})")
    if indexed.unknown_captions:
        print(f"not used: {indexed.unknown_captions:,} captions (no sample has their key)")
