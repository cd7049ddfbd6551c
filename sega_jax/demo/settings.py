"""The settings that the demo model recommends, chosen with `sega_jax.demo.evaluate`.

Calls and edits use these settings unless others are given:

    pipe = sega_jax.load()
    pipe("a portrait of a woman", [Edit("glasses"), Edit("smile", scale=-5)])

With up to 256 pictures for each of 41 words (`python -m sega_jax.demo.evaluate.diffusion FOLDER`), adding succeeds in
98 % of the pictures and keeps 91 % of the other attributes; removing succeeds in 93 % and keeps 76 %. With larger
scales, edits succeed more often but keep fewer of the other attributes.
"""

from sega_jax.pipelines.load_options import DEMO
from sega_jax.pipelines.recommended import read
from sega_jax.systems.registry import named

RECOMMENDED = read(DEMO, named("stable_diffusion"))
