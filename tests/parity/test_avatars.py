"""Compares both libraries' pictures from a trained checkpoint: portraits with three edits each.

The environment variable SEGA_JAX_CHECKPOINT names the folder of the checkpoint; the default is a folder next to the
repository. In float32, a value that is almost equal to its quantile may pass the threshold in only one of the
libraries. PNDM's extrapolation amplifies such differences, especially with strong guidance, so the tests with PNDM use
weaker edits. In float64 there are no such differences.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import json
import os
from pathlib import Path

from support import tiny

from parity.both import ESTIMATES, differ, run
from parity.theirs import double, load, relative, schedule

FOLDER = Path(
    os.environ.get("SEGA_JAX_CHECKPOINT", Path(__file__).parents[2] / "../shared/checkpoints/avatars-sd")
).resolve()

pytestmark = [pytest.mark.parity, pytest.mark.skipif(not FOLDER.is_dir(), reason="the checkpoint does not exist")]

CALL = {
    "prompt": ["a portrait of a woman with long hair wearing a blue hoodie", "a portrait of a person"],
    "negative_prompt": ["", "hat"],
    "num_inference_steps": 20,
    "guidance_scale": 4,
    "editing_prompt": ["glasses", "beard", "long hair"],
    "reverse_editing_direction": [False, False, True],
    "edit_guidance_scale": [4, 3.5, 5],
    "edit_threshold": [0.95, 0.9, 0.95],
    "edit_warmup_steps": [3, 4, 6],
    "edit_cooldown_steps": [18, 15, 20],
    "edit_weights": [1, 1.5, 0.7],
    "edit_momentum_scale": 0.3,
    "edit_mom_beta": 0.6,
    "output_type": "np",
}
SHORT = {
    "prompt": ["a portrait of a person"],
    "negative_prompt": ["hat"],
    "num_inference_steps": 6,
    "edit_warmup_steps": [1, 2, 3],
    "edit_cooldown_steps": [6, 5, 7],
}
GENTLE = {
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "edit_guidance_scale": 3,
    "edit_momentum_scale": 0.1,
    "edit_mom_beta": 0.4,
}


@pytest.mark.parametrize("scheduler", ["DDIM", "PNDM"])
def test_portraits(scheduler, tmp_path, one_device):
    folder, call = FOLDER, CALL
    if scheduler == "PNDM":
        folder, call = with_scheduler(tiny.PNDM, tmp_path), CALL | SHORT | GENTLE
    ours, reference = load(folder, "float32", one_device)
    assert (ours.scheduler.name, type(reference.scheduler).__name__) == (f"{scheduler}Scheduler",) * 2
    results = run(ours, reference, call)
    assert relative(*(latents[-1] for latents in results["latents"])) < 3e-4
    assert differ(*results["images"]) <= 1e-3
    assert differ(*results["sem_guidance"]) <= 1e-3
    for name in ESTIMATES:
        assert relative(*results[name]) < 3e-4
        assert relative(*(estimates[0] for estimates in results[name])) < 1e-5


def test_portraits_in_float64(tmp_path, one_device):
    """PNDM replaces the checkpoint's DDIM."""
    ours, reference = load(with_scheduler(tiny.PNDM, tmp_path), "float64", one_device)
    assert ours.pipeline.scheduler.name == "PNDMScheduler"
    with double():
        schedule(ours, reference, tiny.PNDM)
        results = run(ours, reference, CALL | SHORT)
    assert differ(*results.pop("images")) == 0
    for both in results.values():
        assert relative(*both) < 1e-9


def with_scheduler(config, folder):
    """Returns a copy of the checkpoint with a different scheduler."""
    for part in FOLDER.iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            (folder / part.name).symlink_to(part)
    index = json.loads((FOLDER / "model_index.json").read_text())
    tiny.write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", config["_class_name"]]})
    (folder / "scheduler").mkdir()
    tiny.write_json(folder / "scheduler" / "scheduler_config.json", config)
    return folder
