"""Records results of Paella's public code on small networks, for tests that run without torch.

The script needs four public pure-Python repositories, each checked out at the commit listed here. They cannot be
installed as packages.

    github.com/dome272/Paella            e1ab72b8aa7b22def24dafd51805aed84be52ed9  the denoiser, its sampler, the VQGAN
    github.com/pabloppp/Arroz-Con-Cosas  075298406c283a9e82630112736a6bdb0124b563  the prior and its sampler
    github.com/pabloppp/pytorch-tools    6472bd5e223142bfbe105e2006432252f1ce3709  the VQGAN's codebook
    github.com/ml-research/i2p           5176a1e8ebec0a5f7c35afd43543a6833dee8989  semantic guidance for the denoiser

    pip install torch==2.13.0 && python tests/reference/record_paella.py PAELLA ARROZ TOOLS I2P

The command writes `paella_float32.npz` and `paella_float64.npz` (channels last). It also builds the classes at their
published sizes, and lists the name and shape of every tensor in `paella_v3.txt`, `vqgan_f4.txt` and `prior_v1.txt`. The
inputs come from `paella.py` in this folder, and the weights from `tests/support/tiny.py`, because the classes' initial
weights would hide errors in most of the networks. The stored files were made with torch 2.13.0 on a CPU.

The denoiser's public code has two versions; this script runs the one with re-weighted attention. The samplers use the
random numbers from `paella.py` instead of torch's: they choose the token with the largest sum of logit and Gumbel
noise.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from reference import paella as cases
from support import tiny

# The arguments of the published networks that differ from the classes' defaults.
PUBLISHED = {"paella": {"byt5_embd": 2560}, "vqgan": {}, "prior": {}}


def load(path, name):
    """Imports a module from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_classes(paella, arroz, tools, i2p):
    """Returns the classes of the three networks, the function that replaces attention layers, and the samplers.

    The repositories' other imports are replaced with mocks.
    """
    for name in ("torchtools", "torchtools.nn", "arroz"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
    sys.modules["torchtools.nn"].__path__ = [str(Path(tools, "torchtools/nn"))]
    sys.modules["torchtools.nn"].VectorQuantize = importlib.import_module("torchtools.nn.vq").VectorQuantize
    sys.modules["arroz"].__path__ = [str(Path(arroz, "arroz"))]
    sys.modules["pytorch_wavelets"] = mock.MagicMock()
    attention = load(Path(paella, "utils/alter_attention.py"), "paella_attention")
    classes = {
        "paella": load(Path(paella, "utils/modules.py"), "paella_modules").Paella,
        "vqgan": load(Path(paella, "src/vqgan.py"), "paella_vqgan").VQModel,
        "prior": importlib.import_module("arroz.modules").PriorModel,
    }
    others = ("requests", "open_clip", "torchvision", "torchvision.transforms", "matplotlib", "matplotlib.pyplot")
    others += ("transformers", "vqgan", "Paella", "Paella.src", "Paella.src.vqgan", "Paella.utils")
    others += ("Paella.utils.modules", "Paella.utils.alter_attention")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in others}):
        samplers = {"published": load(Path(paella, "src/utils.py"), "paella_utils").sample}
        sys.modules["arroz"].Diffuzz = samplers["prior"] = importlib.import_module("arroz.diffusion").Diffuzz
        sys.modules["arroz"].PriorModel = classes["prior"]
        samplers["edited"] = load(Path(i2p, "mitigation/safe_paella.py"), "safe_paella").SafePaellaT2I
    return classes, attention.replace_attention_layers, samplers


def filled(net):
    """Returns the network, filled with `tiny`'s tensors, in evaluation mode."""
    tensors = {
        key: torch.tensor(tiny.values(key, tensor.shape)) if tensor.is_floating_point() else tensor
        for key, tensor in net.state_dict().items()
    }
    net.load_state_dict(tensors)
    return net.eval()


def first(array):
    """Converts an array to a tensor with channels first. Floats are cast to the default dtype."""
    array = np.moveaxis(array, -1, 1) if array.ndim == 4 else array
    return torch.tensor(array, dtype=torch.get_default_dtype() if array.dtype.kind == "f" else None)


def last(tensor):
    return (tensor.movedim(1, -1) if tensor.ndim == 4 else tensor).numpy()


def logits(make, replace, name):
    net = filled(make(**cases.paella(name)))
    replace(net)
    condition = {key: first(array) for key, array in cases.CONDITIONS[name].items()}
    if name == "pictures":
        condition["clip_image"] = list(condition["clip_image"].unbind(1))
    more = {}
    if name == "influenced":
        factors = torch.full((condition["byt5"].shape[1],), cases.INFLUENCE[0])
        factors[-tiny.PAELLA["clip_seq_len"] :] = cases.INFLUENCE[1]
        more = {"attn_weights": factors}
    x, r = map(first, cases.paella_inputs(name))
    return {
        f"logits {name}": last(net(x, r, **condition, **more)),
        f"sequence {name}": net.gen_c_embeddings(*(condition.get(key) for key in ("byt5", "clip", "clip_image"))),
    }


def at(module, path):
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def called(block, x, skip, level, tokens, *, skips):
    others = {"TimestepBlock": [level], "AttnBlock": [tokens]}.get(type(block).__name__, [])
    if skips and type(block).__name__ == "ResBlock":
        others = [skip]
    return last(block(x, *others))


def blocks(net):
    for path, channels in cases.BLOCKS.items():
        for std in cases.STDS:
            inputs = map(first, cases.block_inputs(channels, std))
            yield f"{path} {std:g}", called(at(net, path), *inputs, skips=path.startswith("up"))


def wide_blocks(make):
    """Yields the outputs of the wide blocks. The network's other blocks have shapes but no values."""
    with torch.device("meta"):
        net = make(**cases.WIDE)
    for path, channels in cases.WIDE_BLOCKS.items():
        block = at(net, path).to_empty(device="cpu").eval()
        for name, parameter in block.named_parameters():
            parameter.copy_(torch.tensor(tiny.values(f"{path}.{name}", parameter.shape)))
        yield f"wide {path}", called(block, *map(first, cases.wide_inputs(channels)), skips=True)[..., ::40]


def vqgan(net):
    quantised, latents, tokens, _ = net.encode(first(cases.IMAGE))
    distances = torch.cdist(latents.movedim(1, -1) * net.scale_factor, net.vquantizer.codebook.weight)
    near = distances.topk(2, largest=False).values
    assert ((near[..., 1] - near[..., 0]) > 1e-3).all(), "two codes are almost equally near; use another image"
    yield from {
        "tokens": tokens.numpy(),
        "latents": last(latents),
        "quantised": last(quantised),
        "decoded": last(net.decode(first(cases.LATENTS))),
        "decoded tokens": last(net.decode_indices(torch.tensor(cases.TOKENS))),
    }.items()
    for path, channels in cases.VQ_BLOCKS.items():
        for std in cases.STDS:
            yield f"vqgan.{path} {std:g}", last(at(net, path)(first(cases.block_inputs(channels, std)[0])))


def prior(net):
    yield "prior", net(*map(first, cases.PRIOR)).numpy()
    for std in cases.STDS:
        yield f"prior.{cases.PRIOR_BLOCK} {std:g}", at(net, cases.PRIOR_BLOCK)(first(cases.prior_block_input(std)))


class Watched:
    """A denoiser that records the prompt branch's grid at every call."""

    def __init__(self, net):
        self.net, self.grids, self.num_labels = net, [], net.num_labels

    def __call__(self, x, r, **text):
        if text["clip_image"] is not None:
            self.grids.append(x)
        return self.net(x, r, **text)

    def add_noise(self, x, t, random_x=None, seed=None):
        return self.net.add_noise(x, t, random_x=random_x)


def sampled(classes, replace, samplers, name):
    """Runs a sampler and returns every grid, from the first to the last."""
    net = filled(classes["paella"](**{k: v for k, v in tiny.PAELLA_PARTS["denoiser"].items() if k != "sample_size"}))
    replace(net)
    watched, settings = Watched(net), cases.SAMPLERS[name]
    branches = {
        branch: {"clip_image": None} | {key: first(array).expand(2, *array.shape[1:]) for key, array in text.items()}
        for branch, text in cases.BRANCHES.items()
    }
    gumbel, uniform = (iter(map(torch.tensor, noise)) for noise in (cases.GUMBEL, cases.UNIFORM))

    def drawn(scores, count, generator=None):
        return (scores.log() + next(gumbel).reshape(scores.shape)).argmax(-1, keepdim=True)

    common = {"latent_shape": cases.START.shape, "temperature": cases.TEMPERATURE}
    common["unconditional_inputs"] = branches["uncond"]
    with (
        mock.patch("torch.randint", return_value=torch.tensor(cases.START)),
        mock.patch("torch.rand_like", side_effect=uniform),
        mock.patch("torch.multinomial", drawn),
    ):
        if name == "published":
            last = samplers["published"](watched, branches["cond"], cfg=cases.CFG, device="cpu", **common, **settings)
        else:
            one = object.__new__(samplers["edited"])
            one.model, one.vqmodel = watched, filled(classes["vqgan"](**tiny.PAELLA_PARTS["vqgan"]))
            factors = torch.full((7,), cases.INFLUENCE[0])
            factors[-tiny.PAELLA["clip_seq_len"] :] = cases.INFLUENCE[1]
            edited = {"enable_edit_guidance": name == "edited", "edit_inputs": branches["edit"]}
            scales = (cases.CFG, cases.CFG)
            last, _ = one.sample(branches["cond"], cfg=scales, attn_weights=factors, **edited, **common, **settings)
    return torch.stack([*watched.grids, last]).numpy()


def imagined(classes, samplers):
    text, noise = map(first, cases.IMAGINED)
    net = filled(classes["prior"](**tiny.PRIOR))
    with mock.patch("torch.randn", return_value=noise[0]), mock.patch("torch.randn_like", side_effect=noise[1:]):
        return samplers["prior"]().sample(net, {"c": text}, text.shape, timesteps=60, cfg=3.0, sampler="ddpm")[-1]


@contextlib.contextmanager
def precision(dtype):
    """Sets torch's default dtype, and makes `Tensor.float` use that dtype instead of float32."""
    torch.set_default_dtype(dtype)
    with mock.patch.object(torch.Tensor, "float", lambda self: self.to(dtype)):
        yield
    torch.set_default_dtype(torch.float32)


def record(classes, replace, samplers):
    results = {"imagined": imagined(classes, samplers)}
    for name in cases.CONDITIONS:
        results |= logits(classes["paella"], replace, name)
    results["wave"] = classes["paella"](**tiny.PAELLA | {"c_r": 64}).gen_r_embedding(first(cases.LEVELS))
    results |= blocks(filled(classes["paella"](**tiny.PAELLA)))
    results |= wide_blocks(classes["paella"])
    results |= vqgan(filled(classes["vqgan"](**tiny.VQGAN)))
    results |= prior(filled(classes["prior"](**tiny.PRIOR)))
    return {name: np.asarray(array) for name, array in results.items()}


def main(*repositories):
    classes, replace, samplers = load_classes(*repositories)
    for name, settings in PUBLISHED.items():
        with torch.device("meta"):
            tensors = classes[name](**settings).state_dict()
        lines = [" ".join(map(str, (key, *tensor.shape))) for key, tensor in tensors.items()]
        (cases.HERE / cases.PUBLISHED[name]).write_text("\n".join(lines) + "\n")
    for dtype in (torch.float32, torch.float64):
        with precision(dtype), torch.no_grad():
            name = str(dtype).removeprefix("torch.")
            results = record(classes, replace, samplers)
            if dtype == torch.float64:
                results |= {f"grids {run}": sampled(classes, replace, samplers, run) for run in cases.SAMPLERS}
            np.savez_compressed(cases.HERE / f"paella_{name}.npz", **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
