"""Guidance rules that operate on arrays, including semantic guidance (SEGA). Each rule has its own file.

Each rule is a link in an optax chain. Its `params` are the `Predictions` of one model call and its `updates` are the
estimate so far. The chain starts from the unconditional prediction:

    guidance = optax.chain(cfg(7.5), sega(Edits.stack([[Edit("glasses")]])))
    state = guidance.init(predictions)                                          # reads shapes only
    estimate, state = guidance.update(predictions.uncond, state, predictions)

The rules work with any denoiser trained for classifier-free guidance, in any loop, under jit, vmap, scan and grad.
Arrays are [batch, (n,) *space, channels], where n is the number of concepts. All arithmetic is in at least float32,
whatever the dtype of the network.
"""

from sega_jax.method.guidance.cfg import cfg as cfg
from sega_jax.method.guidance.chain import Predictions as Predictions
from sega_jax.method.guidance.edits import NEVER as NEVER
from sega_jax.method.guidance.edits import Edit as Edit
from sega_jax.method.guidance.edits import Edits as Edits
from sega_jax.method.guidance.quantile import SUPPORTS as SUPPORTS
from sega_jax.method.guidance.replay import ReplayState as ReplayState
from sega_jax.method.guidance.replay import replay as replay
from sega_jax.method.guidance.rescale import rescale as rescale
from sega_jax.method.guidance.sega import SEMANTICS as SEMANTICS
from sega_jax.method.guidance.sega import SegaState as SegaState
from sega_jax.method.guidance.sega import sega as sega
