"""Pictures on one, two, four and eight devices."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format
from support.topology import sharded

import sega_jax
from sega_jax import Edit
from sega_jax.pipelines.execution import devices
from sega_jax.pipelines.execution.chunks import CHUNK
from sega_jax.pipelines.execution.devices import Devices, Flat
from sega_jax.pipelines.run import fetch_record
from sega_jax.systems.base import Record

WORDS = "abcdefgh"
STEPS = 4


@pytest.fixture(scope="module")
def on(small_folder):
    """Returns a function that loads a small pipeline on a given number of devices."""
    return cache(lambda count: sega_jax.load(small_folder, devices=jax.local_devices()[:count]))


def draw(pipe, rows, **options):
    """Makes one picture for each integer in `rows`; the integer determines the picture's prompt, edit, scale and
    seed."""
    settings = {
        "edits": [[Edit(WORDS[-r], scale=r + 1, warmup=r % 2)] for r in rows],
        "steps": STEPS,
        "output": "latent",
        "guidance_scale": [1.0 + r for r in rows],
        "seed": list(rows),
    }
    return pipe([WORDS[r] for r in rows], **settings | options)


def test_the_default_is_all_devices():
    assert len(Devices()) == len(jax.local_devices()) == 8


def test_the_twin_that_is_compiled_for_tpus_equals_pmap():
    """`TopologyDevices` compiles `jit(shard_map(function))`, because JAX cannot lower `pmap` for absent devices."""
    eight, x = Devices(), np.arange(32, dtype=np.float32).reshape(16, 2)
    axes, arguments = (0, None), (eight.split(x), eight.place(np.float32(3)))

    def scaled(x, factor):
        return factor * x / x.sum(), x[:1]

    mapped = eight.map(scaled, axes)(*arguments)
    twin = jax.jit(sharded(scaled, axes, eight._spread.mesh))(*arguments)
    for one, other in zip(mapped, twin, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("platform", "setting", "precise"),
    [("tpu", None, True), ("cpu", None, True), ("tpu", "default", False), ("gpu", None, False)],
)
def test_precision_of_float32_products_on_tpus(monkeypatch, platform, setting, precise):
    """`setting` is the precision that the user has set."""
    absent = Devices(jax.local_devices()[:1])
    monkeypatch.setattr(absent, "devices", [SimpleNamespace(platform=platform)])
    x = jax.ShapeDtypeStruct((2, 2), np.float32)
    with jax.default_matmul_precision(setting):
        program = jax.jit(absent.with_options(lambda x, *, times: times * x @ x, {"times": 2})).trace(x)
        assert ("HIGHEST" in program.lower(lowering_platforms=("tpu",)).as_text()) == precise


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8])
def test_equal_shares_give_equal_bits(on, count):
    together = draw(on(count), range(count)).images
    alone = [draw(on(1), [row]).images[0] for row in range(count)]
    assert np.array_equal(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_kernel_layout_of_gpus(on, count, small_folder):
    """The layout in memory changes, but the results do not."""
    devices_with_layout = Devices(jax.local_devices()[:count])
    devices_with_layout._kernels = Format(devices._CUDNN, devices_with_layout._everywhere)
    pipe = sega_jax.load(small_folder, devices=devices_with_layout)
    kernel = pipe.models.unet.conv_in.kernel[...]
    assert kernel.format.layout.major_to_minor == (3, 0, 1, 2)
    again = devices_with_layout.place(kernel).addressable_shards[0].data
    assert again.unsafe_buffer_pointer() == kernel.addressable_shards[0].data.unsafe_buffer_pointer()
    np.testing.assert_allclose(draw(pipe, [0, 1]).images, draw(on(count), [0, 1]).images, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "count"), [(3, 2), (5, 4), (1, 2)])
def test_uneven_batches(on, rows, count):
    share = -(-rows // count)
    even, uneven = draw(on(count), range(share * count)), draw(on(count), range(rows))
    assert uneven.images.shape == (rows, 8, 8, 4)
    assert uneven.finite.shape == (rows,)
    assert np.array_equal(uneven.images, even.images[:rows])
    single = draw(on(1), range(2)).images[:rows]
    for found, wanted in zip(uneven.images, single, strict=False):
        assert np.linalg.norm(found - wanted) <= 3e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_permuted_rows_give_permuted_pictures(on, count):
    order = [1, 0] if count == 1 else [2, 0, 3, 1]
    rows = range(len(order))
    assert np.array_equal(draw(on(count), order).images, draw(on(count), rows).images[order])


def test_results_exclude_the_padding_of_rows(on):
    seen = []
    out = draw(on(2), range(3), output="float", record=True, callback=lambda *call: seen.append(call))
    assert out.images.shape == (3, 16, 16, 3)
    assert out.record.cond.shape == (3, STEPS, 8, 8, 4)
    assert out.record.edits.shape == (3, STEPS, 1, 8, 8, 4)
    assert [latents.shape for _, _, latents in seen] == [(3, 8, 8, 4)] * STEPS
    plain = draw(on(2), range(3)).images
    for found, wanted in zip(seen[-1][2], plain, strict=True):
        assert np.linalg.norm(found - wanted) <= 3e-4 * np.linalg.norm(wanted)


def test_no_edits(on):
    plain, none = (draw(on(2), range(2), edits=edits).images for edits in ([], [[], []]))
    assert np.array_equal(plain, none)
    assert np.isfinite(plain).all()


def test_weights_are_placed_once(on):
    pipe = on(4)
    before = jax.tree.leaves(pipe.models)
    for leaf in before:
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.local_devices()[:4])
    draw(pipe, range(4))
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        draw(pipe, range(4))
    assert all(leaf is old for leaf, old in zip(jax.tree.leaves(pipe.models), before, strict=True))


def test_the_transfer_guard_detects_copies():
    """The test above relies on the guard, which raises an error if weights are copied from one device to another."""
    devices = jax.local_devices()[:2]
    add = jax.pmap(lambda w, x: w + x, in_axes=(None, 0), devices=devices)
    here, rows = jax.device_put(np.ones((1, 3)), devices[0]), Devices(devices).split(np.ones((2, 3)))
    with jax.transfer_guard_device_to_device("disallow_explicit"), pytest.raises(RuntimeError, match="isallowed"):
        add(here, rows)


def test_more_calls_compile_nothing(on, compilations):
    draw(on(4), range(4))
    compilations.clear()
    draw(on(4), range(4, 8), steps=7, eta=0.5, negative_prompt="h")
    assert not compilations


@pytest.mark.slow
def test_compiled_ahead_of_time(on, compilations):
    """The programs for fewer concepts are also compiled. On several devices, the compile report does not list
    memory."""
    pipe = on(2)
    report = pipe.compile(["a", "b"], [Edit("", warmup=0, cooldown=2)], steps=STEPS, output="latent")
    assert [program.concepts for program in report.programs if program.name == "advance"] == [1, 0]
    assert report.memory is None
    compilations.clear()
    draw(pipe, range(2), edits=[[Edit("a", warmup=0, cooldown=3)], []])
    assert not compilations


@pytest.mark.parametrize("count", [1, 2])
def test_flat_trees_equal_their_trees(on, count, compilations):
    devices, net = on(count).devices, on(count).models.unet

    def biased(net, x):
        return x + net.conv_in.bias[...][0]

    program, x = devices.map(biased, (None, 0)), devices.split(np.ones((2, 3), np.float32))
    wanted = devices.gather(program(net, x))
    assert np.array_equal(devices.gather(program(Flat(net), x)), wanted)
    other = Flat(jax.tree.map(lambda leaf: 2 * leaf, net))
    compilations.clear()
    np.testing.assert_allclose(devices.gather(program(other, x)) - 1, 2 * (wanted - 1), rtol=1e-6)
    assert not compilations


def test_only_the_used_calls_of_a_chunk_are_fetched(on, monkeypatch):
    """On the devices, a record's arrays span a complete chunk, even if only some of the chunk's calls are used."""
    gather, fetched = Devices.gather, []

    def count(devices, tree, rows=None):
        fetched.extend(leaf.nbytes for leaf in jax.tree.leaves(tree))
        return gather(devices, tree, rows)

    monkeypatch.setattr(Devices, "gather", count)
    few = draw(on(2), range(4), record=True).record
    states = few.cond[:, 0].nbytes
    assert sum(fetched) <= sum(leaf.nbytes for leaf in jax.tree.leaves(few)) + states


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("live", [1, 3, CHUNK // 2, CHUNK // 2 + 1, CHUNK])
def test_fetching_a_chunk_of_a_record(on, count, live):
    chunk = np.arange(count * 2 * CHUNK * 3.0, dtype=np.float32).reshape(count * 2, CHUNK, 3)
    record = Record(*on(count).devices.split([chunk, chunk + 1, chunk + 2]), None)
    found = fetch_record(on(count), record, live)
    for i, kept in enumerate(found[:3]):
        assert np.array_equal(kept, chunk[:, :live] + i)
    assert found.edits is None
    assert fetch_record(on(count), None, live) is None


def test_a_device_other_than_the_first(on):
    other = on(1)
    models = jax.device_put(jax.device_get(other.models), jax.local_devices()[5])
    pipe = sega_jax.Pipeline(**other.components | {"models": models, "devices": Devices(jax.local_devices()[5:6])})
    assert np.array_equal(draw(pipe, [0]).images, draw(other, [0]).images)


def test_compiling_in_one_thread_records_only_its_own_calls(one_device):
    shared = Devices(one_device)

    def double(x):
        return 2 * x

    x = np.ones(3, np.float32)
    with ThreadPoolExecutor(1) as pool:
        with shared.watch() as here:
            pool.submit(lambda: shared.map(double, (0,))(x)).result()
            assert here == []
            shared.map(double, (0,))(x)
        assert [program.name for program in here] == ["double"]
        shared.map(double, (0,))(x)
    assert len(here) == 1
