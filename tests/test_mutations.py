"""Faults made on purpose: each changes what a view of the library shows by more than the tests tolerate."""

import inspect
import textwrap
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_guidance
import tiny
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from reference import cases
from reference.oracle import guidance as guide
from test_reference import recorded

from convert import deepfloyd as original
from sega_jax import Edits
from sega_jax.method import guidance, schedules, solvers
from sega_jax.method.schedules import ddim_ddpm_pndm, exponential, sigmas
from sega_jax.method.schedules import spacing as schedule
from sega_jax.nn import clip, flash_attention, layers, t5, vae
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig, attention, blocks, embedding, model
from sega_jax.pipelines import batch
from sega_jax.pipelines.execution import active_concepts
from sega_jax.systems import base, deepfloyd
from sega_jax.systems import stable_diffusion as system
from sega_jax.text.tokenizers import T5Tokenizer, Tokenizer
from sega_jax.weights import pull

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:the text encoder reads")]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(part):
    return tiny.filled(getattr(tiny.networks(), part))


def show(function, *args):
    """Runs a function, compiled without optimisation, which would take longer."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(*args)


def view_text():
    return show(lambda net: net(cases.INPUTS["ids"]), network("text_encoder"))


def view_unet():
    return show(lambda net: net(*(cases.INPUTS[name] for name in ("x", "timestep", "context"))), network("unet"))


def view_autoencoder():
    latents, image = cases.INPUTS["latents"], cases.INPUTS["image"]
    return show(lambda net: (net.decode(latents), *net.encode(image)), network("vae"))


def view_pictures():
    return show(lambda net: system.decode(net, recorded("pictures_none")["latents"])[0], network("vae"))


def view_small():
    """Blocks of all three networks, whose inputs vary so little that an epsilon shows."""
    words, picture, text = 0.01 * noise(2, 12, 16), 0.01 * noise(2, 8, 8, 8), noise(2, 12, 16, seed=1)
    text_encoder, net, autoencoder = network("text_encoder"), network("unet"), network("vae")
    told = net.down_blocks[0].attentions[0].project(text)
    blocks = {
        "text": (text_encoder.encoder.layers[0], words),
        "transformer": (net.down_blocks[0].attentions[0], picture, told),
        "down": (net.down_blocks[0], picture, noise(2, 32), [told]),
        "autoencoder": (autoencoder.encoder.down_blocks[0], picture),
    }
    return show(lambda blocks: {name: block(*inputs) for name, (block, *inputs) in blocks.items()}, blocks)


def view_unet_of(name):
    net = tiny.filled(UNet2DConditionModel(UNetConfig.from_dict(cases.UNETS[name][0])))
    return show(lambda net: net(*cases.unet_inputs(name)), net)


BRANCHES = noise(2, 4, 4, 4), np.array([999, 3], np.float32), noise(6, 7, 16, seed=1)


def view_branches(repeat=False):
    """Of three texts for each of two pictures, given once or once for each text."""
    net = tiny.filled(UNet2DConditionModel(UNetConfig.from_dict(tiny.UNET_1)))
    x, timestep, text = BRANCHES
    given = (x.repeat(3, 0), timestep.repeat(3)) if repeat else (x, timestep)
    return show(lambda net: net(*given, text), net)


def view_t5():
    """Of padding, no state is used."""
    net = tiny.filled(t5.T5EncoderModel(t5.T5Config.from_dict(tiny.T5)))
    return show(lambda net: net(cases.WORDS, cases.MASK), net)[cases.MASK]


def view_small_blocks():
    """Blocks of DeepFloyd-IF's networks, whose inputs vary so little that an epsilon shows."""
    net = tiny.filled(UNet2DConditionModel(UNetConfig.from_dict(cases.UNETS["if_2"][0])))
    layer = tiny.filled(t5.T5EncoderModel(t5.T5Config.from_dict(tiny.T5))).encoder.block[1].layer[1]
    picture, text, time = 0.01 * noise(2, 4, 6, 16), 0.01 * noise(2, 7, 64, seed=1), noise(2, 20)
    blocks = {
        "attention": (net.mid_block.attentions[0], picture, net.mid_block.attentions[0].project(text)),
        "resnet": (net.mid_block.resnets[0], picture, time),
        "t5": (layer, 0.003 * noise(2, 7, 24)),
    }
    return show(lambda blocks: {name: block(*inputs) for name, (block, *inputs) in blocks.items()}, blocks)


STAGES = {"stage1": tiny.STAGE_1, "stage2": tiny.STAGE_2}


def view_stage(name):
    """The state that a stage of DeepFloyd-IF, or the x4 upscaler, ends with."""
    steps, scale, level, betas = cases.STAGES[name]
    small, shape = None, (8, 8, 3)
    if name == "upscaler":
        models, config, tokens, stage = tiny.networks(**tiny.X4), tiny.X4_SCHEDULER, cases.TEXTS["clip"][0], system
        shape = (8, 8, 4)
    else:
        models, config = deepfloyd.Models.build(tiny.T5, STAGES[name]), tiny.IF_SCHEDULER
        tokens, stage = np.stack(cases.TEXTS["t5"], 1).astype(np.int32), deepfloyd
    if name == "stage2":
        config, shape = config | {"sample_max_value": 1.0}, (32, 32, 3)
    family = schedules.from_config(config)
    table = family.table(steps)
    if level is not None:
        shares = schedules.from_config(betas).shares([level])
        small = base.Small(cases.SMALL / np.float32(127.5) - 1, np.int32([level]), *shares, np.zeros(1, bool))

    def run(models):
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
        settings = base.Settings(keys, np.full(1, scale), np.zeros(1), None, None, small)
        text, method = stage.encode(models.text_encoder, tokens)[None], base.Method(family.solver)
        carry = stage.start(settings, None, 1.0, shape=shape, method=method, dtype=np.float32)
        return stage.advance(models.unet, text, carry, table, settings, method=method)[0].x

    return show(run, type(models)(*map(tiny.filled, models)))


# Late cool-downs, so that a momentum is there to go on; and an edge where diffusers divides 0 by 0.
FIRST = {
    "scale": [4, 5, 6],
    "reverse": [False, True, False],
    "threshold": [0.9, 0.5, 1.0],
    "warmup": [0, 3, 1],
    "cooldown": [2, 5, None],
    "weight": [2.0, 0.5, 1.0],
    "momentum_scale": [0.4] * 3,
    "momentum_beta": [0.7] * 3,
}
SECOND = FIRST | {
    "threshold": [0.7, 0.0, 0.8],
    "warmup": [1, 4, 0],
    "cooldown": [2, None, 1],
    "weight": [1.0, 3.0, 0.0],
}
SHORT = {name: values[:2] for name, values in FIRST.items()}
PREDICTIONS = test_guidance.predictions(np.random.default_rng(0), 2, 3)


def view_guidance(pictures, semantics="diffusers"):
    with jax.enable_x64(True):
        settings = test_guidance.edits(pictures)
        return show(lambda *args: test_guidance.run.__wrapped__(*args, semantics), PREDICTIONS, settings)


def oracle(pictures, semantics="diffusers"):
    """The same in plain NumPy."""
    u, _, e, _ = PREDICTIONS
    added = [guide(u[:, b], e[:, b, : len(p["scale"])], **p, semantics=semantics) for b, p in enumerate(pictures)]
    return np.stack(added, 1)


# With the concepts that end first behind the others, and without a momentum that needs them before their warm-up.
LATE = [{name: values[::-1] for name, values in settings.items()} for settings in (FIRST, SECOND)]
ALONE = [settings | {"momentum_scale": [0.0] * 3} for settings in LATE]


def view_unneeded(pictures):
    """What is added where the predictions that are not needed are wrong."""
    u, p, e, _ = PREDICTIONS
    with jax.enable_x64(True):
        settings = test_guidance.edits(pictures)
        wrong = np.arange(3) >= active_concepts.needed(settings, len(u))[:, None, None]
        given = PREDICTIONS._replace(edits=np.where(wrong[..., None, None, None], 99 * p[:, :, None], e))
        return show(test_guidance.run.__wrapped__, given, settings)


SOLVERS = {
    "ddim": ["ddim", "ddim_v", "ddim_eta_clip"],
    "pndm": ["pndm", "pndm_v"],
    "runge_kutta": ["pndm_runge_kutta"],
    "ddpm": ["ddpm", "ddpm_large", "ddpm_threshold"],
    "sigma": ["euler", "euler_v", "euler_ancestral", "heun", "lms"],
    "dpm": ["dpm", "dpm_heun", "dpm_3", "dpm_stochastic"],
    "unipc": ["unipc", "unipc_3"],
}


def view_solver(names):
    """Every x of recorded trajectories."""

    def path(name):
        config, steps, eta = cases.SCHEDULES[name]
        family = schedules.from_config(config)
        solver, table = solvers.SOLVERS[family.solver](eta), family.table(steps)

        def call(carry, given):
            row, output, fresh = given
            carry = solver.update(*carry, output, None, row, lambda _: fresh)
            return carry, carry[0]

        calls = len(table.call)
        given = table, cases.OUTPUTS[:calls], cases.NOISE[:calls]
        return jax.lax.scan(call, (jnp.asarray(cases.START), solver.init(cases.START)), given)[1]

    return show(lambda: [path(name) for name in names])


def recorded_paths(names):
    return [recorded(f"schedule_{name}")["path"] for name in names]


class Silent:
    """A network that predicts nothing."""

    def project(self, text):
        return text

    def __call__(self, x, timestep, text):
        return jnp.zeros((len(text), *x.shape[1:]))


def view_loop():
    """Fresh noise of two rows over three calls."""
    settings = system.Settings(batch._from_seeds(np.uint32([3, 4])), np.ones(2), np.ones(2), Edits.stack([[]] * 2))
    method, text = system.Method(), np.zeros((2, 2, 12, 16), np.float32)
    table = schedules.from_config(tiny.DDIM).table(3)

    def run(settings):
        carry = system.start(settings, None, 1.0, shape=(2, 2, 4), method=method, dtype=np.float32)
        return system.advance(Silent(), text, carry, table, settings, method=method)[0].x

    return show(run, settings)


def view_fused():
    """The keys among rows of queries, keys and values, of three heads that are two wide."""
    return original._rows(lambda: np.arange(18)[:, None], (-1, 3, 2, 1), 1, (6, 1))[:, 0]


RANKED = np.random.default_rng(3).integers(0, 9, (2, 20, 3)).astype(np.float32) / 7 * 2.0 ** np.arange(-60, 60, 40)
RANKED = RANKED.astype(np.float32)


def view_counting():
    """Of entries many of which are equal."""
    return guidance._by_counting(jnp.asarray(RANKED), jnp.array([[4], [18]]))


ATTENDED = noise(2, 3, 1, 160), noise(2, 7, 1, 160, seed=1), noise(2, 7, 1, 160, seed=2)
SEEN = np.arange(7) < np.array([[4], [7]])


def view_flash():
    """Attention of heads and to keys that the kernel for TPUs pads, some of them masked."""
    with force_tpu_interpret_mode():
        return flash_attention.flash(*map(jnp.asarray, ATTENDED), jnp.asarray(SEEN), False)


# Letters are 0 to 25, and 28 more at the end of a word; 56 begins, 57 ends and pads.
TOKENS = np.array(
    [
        [56] + [57] * 11,
        [56, 28, 2, 0, 47, 54, 1, 11, 0, 2, 38, 57],
        [56, *range(28, 38), 57],
    ]
)

# Letters are 6 to 31, 33 is an a that begins a word and 3 another letter's beginning; 1 ends, 0 pads and is masked.
T5_TOKENS = np.zeros((2, 2, 77), int)
T5_TOKENS[0, :, 0] = 1
T5_TOKENS[1, :, :5] = [33, 3, 6, 32, 1], [1] * 5


@pytest.fixture(scope="module")
def views(folder, tmp_path_factory):
    def tokens():
        return Tokenizer(folder / "tokenizer", 12, 60)(["", "a cat, black", "a b c d e f g h i j k l m n"])

    def t5_tokens():
        tiny.t5_tokenizer(path := tmp_path_factory.mktemp("t5") / "tokenizer")
        return T5Tokenizer(path, 60)(["", "a cat"])

    return {
        "text": view_text,
        "unet": view_unet,
        "autoencoder": view_autoencoder,
        "pictures": view_pictures,
        "small": view_small,
        "first stage": partial(view_unet_of, "if_1"),
        "deepfloyd": partial(view_unet_of, "if_2"),
        "upscaler": partial(view_unet_of, "upscaler"),
        "branches": view_branches,
        "t5": view_t5,
        "small blocks": view_small_blocks,
        **{f"{name} pictures": partial(view_stage, name) for name in cases.STAGES},
        "diffusers": partial(view_guidance, [FIRST, SECOND]),
        "per_concept": partial(view_guidance, [FIRST, SECOND], "per_concept"),
        "padding": partial(view_guidance, [FIRST, SHORT]),
        "cooled": partial(view_unneeded, LATE),
        "without momentum": partial(view_unneeded, ALONE),
        **{name: partial(view_solver, names) for name, names in SOLVERS.items()},
        "loop": view_loop,
        "seeds": lambda: batch._seeds(3, 3),
        "tokens": tokens,
        "T5 tokens": t5_tokens,
        "fused": view_fused,
        "counting": view_counting,
        "flash": view_flash,
    }


@pytest.fixture(scope="module")
def sound(views):
    """What a view should show: as recorded from diffusers, by the oracle, or else as it is without a fault."""
    networks = recorded("networks_sd1_ddim")
    known = {
        "text": lambda: networks["text"],
        "unet": lambda: networks["unet"],
        "autoencoder": lambda: tuple(networks[name] for name in ("decoded", "mean", "logvar")),
        "pictures": lambda: recorded("pictures_none")["images"],
        "first stage": lambda: recorded("unet_if_1")["output"],
        "deepfloyd": lambda: recorded("unet_if_2")["output"],
        "upscaler": lambda: recorded("unet_upscaler")["output"],
        "branches": partial(view_branches, repeat=True),
        "t5": lambda: recorded("t5")["states"][cases.MASK],
        **{f"{name} pictures": lambda name=name: recorded(f"stage_{name}")["x"] for name in cases.STAGES},
        "diffusers": lambda: oracle([FIRST, SECOND]),
        "per_concept": lambda: oracle([FIRST, SECOND], "per_concept"),
        "padding": lambda: oracle([FIRST, SHORT]),
        "cooled": lambda: oracle(LATE),
        "without momentum": lambda: oracle(ALONE),
        **{name: partial(recorded_paths, names) for name, names in SOLVERS.items()},
        "seeds": lambda: [3, 4, 5],
        "tokens": lambda: TOKENS,
        "T5 tokens": lambda: T5_TOKENS,
        "counting": lambda: tuple(
            np.stack([np.sort(RANKED[i], 0)[place + after] for i, place in enumerate((4, 18))]) for after in (0, 1)
        ),
        "fused": lambda: np.array([2, 3, 8, 9, 14, 15]),
        "flash": lambda: layers._attend(*map(jnp.asarray, ATTENDED), jnp.asarray(SEEN), False),
    }
    return cache(lambda name: (views | known)[name]())


# Relative L2. What is not here is compared exactly.
TOLERANCE = dict.fromkeys(["text", "unet", "autoencoder", "pictures", "small"], 1e-5)
TOLERANCE |= dict.fromkeys(["first stage", "deepfloyd", "upscaler", "branches", "t5", "small blocks", "flash"], 1e-5)
TOLERANCE |= dict.fromkeys([f"{name} pictures" for name in cases.STAGES], 3e-4)
TOLERANCE |= dict.fromkeys(
    ["diffusers", "per_concept", "padding", "cooled", "without momentum"], 1e-12
) | dict.fromkeys(SOLVERS, 2e-5)


def error(found, wanted):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    errors = [np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b) for a, b in pairs]
    return max(e if np.isfinite(e) else np.inf for e in errors)


def damage(monkeypatch, function, old, new):
    """Gives a function another body, wherever it is used."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} has {old!r} {source.count(old)} times; renew this fault"
    scope = dict(function.__globals__)
    exec(source.replace(old, new), scope)
    other = scope[function.__name__]
    monkeypatch.setattr(function, "__code__", getattr(other, "__func__", other).__code__)


# The view that must show it, the function, a piece of its source and what takes its place.
FAULTS = {
    # Networks
    "softmax of other logits": ("unet", layers._attend, "math.sqrt(", "2 * math.sqrt("),
    "heads used as their width": (
        "unet",
        layers.Attention.__init__,
        "self.implementation = heads,",
        "self.implementation = channels // heads,",
    ),
    "halves of the geglu swapped": ("unet", attention.GEGLU.__call__, "value, gate = jnp", "gate, value = jnp"),
    "tanh in the geglu": ("unet", attention.GEGLU.__call__, "gelu(gate)", "jax.nn.gelu(gate)"),
    "sine before cosine": ("unet", embedding.sinusoid, "parts[::-1] if flip else parts", "parts"),
    "timestep not activated": ("unet", layers.ResnetBlock.__call__, "proj(act(embedding))", "proj(embedding)"),
    "skip before x": ("unet", blocks.UpBlock.__call__, "[x, spread(skips.pop(), x)]", "[spread(skips.pop(), x), x]"),
    "no residual around cross-attention": (
        "unet",
        attention.TransformerBlock.__call__,
        "out = self.attn2(self.norm2(x), *second)\n    x = spread(x, out) + out",
        "x = self.attn2(self.norm2(x), *second)",
    ),
    "epsilon of the transformers' group norm": (
        "small",
        attention.Transformer.__init__,
        "channels, 1e-6)",
        "channels, 1e-5)",
    ),
    "epsilon of the UNet's resnets": ("small", blocks._resnet, "eps=c.norm_eps", "eps=1e-6"),
    "sample variance in the group norm": (
        "unet",
        layers.GroupNorm.__call__,
        "variance + self.eps",
        "variance * x[0].size / (x[0].size - self.groups) + self.eps",
    ),
    "epsilon of the layer norms": (
        "small",
        layers.normalise,
        "variance + eps",
        "variance + eps / 10",
    ),
    "UNet padded at the right only": (
        "small",
        blocks._downsampler,
        "Downsample(channels)",
        "Downsample(channels, padding=((0, 1), (0, 1)))",
    ),
    "tiled, not repeated": (
        "autoencoder",
        layers.Upsample.__call__,
        "jnp.stack([phase(i, j) for j in (0, 1)], 3) for i in (0, 1)], 2)",
        "jnp.concatenate([phase(i, j) for j in (0, 1)], 2) for i in (0, 1)], 1)",
    ),
    "upsampled positions swapped": ("autoencoder", layers.Upsample.__call__, "sums[i::2, j::2]", "sums[j::2, i::2]"),
    "channels' means left out of the groups' variance": (
        "unet",
        layers.GroupNorm._moments,
        "groups(squares + jnp.square(about - mean))",
        "groups(squares)",
    ),
    "square kernels not transposed": (
        "text",
        pull.from_torch,
        "if _is_kernel(flax_name(path)) else array",
        "if _is_kernel(flax_name(path)) and array.shape[0] != array.shape[1] else array",
    ),
    "no causal mask": ("text", clip.CLIPTextModel.__init__, "causal=True", "causal=False"),
    "no final layer norm": (
        "text",
        clip.CLIPTextModel.__call__,
        "self.final_layer_norm(self.encoder(self.embeddings(ids)))",
        "self.encoder(self.embeddings(ids))",
    ),
    "gelu for quick gelu": ("text", clip.MLP.__call__, "ACTIVATIONS[self.activation]", 'ACTIVATIONS["gelu"]'),
    "the same norm twice": ("text", clip.EncoderLayer.__call__, "self.layer_norm2(x)", "self.layer_norm1(x)"),
    "no positions": ("text", clip.Embeddings.__call__, "jnp.arange(ids.shape[-1])", "jnp.zeros(ids.shape[-1], int)"),
    "VAE padded on all sides": ("autoencoder", vae.EncoderBlock.__init__, "padding=((0, 1), (0, 1))", "padding=1"),
    "epsilon of the VAE": ("small", vae._resnet, "eps=_EPS", "eps=1e-5"),
    "no attention in the VAE": ("autoencoder", vae.MidBlock.__call__, "in self.attentions:", "in ():"),
    "mean and variance swapped": ("autoencoder", vae.AutoencoderKL.encode, "mean, logvar = ", "logvar, mean = "),
    "another scaling factor": ("pictures", system.decode, "/ vae.config.scaling_factor", "/ 0.18215"),
    "pictures in [-1, 1]": ("pictures", system.decode, "image / 2 + 0.5", "image"),
    "branches of other rows": (
        "branches",
        layers.spread,
        "jnp.repeat(x, len(like) // len(x), 0)",
        "jnp.resize(x, (len(like), *x.shape[1:]))",
    ),
    # Networks of DeepFloyd-IF and of the upscaler
    "scale and shift swapped": (
        "deepfloyd",
        blocks.ScaledResnetBlock.__call__,
        "scale, shift = jnp",
        "shift, scale = jnp",
    ),
    "time activated in every resnet": (
        "deepfloyd",
        blocks.ScaledResnetBlock.__call__,
        "act(embedding) if self.activate_time else embedding",
        "act(embedding)",
    ),
    "resampled before the first norm": (
        "deepfloyd",
        blocks.ScaledResnetBlock.__call__,
        "x, h = self.resample(x), self.resample(h)",
        "x, h = self.resample(x), act(self.norm1(self.resample(x)))",
    ),
    "sum not divided": ("deepfloyd", blocks.ScaledResnetBlock.__call__, " / self.divisor", ""),
    "tanh in IF": ("deepfloyd", blocks.ScaledResnetBlock.__call__, "ACTIVATIONS[self.activation]", "jax.nn.gelu"),
    "the middle's sum not divided": (
        "deepfloyd",
        blocks.MidBlock.__init__,
        "divisor = c.mid_block_scale_factor",
        "divisor = 1.0",
    ),
    "width of a head used as their number": (
        "deepfloyd",
        attention.AddedAttention.__init__,
        "channels // c.attention_head_dim",
        "c.attention_head_dim",
    ),
    "text not normalised": (
        "deepfloyd",
        attention.AddedAttention.project,
        "text = self.norm_cross(context)",
        "text = context",
    ),
    "values not in the order of the keys": (
        "deepfloyd",
        attention.AddedAttention.__call__,
        "[values, spread(self.to_v(h), values)]",
        "[spread(self.to_v(h), values), values]",
    ),
    "no residual around IF's attention": (
        "deepfloyd",
        attention.AddedAttention.__call__,
        "return spread(x, out) + self",
        "return self",
    ),
    "epsilon of the picture's norm": (
        "small blocks",
        attention.AddedAttention.__init__,
        "channels, 1e-5)",
        "channels, 1e-6)",
    ),
    "epsilon of the text's norm": ("small blocks", attention.AddedAttention.__init__, "text, 1e-5)", "text, 1e-6)"),
    "epsilon of IF's resnets": ("small blocks", layers.ResnetBlock.__init__, "inputs, eps)", "inputs, 1e-6)"),
    "pooled from the tokens' mean itself": (
        "deepfloyd",
        embedding.AttentionPooling.__call__,
        " + self.positional_embedding[...][None]",
        "",
    ),
    "the mean not among what is pooled": (
        "deepfloyd",
        embedding.AttentionPooling.__call__,
        "jnp.concatenate([mean, x], 1)",
        "x",
    ),
    "pooled from the projected text": (
        "first stage",
        model.UNet2DConditionModel.project,
        "self.add_embedding(context)",
        "self.add_embedding(self.encoder_hid_proj(context))",
    ),
    "no pooled text": (
        "deepfloyd",
        model.UNet2DConditionModel._embed,
        "embedding = spread(embedding, pooled) + pooled",
        "...",
    ),
    "frequencies to the last": ("deepfloyd", embedding.sinusoid, "half - shift", "half - 1"),
    "noise level through the timestep's layers": (
        "deepfloyd",
        model.UNet2DConditionModel._embed,
        "self._wave(class_labels",
        "self._wave(timestep",
    ),
    "sum of embeddings not activated": (
        "deepfloyd",
        model.UNet2DConditionModel._embed,
        "if c.time_embedding_act_fn else embedding",
        "if False else embedding",
    ),
    "no noise level": ("upscaler", model.UNet2DConditionModel._embed, "= class_labels if", "= 0 * class_labels if"),
    "attention to the picture where it is to the text": (
        "upscaler",
        attention.TransformerBlock.__call__,
        "text if self.only_cross",
        "(self.attn1.project(normal), text[1]) if self.only_cross",
    ),
    "exact gelu in T5": ("t5", t5.GatedGELU.__call__, "approximate=True", "approximate=False"),
    "gate and value swapped in T5": (
        "t5",
        t5.GatedGELU.__call__,
        "(self.wi_0(x), approximate=True) * self.wi_1(x)",
        "(self.wi_1(x), approximate=True) * self.wi_0(x)",
    ),
    "logits divided in T5": ("t5", t5.SelfAttention.__call__, "bias.dtype) + bias", "bias.dtype) / 5**0.5 + bias"),
    "mean taken off in T5": ("t5", t5.RMSNorm.__call__, "jnp.square(x).mean(", "x.var("),
    "epsilon of T5": ("small blocks", t5.RMSNorm.__call__, "+ self.eps", "+ 10 * self.eps"),
    "padding seen": ("t5", t5.T5EncoderModel.__call__, "position + padding", "position"),
    "earlier keys for later": ("t5", t5.buckets, "offset > 0", "offset < 0"),
    "distances of twice the range": ("t5", t5.buckets, "farthest / exact", "2 * farthest / exact"),
    "positions in the first layer only": (
        "t5",
        t5.Encoder.__call__,
        "x = block(x, bias)",
        "x, bias = block(x, bias), jnp.where(bias < -1e9, bias, 0)",
    ),
    "padding for the kernel seen": (
        "flash",
        flash_attention.flash,
        "(0, k.shape[2] - keys)))",
        "(0, k.shape[2] - keys)), constant_values=True)",
    ),
    "masked keys seen by the kernel": (
        "flash",
        flash_attention.flash,
        "if mask is None else mask",
        "if True else mask",
    ),
    "the padded width's scale": ("flash", flash_attention.flash, "math.sqrt(width)", "math.sqrt(q.shape[3])"),
    # Guidance
    "quantile over the wrong axes": (
        "diffusers",
        guidance._mask,
        'if support == "latent"',
        'if support != "pixel"',
    ),
    "quantile of signed differences": ("diffusers", guidance.sega, "_mask(jnp.abs(direction)", "_mask(direction"),
    "quantile without interpolation": (
        "diffusers",
        guidance._quantile,
        "jnp.where(w < 0.5, low + w * (high - low), high - (high - low) * (1 - w))",
        "low",
    ),
    "the rank after": ("diffusers", guidance._by_sorting, "at(place), at(place + 1)", "at(place + 1), at(place + 2)"),
    "the rank after, counted": ("counting", guidance._by_counting, "fewer <= place,", "fewer <= place + 1,"),
    "the next rank where entries are equal": (
        "counting",
        guidance._by_counting,
        "> place + 1, low",
        "> place + 2, low",
    ),
    "the highest bit left out": ("counting", guidance._by_counting, "bits - 1 - i", "bits - 1 - jnp.maximum(i, 1)"),
    "above the quantile, not at it": ("diffusers", guidance._mask, "~(flat < limit", "(flat > limit"),
    "the opposite direction": (
        "diffusers",
        guidance.sega,
        "(targets - uncond[:, None])",
        "(uncond[:, None] - targets)",
    ),
    "weight after the momentum": (
        "diffusers",
        guidance.sega,
        "_lift(weight, gamma) * gamma + _lift(e.momentum_scale, nu) * nu",
        "_lift(weight, gamma) * (gamma + _lift(e.momentum_scale, nu) * nu)",
    ),
    "momentum only after the warm-up": (
        "diffusers",
        guidance.sega,
        "beta * nu + (1 - beta) * edit",
        "jnp.where(_lift(warm, nu), beta * nu + (1 - beta) * edit, nu)",
    ),
    "beta and its complement swapped": (
        "diffusers",
        guidance.sega,
        "beta * nu + (1 - beta) * edit",
        "(1 - beta) * nu + beta * edit",
    ),
    "momentum without the last momentum": (
        "diffusers",
        guidance.sega,
        "beta * nu + (1 - beta) * edit",
        "beta * nu + (1 - beta) * gamma",
    ),
    "weights not normalised": ("diffusers", guidance.sega, "share / jnp.where(total > 0, total, 1)", "share"),
    "0 divided by 0": ("diffusers", guidance.sega, "jnp.where(total > 0, total, 1)", "total"),
    "no momentum after the cool-down": (
        "diffusers",
        guidance.sega,
        "edit.sum(1), partly",
        "jnp.where(_lift(cooled, edit), 0, edit).sum(1), partly",
    ),
    "no longer warm after the cool-down": (
        "diffusers",
        guidance.sega,
        "warm, cooled = step >= e.warmup,",
        "warm, cooled = (step >= e.warmup) & (step < e.cooldown),",
    ),
    "warm one call later": ("diffusers", guidance.sega, "step >= e.warmup", "step > e.warmup"),
    "cooled one call later": ("diffusers", guidance.sega, "step >= e.cooldown", "step > e.cooldown"),
    "dropped one call before the cool-down": ("cooled", active_concepts.needed, "call < end", "call < end - 1"),
    "dropped before the warm-up": (
        "cooled",
        active_concepts._window,
        "np.where(edits.momentum_scale > 0, 0, edits",
        "(edits",
    ),
    "dropped at the warm-up": ("without momentum", active_concepts.needed, "first <= call", "first < call"),
    "a tail of its own": ("per_concept", guidance.sega, "warm & ~cooled", "warm"),
    "weights normalised": (
        "per_concept",
        guidance.sega,
        "_lift(weight, gamma) * gamma +",
        "_lift(weight / weight.sum(1, keepdims=True), gamma) * gamma +",
    ),
    "padding that has to warm up": (
        "padding",
        guidance.Edits.stack.__func__,
        "warmup=np.zeros(shape, np.int32)",
        "warmup=np.full(shape, 5, np.int32)",
    ),
    # Solvers
    "the step before, off by one": ("ddim", ddim_ddpm_pndm.ddim, '_timesteps"] // steps', '_timesteps"] // steps + 1'),
    "steps_offset ignored": ("ddim", schedule.spaced, ' + options["steps_offset"]', ""),
    "set_alpha_to_one ignored": ("ddim", ddim_ddpm_pndm._at, "else bars[0]", "else 1.0"),
    "sign of v": ("ddim", ddim_ddpm_pndm.x0_form, "return a, -b", "return a, b"),
    "linear betas": (
        "ddim",
        schedule.cumulative,
        "np.linspace(math.sqrt(low), math.sqrt(high), count) ** 2",
        "np.linspace(low, high, count)",
    ),
    "noise on top": ("ddim", solvers.ddim, "c.variance - sigma**2", "c.variance"),
    "PNDM without the second look": ("pndm", ddim_ddpm_pndm._low_orders, "anew = call == 1", "anew = call < 0"),
    "the second look left in the memory": ("pndm", ddim_ddpm_pndm._low_orders, "weights, ~anew", "weights, True"),
    "the second look from the wrong x": (
        "pndm",
        ddim_ddpm_pndm.pndm,
        "start=(~anew, anew, 0.0)",
        "start=(1.0, 0.0, 0.0)",
    ),
    "PNDM of lower order": ("pndm", ddim_ddpm_pndm._low_orders, "np.minimum(call, 4)", "np.minimum(call, 3)"),
    "PNDM, sign of v": ("pndm", ddim_ddpm_pndm.pndm, "+ slope * from_x", "- slope * from_x"),
    "Runge-Kutta's middle counted": ("runge_kutta", ddim_ddpm_pndm._runge_kutta, "k >= 12 or k % 4 == 0", "k % 4 < 2"),
    "Runge-Kutta's middle at the end": (
        "runge_kutta",
        ddim_ddpm_pndm._runge_kutta,
        "[half, 0, half, 0]",
        "[half, half, 0, 0]",
    ),
    "the posterior's mean": ("ddpm", ddim_ddpm_pndm.ddpm, "np.sqrt(after) * beta / (1 - now)", "np.sqrt(after) * beta"),
    "noise at timestep 0": ("ddpm", ddim_ddpm_pndm.ddpm, "np.where(t > 0, deviation, 0)", "deviation + 0.01"),
    "signal left at the end": ("ddpm", schedule.cumulative, "(root - root[-1])", "root"),
    "x not scaled back": ("sigma", sigmas._derivative, "1 / np.sqrt(sigma**2 + 1)", "np.ones_like(sigma)"),
    "noise up, not down": ("sigma", sigmas.euler_ancestral, "down - now", "after - now"),
    "Heun's second slope at the first sigma": ("sigma", sigmas.heun, "half / now, 0", "half / before, 0"),
    "LMS of lower order": ("sigma", sigmas.lms, "i - order + 1", "i - order + 2"),
    "Karras' exponent": ("sigma", schedule.respaced, "** 7", "** 6"),
    "midpoint for Heun": ("dpm", exponential.dpm_solver, '== "midpoint"', '!= ""'),
    "the last step but one of third order": ("dpm", exponential.dpm_solver, "min(order, 2)", "order"),
    "stochastic with the same exponent": ("dpm", exponential._dpm_gains, "g = 2 * h if sde else h", "g = h"),
    "the bend left out": ("dpm", exponential.dpm_solver, "bend * h[0]", "0 * h[0]"),
    "no corrector": ("unipc", exponential.unipc, "if i > begin and", "if i > 99 and"),
    "bh1 as bh2": ("unipc", exponential._unipc_step, '== "bh1"', '== "bh0"'),
    "the corrector's last weight": ("unipc", exponential._unipc_step, "0 if k == order", "1 if k == order"),
    "memory not clipped": ("ddpm", solvers._bounded, "jnp.clip(x, -c.clip, c.clip)", "x"),
    "thresholded, not scaled": ("ddpm", solvers._bounded, "-s, s) / s", "-s, s)"),
    "the threshold without its bounds": ("ddpm", solvers._bounded, "jnp.clip(s, 1, c.threshold.most)", "s"),
    # Stages
    "the negative prompt's variance": ("stage1 pictures", base.predict, "out[:, 1, ..., x", "out[:, 0, ..., x"),
    "no predicted variance": ("stage1 pictures", base.predict, "variance if variance.size else None", "None"),
    "variances swapped": (
        "stage1 pictures",
        solvers.multistep,
        "share * c.log_variance[1] + (1 - share) * c.log_variance[0]",
        "share * c.log_variance[0] + (1 - share) * c.log_variance[1]",
    ),
    "thresholded at a picture's own quantile of 0.9": (
        "stage1 pictures",
        ddim_ddpm_pndm.threshold,
        'for key in ("dynamic_thresholding_ratio"',
        'for options in ({**options, "dynamic_thresholding_ratio": 0.9},) for key in ("dynamic_thresholding_ratio"',
    ),
    "padding seen by the stage": ("stage1 pictures", deepfloyd.encode, "tokens[:, 1]", "0 * tokens[:, 1] + 1"),
    "the small picture first": (
        "stage2 pictures",
        base.predict,
        "[seen, small[0].astype(x.dtype)]",
        "[small[0].astype(x.dtype), seen]",
    ),
    "the small picture without noise": ("stage2 pictures", base.noised, "+ noise * z", "+ 0 * noise * z"),
    "the small picture's signal kept": ("stage2 pictures", base.noised, "signal * small", "small"),
    "corners that move": (
        "stage2 pictures",
        base.enlarge,
        "np.linspace(0, before - 1, count)",
        "np.clip((np.arange(count) + 0.5) * before / count - 0.5, 0, before - 1)",
    ),
    "noise levels of other betas": (
        "upscaler pictures",
        schedules.Scheduler.shares,
        "cumulative(self.options)",
        "cumulative({**self.options, 'beta_end': 0.012})",
    ),
    # Randomness and words
    "the same noise at every call": ("loop", system.advance, "row.call, shape[1:]", "0, shape[1:]"),
    "the same noise in every row": (
        "loop",
        base._noise,
        "jax.random.fold_in(k, tag)",
        "jax.random.fold_in(key[0], tag)",
    ),
    "the same seed in every row": ("seeds", batch._seeds, "+ 1) + i for i", "+ 1) for i"),
    "truncation takes the end": (
        "tokens",
        Tokenizer.__call__,
        "truncation=True).input_ids",
        "truncation=False).input_ids; ids = [i[: self.length] for i in ids]",
    ),
    "padding on the left": (
        "tokens",
        Tokenizer.__call__,
        'padding="max_length",',
        'padding="max_length", padding_side="left",',
    ),
    "T5's padding on the left": (
        "T5 tokens",
        T5Tokenizer.__call__,
        'padding="max_length",',
        'padding="max_length", padding_side="left",',
    ),
    "T5's padding not masked": ("T5 tokens", T5Tokenizer.__call__, "made.attention_mask", "[[1] * 77] * 2"),
    "queries, keys and values one after another": (
        "fused",
        original._rows,
        "reshape(heads)[:, part]",
        "reshape(heads[1], -1, *heads[2:])[part]",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, views, sound, monkeypatch):
    view, *fault = FAULTS[name]
    wanted = sound(view)
    damage(monkeypatch, *fault)
    assert error(views[view](), wanted) > TOLERANCE.get(view, 0)


def test_the_order_of_the_keys_does_not_matter(views, sound, monkeypatch):
    """Of text and picture in IF's attention."""
    wanted, line = sound("deepfloyd"), "jnp.concatenate([{1}, spread(self.to_{0}(h), {1})], 1),"
    other = "jnp.concatenate([spread(self.to_{0}(h), {1}), {1}], 1),"
    names = ("k", "keys"), ("v", "values")
    old, new = ("\n        ".join(part.format(*name) for name in names) for part in (line, other))
    damage(monkeypatch, attention.AddedAttention.__call__, old, new)
    assert error(views["deepfloyd"](), wanted) < TOLERANCE["deepfloyd"]


def test_without_a_fault_nothing_is_seen(views, sound):
    assert {name for name in views if error(views[name](), sound(name)) > TOLERANCE.get(name, 0)} == set()
