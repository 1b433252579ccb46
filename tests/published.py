"""Whole parameter trees from checkpoints and back, for tests. The commands read and write them leaf by leaf."""

import jax

from minisora_jax.weights.rules import export_lazily, import_lazily


def import_params(checkpoint, rules, abstract, *, ignored=()):
    """The tree of `import_lazily` in memory, each leaf with the sharding of `abstract` if that has one."""

    def place(leaf, target):
        array, sharding = leaf.whole(), getattr(target, "sharding", None)
        return array if sharding is None else jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, import_lazily(checkpoint, rules, abstract, ignored=ignored), abstract)


def export_params(params, rules):
    """{published name: tensor} of every parameter."""
    return {name: tensor.whole() for name, tensor in export_lazily(params, rules).items()}
