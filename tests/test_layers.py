"""A room imports lower layers only, never a sibling; private names of torch stay where they are listed.

| layer | rooms |
|---|---|
| 0 | config, distributed (which may import config) |
| 1 | context_parallel, models |
| 2 | parallel, loss, optim, data, checkpoint, metrics |
| 3 | train |
| 4 | check, which proves what train would do |
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cptrain

ROOT = Path(cptrain.__file__).parent
LAYERS = (
    ("config", "distributed"),
    ("context_parallel", "models"),
    ("parallel", "loss", "optim", "data", "checkpoint", "metrics"),
    ("train",),
    ("check",),
)
PROGRAMS = ("train", "check")  # these may ask the package itself for its version
SIBLINGS_ALLOWED = {("distributed", "config")}
# Rooms that another project can lift out: what they may import apart from the standard library and lower layers.
# numpy: planning on the host, where torch has no stable order. triton: imported on CUDA alone, where torch brings it.
LIBRARIES = {"context_parallel": {"numpy", "torch", "triton"}}

# Where private names of torch may be used at all, as many as are needed: these files exist to hold them.
PRIVATE_HOMES = ("context_parallel/backends.py", "distributed/")
# Everywhere else each one is listed with its reason, and one that is no longer used has to go from the list.
PRIVATE_USES = {
    "context_parallel/packed_batch.py": {
        # Tells a recompute from a first forward pass, as torch's own checkpointing does; there is no public one.
        "torch._C._current_graph_task_id",
    },
    "models/init.py": {
        # The only function that knows a shard's offset in the whole tensor, also where FSDP2 cuts what TP has cut.
        "torch.distributed.tensor._utils",
    },
    "parallel/activation_checkpoint.py": {
        # Wraps a module so that names in checkpoints stay plain; there is no public one.
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    },
    "parallel/apply.py": {
        # A switch of the compiler without another way in.
        "torch._dynamo.config.recompile_limit",
        "torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint",
    },
    "optim/clip.py": {
        # One kernel for all gradients of a device and dtype; torch's own clipping uses the same two.
        "torch._foreach_mul_",
        "torch._foreach_norm",
    },
    "metrics/profiler.py": {
        # What torch's documentation of memory snapshots tells everybody to call.
        "torch.cuda.memory._dump_snapshot",
        "torch.cuda.memory._record_memory_history",
    },
}


def modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path below the root, parsed source) of every file of a package."""
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(), filename=str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions and by name too; "from a.b import c" gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports would escape this test"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def layer_faults(root: Path) -> list[str]:
    """Every import in a package "cptrain" that breaks the rule, as `file:line: what`."""
    layer = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
    faults = []
    for path, tree in modules(root):
        room = path.partition("/")[0].removesuffix(".py")
        if room == "__init__":
            faults += [
                f"{path}:{line}: imports {name}" for line, name in imports(tree) if name != "__future__.annotations"
            ]
            continue
        if room not in layer:
            faults.append(f"{path}: the room {room} has no layer; give it one in the table of this test")
            continue
        for line, name in imports(tree):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package != "cptrain":
                if room in LIBRARIES and package not in sys.stdlib_module_names | LIBRARIES[room]:
                    faults.append(f"{path}:{line}: {room} imports {name}, which is not in {sorted(LIBRARIES[room])}")
            elif other in layer and other != room and (room, other) not in SIBLINGS_ALLOWED:
                if layer[other] == layer[room]:
                    faults.append(f"{path}:{line}: {room} imports its sibling {other}")
                elif layer[other] > layer[room]:
                    faults.append(f"{path}:{line}: {room} imports {other} of a higher layer")
            elif other not in layer and room not in PROGRAMS:
                faults.append(f"{path}:{line}: {room} imports {name}, which no room below it holds")
    return faults


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


def is_aten(value: object) -> bool:
    """Whether a constant is the name of a private operator."""
    named = isinstance(value, str) and bool(re.fullmatch(r"_\w+", value)) and is_private(value)
    return named and hasattr(torch.ops.aten, value)


def private_names(tree: ast.Module) -> set[str]:
    """The dotted names of torch that pass through a private part, however they are reached, up to their end."""
    aliases: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                aliases[alias.asname or name] = name
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}" if is_private(alias.name) else f"{node.module}")
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        parts: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            parts.insert(0, at.attr)
            at = at.value
        if parts and id(node) not in inner and isinstance(at, ast.Name):
            found.add(".".join([aliases.get(at.id, at.id), *parts]))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
            target, name = node.args[:2]
            if isinstance(target, ast.Name) and isinstance(name, ast.Constant):
                found.add(f"{aliases.get(target.id, target.id)}.{name.value}")
        elif isinstance(node, ast.Constant) and is_aten(node.value):
            found.add(f"aten::{node.value}")
    return {
        name
        for name in found
        if name.startswith("aten::") or (name.startswith("torch.") and any(map(is_private, name.split("."))))
    }


def private_uses(root: Path) -> dict[str, set[str]]:
    """Private names of torch by file, without the homes of them."""
    found = {path: private_names(tree) for path, tree in modules(root) if not path.startswith(PRIVATE_HOMES)}
    return {path: names for path, names in found.items() if names}


def test_layers_import_lower_ones_only() -> None:
    assert layer_faults(ROOT) == []


def test_layers_hold_every_room() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == {room for layer in LAYERS for room in layer}


def test_layers_private_names_of_torch_are_listed_exactly() -> None:
    assert private_uses(ROOT) == PRIVATE_USES


PLANTED = {
    "a higher layer": ("optim/adamw.py", "import cptrain.train.settings", "optim imports train of a higher layer"),
    "a sibling": ("data/loader.py", "from cptrain.optim import clip", "data imports its sibling optim"),
    "a sibling of the lowest layer": (
        "config/error.py",
        "from cptrain.distributed.mesh import Meshes",
        "config imports its sibling distributed",
    ),
    "inside a function": (
        "models/rope.py",
        "def late():\n    from cptrain.context_parallel import api",
        "models imports its sibling context_parallel",
    ),
    "by name": (
        "loss.py",
        "import importlib\nimportlib.import_module('cptrain.train.trainer')",
        "loss imports train of a higher layer",
    ),
    "another project": ("context_parallel/mask.py", "import tomli", "context_parallel imports tomli, which is not"),
    "the package itself": ("models/rope.py", "import cptrain", "models imports cptrain, which no room below it holds"),
    "work at import": ("__init__.py", "import torch", "imports torch"),
    "a room without a layer": ("planner.py", "", "the room planner has no layer"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_layers_faults_are_found(tmp_path: Path, name: str) -> None:
    path, code, fault = PLANTED[name]
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(code)
    (found,) = layer_faults(tmp_path)
    assert fault in found


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch\ntorch._C._jit()", "torch._C._jit"),
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch.distributed as dist\ndist.distributed_c10d._world", "torch.distributed.distributed_c10d._world"),
        ("from torch.distributed import _functional_collectives as f", "torch.distributed._functional_collectives"),
        ("from torch.distributed.tensor._utils import thing", "torch.distributed.tensor._utils"),
        ("from torch.utils import checkpoint\ncheckpoint._policy(1).x", "torch.utils.checkpoint._policy"),
        ("import torch\ngetattr(torch, '_dynamo')", "torch._dynamo"),
        ("KEPT = ('_scaled_dot_product_flash_attention',)", "aten::_scaled_dot_product_flash_attention"),
    ],
)
def test_layers_private_names_are_found(code: str, name: str) -> None:
    assert private_names(ast.parse(code)) == {name}


def test_layers_public_names_are_not_taken_for_private() -> None:
    code = "import torch\ntorch.__version__\nself._x\nimport torch.nn as nn\nnn.Module.__init__\nnn.ReLU()._get_name()"
    assert private_names(ast.parse(code)) == set()


def test_layers_settings_and_the_package_import_no_torch() -> None:
    """Parsing the settings of a run takes a fraction of a second, because nothing slow is imported for it."""
    settings = [
        f"cptrain.{path.removesuffix('.py').replace('/', '.')}" for path, _ in modules(ROOT) if "settings" in path
    ]
    assert len(settings) > 6
    names = ["cptrain", *settings, "cptrain.config.command", "cptrain.train.report"]
    names += ["cptrain.train.__main__", "cptrain.check.__main__"]
    code = f"import sys, {', '.join(names)}\nprint(sorted({{'torch', 'numpy', 'tensorboard'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_layers_context_parallel_needs_nothing_of_settings():
    code = "import sys\nsys.modules['tomli'] = None\nimport cptrain.context_parallel\n"
    code += "print([name for name in sys.modules if name.startswith(('cptrain.config', 'cptrain.train'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
