"""Faults in reading prompts: tokenizers, textual inversions, bracketed weights, long prompts and the embedding
cache."""

import dataclasses
import warnings

import numpy as np
import pytest
from support import tiny

from faults.damage import argument, instead, result, skipped
from faults.views import Fault, View, Views, compiled, network, normal
from sega_jax.nn import clip
from sega_jax.pipelines import texts
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import EmbeddingCache
from sega_jax.systems import clip_text
from sega_jax.systems.clip_text import ClipText
from sega_jax.text import prompt_weights
from sega_jax.text.tokenizers import T5Tokenizer, Tokenizer

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:the text encoder reads")]

# Letters have the ids 0 to 25, or 28 to 53 at the end of a word. Id 56 starts a text, and id 57 ends and pads it.
TOKENS = np.array(
    [
        [56] + [57] * 11,
        [56, 28, 2, 0, 47, 54, 1, 11, 0, 2, 38, 57],
        [56, *range(28, 38), 57],
    ]
)
# The ids of letters start at 6. Id 33 is an "a" at the start of a word, and id 3 precedes any other letter at the start
# of a word. Id 1 ends a text, and id 0 pads it.
T5_TOKENS = np.zeros((2, 2, 77), int)
T5_TOKENS[0, :, 0] = 1
T5_TOKENS[1, :, :5] = [33, 3, 6, 32, 1], [1] * 5
# A weighted text that needs more than one chunk, its tokens, and the tokens' weights.
LONG = "ab (cd:2) [e]" + " f" * 6
CHUNKS = np.array([[56, 0, 29, 2, 31, 32, *[33] * 5, 57], [56, 33, *[57] * 10]])
WEIGHTS = np.array([[1, 1, 1, 2, 2, 1 / 1.1, *[1] * 6], [1] * 12])
TABLE = normal(60, 4) + 1


def read(tokenizer, devices):
    """Encodes a long weighted text with a stand-in text encoder that looks up each token in `TABLE`."""
    embed = EmbeddingCache(lambda table, ids: ClipText(table[ids]), Devices(devices))
    options = {"warn": warnings.warn, "long_prompts": True, "weighted": True}
    (text,) = clip_text.read([LONG], tokenizer, lambda ids: embed(TABLE, ids), **options)
    return text.states[0]


def read_by_hand():
    """Computes the same embedding with NumPy: weighted states of each chunk, rescaled to their original mean."""
    states = TABLE[CHUNKS]
    weighted = states * WEIGHTS[..., None]
    return (weighted * (states.mean((1, 2)) / weighted.mean((1, 2)))[:, None, None]).reshape(-1, 4)


def of_two_encoders(devices):
    """Encodes a text with one text encoder, clears the cache, and encodes it with another one."""
    cache = EmbeddingCache(lambda encoder, ids: ClipText(encoder * ids), Devices(devices))
    first = cache(1, np.array([[1, 2]]))
    cache.clear()
    return first, cache(2, np.array([[1, 2]]))


def earlier_layer():
    """Encodes texts with the states of the second-to-last layer."""
    return compiled(clip_text.encode, network("text_encoder"), clip_text.Skipping(TOKENS, np.ones(3, np.int32))).states


def earlier_layer_by_hand():
    """Applies the first of the two layers and the final layer norm."""
    encoder = network("text_encoder")
    first, _ = encoder.encoder.layers
    return encoder.final_layer_norm(first(encoder.embeddings(TOKENS)))


def branches(pipe):
    """Returns the hidden states of a negative prompt, a prompt and a concept; only the last two skip a layer."""
    batch = pipe.prepare("cat", "hat", negative_prompt="bad", clip_skip=1)
    return texts.joined_branches(pipe, batch, 1).states[0]


def branches_by_hand(pipe):
    return np.concatenate([pipe.encode("bad").states, pipe.encode(["cat", "hat"], clip_skip=1).states])


@pytest.fixture(scope="module")
def views(folder, tmp_path_factory, one_device, small):
    tiny.t5_tokenizer(t5 := tmp_path_factory.mktemp("t5") / "tokenizer")
    tokenizer = Tokenizer(folder / "tokenizer", 12, 60)
    return Views(
        {
            "tokens": View(
                lambda: Tokenizer(folder / "tokenizer", 12, 60)(["", "a cat, black", "a b c d e f g h i j k l m n"]),
                lambda: TOKENS,
            ),
            "T5 tokens": View(lambda: T5Tokenizer(t5, 60)(["", "a CAT"]), lambda: T5_TOKENS),
            "learnt words": View(
                lambda: tokenizer.with_words({"<cat>": 3})[0](["<cat> a"])[0, 1:5], lambda: np.array([58, 59, 60, 28])
            ),
            "earlier layer": View(earlier_layer, earlier_layer_by_hand, 1e-5),
            "branches": View(lambda: branches(small), lambda: branches_by_hand(small), 1e-5),
            "read": View(lambda: read(tokenizer, one_device), read_by_hand, 1e-6),
            "remembered": View(lambda: of_two_encoders(one_device), lambda: (np.array([[1, 2]]), np.array([[2, 4]]))),
        }
    )


def with_side(name):
    """Makes a tokenizer pad or truncate on the left."""

    def change(init):
        def damaged(self, *args):
            init(self, *args)
            setattr(self._tokenizer, name, "left")

        return damaged

    return change


def skipping_everywhere(batch):
    return dataclasses.replace(batch, negative_reading=batch.reading)


def skipping_nowhere(batch):
    return dataclasses.replace(batch, reading=batch.negative_reading)


FAULTS = {
    "truncation keeps the end of a text": Fault("tokens", Tokenizer, "__init__", with_side("truncation_side")),
    "padding comes before the text": Fault("tokens", Tokenizer, "__init__", with_side("padding_side")),
    "T5's padding comes before the text": Fault("T5 tokens", T5Tokenizer, "__init__", with_side("padding_side")),
    "a learnt word of several vectors becomes one token": Fault(
        "learnt words", Tokenizer, "_expanded", instead(lambda self, text: text)
    ),
    "square brackets increase the weight": Fault(
        "read", prompt_weights, "parse_weights", argument(0, lambda text: text.translate(str.maketrans("[]", "()")))
    ),
    "chunks have no end token": Fault("read", Tokenizer, "framed", result(lambda ids: np.where(ids == 57, 0, ids))),
    "the mean of a weighted chunk is not restored": Fault(
        "read", prompt_weights, "weight_states", instead(lambda states, weights: states * weights[..., None])
    ),
    "one layer too few is skipped": Fault("earlier layer", clip.Encoder, "earlier", argument(2, lambda skip: skip - 1)),
    "earlier layers skip the final layer norm": Fault(
        "earlier layer", clip.CLIPTextModel, "__init__", skipped("final_layer_norm")
    ),
    "negative prompts also skip layers": Fault("branches", texts, "joined_branches", argument(1, skipping_everywhere)),
    "concepts use the layer of negative prompts": Fault(
        "branches", texts, "joined_branches", argument(1, skipping_nowhere)
    ),
    "the cache returns the previous text encoder's embeddings": Fault(
        "remembered", EmbeddingCache, "clear", instead(lambda self: None)
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, views, monkeypatch):
    assert views.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults(views):
    assert views.wrong() == set()
