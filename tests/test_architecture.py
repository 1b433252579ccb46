"""The house: imports point downwards only, no circles, one trade a folder, small files (docs/architecture.md)."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minisora_jax"
# From the ground up. A room imports from the tiers below its own, never from beside or above.
TIERS = (
    {"types", "config", "bundled"},
    {"parallel"},
    {"io", "toy"},
    {"media"},
    {"models", "sources"},
    {"data", "diffusion", "curation"},
    {"weights"},
    {"generate", "training"},
    {"jobs", "api", "plan", "evaluation", "inspection"},
    {"ui"},
    {"commands"},
    {"cli", "__init__"},
)
TIER = {room: number for number, rooms in enumerate(TIERS) for room in rooms}
MODULES = {
    "minisora_jax." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minisora_jax"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else f"{node.module}" for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("minisora_jax")}
    return {name if name in MODULES else f"{name}.__init__" for name in found}


def room(module: str) -> str:
    return module.split(".")[1]


GRAPH = {module: imports(path) - {module} for module, path in MODULES.items()}


def test_imports_point_downwards():
    upwards = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        # __version__ may be read from anywhere
        if room(module) != room(other) and other != "minisora_jax.__init__" and TIER[room(module)] <= TIER[room(other)]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_circles():
    done, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail(" -> ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        path.append(module)
        for other in sorted(GRAPH[module] - {"minisora_jax.__init__"}):
            visit(other)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_shard_map_stays_in_parallel():
    users = [m for m, path in MODULES.items() if re.search(r"\bshard_map\b\(", path.read_text(encoding="utf-8"))]
    assert {room(module) for module in users} == {"parallel"}


def test_no_room_is_above_a_tenth_and_no_file_above_350_lines():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: n for module, n in lines.items() if n > 350}
    rooms = Counter()
    for module, n in lines.items():
        rooms[room(module)] += n
    largest, n = rooms.most_common(1)[0]
    assert n <= 0.1 * sum(rooms.values()), f"{largest}/ has {n} of {sum(rooms.values())} lines"


def test_a_prompt_walks_straight_from_the_command_to_the_sampler(tmp_path):
    """docs/prompt-walk.svg: the files through which a prompt is passed as an argument, up to the sampler's loop."""
    prompt, walk, pipeline = "a red circle grows on a black background", [], "generate/native.py"

    def carries(value) -> bool:
        if isinstance(value, list | tuple):
            return any(carries(item) for item in value[:4])
        return value == prompt if isinstance(value, str) else getattr(value, "prompt", None) == prompt

    def profile(frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)) or code.co_name.startswith("<"):
            return
        owner = frame.f_locals.get("self")
        if isinstance(getattr(type(owner), code.co_name, None), property) or code.co_name.startswith("__"):
            return  # reading an attribute is no visit
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(carries(frame.f_locals.get(name)) for name in names):
            file = str(Path(code.co_filename).relative_to(PACKAGE))
            if walk[-1:] != [file]:
                walk.append(file)
            if file == "generate/sampling.py":
                raise Arrived

    class Arrived(Exception):
        pass

    from minisora_jax.cli import main

    sys.setprofile(profile)
    try:
        with pytest.raises(Arrived):
            main(["generate", prompt, "--steps", "1", "--frames", "5", "--out", str(tmp_path)])
    finally:
        sys.setprofile(None)
    others = [file for file in walk if file not in ("cli.py", pipeline)]
    assert len(others) == len(set(others)), walk  # no file is visited again after it was left
    assert len({*others, pipeline, "commands/generate.py"}) <= 8, walk
    assert walk[-1] == "generate/sampling.py"
