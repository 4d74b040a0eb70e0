"""`megadit data`: pack data sets and serve them locally."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megadit.cli.data_sets import data_caption, data_index, data_preview, data_stats, data_verify
from megadit.cli.progress import progress_bar
from megadit.launcher.processes import wait_for_interrupt

data_app = typer.Typer(help="Pack data sets and serve them locally.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command("pack")
def data_pack(
    source: Annotated[
        str,
        typer.Argument(help="`emoji` (shipped), a folder or zip of images with captions.jsonl, or a data set (index)."),
    ],
    destination: Annotated[str, typer.Argument(help="s3://bucket/prefix or a folder; gets train/ and validation/.")],
    label: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Metadata field whose values are the classes (emoji: subgroup).")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Side of the packed images, in pixels.")] = 32,
    aspect_buckets: Annotated[
        bool, typer.Option("--aspect-buckets", help="Not squares: resolutions of nearly that area, by aspect ratio.")
    ] = False,
    text: Annotated[str, typer.Option(help="`minilm`, or the folder of a transformers text model (T5).")] = "minilm",
    no_text: Annotated[bool, typer.Option("--no-text", help="Captions alone, to be encoded while training.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Captions are cut after so many tokens.")] = 120,
    text_dtype: Annotated[
        Literal["float16", "int8"], typer.Option(help="float16, or int8 with a scale for each token.")
    ] = "float16",
    vae: Annotated[str | None, typer.Option(help="Folder of an AutoencoderKL of diffusers: pack latents, too.")] = None,
    latents: Annotated[
        Literal["moments", "sample"], typer.Option(help="moments (mean and std), or one sample of each.")
    ] = "moments",
    latent_dtype: Annotated[Literal["float16", "bfloat16"], typer.Option(help="float16 or bfloat16.")] = "float16",
    features: Annotated[
        str | None,
        typer.Option(help="Folder of a DINOv2 of transformers: pack its features of the pictures, too (REPA)."),
    ] = None,
    feature_dtype: Annotated[
        Literal["bfloat16", "int8"], typer.Option(help="bfloat16, or int8 with a scale for each token.")
    ] = "bfloat16",
    feature_grid: Annotated[
        int | None, typer.Option(min=1, help="Image tokens of the model a side; default: pixels / 16.")
    ] = None,
    keep_pictures: Annotated[bool, typer.Option(help="Whether latents are packed with their pictures.")] = True,
    picture_format: Annotated[Literal["png", "jpg"], typer.Option(help="png, or jpg (quality 95).")] = "png",
    encoder_precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="In which the encoders compute: fp32 or bf16.")
    ] = "fp32",
    where: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Keep samples whose metadata say so; repeatable.")
    ] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples of one shard, which must fit into memory.")] = 512,
    holdout: Annotated[
        int, typer.Option(min=0, help="One concept in this many goes to validation/; 0: there is none.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order in which samples are packed.")] = 0,
    num_ranks: Annotated[int, typer.Option(min=1, help="Local processes that share the shards.")] = 1,
) -> None:
    """Pack images and captions into WebDataset shards with a manifest.

    Captions (with --vae and --features images, too) are encoded here, once. The same arguments give the same bytes, on
    any number of ranks; shards that are there already are left as they are, and a different data set at DESTINATION is
    an error. The manifest is written last, so half a pack is never read. Started by torchrun or srun, ranks share the
    shards, too.

    \b
    Examples:
      megadit data pack emoji s3://megadit/emoji --size 16 --where skin_tone=false
      megadit data pack photos/ /data/photos --size 256 --text /models/t5
      torchrun --nproc-per-node 8 -m -- megadit data pack s3://mine/sa-1b s3://mine/buckets --size 512 \\
        --aspect-buckets --text /models/t5-v1_1-xxl --text-dtype int8 --vae /models/sd-vae \\
        --no-keep-pictures
      megadit data pack s3://mine/sa-1b s3://mine/aligned --size 256 --text /models/t5-v1_1-xxl --text-dtype int8 \\
        --vae /models/sd3-vae --features /models/dinov2-base --feature-dtype int8 --no-keep-pictures
    """
    from megadit.data.packing.settings import PackSettings
    from megadit.launcher.pack import pack

    settings = PackSettings(
        size=size,
        aspect_buckets=aspect_buckets,
        seed=seed,
        shard_samples=shard_samples,
        holdout=holdout,
        where=tuple(where or ()),
        label=label,
        keep_pictures=keep_pictures,
        picture_format=picture_format,
        latents=latents,
        latent_dtype=latent_dtype,
        text_dtype=text_dtype,
        feature_dtype=feature_dtype,
        feature_grid=feature_grid,
        encoder_precision=encoder_precision,
    )
    code = pack(
        source,
        destination,
        settings,
        text=None if no_text else text,
        max_tokens=max_tokens,
        vae=vae,
        features=features,
        num_ranks=num_ranks,
        bars=progress_bar,
        say=print,
    )
    raise typer.Exit(code)


@data_app.command("serve")
def data_serve(
    directory: Annotated[Path, typer.Argument(help="Folder of the stored objects; made if missing.")],
    bucket: Annotated[str, typer.Option(help="Bucket to make if it is missing.")] = "megadit",
) -> None:
    """Run an S3 server (SeaweedFS) on 127.0.0.1 until Ctrl-C.

    Prints the lines that let another shell use it. What it stores stays in DIRECTORY; address and keys are new each
    time.

    \b
    Example:
      megadit data serve runs/s3
    """
    from megadit.data.storage.local_s3 import LocalS3

    with LocalS3(directory) as server:
        server.create_bucket(bucket)
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        sys.stdout.flush()
        wait_for_interrupt()


data_app.command("index")(data_index)
data_app.command("caption")(data_caption)
data_app.command("stats")(data_stats)
data_app.command("verify")(data_verify)
data_app.command("preview")(data_preview)
