"""DeepFloyd-IF's UNet in plain torch, with the original names and fused layers, and a function that writes a stage's
files.

Inside the network, texts are [batch, channels, tokens] and pictures are [batch, channels, height, width].
"""

import math

import torch
import yaml
from torch import nn
from torch.nn import functional

# `params` in the config.yml of a small first stage, a second stage, and a first stage without a text projection.
FIRST = {
    "image_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "channel_mult": "1,2,3",
    "num_res_blocks": 2,
    "attention_resolutions": "8,4",
    "num_head_channels": 8,
    "encoder_dim": 24,
    "encoder_channels": 64,
    "att_pool_heads": 6,
    "activation": "gelu",
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "disable_self_attentions": False,
    "precision": "16",
    "dropout": 0.1,
}
SECOND = FIRST | {
    "in_channels": 6,
    "channel_mult": "1,3,2",
    "num_res_blocks": [1, 2, 3],
    "attention_resolutions": "4",
    "efficient_activation": True,
    "scale_skip_connection": True,
}
UNPROJECTED = FIRST | {
    "channel_mult": [1, 2],
    "attention_resolutions": [1, 2],
    "encoder_dim": 64,
    "att_pool_heads": 4,
    "activation": "silu",
}


def write(folder, params, *, dtype=torch.float32):
    """Writes a stage with random nonzero weights and returns its network."""
    torch.manual_seed(0)
    unet = UNet(params).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5).add_(0.05 * torch.randn_like(parameter))
    unet.to(dtype)
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text(yaml.safe_dump({"params": params}))
    torch.save(unet.state_dict(), folder / "pytorch_model.bin")
    return unet


def numbers(value):
    return [int(number) for number in value.split(",")] if isinstance(value, str) else value


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-5)


def activation(params):
    return {"gelu": nn.GELU, "silu": nn.SiLU}[params["activation"]]()


def waves(steps, channels):
    """Embeds timesteps [batch] as [batch, channels], cosines first."""
    phase = steps[:, None] * torch.exp(-math.log(10000) * torch.arange(channels // 2) / (channels // 2))
    return torch.cat([phase.cos(), phase.sin()], 1)


class Resnet(nn.Module):
    def __init__(self, params, inputs, outputs, time, resample=None):
        super().__init__()
        self.resample, self.factor = resample, 0.7071 if params.get("scale_skip_connection") else 1
        self.in_layers = nn.Sequential(norm(inputs), activation(params), nn.Conv2d(inputs, outputs, 3, padding=1))
        first = nn.Identity() if params.get("efficient_activation") else activation(params)
        self.emb_layers = nn.Sequential(first, nn.Linear(time, 2 * outputs))
        last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(norm(outputs), activation(params), nn.Dropout(), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time, text):
        h = self.in_layers[:2](x)
        if self.resample == "down":
            x, h = functional.avg_pool2d(x, 2), functional.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = (functional.interpolate(y, scale_factor=2.0, mode="nearest") for y in (x, h))
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[0](self.in_layers[2](h)) * (1 + scale) + shift
        return (self.skip_connection(x) + self.out_layers[1:](h)) * self.factor


class Attention(nn.Module):
    """Attention to both the text and the picture. The rows of `qkv` and `encoder_kv` are grouped by head."""

    def __init__(self, params, channels):
        super().__init__()
        text = params["encoder_channels"]
        self.width = params["num_head_channels"]
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.norm_encoder, self.encoder_kv = norm(text), nn.Conv1d(text, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, time, text):
        queries, keys, values = [], [], []
        qkv, kv = self.qkv(self.norm(x).flatten(2)), self.encoder_kv(self.norm_encoder(text))
        for picture_head, text_head in zip(qkv.split(3 * self.width, 1), kv.split(2 * self.width, 1), strict=True):
            query, key, value = picture_head.split(self.width, 1)
            text_key, text_value = text_head.split(self.width, 1)
            queries.append(query)
            keys.append(torch.cat([text_key, key], 2))
            values.append(torch.cat([text_value, value], 2))
        heads = [
            value @ torch.softmax(query.mT @ key / math.sqrt(self.width), 2).mT
            for query, key, value in zip(queries, keys, values, strict=True)
        ]
        return x + self.proj_out(torch.cat(heads, 1)).view_as(x)


class Pooling(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(1, channels))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x):
        token = x.mean(1, keepdim=True) + self.positional_embedding
        x = torch.cat([token, x], 1)
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.q_proj(token), self.k_proj(x), self.v_proj(x))
        )
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class UNet(nn.Module):
    def __init__(self, params):
        super().__init__()
        channels = [multiple * params["model_channels"] for multiple in numbers(params["channel_mult"])]
        layers, time = params["num_res_blocks"], max(channels)
        layers = [layers] * len(channels) if isinstance(layers, int) else layers
        rates = numbers(params["attention_resolutions"])
        if isinstance(params["attention_resolutions"], str):
            rates = [params["image_size"] // size for size in rates]

        def block(inputs, level):
            attention = [Attention(params, channels[level])] if 2**level in rates else []
            return [Resnet(params, inputs, channels[level], time), *attention]

        self.channels = params["model_channels"]
        self.time_embed = self.mlp(params, time)
        blocks, widths = [[nn.Conv2d(params["in_channels"], channels[0], 3, padding=1)]], [channels[0]]
        for level, outputs in enumerate(channels):
            for _ in range(layers[level]):
                blocks.append(block(widths[-1], level))
                widths.append(outputs)
            if level + 1 < len(channels):
                blocks.append([Resnet(params, outputs, outputs, time, "down")])
                widths.append(outputs)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        last = channels[-1]
        self.middle_block = nn.ModuleList(
            [Resnet(params, last, last, time), Attention(params, last), Resnet(params, last, last, time)]
        )
        blocks = []
        for level, outputs in reversed(list(enumerate(channels))):
            for _ in range(layers[level] + 1):
                blocks.append(block(last + widths.pop(), level))
                last = outputs
            if level:
                blocks[-1].append(Resnet(params, outputs, outputs, time, "up"))
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.out = nn.Sequential(norm(last), activation(params), nn.Conv2d(last, params["out_channels"], 3, padding=1))
        self.activation = activation(params) if params.get("efficient_activation") else nn.Identity()
        states, text = params["encoder_dim"], params["encoder_channels"]
        self.encoder_pooling = nn.Sequential(
            nn.LayerNorm(states), Pooling(states, params["att_pool_heads"]), nn.Linear(states, time), nn.LayerNorm(time)
        )
        self.encoder_proj = nn.Identity() if states == text else nn.Linear(states, text)
        self.aug_proj = self.mlp(params, time) if params["in_channels"] == 6 else None

    def mlp(self, params, outputs):
        return nn.Sequential(nn.Linear(self.channels, outputs), activation(params), nn.Linear(outputs, outputs))

    def forward(self, x, steps, states, levels=None):
        """Returns the network's output.

        Args:
            x: [batch, channels, height, width].
            steps: timesteps [batch].
            states: the text encoder's hidden states [batch, tokens, channels].
            levels: noise levels [batch], only for a second stage.
        """
        time = self.time_embed(waves(steps, self.channels)) + self.encoder_pooling(states)
        if self.aug_proj is not None:
            time = time + self.aug_proj(waves(levels, self.channels))
        time, text, skips = self.activation(time), self.encoder_proj(states).mT, []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, time, text)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, time, text)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], 1)
            for layer in block:
                x = layer(x, time, text)
        return self.out(x)
