"""Makes pictures in batches of equal size, so that the pipeline compiles once, and has the judge classify them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sega_jax.demo.judge import Judge, Verdict, look
from sega_jax.demo.settings import RECOMMENDED
from sega_jax.method.guidance import Edit
from sega_jax.pipelines.pipeline import Pipeline


class Request(NamedTuple):
    """The prompt, seed and settings of a picture to make."""

    prompt: str
    seed: int
    edits: tuple[Edit, ...] = ()
    negative: str = ""
    guidance_scale: float | None = None  # None uses the maker's guidance scale


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures and the judge's classification of them."""

    pixels: np.ndarray  # uint8 [n, 128, 128, 3]
    verdict: Verdict

    def __getitem__(self, index: Any) -> "Pictures":
        """Selects pictures by indices, a slice or a mask."""
        return Pictures(self.pixels[index], Verdict(*(values[index] for values in self.verdict)))


@dataclasses.dataclass(frozen=True)
class PictureMaker:
    """Makes and judges pictures.

    Attributes:
        pipe: the pipeline; it is called with uint8 output.
        judge: the judge.
        batch: the number of pictures in one call of the pipeline. The last call is padded with copies of the last
            picture.
        call: other arguments of the pipeline's calls. A request may override the guidance scale.
    """

    pipe: Pipeline
    judge: Judge
    batch: int = 256
    call: Mapping[str, Any] = dataclasses.field(default_factory=lambda: RECOMMENDED.call)

    def __call__(self, requests: Sequence[Request], **options: Any) -> Pictures:
        """Makes the requested pictures.

        Args:
            requests: the requested pictures.
            options: arguments of the pipeline for all pictures, such as `support` or `replay`; they override `call`.

        Raises:
            ValueError: there are no requests.
        """
        if not requests:
            raise ValueError("no pictures were requested; pass at least one request")
        parts = []
        for i in range(0, len(requests), self.batch):
            block = list(requests[i : i + self.batch])
            parts.append(self._make(block + block[-1:] * (self.batch - len(block)), options)[: len(block)])
        pixels = np.concatenate(parts)
        return Pictures(pixels, look(self.judge, pixels, self.batch))

    def _make(self, requests: list[Request], options: dict[str, Any]) -> np.ndarray:
        """Calls the pipeline once."""
        default = self.call["guidance_scale"]
        rows = {
            "seed": [request.seed for request in requests],
            "negative_prompt": [request.negative for request in requests],
            "guidance_scale": [default if one.guidance_scale is None else one.guidance_scale for one in requests],
        }
        edits = [list(request.edits) for request in requests]
        prompts = [request.prompt for request in requests]
        call = {**self.call, **rows, **options}
        return np.asarray(self.pipe(prompts, edits, **call, output="uint8", progress=False).images)
