"""One call of the faces of both libraries, and how far apart they come out."""

import numpy as np

from parity.theirs import first, last, noise

ESTIMATES = ("uncond_estimates", "text_estimates", "edit_estimates")


def run(ours, reference, call):
    """The recorded arrays and pictures of both: {name: (ours, theirs)}, calls first."""
    latents, seen, expected = noise(len(call["prompt"]), *ours.pipeline.latent_shape()), [], []
    a = ours(**call, latents=latents, return_guidance=True, callback=lambda *step: seen.append(step[2]))
    b = reference(**call, latents=first(latents), callback=lambda *step: expected.append(last(step[2])))
    found = {"latents": (np.stack(seen), np.stack(expected)), "images": (a.images, b.images)}
    for name in (*ESTIMATES, "sem_guidance"):
        found[name] = getattr(a, name), last(getattr(reference, name))[: len(seen)]
    return found


def differ(ours, theirs):
    """The share of entries that differ by more than 2e-3."""
    return (np.abs(ours - theirs) > 2e-3).mean()
