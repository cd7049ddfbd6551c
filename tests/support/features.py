"""A table with a cell for every feature and family. A cell says that the feature works, or gives the expected error.

The table has four parts: call arguments, other features, sweep settings, and command-line options.
"""

FAMILIES = ("stable_diffusion", "x4_upscaler", "sdxl", "deepfloyd_stage_1", "deepfloyd_stage_2", "paella")
DIFFUSION, CLIP = FAMILIES[:5], FAMILIES[:3]
STARTING, ENLARGING = ("stable_diffusion", "sdxl"), ("x4_upscaler", "deepfloyd_stage_2")

# A cell is this word, or a regular expression that matches the error.
WORKS = "works"
CALL = "{name} is not an argument of a call of {title}; leave it out. It is supported by "
LORA = "is given, but {title} does not support LoRA; leave it out. It is supported by "
WORDS = "is given, but {title} does not support textual inversion; leave it out. It is supported by "
SCHEDULE = "scheduler=.* {title} has its own schedule; leave (it|scheduler) out"
FILE = "is not a single-file checkpoint of Stable Diffusion 1.x or 2.x or Stable Diffusion XL: "
SWEEP = "'{name}' is not a setting of {title}; its settings are prompt, negative_prompt, seed, "
SHELL = "--{option} applies to .*, but MODEL is {title}; leave it out"


def row(refusal, *families):
    """Returns the cells for a feature of the given families, or of all families if none are given."""
    return {family: WORKS if family in families or not families else refusal for family in FAMILIES}


def rows(names, *cells):
    """Returns the same cells for each of several features."""
    return dict.fromkeys(names.split(), row(*cells))


CALLS = {
    **rows("prompt edits negative_prompt images_per_prompt seed key steps guidance_scale height width", CALL),
    **rows("momentum_scale momentum_beta semantics support replay output noise record record_noise", CALL),
    **rows("callback callback_steps progress strict", CALL),
    **rows("guidance_rescale eta latents rows_at_once", CALL, *DIFFUSION),
    **rows("long_prompts weighted clip_skip tiled", CALL, *CLIP),
    **rows("image image_noise", CALL, *STARTING, *ENLARGING),
    **rows("strength", CALL, *STARTING),
    **rows("noise_level noise_anew", CALL, *ENLARGING),
    **rows("original_size crops_top_left target_size", CALL, "sdxl"),
    **rows("renoise_steps temperature choice influence centred tokens", CALL, "paella"),
}
OTHERS = {
    **rows("lora", LORA, *DIFFUSION),
    **rows("textual_inversion", WORDS, *CLIP),
    **rows("scheduler", SCHEDULE, *DIFFUSION),
    **rows("single_file", FILE, *STARTING),
    **rows("devices encode as_function", None),
}
SWEEPS = {
    **rows("prompt negative_prompt seed steps guidance_scale height width edits", SWEEP),
    **rows("momentum_scale momentum_beta semantics support", SWEEP),
    **rows("guidance_rescale eta", SWEEP, *DIFFUSION),
    **rows("long_prompts weighted clip_skip tiled", SWEEP, *CLIP),
    **rows("image", SWEEP, *STARTING, *ENLARGING),
    **rows("strength", SWEEP, *STARTING),
    **rows("noise_level noise_anew", SWEEP, *ENLARGING),
    **rows("original_size crops_top_left target_size", SWEEP, "sdxl"),
    **rows("renoise_steps temperature choice influence centred", SWEEP, "paella"),
    **rows("scheduler", SCHEDULE, *DIFFUSION),
    **rows("lora", LORA, *DIFFUSION),
    **rows("textual_inversion", WORDS, *CLIP),
}
SHELLS = {
    **rows("negative_prompt images_per_prompt seed steps guidance_scale height width", SHELL),
    **rows("momentum_scale momentum_beta semantics support", SHELL),
    **rows("guidance_rescale eta", SHELL, *DIFFUSION),
    **rows("long_prompts weighted clip_skip tiled", SHELL, *CLIP),
    **rows("image", SHELL, *STARTING, *ENLARGING),
    **rows("strength", SHELL, *STARTING),
    **rows("noise_level noise_anew", SHELL, *ENLARGING),
    **rows("original_size crops_top_left target_size", SHELL, "sdxl"),
    **rows("renoise_steps temperature choice influence centred", SHELL, "paella"),
    **rows("lora", LORA, *DIFFUSION),
    **rows("textual_inversion", WORDS, *CLIP),
}
TABLE = {"call": CALLS, "other": OTHERS, "sweep": SWEEPS, "shell": SHELLS}
