"""Advice on diffusers' names, and the repr and copying of pipelines."""

import copy
import pickle

import jax
import numpy as np
import pytest
from support.checkpoints import same

import sega_jax
from sega_jax import Edit, Pipeline
from sega_jax.diffusers_api.plain import SDXLTextToImageArguments, TextToImageArguments
from sega_jax.method.arguments import arguments
from sega_jax.pipelines.diffusers_names import ARGUMENTS, ATTRIBUTES
from sega_jax.systems.registry import systems


def test_every_argument_of_diffusers_has_advice():
    """Each argument either exists here or raises an error that names its replacement."""
    known = {name for system in systems().values() for name in arguments(system.call)}
    theirs = {*arguments(TextToImageArguments), *arguments(SDXLTextToImageArguments)}
    assert theirs <= known | set(ARGUMENTS)
    assert not known & set(ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("num_inference_steps", "num_inference_steps is not an argument of a call of .*; write steps$"),
        ("editing_prompt", r"write edits=\[Edit\(\"glasses\"\), ...\]"),
        ("edit_guidance_scale", r"write edits=\[Edit\(..., scale=5\)\]"),
        ("generator", r"write seed \(a number or a list\) or key \(a JAX key\)"),
        ("num_images_per_prompt", "write images_per_prompt$"),
        ("steps_", "did you mean steps"),
    ],
)
def test_advice_on_arguments(small, name, words):
    with pytest.raises(TypeError, match=words):
        small("a cat", **{name: 3})
    with pytest.raises(TypeError, match=words):
        small.prepare("a cat", **{name: 3})


def test_advice_on_attributes(small):
    for name, answer in ATTRIBUTES.items():
        with pytest.raises(AttributeError) as caught:
            getattr(small, name)
        assert str(caught.value).endswith(f"which is diffusers' name; {answer}")
        with pytest.raises(AttributeError, match=f"{name} is diffusers' name"):
            setattr(small, name, None)
    with pytest.raises(AttributeError, match=r"enable_model_cpu_offload.* it configures torch; leave it out"):
        small.enable_model_cpu_offload()
    with pytest.raises(AttributeError, match=r"object has no attribute 'magic'$"):
        _ = small.magic
    with pytest.raises(TypeError, match=r"from_pretrained is diffusers' name; write pipe = sega_jax.load\(source\)"):
        Pipeline.from_pretrained("owner/name", torch_dtype="float16")
    with pytest.raises(TypeError, match=r"torch_dtype is not an argument of sega_jax.load; did you mean dtype"):
        sega_jax.load("owner/name", torch_dtype="float16")


def test_repr(small, small_folder, paella):
    assert repr(small) == (
        f"<StableDiffusionPipeline: Stable Diffusion 1.x or 2.x, '{small_folder}', float32, cpu, DDIMScheduler,"
        " 16 x 16 pixels>"
    )
    two = Pipeline(**{**small.components, "devices": jax.devices()[:2]})
    assert "float32, 2 x cpu, DDIMScheduler" in repr(two)
    assert "Scheduler" not in repr(paella)


@pytest.mark.parametrize("name", ["small", "paella"])
def test_copies(name, request):
    """Copies share only the weights; replacing the scheduler or a network of a copy does not change the original."""
    pipe = request.getfixturevalue(name)
    for other in (copy.copy(pipe), copy.deepcopy(pipe), copy.deepcopy([pipe, pipe])[1]):
        assert type(other) is type(pipe)
        assert same(other, pipe)
        assert other.source == pipe.source
        assert jax.tree.leaves(other.models)[0] is jax.tree.leaves(pipe.models)[0]
        if name == "small":
            other.scheduler = "EulerDiscreteScheduler"
            assert pipe.scheduler.name == "DDIMScheduler"
        models = pipe.models
        other.models = other.models._replace(**{models._fields[-1]: other.models[-1]})
        assert pipe.models is models
    both = copy.deepcopy([pipe, pipe])
    assert both[0] is both[1]
    with pytest.raises(
        TypeError, match=r"cannot be pickled, because .*; write pipe.save\(folder\) here, and sega_jax.load"
    ):
        pickle.dumps(pipe)


def test_edits_are_equal_by_their_arrays(small):
    array = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32)
    one, other = Edit(array, scale=3), Edit(array.copy(), scale=3)
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, Edit(array + 1, scale=3), Edit(array, scale=4), Edit("hat"), Edit("hat")}) == 4
    assert one != Edit(array[:6], scale=3)
    assert one != Edit("hat", scale=3)
    assert one != "hat"
    assert Edit(jax.numpy.asarray(array), scale=3) == one
    assert Edit(small.encode("hat")) == Edit(small.encode("hat"))
    assert Edit(small.encode("hat")) != Edit(small.encode("bow"))
