"""Computes, with NumPy, the noise that torch's generator draws on an NVIDIA GPU.

`torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")` computes each value in a
separate thread, as long as there are enough threads. A thread draws four 32-bit numbers with Philox4x32-10 (Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key is the seed, and the counter contains the index of the
thread. The first two numbers give one normal value (Box and Muller 1958).
"""

import math

import numpy as np

# Every GPU with at least 16 multiprocessors draws this many values with one thread per value.
MOST = 2**14
_MULTIPLIERS, _WEYL, _ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
_LOW, _BITS = np.uint64(2**32 - 1), np.uint64(32)


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the normal float32 noise that torch draws on a GPU right after `manual_seed(seed)`.

    GPUs compute sines less precisely, so their values differ by about 1e-6.

    Raises:
        ValueError: the seed is negative or has more than 64 bits, or the shape has more than `MOST` values.
    """
    count = math.prod(shape)
    if not 0 <= seed < 2**64 or not 0 <= count <= MOST:
        raise ValueError(
            f"seed={seed} should be from 0 to 2^64 - 1, and shape={shape} should have at most {MOST} values"
        )
    threads = np.arange(count, dtype=np.uint64)
    zeros = np.zeros_like(threads)
    first, second, *_ = philox((zeros, zeros, threads, zeros), (seed % 2**32, seed // 2**32))
    # A uniform value in (0, 1] and an angle in (0, 2 pi], both in float32 as on the GPU.
    scale, turn = np.float32(2**-32), np.float32(2**-32 * 2 * math.pi)
    uniform = first.astype(np.float32) * scale + scale / 2
    angle = second.astype(np.float32) * turn + turn / 2
    values = np.sqrt(-2 * np.log(uniform.astype(np.float64))) * np.sin(angle.astype(np.float64))
    return values.astype(np.float32).reshape(shape)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Applies Philox4x32-10 (Salmon et al. 2011, section 3.3) to four arrays of counters.

    Counters and results are uint64 arrays whose values are below 2^32.
    """
    for i in range(_ROUNDS):
        left, right = (np.uint64((word + i * weyl) % 2**32) for word, weyl in zip(key, _WEYL, strict=True))
        a, b = counter[0] * np.uint64(_MULTIPLIERS[0]), counter[2] * np.uint64(_MULTIPLIERS[1])
        counter = ((b >> _BITS) ^ counter[1] ^ left, b & _LOW, (a >> _BITS) ^ counter[3] ^ right, a & _LOW)
    return counter
