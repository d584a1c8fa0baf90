"""A pipeline that is linear in latents, text and all activations, so that first-order estimates are exact."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from tests import tiny
from tests.runs import double

WIDTH = 6


class Attention(nn.Module):
    """Averages text or itself; its heads are slices of what the output projection reads."""

    heads, processor = 2, None

    def __init__(self, n_features: int):
        super().__init__()
        self.to_k = nn.Linear(n_features, WIDTH)
        self.to_v = nn.Linear(n_features, WIDTH)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x, states):
        # with uneven weights, so that tokens do not count alike
        weights = torch.linspace(0, 1, states.shape[1], dtype=x.dtype)
        mixed = torch.einsum("t,bti->bi", weights, self.to_k(states) + 2 * self.to_v(states))[:, None]
        return self.to_out[0](mixed + x)


class Layer(nn.Module):
    def __init__(self, n_text: int):
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(WIDTH), Attention(n_text), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, text):
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, text)
        return x + self.ff(x)


class Transformer(nn.Module):
    def __init__(self, n_text: int):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Layer(n_text)])


class Block(nn.Module):
    def __init__(self, n_text: int):
        super().__init__()
        self.resnets = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1)])
        self.attentions = nn.ModuleList([Transformer(n_text)])

    def forward(self, x, text):
        x = x + self.resnets[0](x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.attentions[0].transformer_blocks[0](tokens, text)
        x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return x, (x, 2 * x)


class LinearUNet(ModelMixin, ConfigMixin):
    """One down and one up block, with a skip connection."""

    mid_block = None

    @register_to_config
    def __init__(self, sample_size=4, in_channels=4, n_text=32, time_cond_proj_dim=None, encoder_hid_dim_type=None):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, WIDTH, 1)
        self.down_blocks = nn.ModuleList([Block(n_text)])
        self.up_blocks = nn.ModuleList([Block(n_text)])
        self.conv_out = nn.Conv2d(WIDTH, in_channels, 1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
        x, skips = self.down_blocks[0](self.conv_in(sample), encoder_hidden_states)
        x, _ = self.up_blocks[0](x + skips[0] + skips[1], encoder_hidden_states)
        predicted = self.conv_out(x)
        return UNet2DConditionOutput(predicted) if return_dict else (predicted,)


def linear_pipeline(**overrides):
    """A `StableDiffusionPipeline` in float64 with a `LinearUNet`, and a text encoder that is linear as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = LinearUNet().eval()
    pipe = double(tiny.stable_diffusion(unet=unet, text_encoder={"hidden_act": "linear"}, **overrides))
    _make_linear(pipe.text_encoder)
    return pipe


@torch.no_grad()
def _make_linear(text_encoder: nn.Module) -> None:
    """Leaves out the norms, and lets every token attend to all before it alike."""
    for path, module in list(text_encoder.named_modules()):
        if isinstance(module, nn.LayerNorm):
            text_encoder.set_submodule(path, nn.Identity())
        if path.endswith("q_proj"):
            module.weight.zero_()
            module.bias.zero_()


def linear_metric(images, latents, cases):
    """A weighted sum of the final latents."""
    weights = torch.linspace(-1, 2, latents[0].numel(), dtype=latents.dtype).view(latents.shape[1:])
    return (latents * weights).sum((1, 2, 3))


linear_metric.needs_images = False
