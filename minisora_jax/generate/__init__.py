"""Making videos with a trained model.

    generator = Generator.load(MODEL)
    [video] = generator.generate([Request("a red circle moves left on a black background", (17, 48, 48))])
    [longer] = perform(generator, [extend(generator, Request("a red circle moves left ..."), video, after=8)])

request.py says what is asked for, sampling.py makes the latents, verbs.py has every other thing that one can ask of the
model: each verb is a few lines over requests with different known tokens.
"""

from minisora_jax.generate.pipeline import Generator
from minisora_jax.generate.request import Given, Request
from minisora_jax.generate.runner import perform
from minisora_jax.generate.tasks import (
    animate,
    connect,
    enlarge,
    extend,
    inpaint,
    join,
    make,
    outpaint,
    restyle,
    rollout,
)

__all__ = [
    "Generator",
    "Given",
    "Request",
    "animate",
    "connect",
    "enlarge",
    "extend",
    "inpaint",
    "join",
    "make",
    "outpaint",
    "perform",
    "restyle",
    "rollout",
]
