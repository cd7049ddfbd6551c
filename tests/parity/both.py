"""Runs the same call in the semantic pipelines of both libraries, and measures how much the results differ."""

import numpy as np

from parity.theirs import first, last, noise

ESTIMATES = ("uncond_estimates", "text_estimates", "edit_estimates")


def run(ours, reference, call):
    """Returns {name: (ours, theirs)} for the pictures and for the recorded arrays [calls, ...]."""
    latents, seen, expected = noise(len(call["prompt"]), *ours.pipeline.latent_shape()), [], []
    a = ours(**call, latents=latents, return_guidance=True, callback=lambda *step: seen.append(step[2]))
    b = reference(**call, latents=first(latents), callback=lambda *step: expected.append(last(step[2])))
    results = {"latents": (np.stack(seen), np.stack(expected)), "images": (a.images, b.images)}
    for name in (*ESTIMATES, "sem_guidance"):
        results[name] = getattr(a, name), last(getattr(reference, name))[: len(seen)]
    return results


def differ(ours, theirs):
    """Returns the share of entries in which the two arrays differ by more than 2e-3."""
    return (np.abs(ours - theirs) > 2e-3).mean()
