"""Faults in reading other files: LoRAs, textual inversions, and torch's pickles, which must never run code."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import pickling, tiny

from faults.damage import argument, instead
from faults.views import Fault, View, Views, outcome
from sega_jax.pipelines import adapters
from sega_jax.text.files import CheckpointError
from sega_jax.text.tokenizers import Tokenizer
from sega_jax.weights import lora, textual_inversion, torch_pickle, unpickling

pytestmark = pytest.mark.fault

TENSORS = {
    "float64": np.arange(24.0).reshape(2, 3, 4),
    "float16": np.arange(6).astype(np.float16),
    "number": np.float32(3),
}
WORD, VECTORS = "<cat-toy>", np.arange(48, dtype=np.float32).reshape(3, 16)


def tensors_in(path):
    with torch_pickle.NestedTensors.of_file(path) as tensors:
        return {name: tensors[name] for name in tensors.shapes}


def view_of(count, *place):
    """Returns pickle opcodes for a view of the first storage, which is declared to have `count` entries."""
    storage = ("storage", b"ctorch\nFloatStorage\n", "0", "cpu", count)
    return pickling.call("torch._utils._rebuild_tensor_v2", pickling.opcodes(storage, []) + b"Q", *place, False, {})


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    trained = {"state_dict": TENSORS, "global_step": 3, "hyper": [None, True, ("a", 2)]}
    shared = {"own": np.arange(24, dtype=np.float32), "part": view_of(24, 6, (2, 3), (1, 2))}
    sound = [
        pickling.save(trained, folder / "zip.ckpt"),
        pickling.save(trained, folder / "legacy.ckpt", legacy=True),
        pickling.save(shared, folder / "shared.ckpt"),
    ]
    sound_tensors, system = (
        {"own": np.arange(24, dtype=np.float32)},
        pickling.call("posix.system", f"touch {folder / 'canary'}"),
    )
    hostile = [
        pickling.save({"state_dict": sound_tensors, "optimizer": [system]}, folder / "call.ckpt"),
        pickling.save(sound_tensors | {"x": view_of(24, 20, (2, 3), (3, 1))}, folder / "beyond.ckpt"),
        pickling.save(sound_tensors | {"x": view_of(10**9, 0, (10**9,), (1,))}, folder / "storage.ckpt"),
        pickling.save(sound_tensors, folder / "compressed.ckpt", compressed=True),
    ]

    def refused():
        outcomes = [outcome(tensors_in, path) for path in hostile]
        return [one if isinstance(one, str) else "no error" for one in outcomes], (folder / "canary").exists()

    models = tiny.Models(*map(tiny.filled, tiny.networks(unet=tiny.UNET_1)))
    up, down = np.float32(np.random.default_rng(0).standard_normal((16, 2))), np.ones((2, 16), np.float32)
    adapter, old = folder / "lora.safetensors", "text_encoder.encoder.layers.0.self_attn.to_v_lora"
    save_file({f"{old}.up.weight": up, f"{old}.down.weight": down, f"{old}.alpha": np.array(3, np.float32)}, adapter)
    (folder / "tokenizer").mkdir()
    tiny.tokenizer(folder / "tokenizer", 12)
    tokenizer = Tokenizer(folder / "tokenizer", 12, 60)
    save_file({WORD: VECTORS}, folder / "word.safetensors")

    def merged():
        return outcome(adapters.merge_lora, models, {adapter: 0.5})

    def merged_by_hand():
        layer = models.text_encoder.encoder.layers[0].self_attn.v_proj
        changed = layer.kernel[...] + (0.5 * 3 / 2 * up @ down).T
        text = tiny.filled(tiny.networks().text_encoder)
        text.encoder.layers[0].self_attn.v_proj.kernel[...] = changed
        return models._replace(text_encoder=text)

    def learnt():
        """Returns the tokens and the vectors of a learned word that is loaded under another name."""
        extended, new_tokenizer = adapters.add_words(models, tokenizer, {"<toy>": folder / "word.safetensors"})
        ids = new_tokenizer(["a <toy>"])[0, 2:5]
        return ids, np.asarray(extended.text_encoder.embeddings.token_embedding.embedding[...])[ids]

    return Views(
        {
            "pickles": View(
                lambda: [outcome(tensors_in, path) for path in sound],
                lambda: [TENSORS, TENSORS, {"own": sound_tensors["own"], "part": np.float32([[6, 8, 10], [7, 9, 11]])}],
            ),
            "hostile pickles": View(refused, lambda: (["CheckpointError"] * 4, False)),
            "lora": View(merged, merged_by_hand, 1e-6),
            "learnt words": View(learnt, lambda: (np.array([58, 59, 60]), VECTORS)),
        }
    )


def obedient(call):
    """Lets a pickle call any function."""

    def damaged(self, function, args):
        try:
            return call(self, function, args)
        except CheckpointError:
            return args[0]

    return damaged


def in_c_order(read):
    """Reads tensors as if their entries were always stored in C order."""

    def damaged(self, data):
        strides = np.cumprod([1, *self.shape[:0:-1]])[::-1].tolist() if self.shape else []
        return read(self._replace(strides=tuple(strides)), data)

    return damaged


def times_the_rank(factors):
    """Multiplies a LoRA layer's scale by the rank, so that it becomes alpha instead of alpha / rank."""

    def damaged(*args):
        factor = factors(*args)
        return lambda part, key, alpha, rank: factor(part, key, alpha, rank) * rank

    return damaged


FAULTS = {
    "a pickle may call any function": Fault("hostile pickles", unpickling.Machine, "call", obedient),
    "tensors may lie beyond their storage": Fault(
        "hostile pickles", unpickling.Tensor, "fits", instead(lambda self: True)
    ),
    "the strides of a pickle's tensors are ignored": Fault("pickles", unpickling.Tensor, "read", in_c_order),
    "the training state counts as tensors": Fault(
        "pickles", torch_pickle.NestedTensors, "_within", instead(lambda self, content: content)
    ),
    "alpha is not divided by the rank": Fault("lora", lora, "factors", times_the_rank),
    "the scale of a LoRA is ignored": Fault(
        "lora", lora, "merged", argument(1, lambda changes: [change._replace(scale=1.0) for change in changes])
    ),
    "the vectors of a word are in reverse order": Fault(
        "learnt words", textual_inversion, "_with_vectors", argument(2, lambda vectors: vectors[::-1])
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, views, monkeypatch):
    assert views.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults(views):
    assert views.wrong() == set()
