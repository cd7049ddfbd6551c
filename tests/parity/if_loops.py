"""Semantic guidance for DeepFloyd-IF's stages and the x4 upscaler, as plain torch loops.

The loops use diffusers' networks and schedulers, and apply the guidance of `SemanticStableDiffusionPipeline`. diffusers
has no semantic guidance for these pipelines. The paper's authors published code for the first stage, with two errors:
its buffers have one entry per picture instead of one per concept, and it crashes if warm-ups differ. Like the loops
here, that code applies the guidance to the predicted noise and takes the variance from the prompt's prediction. Without
edits, diffusers' pipelines do the same.

Arrays are NumPy arrays with channels last (float64 inside `theirs.double`): pictures in [-1, 1], texts [batch, tokens,
channels], noise [batch, height, width, channels]. The concept of an `Edit` is an array [tokens, channels].
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from parity.theirs import first, inject, last, scheduler


class Text(NamedTuple):
    """The text encoder's hidden states, [batch, tokens, channels]."""

    uncond: np.ndarray
    cond: np.ndarray


class Run(NamedTuple):
    """The result of a run, and the arrays of every call, [batch, calls, (n,) height, width, channels]."""

    x: np.ndarray  # [batch, height, width, channels], pictures in [-1, 1] or latents
    states: np.ndarray  # x after each call
    uncond: np.ndarray
    cond: np.ndarray
    edits: np.ndarray
    sem_guidance: np.ndarray
    variance: np.ndarray | None  # the variance predicted for the prompt, or None if the network predicts none


class Sega:
    """Computes semantic guidance call by call, with the equations of Brack et al. 2023 as implemented in diffusers.

    All concepts share one momentum, computed from the sum of their guidance. If all concepts that have warmed up have
    weight 0, nothing is added, whereas diffusers divides 0 by 0.
    """

    def __init__(self, edits, momentum_scale, momentum_beta):
        self.edits, self.scale, self.beta = edits, momentum_scale, momentum_beta
        self.calls, self.momentum = 0, 0.0

    def __call__(self, uncond, targets):
        """Returns the guidance that the next call adds.

        Args:
            uncond: the prediction for the empty text, [batch, channels, height, width].
            targets: the predictions for the concepts, each of the same shape.
        """
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
    """Returns psi, set to 0 where its magnitude is below the quantile over the positions of a picture's channel."""
    magnitude = psi.abs()
    least = torch.quantile(magnitude.flatten(2), threshold, dim=2)[:, :, None, None]
    return torch.where(magnitude >= least, psi, torch.zeros_like(psi))


def first_stage(unet, config, text, start, noises, **guided):
    """Runs stage I, from noise to pictures with 3 channels.

    Args:
        unet: a diffusers UNet.
        config: the content of `scheduler_config.json`.
        text: a `Text`.
        start: the initial noise.
        noises: the fresh noise of every call.
        guided: arguments for `sample`: steps, guidance_scale, edits and momentum.
    """

    def predict(_call, t, x):
        return branches(unet, x, t, text, guided)

    return sample(predict, config, start, noises, **guided)


def second_stage(unet, config, text, start, noises, *, picture, noising, level, level_noises, **guided):
    """Runs stage II, from noise and the noised pictures of the first stage to larger pictures.

    Args:
        unet, config, text, start, noises, guided: as in `first_stage`; the result has the same size as `start`.
        picture: pictures of the first stage, [batch, height, width, 3].
        noising: the `scheduler_config.json` of the scheduler that adds noise to the pictures.
        level: the timestep of that noise.
        level_noises: one noise array for all calls, as in diffusers, or one per call, as in the original code. The
            original also draws different noise for the unconditional branch; here all branches see the same picture.
    """
    large = interpolate(tensor(picture), start.shape[1:3], mode="bilinear", align_corners=True)
    levels, noiser = torch.tensor([level] * len(start)), scheduler(noising)

    def predict(call, t, x):
        noise = tensor(level_noises[call if len(level_noises) > 1 else 0])
        x = torch.cat([x, noiser.add_noise(large, noise, levels)], 1)
        return branches(unet, x, t, text, guided, levels)

    return sample(predict, config, start, noises, **guided)


def upscaler(unet, config, text, start, noises, *, picture, noising, level, level_noise, **guided):
    """Runs Stable Diffusion's x4 upscaler, from noise and a noised picture to latents of the same size as the picture.

    Args:
        unet, config, text, start, guided: as in `first_stage`.
        noises: the fresh noise of every call, or None for a deterministic scheduler.
        picture, noising, level: as in `second_stage`.
        level_noise: the noise that is added to the picture.
    """
    levels = torch.tensor([level] * len(start))
    picture = scheduler(noising).add_noise(tensor(picture), tensor(level_noise), levels)

    def predict(_call, t, x):
        return branches(unet, torch.cat([x, picture], 1), t, text, guided, levels)

    return sample(predict, config, start, noises, **guided)


def decoded(vae, latents):
    """Decodes the upscaler's latents to pictures, nominally in [-1, 1]."""
    with torch.no_grad():
        return last(vae.decode(tensor(latents) / vae.config.scaling_factor).sample)


def tensor(array):
    """Converts [..., height, width, channels] to [..., channels, height, width].

    The result is contiguous, because torch rounds differently with other memory layouts.
    """
    return first(array).to(torch.get_default_dtype()).contiguous()


def branches(unet, x, t, text, guided, levels=None):
    """Returns the network's outputs for the empty text, the prompt and every concept, computed in one batch."""
    rows = len(x)
    concepts = [np.repeat(edit.concept[None], rows, 0) for edit in guided.get("edits", ())]
    states = [torch.tensor(states, dtype=x.dtype) for states in (*text, *concepts)]
    labels = {} if levels is None else {"class_labels": levels.repeat(len(states))}
    with torch.no_grad():
        out = unet(torch.cat([x] * len(states)), t, encoder_hidden_states=torch.cat(states), **labels).sample
    return out.split(rows)


def sample(predict, config, start, noises, *, steps, guidance_scale, edits=(), momentum=(0.1, 0.4)):
    """Runs the loop that all stages share and returns a `Run`.

    Args:
        predict: maps (call, timestep, x) to the outputs for the empty text, the prompt and every concept.
        steps: the number of steps, or their timesteps.
        edits: the same edits for all pictures in the batch.
        momentum: the momentum scale s_m and beta.
    """
    steps = {"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": list(steps)}
    solver, sega, calls = scheduler(config), Sega(edits, *momentum), []
    solver.set_timesteps(**steps)
    if noises is not None:
        inject(solver, noises.__getitem__)
    x = tensor(start) * solver.init_noise_sigma
    for call, t in enumerate(solver.timesteps):
        outputs = predict(call, t, solver.scale_model_input(x, t))
        uncond, cond, *targets = (out[:, : x.shape[1]] for out in outputs)
        variance = outputs[1][:, x.shape[1] :]
        added = sega(uncond, targets)
        estimate = uncond + guidance_scale * (cond - uncond) + added
        x = solver.step(torch.cat([estimate, variance], 1), t, x).prev_sample
        targets = torch.stack(targets, 1) if targets else torch.zeros(len(x), 0, *x.shape[1:])
        calls.append((x, uncond, cond, targets, added, variance))
    *arrays, variance = (last(torch.stack(arrays, 1)) for arrays in zip(*calls, strict=True))
    return Run(last(x), *arrays, variance if variance.size else None)
