"""MMDiT against SD3Transformer2DModel of diffusers, and what padding, precision and the meta device may change."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadit import models
from megadit.interop.diffusers import peer
from megadit.interop.layouts import to_diffusers
from megadit.models.mmdit import MMDiT, MMDiTConfig
from megadit.models.mmdit.model import patchify, unpatchify

CONFIGS = {
    "pixels": MMDiTConfig(
        input_size=16, in_channels=3, patch_size=4, width=64, depth=2, head_dim=32, text_dim=24, pooled_dim=20
    ),
    "latents": MMDiTConfig(
        input_size=8, in_channels=4, patch_size=2, width=96, depth=3, head_dim=16, text_dim=17, pooled_dim=33
    ),
    "one block": MMDiTConfig(
        input_size=6, in_channels=1, patch_size=1, width=16, depth=1, head_dim=16, text_dim=8, pooled_dim=8
    ),
}


def random_model(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    """A model in which no weight is at a value that hides a mistake (0 or 1)."""
    torch.manual_seed(seed)
    model = MMDiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2
            parameter.normal_(std=scale).add_(float("qk_norm" in name))
    return model


def random_batch(config: MMDiTConfig, batch: int, length: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    conditions = {
        "text": torch.randn(batch, length, config.text_dim),
        "text_lengths": torch.full((batch,), length),
        "pooled": torch.randn(batch, config.pooled_dim),
    }
    return x, 1000 * torch.rand(batch), conditions


def matching_pair(config: MMDiTConfig) -> tuple[MMDiT, SD3Transformer2DModel]:
    ours, theirs = random_model(config), peer(config)
    missing, unexpected = theirs.load_state_dict(to_diffusers(config, ours.state_dict()), strict=False)
    assert missing == ["pos_embed.pos_embed"], missing  # the sine-cosine table is a buffer there
    assert not unexpected
    return ours, theirs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length", [1, 7])
def test_forward_and_gradients_equal_diffusers(config: MMDiTConfig, length: int) -> None:
    ours, theirs = matching_pair(config)
    x, t, conditions = random_batch(config, batch=3, length=length)
    y = ours(x, t, **conditions)
    expected = theirs(x, conditions["text"], conditions["pooled"], t).sample
    assert y.shape == x.shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn_like(x)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = to_diffusers(config, {name: p.grad for name, p in ours.named_parameters()})
    assert gradients.keys() == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * max(1, scale), msg=name)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    extra=st.integers(0, 4),
    filling=st.sampled_from([0.0, 1e4, float("nan"), float("inf")]),
)
def test_padding_has_no_influence(
    same_alone: Callable[..., None], lengths: list[int], extra: int, filling: float
) -> None:
    config = CONFIGS["pixels"]
    model = random_model(config)
    x, t, conditions = random_batch(config, batch=3, length=5 + extra)
    text = conditions["text"]
    for row, length in enumerate(lengths):
        text[row, length:] = filling

    def run(rows: slice, length: int) -> Tensor:
        return model(
            x[rows],
            t[rows],
            text=text[rows, :length],
            text_lengths=torch.tensor(lengths[rows]),
            pooled=conditions["pooled"][rows],
        )

    same_alone(model, run, 5 + extra, lengths)


def test_every_parameter_has_a_gradient() -> None:
    config = CONFIGS["pixels"]
    model = random_model(config)
    x, t, conditions = random_batch(config, batch=2, length=3)
    model(x, t, **conditions).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_no_buffer_outlives_or_misses_construction() -> None:
    """Engines build on the meta device and allocate parameters alone."""
    with torch.device("meta"):
        model = models.build(CONFIGS["pixels"])
    assert not list(model.buffers())
    assert all(p.is_meta for p in model.parameters())
    x, t, conditions = random_batch(CONFIGS["pixels"], batch=2, length=3)
    y = model(x.to("meta"), t.to("meta"), **{name: value.to("meta") for name, value in conditions.items()})
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_keeps_times_apart(autocast: bool) -> None:
    """In bf16 998.38 would be 1000."""
    config = CONFIGS["pixels"]
    exact = random_model(config)
    x, _, conditions = random_batch(config, batch=1, length=3)

    def shift(model: MMDiT) -> Tensor:
        times = torch.tensor([998.38, 1000.0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            late, end = (model(x, t[None], **conditions).float() for t in times)
        return late - end

    expected = shift(exact) if not autocast else _fp32_shift(exact, x, conditions)
    found = shift(exact if autocast else random_model(config).bfloat16())
    assert expected.abs().mean() > 0.05, "the two times are told apart in fp32"
    assert (found - expected).abs().mean() < 0.3 * expected.abs().mean()


def _fp32_shift(model: MMDiT, x: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        late, end = (model(x, torch.tensor([t]), **conditions) for t in (998.38, 1000.0))
    return late - end


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_is_as_exact_as_diffusers(autocast: bool) -> None:
    config = CONFIGS["pixels"]
    ours, theirs = matching_pair(config)
    x, t, conditions = random_batch(config, batch=4, length=5)
    arguments = (x, conditions["text"], conditions["pooled"])
    expected = ours(x, t, **conditions)
    if not autocast:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
        arguments = tuple(a.bfloat16() for a in arguments)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        error = (ours(x, t, **conditions) - expected).abs().mean()
        their_error = (theirs(*arguments, t).sample - expected).abs().mean()
    assert error <= 1.5 * their_error


def test_wrong_image_size_is_named() -> None:
    config = CONFIGS["pixels"]
    x, t, conditions = random_batch(config, batch=2, length=3)
    with pytest.raises(ValueError, match=r"3 channels and sides that are multiples of 4, not \[2, 3, 16, 14\]"):
        MMDiT(config)(x[..., :14], t, **conditions)


@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    patch=st.integers(1, 3),
    channels=st.integers(1, 3),
    batch=st.integers(1, 2),
)
def test_unpatchify_inverts_patchify(height: int, width: int, patch: int, channels: int, batch: int) -> None:
    shape = (batch, channels, height * patch, width * patch)
    x = torch.arange(math.prod(shape)).reshape(shape)
    patches = patchify(x, patch)
    assert patches.shape == (batch, height * width, channels * patch * patch)
    assert torch.equal(unpatchify(patches, channels, patch, (height, width)), x)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (8, 2), (6, 4)])
def test_other_aspect_ratios_equal_diffusers(height: int, width: int) -> None:
    """(Their class takes no more than the table that it crops positions from has.)"""
    config = CONFIGS["latents"]
    ours, theirs = matching_pair(config)
    x, t, conditions = random_batch(config, batch=2, length=5)
    x = torch.randn(*x.shape[:2], height, width)
    expected = theirs(x, conditions["text"], conditions["pooled"], t).sample
    torch.testing.assert_close(ours(x, t, **conditions), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_num_flops_is_what_runs(config: MMDiTConfig) -> None:
    x, t, conditions = random_batch(config, batch=1, length=7)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        MMDiT(config)(x, t, **conditions, return_features=config.repa is not None)
    assert models.num_flops(config, 7) == counter.get_total_flops()
