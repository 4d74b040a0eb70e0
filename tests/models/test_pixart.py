"""PixArt against PixArtTransformer2DModel of diffusers, and what padding, dropping and precision may change."""

from collections.abc import Callable

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadit import models
from megadit.interop.diffusers import peer
from megadit.interop.layouts import from_diffusers, to_diffusers
from megadit.models.pixart import PixArt, PixArtConfig

CONFIGS = {
    "latents": PixArtConfig(
        input_size=8, in_channels=4, patch_size=2, width=64, depth=2, head_dim=16, text_dim=24, max_text_tokens=12
    ),
    "pixels": PixArtConfig(
        input_size=16, in_channels=3, patch_size=4, width=96, depth=3, head_dim=32, text_dim=17, max_text_tokens=9
    ),
    "no sigma": PixArtConfig(
        input_size=5,
        in_channels=2,
        patch_size=1,
        width=32,
        depth=2,
        head_dim=8,
        text_dim=8,
        max_text_tokens=7,
        learn_sigma=False,
    ),
}


def random_model(config: PixArtConfig) -> PixArt:
    """A model in which no weight is at a value that hides a mistake (0 or 1)."""
    torch.manual_seed(0)
    model = PixArt(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim > 1 and "table" not in name
            parameter.normal_(std=parameter[0].numel() ** -0.5 if is_matrix else 0.2)
    return model


def random_batch(config: PixArtConfig, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    return x, torch.randint(0, 1000, (batch,)), torch.randn(batch, length, config.text_dim)


def matching_pair(config: PixArtConfig) -> tuple[PixArt, PixArtTransformer2DModel]:
    ours, theirs = random_model(config), peer(config)
    theirs.load_state_dict(to_diffusers(config, ours.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_and_gradients_equal_diffusers(config: PixArtConfig) -> None:
    ours, theirs = matching_pair(config)
    x, timestep, text = random_batch(config, batch=4, length=7)
    lengths, dropped = torch.tensor([7, 3, 1, 6]), torch.tensor([False, True, False, True])
    y = ours(x, timestep.float(), text=text, text_lengths=lengths, dropped_B=dropped)
    null_caption = ours.y_embedder.y_embedding[:7]
    their_text = torch.where(dropped[:, None, None], null_caption, text)
    mask = (torch.arange(7) < lengths[:, None]).float()
    expected = theirs(x, their_text, timestep, encoder_attention_mask=mask).sample
    assert y.shape == (4, config.out_channels, *x.shape[2:])
    assert expected.std() > 0.3
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = from_diffusers(config, {name: p.grad for name, p in theirs.named_parameters()})
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5 * max(1, scale), msg=name)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 16), (12, 6), (16, 16)])
def test_other_aspect_ratios_equal_diffusers(height: int, width: int) -> None:
    config = CONFIGS["latents"]
    ours, theirs = matching_pair(config)
    x, timestep, text = random_batch(config, batch=2, length=5)
    x = torch.randn(*x.shape[:2], height, width)
    y = ours(x, timestep.float(), text=text, text_lengths=torch.tensor([5, 5]))
    torch.testing.assert_close(y, theirs(x, text, timestep).sample, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    dropped=st.lists(st.booleans(), min_size=3, max_size=3),
    extra=st.integers(0, 2),
    filling=st.sampled_from([0.0, 1e4, float("nan"), float("inf")]),
)
def test_padding_has_no_influence(
    same_alone: Callable[..., None], lengths: list[int], dropped: list[bool], extra: int, filling: float
) -> None:
    config = CONFIGS["no sigma"]
    model = random_model(config)
    x, timestep, text = random_batch(config, batch=3, length=5 + extra)
    for row, length in enumerate(lengths):
        text[row, length:] = filling

    def run(rows: slice, length: int) -> Tensor:
        return model(
            x[rows],
            timestep[rows],
            text=text[rows, :length],
            text_lengths=torch.tensor(lengths[rows]),
            dropped_B=torch.tensor(dropped[rows]),
        )

    same_alone(model, run, 5 + extra, lengths)


def test_a_dropped_caption_matters_only_by_its_length() -> None:
    config = CONFIGS["latents"]
    model = random_model(config)
    x, timestep, text = random_batch(config, batch=2, length=5)
    drop = {"dropped_B": torch.tensor([True, True])}
    lengths = torch.tensor([5, 2])
    y = model(x, timestep, text=text, text_lengths=lengths, **drop)
    assert torch.equal(y, model(x, timestep, text=-text, text_lengths=lengths, **drop))
    longer = model(x, timestep, text=text, text_lengths=torch.tensor([5, 3]), **drop)
    assert torch.equal(y[0], longer[0])
    assert (y[1] - longer[1]).abs().max() > 1e-3


def test_null_caption_is_fixed_and_of_the_published_size() -> None:
    first, second = (PixArt(CONFIGS["latents"]).y_embedder.y_embedding for _ in range(2))
    assert torch.equal(first, second)
    published = PixArt(PixArtConfig(width=72, depth=1)).y_embedder.y_embedding
    assert published.shape == (120, 4096)
    assert published.std().item() == pytest.approx(4096**-0.5, rel=0.01)


def test_state_dict_has_the_names_of_the_published_checkpoint() -> None:
    model = PixArt(PixArtConfig(width=72, depth=28, text_dim=16))
    assert len(list(model.parameters())) == 435  # PixArt-alpha/L28_width288.bsh of ML-GSAI
    state = model.state_dict()
    blocks = {name.partition(".")[2].partition(".")[2] for name in state if name.startswith("blocks.")}
    attention = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
    linear = {f"{module}.{leaf}" for module in (*attention, "mlp.fc1", "mlp.fc2") for leaf in ("weight", "bias")}
    assert blocks == {"scale_shift_table"} | linear
    assert {name: list(value.shape) for name, value in state.items() if not name.startswith("blocks.")} == {
        "pos_embed": [1, 256, 72],
        "x_embedder.proj.weight": [72, 4, 2, 2],
        "x_embedder.proj.bias": [72],
        "t_embedder.mlp.0.weight": [72, 256],
        "t_embedder.mlp.0.bias": [72],
        "t_embedder.mlp.2.weight": [72, 72],
        "t_embedder.mlp.2.bias": [72],
        "t_block.1.weight": [432, 72],
        "t_block.1.bias": [432],
        "y_embedder.y_embedding": [120, 16],
        "y_embedder.y_proj.fc1.weight": [72, 16],
        "y_embedder.y_proj.fc1.bias": [72],
        "y_embedder.y_proj.fc2.weight": [72, 72],
        "y_embedder.y_proj.fc2.bias": [72],
        "final_layer.scale_shift_table": [2, 72],
        "final_layer.linear.weight": [32, 72],
        "final_layer.linear.bias": [32],
    }


def test_buffers_have_values_on_the_meta_device() -> None:
    config = CONFIGS["no sigma"]
    with torch.device("meta"):
        model = PixArt(config)
    assert all(p.is_meta for p in model.parameters())
    plain = PixArt(config)
    assert torch.equal(model.pos_embed, plain.pos_embed)
    assert torch.equal(model.y_embedder.y_embedding, plain.y_embedder.y_embedding)
    x, timestep, text = (tensor.to("meta") for tensor in random_batch(config, batch=2, length=3))
    y = model.to("meta")(x, timestep, text=text, text_lengths=torch.tensor([3, 1]).to("meta"))
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_is_as_exact_as_diffusers(autocast: bool) -> None:
    config = CONFIGS["pixels"]
    ours, theirs = matching_pair(config)
    x, timestep, text = random_batch(config, batch=4, length=5)
    lengths = torch.full((4,), 5)
    expected = ours(x, timestep.float(), text=text, text_lengths=lengths)
    their_x, their_text = x, text
    if not autocast:
        ours, theirs, their_x, their_text = ours.bfloat16(), theirs.bfloat16(), x.bfloat16(), text.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ours(x, timestep.float(), text=text, text_lengths=lengths)
        their_error = (theirs(their_x, their_text, timestep).sample - expected).abs().mean()
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().mean() <= 1.5 * their_error


def test_wrong_input_is_named() -> None:
    config = CONFIGS["no sigma"]
    x, timestep, text = random_batch(config, batch=2, length=8)
    model = PixArt(config)
    with pytest.raises(ValueError, match=r"2 channels and sides that are multiples of 1, not \[2, 1, 5, 5\]"):
        model(x[:, :1], timestep, text=text[:, :7], text_lengths=torch.tensor([7, 7]))
    with pytest.raises(ValueError, match="at most 7 text tokens, not 8"):
        model(x, timestep, text=text, text_lengths=torch.tensor([7, 7]))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_num_flops_is_what_runs(config: PixArtConfig) -> None:
    x, timestep, text = random_batch(config, batch=1, length=7)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        PixArt(config)(x, timestep, text=text, text_lengths=torch.tensor([4]))
    assert models.num_flops(config, 7) == counter.get_total_flops()
