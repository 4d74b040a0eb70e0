"""`megadit data pack`: start the local ranks that share the shards, or be one of them."""

from collections.abc import Callable

from megadit.data.bars import Bars, no_bars
from megadit.data.packing.settings import PackSettings
from megadit.exit_codes import DONE
from megadit.launcher.environment import Ranks
from megadit.launcher.join import launch_or_join


def pack(
    source: str,
    destination: str,
    settings: PackSettings,
    *,
    text: str | None,
    max_tokens: int,
    vae: str | None,
    features: str | None,
    num_ranks: int,
    bars: Bars,
    say: Callable[[str], object],
) -> int:
    """Pack the source that is called `source`; returns the exit code.

    text: `minilm` or the folder of a text encoder, None for captions alone. vae: the folder of an autoencoder.
    features: the folder of an image encoder.
    bars: those of rank 0. say: gets the outcome. The ranks that are started get this process's command line.
    Raises ValueError for what cannot be packed.
    """

    def pack_a_share(ranks: Ranks) -> int:
        import torch

        from megadit.data.encoders.autoencoder import Autoencoder
        from megadit.data.encoders.text_encoder import TextEncoder
        from megadit.data.packing.pack import pack as pack_share
        from megadit.data.packing.sources import open_source
        from megadit.objectives.image_encoder import ImageEncoder

        device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        dtype = torch.bfloat16 if settings.encoder_precision == "bf16" else torch.float32
        text_encoder = None if text is None else TextEncoder.load(text, max_tokens, device, dtype)
        autoencoder = None if vae is None else Autoencoder.load(vae, device, dtype)
        image_encoder = None if features is None else ImageEncoder.load(features, device, dtype)
        packed = pack_share(
            open_source(source),
            destination,
            settings,
            text_encoder,
            autoencoder,
            image_encoder,
            rank=ranks.rank,
            world_size=ranks.world_size,
            bars=bars if ranks.rank == 0 else no_bars,
        )
        if packed is not None and not packed.skipped:
            say(f"packed {packed.counts} to {destination}")
        return DONE

    return launch_or_join(num_ranks, pack_a_share)
