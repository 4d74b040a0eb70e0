"""`megadit eval score`: one metric of one folder. torch is imported inside, so that --help is fast."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megadit.eval.ranks import run_on_ranks

if TYPE_CHECKING:
    from megadit.distributed import Topology


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

    def job(topology: "Topology") -> None:
        scores = score_folder(metric, folder, weights, reference, resize, batch_size, topology, reference_features)
        if topology.is_first:
            for line in scores:
                error = "" if line["stderr"] is None else f" +- {line['stderr']:.3g}"
                typer.echo(f"{line['metric']}  {line['value']:.6g}{error}  ({line['n']} images)")

    raise typer.Exit(run_on_ranks(num_ranks, job))


def score_folder(
    metric: str,
    folder: Path,
    weights: Path,
    reference: Path | None,
    resize: str | None,
    batch_size: int,
    topology: "Topology",
    reference_features: Path | None = None,
) -> Sequence[Mapping[str, Any]]:
    """The scores of a metric by its name, on every rank; call it on all ranks. Raises ValueError as the metrics do."""
    from megadit.eval import scoring
    from megadit.eval.features import FeatureSettings
    from megadit.eval.geneval.judging import PROTOCOLS, score_geneval
    from megadit.eval.metrics.catalogue import find

    if metric not in PROTOCOLS:
        settings = FeatureSettings(batch_size, topology, reference_features)
        return scoring.score(find(metric, resize), folder, weights, reference, settings)
    if reference is not None or resize is not None:
        raise ValueError(f"{metric} takes neither --reference nor --resize: it judges images by their prompts")
    return [score_geneval(folder, weights, metric, topology)]
