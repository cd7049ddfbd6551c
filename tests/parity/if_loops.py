"""The stages of DeepFloyd-IF and the x4 upscaler with semantic guidance, as plain torch loops: diffusers' networks and
steps, guided as `SemanticStableDiffusionPipeline` guides Stable Diffusion.

diffusers has no semantic guidance of these pipelines. The paper's authors have one of the first stage, with two faults
(buffers of as many entries as pictures, not concepts; a crash where warm-ups differ), and agree on what is done: the
noise is guided, and the predicted variance is that of the prompt. Without edits, diffusers' pipelines do the same.

Arrays are NumPy's, channels last, and taken in float64 inside `theirs.double`: pictures in [-1, 1], texts
[batch, tokens, channels], noise [batch, height, width, channels]. An `Edit` has its concept as [tokens, channels].
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from parity.theirs import first, inject, last, scheduler


class Text(NamedTuple):
    """The states of the text encoder, [batch, tokens, channels]."""

    uncond: np.ndarray
    cond: np.ndarray


class Run(NamedTuple):
    """The result, and what there was at every call, [batch, calls, (n,) height, width, channels]."""

    x: np.ndarray  # [batch, height, width, channels], a picture in [-1, 1] or latents
    states: np.ndarray  # x after each call
    uncond: np.ndarray
    cond: np.ndarray
    edits: np.ndarray
    sem_guidance: np.ndarray
    variance: np.ndarray | None  # of the prompt's branch, where the network predicts one


class Sega:
    """What the concepts add to the estimate, call by call, by the equations of Brack et al. 2023 as diffusers has them:
    with one momentum for their sum. Where no warm concept has a weight, nothing is added (diffusers divides 0 by 0)."""

    def __init__(self, edits, momentum_scale, momentum_beta):
        self.edits, self.scale, self.beta = edits, momentum_scale, momentum_beta
        self.calls, self.momentum = 0, 0.0

    def __call__(self, uncond, targets):
        """[batch, channels, height, width] of no text, and of every concept."""
        nothing, call = torch.zeros_like(uncond), self.calls
        self.calls += 1
        gammas = [
            above(edit.scale * (target - uncond), edit.threshold)
            for edit, target in zip(self.edits, targets, strict=True)
        ]
        weights = [0.0 if edit.cooldown is not None and call >= edit.cooldown else edit.weight for edit in self.edits]
        warm = [k for k, edit in enumerate(self.edits) if call >= edit.warmup]
        guidance = sum((weights[k] * gamma for k, gamma in enumerate(gammas)), nothing) + self.scale * self.momentum
        self.momentum = self.beta * self.momentum + (1 - self.beta) * guidance
        if len(warm) == len(self.edits):
            return guidance
        total = sum(weights[k] for k in warm)
        return sum((weights[k] / total * gammas[k] for k in warm), nothing) if total else nothing


def above(psi, threshold):
    """psi where its magnitude reaches the quantile over the positions of its picture and channel, else 0."""
    magnitude = psi.abs()
    least = torch.quantile(magnitude.flatten(2), threshold, dim=2)[:, :, None, None]
    return torch.where(magnitude >= least, psi, torch.zeros_like(psi))


def first_stage(unet, config, text, start, noises, **guided):
    """Stage I: pictures of 3 channels from noise.

    Args:
        unet: diffusers'.
        config: the `scheduler_config.json`.
        text: a `Text`.
        start: the initial noise.
        noises: the fresh noise of every call.
        guided: steps, guidance_scale, edits and momentum, as of `sample`.
    """

    def predict(_call, t, x):
        return branches(unet, x, t, text, guided)

    return sample(predict, config, start, noises, **guided)


def second_stage(unet, config, text, start, noises, *, picture, noising, level, level_noises, **guided):
    """Stage II: larger pictures from noise, and from the first stage's with noise on them.

    Args:
        unet, config, text, start, noises, guided: as of `first_stage`.
        picture: of the first stage, [batch, height, width, 3]; the size of `start` is the result's.
        noising: the `scheduler_config.json` of the noise on it.
        level: that noise's timestep.
        level_noises: one for all calls, as in diffusers, or one for each, as in the original (which also draws for
            the branch without text apart; here all branches see the same picture).
    """
    large = interpolate(tensor(picture), start.shape[1:3], mode="bilinear", align_corners=True)
    levels, noiser = torch.tensor([level] * len(start)), scheduler(noising)

    def predict(call, t, x):
        noise = tensor(level_noises[call if len(level_noises) > 1 else 0])
        x = torch.cat([x, noiser.add_noise(large, noise, levels)], 1)
        return branches(unet, x, t, text, guided, levels)

    return sample(predict, config, start, noises, **guided)


def upscaler(unet, config, text, start, noises, *, picture, noising, level, level_noise, **guided):
    """Stable Diffusion's x4 upscaler: latents of the picture's size from noise, and from the picture with noise on it.

    Args:
        unet, config, text, start, guided: as of `first_stage`.
        noises: of every call, for a scheduler that draws; else None.
        picture, noising, level: as of `second_stage`.
        level_noise: the noise on the picture.
    """
    levels = torch.tensor([level] * len(start))
    picture = scheduler(noising).add_noise(tensor(picture), tensor(level_noise), levels)

    def predict(_call, t, x):
        return branches(unet, torch.cat([x, picture], 1), t, text, guided, levels)

    return sample(predict, config, start, noises, **guided)


def decoded(vae, latents):
    """The picture of the upscaler's latents, in [-1, 1] where they are good ones."""
    with torch.no_grad():
        return last(vae.decode(tensor(latents) / vae.config.scaling_factor).sample)


def tensor(array):
    """[..., height, width, channels] -> [..., channels, height, width], in this order in memory, too: torch rounds
    otherwise where it is not."""
    return first(array).to(torch.get_default_dtype()).contiguous()


def branches(unet, x, t, text, guided, levels=None):
    """The network's outputs for no text, the prompt and every concept, in one batch."""
    rows = len(x)
    concepts = [np.repeat(edit.concept[None], rows, 0) for edit in guided.get("edits", ())]
    states = [torch.tensor(states, dtype=x.dtype) for states in (*text, *concepts)]
    labels = {} if levels is None else {"class_labels": levels.repeat(len(states))}
    with torch.no_grad():
        out = unet(torch.cat([x] * len(states)), t, encoder_hidden_states=torch.cat(states), **labels).sample
    return out.split(rows)


def sample(predict, config, start, noises, *, steps, guidance_scale, edits=(), momentum=(0.1, 0.4)):
    """The loop of all stages.

    Args:
        predict: (call, timestep, x) -> the outputs of no text, the prompt and every concept.
        steps: how many, or their timesteps.
        edits: with an array as concept; all pictures of the batch have the same.
        momentum: s_m and beta.
    """
    steps = {"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": list(steps)}
    made, sega, calls = scheduler(config), Sega(edits, *momentum), []
    made.set_timesteps(**steps)
    if noises is not None:
        inject(made, noises.__getitem__)
    x = tensor(start) * made.init_noise_sigma
    for call, t in enumerate(made.timesteps):
        outputs = predict(call, t, made.scale_model_input(x, t))
        uncond, cond, *targets = (out[:, : x.shape[1]] for out in outputs)
        variance = outputs[1][:, x.shape[1] :]
        added = sega(uncond, targets)
        estimate = uncond + guidance_scale * (cond - uncond) + added
        x = made.step(torch.cat([estimate, variance], 1), t, x).prev_sample
        targets = torch.stack(targets, 1) if targets else torch.zeros(len(x), 0, *x.shape[1:])
        calls.append((x, uncond, cond, targets, added, variance))
    *arrays, variance = (last(torch.stack(arrays, 1)) for arrays in zip(*calls, strict=True))
    return Run(last(x), *arrays, variance if variance.size else None)
