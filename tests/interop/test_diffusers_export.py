"""Exported folders: what diffusers loads from disk gives the output of our model, alone and inside its pipelines."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, PixArtAlphaPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from megadit import models
from megadit.interop.diffusers import export
from megadit.models.dit.diffusers import use_published_timesteps
from megadit.recipe import Recipe

STEPS, GUIDANCE = 2, 3.0
CLASSES = {"dit": "DiTTransformer2DModel", "pixart": "PixArtTransformer2DModel", "mmdit": "SD3Transformer2DModel"}


def export_model(recipe: Recipe, model: nn.Module, folder: Path, **options: bool) -> None:
    multiplier = model.get_submodule(models.family_of(recipe.model).readout).multiplier
    assert multiplier not in (0, 1)
    export(recipe, model.state_dict(), multiplier, folder, **options)


def load_transformer(folder: Path, family: str) -> nn.Module:
    return getattr(diffusers, CLASSES[family]).from_pretrained(folder / "transformer").eval()


def tiny_vae(channels: int) -> AutoencoderKL:
    """A real autoencoder with random weights that halves each side."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(
        **blocks, block_out_channels=[4, 4], norm_num_groups=2, latent_channels=channels, sample_size=16
    ).eval()


def inputs(recipe: Recipe, batch: int) -> tuple[Tensor, Tensor]:
    config = recipe.model
    torch.manual_seed(2)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    return x, torch.randint(1, 1000, (batch,))


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSES)
def test_loaded_transformer_gives_our_output(
    family: str, make_recipe: Callable, random_model: Callable, tmp_path: Path
) -> None:
    recipe = make_recipe(family)
    model = random_model(recipe)
    export_model(recipe, model, tmp_path)
    transformer = load_transformer(tmp_path, family)
    x, timestep = inputs(recipe, batch=3)
    text, pooled = torch.randn(3, 6, 24), torch.randn(3, 20)
    lengths = torch.tensor([6, 2, 4])
    if family == "dit":
        labels = torch.tensor([5, 0, 999])
        ours, theirs = model(x, timestep.float(), labels=labels), transformer(x, timestep, labels)
    elif family == "pixart":
        mask = torch.arange(6) < lengths[:, None]
        ours = model(x, timestep.float(), text=text, text_lengths=lengths)
        theirs = transformer(x, text, timestep, encoder_attention_mask=mask.float())
    else:  # diffusers' SD3 has no mask
        ours = model(x, timestep.float(), text=text, text_lengths=torch.full((3,), 6), pooled=pooled)
        theirs = transformer(x, text, pooled, timestep)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs.sample, rtol=1e-5, atol=1e-5)


def test_published_timesteps_are_refused_unless_allowed(
    make_recipe: Callable, random_model: Callable, tmp_path: Path
) -> None:
    recipe = make_recipe("dit", timestep_freq_shift=0)
    model = random_model(recipe)
    with pytest.raises(ValueError, match="timestep_freq_shift: 1, or export with --allow-timestep-mismatch"):
        export_model(recipe, model, tmp_path)
    assert not list(tmp_path.iterdir())

    export_model(recipe, model, tmp_path, allow_timestep_mismatch=True)
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    x, timestep = inputs(recipe, batch=2)
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        expected = model(x, timestep.float(), labels=labels)
        assert (transformer(x, timestep, labels).sample - expected).abs().max() > 1e-3
        use_published_timesteps(transformer)
        torch.testing.assert_close(transformer(x, timestep, labels).sample, expected, rtol=1e-5, atol=1e-5)


def test_schedulers_are_those_of_the_training(make_recipe: Callable, random_model: Callable, tmp_path: Path) -> None:
    for family, name in (("dit", "DDIMScheduler"), ("pixart", "DPMSolverMultistepScheduler")):
        recipe = make_recipe(family)
        export_model(recipe, random_model(recipe), tmp_path / family)
        scheduler = getattr(diffusers, name).from_pretrained(tmp_path / family / "scheduler")
        # arXiv 2102.09672, section 2: 1000 steps, betas from 1e-4 to 0.02
        torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.02, 1000), rtol=1e-6, atol=0)
        assert scheduler.config.prediction_type == "epsilon"
        assert not scheduler.config.get("clip_sample") and not scheduler.config.get("thresholding")
    recipe = make_recipe("mmdit")
    export_model(recipe, random_model(recipe), tmp_path / "mmdit")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "mmdit" / "scheduler")
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas[:-1], scheduler.timesteps / 1000)
    assert scheduler.config.shift == 1


@torch.no_grad()
def test_dit_pipeline(make_recipe: Callable, random_model: Callable, tmp_path: Path) -> None:
    recipe = make_recipe("dit")
    model, vae = random_model(recipe), tiny_vae(channels=4)
    export_model(recipe, model, tmp_path)
    pipeline = DiTPipeline.from_pretrained(tmp_path, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "pt"}
    images = pipeline([3, 998], generator=torch.Generator().manual_seed(5), **settings).images

    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    labels, dropped = torch.tensor([3, 998] * 2), torch.tensor([False, False, True, True])

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        with_class, without = model(torch.cat([x, x]), timestep.expand(4), labels=labels, dropped_B=dropped)[
            :, :4
        ].chunk(2)
        return without + GUIDANCE * (with_class - without)

    decoded = vae.decode(integrate(pipeline.scheduler, predict, latents) / vae.config.scaling_factor).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pixart_pipeline_with_our_null_caption(make_recipe: Callable, random_model: Callable, tmp_path: Path) -> None:
    recipe = make_recipe("pixart")
    model = random_model(recipe)
    export_model(recipe, model, tmp_path)
    others = {"vae": tiny_vae(channels=4), "text_encoder": None, "tokenizer": None}
    pipeline = PixArtAlphaPipeline.from_pretrained(tmp_path, **others)
    pipeline.set_progress_bar_config(disable=True)
    x, _ = inputs(recipe, batch=2)
    text, lengths = torch.randn(2, 6, 24), torch.tensor([6, 3])
    mask = (torch.arange(6) < lengths[:, None]).long()
    null_caption = load_file(tmp_path / "null_caption.safetensors")["negative_prompt_embeds"]
    latents = pipeline(
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt=None,
        negative_prompt_embeds=null_caption.expand(2, -1, -1),
        negative_prompt_attention_mask=mask,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        latents=x,
        height=16,
        width=16,
        use_resolution_binning=False,
        output_type="latent",
    ).images

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        dropped = torch.tensor([False, False, True, True])
        both = {"text": torch.cat([text, text]), "text_lengths": torch.cat([lengths, lengths])}
        with_text, without = model(torch.cat([x, x]), timestep.expand(4), **both, dropped_B=dropped)[:, :4].chunk(2)
        return without + GUIDANCE * (with_text - without)

    expected = integrate(pipeline.scheduler, predict, x)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sd3_pipeline(make_recipe: Callable, random_model: Callable, tmp_path: Path) -> None:
    recipe = make_recipe("mmdit")
    model = random_model(recipe)
    export_model(recipe, model, tmp_path)
    names = [f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")]
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, vae=tiny_vae(channels=16), **dict.fromkeys(names))
    pipeline.set_progress_bar_config(disable=True)
    x, _ = inputs(recipe, batch=2)
    text, pooled = torch.randn(2, 6, 24), torch.randn(2, 20)
    latents = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        guidance_scale=1,
        num_inference_steps=STEPS,
        latents=x,
        height=16,
        width=16,
        output_type="latent",
    ).images

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        return model(x, timestep.expand(2), text=text, text_lengths=torch.tensor([6, 6]), pooled=pooled)

    torch.testing.assert_close(latents, integrate(pipeline.scheduler, predict, x), rtol=1e-4, atol=1e-4)


def integrate(scheduler: object, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """What our model samples with the scheduler that was loaded from disk; `predict` takes x and one timestep."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, timestep.float()), timestep, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("dit", {"mlp_ratio": 2}, "mlp_ratio 4, not 2"),
        ("pixart", {"mlp_ratio": 3}, "mlp_ratio 4, not 3"),
        ("dit", {"objective": "flow", "learn_sigma": False}, "no pipeline for a dit model trained with objective flow"),
    ],
)
def test_what_diffusers_cannot_have_is_refused(
    family: str, changes: dict[str, int], message: str, make_recipe: Callable, random_model: Callable, tmp_path: Path
) -> None:
    recipe = make_recipe(family, **changes)
    with pytest.raises(ValueError, match=message):
        export_model(recipe, random_model(recipe), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_null_class_other_than_1000_is_warned_of(
    make_recipe: Callable, random_model: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for num_classes, expected in ((1000, False), (7, True)):
        recipe = make_recipe("dit", num_classes=num_classes)
        caplog.clear()
        export_model(recipe, random_model(recipe), tmp_path)
        assert ("DiTPipeline guides by class 1000" in caplog.text) == expected


def test_other_positions_and_sizes_are_refused(make_recipe: Callable, random_model: Callable, tmp_path: Path) -> None:
    recipe = make_recipe("pixart")
    model = random_model(recipe)
    with pytest.raises(
        ValueError, match=r"1 have another shape \(caption_projection.linear_1.weight is \[32, 24\], not \[32, 25\]"
    ):
        export_model(make_recipe("pixart", text_dim=25), model, tmp_path)
    model.pos_embed.mul_(0.5)
    with pytest.raises(ValueError, match="pos_embed is not the sine-cosine table"):
        export_model(recipe, model, tmp_path)
