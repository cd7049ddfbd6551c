"""Advice on replacements for diffusers' arguments, attributes and methods."""

_MADE_BY = "write pipe = sega_jax.load(source"
_COMPUTES = "it configures torch; leave it out"
# {argument of a diffusers pipeline call: advice}
ARGUMENTS = {
    "num_inference_steps": "write steps",
    "timesteps": "write steps, which also accepts descending timesteps",
    "sigmas": "write steps with descending timesteps, or use another scheduler",
    "num_images_per_prompt": "write images_per_prompt",
    "generator": "write seed (a number or a list) or key (a JAX key)",
    "output_type": "write output",
    "return_dict": "leave it out; a call returns an Output",
    "prompt_2": "write prompt=pipe.encode(prompt, second=prompt_2)",
    "negative_prompt_2": "write negative_prompt=pipe.encode(negative_prompt, second=negative_prompt_2)",
    "prompt_embeds": "write prompt, which accepts the result of pipe.encode",
    "negative_prompt_embeds": "write negative_prompt, which accepts the result of pipe.encode",
    "pooled_prompt_embeds": "write prompt, which accepts the result of pipe.encode",
    "negative_pooled_prompt_embeds": "write negative_prompt, which accepts the result of pipe.encode",
    "crops_coords_top_left": "write crops_top_left",
    "callback_on_step_end": "write callback, a function of (call, timestep, state)",
    "callback_on_step_end_tensor_inputs": "leave it out; the callback gets the state",
    "cross_attention_kwargs": "write pipe.models = sega_jax.merge_lora(pipe.models, {file: scale}) before the call",
    "clean_caption": "clean the words with sega_jax.text.caption_cleaning",
    "editing_prompt": 'write edits=[Edit("glasses"), ...]',
    "editing_prompt_embeddings": "write edits=[Edit(embedding), ...], with embeddings from pipe.encode",
    "editing_pooled_prompt_embeddings": "write edits=[Edit(embedding), ...], with embeddings from pipe.encode",
    "reverse_editing_direction": "write edits=[Edit(..., scale=-5)], with a negative scale",
    "edit_guidance_scale": "write edits=[Edit(..., scale=5)]",
    "edit_warmup_steps": "write edits=[Edit(..., warmup=10)]",
    "edit_cooldown_steps": "write edits=[Edit(..., cooldown=20)]",
    "edit_threshold": "write edits=[Edit(..., threshold=0.9)]",
    "edit_weights": "write edits=[Edit(..., weight=1)]",
    "edit_momentum_scale": "write momentum_scale",
    "edit_mom_beta": "write momentum_beta",
    "sem_guidance": "write replay, an array [pictures, calls, ...]",
    "return_guidance": "write record",
    "ip_adapter_image": "IP-Adapters are not supported; leave it out",
    "ip_adapter_image_embeds": "IP-Adapters are not supported; leave it out",
    "denoising_start": "the refiner is not supported; leave it out",
    "denoising_end": "the refiner is not supported; leave it out",
    "aesthetic_score": "the refiner is not supported; leave it out",
    "negative_aesthetic_score": "the refiner is not supported; leave it out",
    "negative_original_size": "negative prompts use the same sizes as prompts; leave it out",
    "negative_crops_coords_top_left": "negative prompts use the same sizes as prompts; leave it out",
    "negative_target_size": "negative prompts use the same sizes as prompts; leave it out",
    "mask_image": "inpainting is not supported; leave it out",
    "torch_dtype": "pass dtype to sega_jax.load",
}
# {attribute of a diffusers pipeline: advice}
ATTRIBUTES = {
    "to": f"{_MADE_BY}, dtype=..., devices=...)",
    "save_pretrained": "write pipe.save(folder)",
    "load_lora_weights": f"{_MADE_BY}, lora=file), or pipe.models = sega_jax.merge_lora(pipe.models, file)",
    "unload_lora_weights": "store pipe.models before calling sega_jax.merge_lora, and assign it to undo the merge",
    "unfuse_lora": "store pipe.models before calling sega_jax.merge_lora, and assign it to undo the merge",
    "fuse_lora": "sega_jax.merge_lora merges LoRAs into the weights",
    "set_adapters": "write pipe.models = sega_jax.merge_lora(pipe.models, {file: scale})",
    "get_active_adapters": "sega_jax.merge_lora merges LoRAs into the weights, so none are listed",
    "delete_adapters": "store pipe.models before calling sega_jax.merge_lora, and assign it to undo the merge",
    "load_textual_inversion": f"{_MADE_BY}, textual_inversion=file), or use sega_jax.add_words",
    "unload_textual_inversion": (
        "store pipe.models and pipe.tokenizer before calling sega_jax.add_words, and assign them to undo it"
    ),
    "encode_prompt": "write pipe.encode(words)",
    "set_progress_bar_config": "pass progress=False to the call",
    "enable_vae_tiling": "pass tiled=True to the call",
    "disable_vae_tiling": "pass tiled=False to the call",
    "enable_freeu": "FreeU is not supported; leave it out",
    "safety_checker": "write pipe.safety; pipe.safety = None turns it off",
    "feature_extractor": "write pipe.safety.feature_extractor",
    "unet": "write pipe.models.unet; pipe.models = pipe.models._replace(unet=...) replaces it",
    "vae": "write pipe.models.vae; pipe.models = pipe.models._replace(vae=...) replaces it",
    "text_encoder": "write pipe.models.text_encoder",
    "text_encoder_2": "write pipe.models.text_encoder_2",
    "from_pipe": "write sega_jax.Pipeline(**pipe.components)",
}
# {class method that creates a diffusers pipeline: advice}
LOADERS = {"from_pretrained": f"{_MADE_BY})", "from_single_file": f"{_MADE_BY}, tokenizer=folder)"}


def attribute(name: str) -> str | None:
    """Returns advice on replacing a diffusers pipeline's attribute, or None for other names."""
    if name in ATTRIBUTES:
        return ATTRIBUTES[name]
    return _COMPUTES if name.startswith(("enable_", "disable_")) else None
