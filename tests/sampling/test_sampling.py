"""Sampling: trajectories against the rules written out, guidance, noise by image, classes by name, the grid."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from megadit.data.format.manifest import Manifest
from megadit.exit_codes import DONE
from megadit.randomness import Purpose, generator, named_generator
from megadit.recipe import Recipe, parse
from megadit.sampling.generate import class_numbers, encode_prompts, generate, load_conditioner, load_encoder, sample
from megadit.sampling.grid import CELL, MARGIN, draw_grid
from megadit.sampling.guidance import guide
from megadit.training.trainer import train

SHAPE = (3, 4, 4)
TEXT = {"text": torch.ones(2, 3, 5), "text_lengths": torch.tensor([3, 2]), "pooled": torch.full((2, 6), 0.5)}
LABELS = {"labels": torch.tensor([3, 7])}
SIZES = {"input_size": 4, "in_channels": 3, "width": 32, "depth": 1, "head_dim": 16}
MODELS = {
    "flow": {"family": "mmdit", "text_dim": 5, "pooled_dim": 6},
    "ddpm": {"family": "dit", "num_classes": 8},
}
CONDITIONS = {"flow": TEXT, "ddpm": LABELS}


def recipe(objective: str, model: dict[str, object] | None = None) -> Recipe:
    return parse(
        {
            "name": "test",
            "model": SIZES | (model or MODELS[objective]),
            "parametrization": {"kind": "sp"},
            "objective": {"kind": objective},
            "data": {"url": "file:///nowhere"},
            "optimizer": {"lr": 0.01},
            "training": {"num_images": 8, "batch_size": 8},
            "checkpoints": {"every_images": 8},
        }
    )


class Field(nn.Module):
    """A velocity that depends on everything it is given."""

    def forward(
        self,
        x: Tensor,
        timestep_B: Tensor,
        *,
        text: Tensor,
        text_lengths: Tensor,
        pooled: Tensor,
        dropped_B: Tensor | None = None,
    ) -> Tensor:
        caption = text.sum((1, 2)) / 10 + pooled.sum(1) + text_lengths
        if dropped_B is not None:
            caption = caption.masked_fill(dropped_B, 1)
        return 0.3 * x + torch.sin(3 * timestep_B / 1000).view(-1, 1, 1, 1) + 0.1 * caption.view(-1, 1, 1, 1)


class Noise(nn.Module):
    """A noise and a v that depend on everything they are given."""

    def forward(self, x: Tensor, timestep_B: Tensor, *, labels: Tensor, dropped_B: Tensor | None = None) -> Tensor:
        label = labels.to(x.dtype)
        if dropped_B is not None:
            label = label.masked_fill(dropped_B, -2)
        time, label = timestep_B.view(-1, 1, 1, 1), label.view(-1, 1, 1, 1)
        return torch.cat([0.4 * x + torch.sin(time / 300) + 0.1 * label, 0.1 * label * torch.cos(x)], dim=1)


NETWORKS = {"flow": Field(), "ddpm": Noise()}


def noise(seed: int, index: int) -> Tensor:
    draws = generator(seed, Purpose.SAMPLING_NOISE, index).standard_normal(SHAPE, np.float32)
    return torch.from_numpy(draws)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_flow_follows_euler_with_guidance(scale: float) -> None:
    num_steps = 7
    x = torch.stack([noise(3, 0), noise(3, 1)]).double()
    with_text = (TEXT["text"].sum((1, 2)) / 10 + TEXT["pooled"].sum(1) + TEXT["text_lengths"]).double()
    for step in range(num_steps):
        t = 1 - step / num_steps
        velocities = [
            0.3 * x + np.sin(3 * t) + 0.1 * caption.view(-1, 1, 1, 1)
            for caption in (with_text, torch.ones(2, dtype=torch.float64))
        ]
        x = x - (velocities[1] + scale * (velocities[0] - velocities[1])) / num_steps
    sampled = generate(NETWORKS["flow"], recipe("flow"), TEXT, scale, num_steps, seed=3)
    torch.testing.assert_close(sampled.double(), x, atol=3e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("num_steps", "timesteps"), [(4, [999, 666, 333, 0]), (10, range(999, -1, -111))])
def test_ddpm_follows_its_posteriors_with_guidance(scale: float, num_steps: int, timesteps: list[int]) -> None:
    """Of two timesteps in a row, s before t, x[s] is drawn around the mean of q(x[s] | x[t], predicted picture).

    q is the product of the normal densities that it is made of, as functions of x[s]: their precisions add.
    """
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()
    draws = [named_generator(3, f"noise while sampling image {index}") for index in (0, 1)]
    x = torch.stack([noise(3, 0), noise(3, 1)]).double()
    for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
        time = torch.full((2,), float(t), dtype=torch.float64)
        noises, v = NETWORKS["ddpm"](x, time, **LABELS).chunk(2, dim=1)
        without, _ = NETWORKS["ddpm"](x, time, **LABELS, dropped_B=torch.tensor([True, True])).chunk(2, dim=1)
        guided = without + scale * (noises - without)
        picture = (x - math.sqrt(1 - alpha_bar[t]) * guided) / math.sqrt(alpha_bar[t])
        if s is None:
            x = picture
            break
        alpha = alpha_bar[t] / alpha_bar[s]
        precision = alpha / (1 - alpha) + 1 / (1 - alpha_bar[s])
        weighted = math.sqrt(alpha) / (1 - alpha) * x + math.sqrt(alpha_bar[s]) / (1 - alpha_bar[s]) * picture
        fraction = (v + 1) / 2
        log_variance = fraction * math.log(1 - alpha) + (1 - fraction) * math.log(1 / precision)
        fresh = torch.cat([torch.randn((1, *SHAPE), generator=draw) for draw in draws])
        x = weighted / precision + torch.exp(log_variance / 2) * fresh
    sampled = generate(NETWORKS["ddpm"], recipe("ddpm"), LABELS, scale, num_steps, seed=3)
    torch.testing.assert_close(sampled.double(), x, atol=2e-4, rtol=2e-4)


def test_three_guided_channels_are_dits_own_guidance() -> None:
    """forward_with_cfg of facebookresearch/DiT, models.py: the first three of four channels, and a learned variance."""
    x_BCHW = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    timestep, scale = torch.tensor(400.0), 4.0

    def forward_with_cfg(x: Tensor) -> Tensor:
        combined = torch.cat([x[: len(x) // 2], x[: len(x) // 2]])
        dropped = torch.tensor([False, False, True, True])
        model_out = NETWORKS["ddpm"](combined, timestep.expand(4), labels=LABELS["labels"].repeat(2), dropped_B=dropped)
        eps, rest = model_out[:, :3], model_out[:, 3:]
        cond_eps, uncond_eps = torch.split(eps, len(eps) // 2, dim=0)
        half_eps = uncond_eps + scale * (cond_eps - uncond_eps)
        return torch.cat([torch.cat([half_eps, half_eps]), rest], dim=1)

    expected = forward_with_cfg(x_BCHW.repeat(2, 1, 1, 1))[:2]  # its samplers keep the first half, the conditional one
    found = guide(NETWORKS["ddpm"], LABELS, scale, 3)(x_BCHW, timestep)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    every = guide(NETWORKS["ddpm"], LABELS, scale, 4)(x_BCHW, timestep)
    assert (every[:, 3] - expected[:, 3]).abs().min() > 0.1
    torch.testing.assert_close(every[:, :3], expected[:, :3], atol=1e-5, rtol=0)


MEAN, STD = 0.3, 0.25


class BestForNormalPictures(nn.Module):
    """The best prediction there is when pixels are normal with MEAN and STD."""

    def __init__(self, objective: str) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, x: Tensor, timestep_B: Tensor, **conditions: Tensor) -> Tensor:
        if self.objective == "flow":
            image_scale, noise_scale = 1 - timestep_B / 1000, timestep_B / 1000
        else:
            alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[timestep_B.long()]
            image_scale, noise_scale = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        image_scale, noise_scale = image_scale.view(-1, 1, 1, 1), noise_scale.view(-1, 1, 1, 1)
        off = (x - image_scale * MEAN) / (image_scale**2 * STD**2 + noise_scale**2)
        noise = noise_scale * off
        if self.objective == "flow":
            return (noise - (MEAN + image_scale * STD**2 * off)).float()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1).float()


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_samples_have_the_distribution_of_the_pictures(objective: str) -> None:
    conditions = {name: value[:1].repeat_interleave(200, 0) for name, value in CONDITIONS[objective].items()}
    images = generate(BestForNormalPictures(objective), recipe(objective), conditions, 1.0, 100, seed=0)
    assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert images.std().item() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_a_picture_does_not_depend_on_the_others(objective: str) -> None:
    network, conditions = NETWORKS[objective], CONDITIONS[objective]
    both = generate(network, recipe(objective), conditions, 3.0, 5, seed=1)
    first = {name: value[:1] for name, value in conditions.items()}
    assert torch.equal(generate(network, recipe(objective), first, 3.0, 5, seed=1), both[:1])
    assert not torch.equal(generate(network, recipe(objective), conditions, 3.0, 5, seed=2), both)


@pytest.mark.parametrize(("objective", "num_steps", "least"), [("flow", 0, 1), ("ddpm", 1, 2), ("ddpm", 1001, 2)])
def test_a_number_of_steps_that_cannot_be(objective: str, num_steps: int, least: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps {num_steps} must be (at least {least}|in \[{least}, 1000\])"):
        generate(NETWORKS[objective], recipe(objective), CONDITIONS[objective], 1.0, num_steps, seed=0)


def test_classes_by_name_and_number(pack_animals: Callable, tmp_path: Path) -> None:
    labels = pack_animals(str(tmp_path), label="subgroup", size=8).train.labels
    run = tmp_path / "run"
    run.mkdir()
    (run / "data.json").write_bytes(Manifest.load(str(tmp_path / "train")).dump())
    conditions = encode_prompts(run, recipe("ddpm"), [labels[4], "0", labels[-1]])
    assert conditions.keys() == {"labels"}
    assert conditions["labels"].tolist() == [4, 0, len(labels) - 1]
    assert conditions["labels"].dtype == torch.int64
    with pytest.raises(
        ValueError, match=rf"no class 'animal-mamal': did you mean 'animal-mammal'\? .* 0 to {len(labels) - 1}"
    ):
        encode_prompts(run, recipe("ddpm"), [labels[0], "animal-mamal"])
    with pytest.raises(ValueError, match=f"no class '{len(labels)}'"):
        encode_prompts(run, recipe("ddpm"), [str(len(labels))])


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        ({"family": "dit", "num_classes": 8}, ["animal-bird", "animal-bug", "7"]),
        ({"family": "pixart", "text_dim": 384, "max_text_tokens": 120}, ["bird", "a red bug", "flower"]),
    ],
)
def test_a_run_with_a_learned_variance_is_sampled(
    pack_animals: Callable, tmp_path: Path, model: dict[str, object], prompts: list[str]
) -> None:
    pack_animals(str(tmp_path), label="subgroup")
    sizes = {"input_size": 16, "patch_size": 4}
    tree = recipe("ddpm", model | sizes).model_dump() | {"data": {"url": str(tmp_path / "train")}}
    assert train(parse(tree), tmp_path / "run") == DONE
    pictures = []
    for number, asked in enumerate((prompts, prompts[:2])):
        grid = sample(tmp_path / "run", asked, tmp_path / f"{number}.png", num_steps=4)
        pictures.append(np.asarray(Image.open(grid))[: MARGIN + CELL, : 2 * (MARGIN + CELL)])
    # Two columns each: the first two do not depend on the third, but for the rounding of other matrix sizes.
    np.testing.assert_allclose(*(picture.astype(np.int32) for picture in pictures), atol=2)
    assert pictures[0].std() > 10


def test_a_name_goes_before_a_number() -> None:
    assert class_numbers(["1", "0", "2"], ["zero", "2", "1"]).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("objective", "model", "names"),
    [
        ("flow", MODELS["flow"], {"text", "text_lengths", "pooled"}),
        ("ddpm", {"family": "pixart", "text_dim": 384}, {"text", "text_lengths"}),
    ],
)
def test_each_family_gets_its_conditions(
    packed: Path, tmp_path: Path, objective: str, model: dict[str, object], names: set[str]
) -> None:
    (tmp_path / "data.json").write_bytes((packed / "train" / "manifest.json").read_bytes())
    conditions = encode_prompts(tmp_path, recipe(objective, model), ["cat", "a small dog"])
    assert conditions.keys() == names
    assert conditions["text_lengths"].diff() > 0
    assert conditions["text"].shape == (2, int(conditions["text_lengths"].max()), 384)


def test_the_text_encoder_runs_where_and_as_it_is_told(packed: Path, tmp_path: Path) -> None:
    """Features in fp32 from weights in bf16, near those of weights in fp32; the device is another in name only here."""
    (tmp_path / "data.json").write_bytes((packed / "train" / "manifest.json").read_bytes())
    wanted, prompts = recipe("flow", MODELS["flow"]), ["cat", "a small dog"]
    exact = load_conditioner(tmp_path, wanted)(prompts)
    rounded = load_conditioner(tmp_path, wanted, device=torch.device("cpu"), dtype=torch.bfloat16)(prompts)
    assert rounded["text"].dtype == rounded["pooled"].dtype == torch.float32
    torch.testing.assert_close(rounded["pooled"], exact["pooled"], atol=0.01, rtol=0)
    assert not rounded["pooled"].equal(exact["pooled"])
    elsewhere = load_encoder(tmp_path, wanted, device=torch.device("meta"))
    assert elsewhere.module.device.type == "meta"


def test_grid_shows_the_pictures(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.2, 1.0], [-1.0, 1.3, -1.0]])
    draw_grid(colours[:, :, None, None].expand(3, 3, 4, 4), ["red", "blue", "green"], tmp_path / "new" / "grid.png")
    sheet = Image.open(tmp_path / "new" / "grid.png")
    seen = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)} <= seen
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
    with pytest.raises(ValueError, match="3 channels, not 4"):
        draw_grid(torch.zeros(1, 4, 4, 4), ["latent"], tmp_path / "latent.png")
