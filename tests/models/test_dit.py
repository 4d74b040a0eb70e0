"""DiT against DiTTransformer2DModel of diffusers, and what dropping, precision and the meta device may change."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadit import models
from megadit.interop.diffusers import peer
from megadit.interop.layouts import from_diffusers, to_diffusers
from megadit.models.dit import DiT, DiTConfig
from megadit.models.dit.diffusers import use_published_timesteps

CONFIGS = {
    "published timesteps": DiTConfig(input_size=8, in_channels=4, patch_size=2, width=64, depth=2, head_dim=16),
    "diffusers timesteps": DiTConfig(
        input_size=16, in_channels=3, patch_size=4, width=96, depth=3, head_dim=32, timestep_freq_shift=1
    ),
    "no sigma": DiTConfig(
        input_size=5, in_channels=2, patch_size=1, width=32, depth=2, head_dim=8, num_classes=7, learn_sigma=False
    ),
}


def random_model(config: DiTConfig) -> DiT:
    """A model in which no weight is at a value that hides a mistake (0 or 1)."""
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    return model


def random_batch(config: DiTConfig, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    return x, torch.randint(0, 1000, (batch,)), torch.randint(0, config.num_classes, (batch,))


def matching_pair(config: DiTConfig) -> tuple[DiT, DiTTransformer2DModel]:
    """Both models with the same weights; theirs has its copies of the embeddings tied, so that gradients add up."""
    ours, theirs = random_model(config), peer(config).eval()  # in training mode it would drop labels by itself
    theirs.load_state_dict(to_diffusers(config, ours.state_dict()))
    for block in theirs.transformer_blocks:
        block.norm1.emb = theirs.transformer_blocks[0].norm1.emb
    if config.timestep_freq_shift == 0:
        use_published_timesteps(theirs)
    return ours, theirs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_and_gradients_equal_diffusers(config: DiTConfig) -> None:
    ours, theirs = matching_pair(config)
    x, timestep, labels = random_batch(config, batch=4)
    dropped = torch.tensor([False, True, False, True])
    y = ours(x, timestep.float(), labels=labels, dropped_B=dropped)
    expected = theirs(x, timestep, labels.where(~dropped, config.num_classes)).sample
    assert y.shape == (4, config.out_channels, *x.shape[2:])
    assert expected.std() > 0.3
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    gradients = from_diffusers(config, their_gradients)
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5 * max(1, scale), msg=name)


def test_a_larger_square_equals_diffusers() -> None:
    """(Their class takes squares alone.)"""
    config = CONFIGS["published timesteps"]
    ours, theirs = matching_pair(config)
    x, timestep, labels = random_batch(config, batch=2)
    x = torch.randn(*x.shape[:2], 12, 12)
    expected = theirs(x, timestep, labels).sample
    torch.testing.assert_close(ours(x, timestep.float(), labels=labels), expected, rtol=1e-5, atol=1e-5)


def test_timestep_frequencies_of_diffusers_are_not_the_published_ones() -> None:
    config = CONFIGS["published timesteps"]
    ours, theirs = matching_pair(config)
    x, timestep, labels = random_batch(config, batch=2)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert (ours(x, timestep.float(), labels=labels) - theirs(x, timestep, labels).sample).abs().max() > 0.01


def test_state_dict_has_the_names_of_the_published_checkpoint() -> None:
    state = DiT(DiTConfig(width=72, depth=28)).state_dict()
    assert len(state) == 292  # DiT/width288_d28.bsh of ML-GSAI/Scaling-Diffusion-Transformers-muP
    blocks = {name.partition(".")[2].partition(".")[2] for name in state if name.startswith("blocks.")}
    modules = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert blocks == {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    assert {name: list(value.shape) for name, value in state.items() if not name.startswith("blocks.")} == {
        "pos_embed": [1, 256, 72],
        "x_embedder.proj.weight": [72, 4, 2, 2],
        "x_embedder.proj.bias": [72],
        "t_embedder.mlp.0.weight": [72, 256],
        "t_embedder.mlp.0.bias": [72],
        "t_embedder.mlp.2.weight": [72, 72],
        "t_embedder.mlp.2.bias": [72],
        "y_embedder.embedding_table.weight": [1001, 72],
        "final_layer.adaLN_modulation.1.weight": [144, 72],
        "final_layer.adaLN_modulation.1.bias": [144],
        "final_layer.linear.weight": [32, 72],
        "final_layer.linear.bias": [32],
    }


def test_positions_are_those_of_diffusers() -> None:
    config = CONFIGS["diffusers timesteps"]
    torch.testing.assert_close(DiT(config).pos_embed, peer(config).pos_embed.pos_embed, rtol=0, atol=1e-6)


def test_buffers_have_values_on_the_meta_device() -> None:
    config = CONFIGS["no sigma"]
    with torch.device("meta"):
        model = DiT(config)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model.pos_embed, DiT(config).pos_embed)
    x, timestep, labels = random_batch(config, batch=2)
    dropped = torch.tensor([True, False])
    y = model.to("meta")(x.to("meta"), timestep.to("meta"), labels=labels.to("meta"), dropped_B=dropped.to("meta"))
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_is_as_exact_as_diffusers(autocast: bool) -> None:
    ours, theirs = matching_pair(CONFIGS["diffusers timesteps"])
    x, timestep, labels = random_batch(CONFIGS["diffusers timesteps"], batch=4)
    expected = ours(x, timestep.float(), labels=labels)
    their_x = x
    if not autocast:
        ours, theirs, their_x = ours.bfloat16(), theirs.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ours(x, timestep.float(), labels=labels)
        their_error = (theirs(their_x, timestep, labels).sample - expected).abs().mean()
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().mean() <= 1.5 * their_error


def test_wrong_input_is_named() -> None:
    config = CONFIGS["no sigma"]
    x, timestep, labels = random_batch(config, batch=2)
    model = DiT(config)
    with pytest.raises(ValueError, match=r"2 channels and sides that are multiples of 1, not \[2, 1, 5, 5\]"):
        model(x[:, :1], timestep, labels=labels)
    with pytest.raises(ValueError, match="labels must be from 0 to 6, not 3 to 7"):
        model(x, timestep, labels=torch.tensor([3, 7]))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_num_flops_is_what_runs(config: DiTConfig) -> None:
    x, timestep, labels = random_batch(config, batch=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        DiT(config)(x, timestep, labels=labels)
    assert models.num_flops(config, 0) == counter.get_total_flops()
