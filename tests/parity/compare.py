"""Are the committed fixtures what make.py makes? Same files, names, shapes and metadata, and values that agree.

python tests/parity/compare.py MADE [COMMITTED]

Values agree where their largest difference is below TOLERANCE of the largest value, which is the parity tests' own: on
the processor that made them they are equal to the bit, with the instructions of older ones up to 5.2e-5 apart.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

TOLERANCE = 1e-4


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def difference(made: np.ndarray, committed: np.ndarray) -> float:
    """The largest difference over the largest value; infinite where one is not finite."""
    largest = np.abs(made - committed).max() / max(np.abs(committed).max(), 1e-30)
    return float(largest) if np.isfinite(largest) else float("inf")


def compare(made: Path, committed: Path) -> list[str]:
    """What differs, a sentence each; prints each file's worst difference."""
    files = [sorted(p.name for p in folder.iterdir()) for folder in (made, committed)]
    wrong = [f"{name} is only among the {where}" for name, where in _unmatched(*files)]
    for name in sorted(set(files[0]) & set(files[1])):
        if not name.endswith(".safetensors"):
            same = (made / name).read_bytes() == (committed / name).read_bytes()
            wrong += [] if same else [f"{name} differs in its bytes"]
            continue
        (ours, our_facts), (theirs, their_facts) = contents(made / name), contents(committed / name)
        wrong += [f"{name}: {tensor!r} is only among the {where}" for tensor, where in _unmatched(ours, theirs)]
        differing = [k for k in {**our_facts, **their_facts} if our_facts.get(k) != their_facts.get(k)]
        wrong += [f"{name}: the metadata {fact!r} differs" for fact in differing]
        worst, at = 0.0, ""
        for tensor in sorted(set(ours) & set(theirs)):
            a, b = ours[tensor], theirs[tensor]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                wrong.append(f"{name}: {tensor!r} is made {a.dtype}{a.shape}, committed {b.dtype}{b.shape}")
            elif (found := difference(a, b)) > worst:
                worst, at = found, tensor
        print(f"{name:<26}{len(theirs):>4} tensors, worst difference {worst:.1e} {f'({at})' if at else ''}")
        if worst > TOLERANCE:
            wrong.append(f"{name}: {at!r} differs by {worst:.1e} of its largest value; {TOLERANCE:g} is allowed")
    return wrong


def _unmatched(made, committed) -> list[tuple[str, str]]:
    return [(name, "made" if name in made else "committed") for name in sorted(set(made) ^ set(committed))]


if __name__ == "__main__":
    committed = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("fixtures")
    if wrong := compare(Path(sys.argv[1]), committed):
        sys.exit("The committed fixtures are not what tests/parity/make.py makes:\n  " + "\n  ".join(wrong))
    print("The committed fixtures are what tests/parity/make.py makes.")
