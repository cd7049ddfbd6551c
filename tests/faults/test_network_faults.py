"""Faults in the networks of Stable Diffusion: CLIP's text encoder, the UNet and the autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from reference import cases
from support import tiny

from faults.damage import argument, halves, instead, layer, override, scaled
from faults.views import Fault, View, Views, network, normal, recorded
from sega_jax.nn import attention, clip, flash_attention, layers, vae
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.systems import latent_space

pytestmark = pytest.mark.fault


def text():
    return network("text_encoder")(cases.INPUTS["ids"])


def unet():
    return network("unet")(*(cases.INPUTS[name] for name in ("x", "timestep", "context")))


def autoencoder():
    net = network("vae")
    return net.decode(cases.INPUTS["latents"]), *net.encode(cases.INPUTS["image"])


def pictures():
    return latent_space.decode_latents(network("vae"), recorded("pictures_none")["latents"])[0]


def faint_blocks():
    """Runs blocks of all three networks on inputs with a variance so small that the norm layers' epsilon matters."""
    words, picture, context = 0.01 * normal(2, 12, 16), 0.01 * normal(2, 8, 8, 8), normal(2, 12, 16, seed=1)
    level = network("unet").down_blocks[0]
    keys = level.attentions[0].project(context)
    return (
        network("text_encoder").encoder.layers[0](words),
        level.attentions[0](picture, keys),
        level(picture, normal(2, 32), [keys])[0],
        network("vae").encoder.down_blocks[0](picture),
    )


BRANCHES = normal(2, 4, 4, 4), np.array([999, 3], np.float32), normal(6, 7, 16, seed=1)


def branches(times=1):
    """Runs the UNet on three texts for each of two pictures. Each picture occurs `times` times in the batch."""
    net, (x, timestep, texts) = tiny.filled(UNet2DConditionModel(UNetConfig.from_dict(tiny.UNET_1))), BRANCHES
    return net(x.repeat(times, 0), timestep.repeat(times), texts)


QUERIES = [jnp.asarray(normal(2, count, 1, 160, seed=count)) for count in (3, 7, 7)]
SEEN = jnp.asarray(np.arange(7) < np.array([[4], [7]]))


def tpu_kernel():
    """Runs the TPU kernel on heads and keys that it has to pad, with some keys masked."""
    with force_tpu_interpret_mode():
        return flash_attention.flash(*QUERIES, SEEN, False)


VIEWS = Views(
    {
        "text": View(text, lambda: recorded("networks_sd1_ddim")["text"], 1e-5),
        "unet": View(unet, lambda: recorded("networks_sd1_ddim")["unet"], 1e-5),
        "autoencoder": View(
            autoencoder, lambda: [recorded("networks_sd1_ddim")[name] for name in ("decoded", "mean", "logvar")], 1e-5
        ),
        "pictures": View(pictures, lambda: recorded("pictures_none")["images"], 1e-5),
        "faint blocks": View(faint_blocks, tolerance=1e-5),
        "branches": View(branches, lambda: branches(3), 1e-5),
        "flash": View(tpu_kernel, lambda: attention._attend(*QUERIES, SEEN, False), 1e-5),
    }
)


def sample_variance(moments):
    """Uses the unbiased sample variance in a group norm."""

    def damaged(self, x, **options):
        mean, variance = moments(self, x, **options)
        count = x[0].size / self.groups
        return mean, variance * (count / (count - 1))

    return damaged


def transposed(upsample):
    """Upsamples the transposed picture and transposes the result, which exchanges height and width."""
    return lambda self, x, size=None: upsample(self, x.swapaxes(1, 2)).swapaxes(1, 2)


FAULTS = {
    # Layers
    "the softmax scale is doubled": Fault("unet", layers, "attend", scaled(0, 2.0)),
    "gelu is approximated by tanh": Fault("unet", layers, "gelu", instead(jax.nn.gelu)),
    "the group norm uses the unbiased variance": Fault("unet", layers.GroupNorm, "_moments", sample_variance),
    "the layer norm has the wrong epsilon": Fault("faint blocks", layers, "normalise", scaled(1, 0.1)),
    "upsampling exchanges height and width": Fault("autoencoder", layers.Upsample, "__call__", transposed),
    "branches get the pictures of other rows": Fault(
        "branches", layers, "spread", instead(lambda x, like: jnp.tile(x, (len(like) // len(x), *[1] * (x.ndim - 1))))
    ),
    "the TPU kernel attends to masked keys": Fault("flash", flash_attention, "flash", argument(3, jnp.ones_like)),
    # CLIP
    "CLIP's text attends to later tokens": Fault("text", clip.SelfAttention, "__init__", override(causal=False)),
    # The UNet
    "the UNet's downsampling is padded only at the right and bottom": Fault(
        "faint blocks", layers.Downsample, "__init__", override(padding=((0, 1), (0, 1)))
    ),
    "the resnets of the UNet have the epsilon of the autoencoder": Fault(
        "faint blocks", layers.ResnetBlock, "__init__", override(eps=1e-6)
    ),
    # The autoencoder
    "the autoencoder's downsampling is padded on all sides": Fault(
        "autoencoder", layers.Downsample, "__init__", override(padding=1)
    ),
    "the encoder's mean and variance are exchanged": Fault(
        "autoencoder", vae.AutoencoderKL, "__init__", layer("quant_conv", lambda x, y: halves(y))
    ),
    "latents are not divided by the scaling factor": Fault("pictures", vae.AutoencoderKL, "decode", scaled(1, 0.5)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, monkeypatch):
    assert VIEWS.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults():
    assert VIEWS.wrong() == set()
