"""Every command of the README runs, as written but for a smaller size where the real one would take minutes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import small_model

from cptrain.context_parallel.kernels import KERNELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.strip().splitlines()
    if line and not line.startswith("#")
]
TINY = (
    "--training.steps 2 --training.seq_len 256 --model.num_layers 1 --model.dim 64 --validation.steps 1 "
    "--job.dump_folder {outputs}"
)
# beginning of a command -> what is put behind it, so that it ends in seconds
SMALLER = {
    "bash launch/quickstart.sh": TINY,
    "bash tools/test.sh": "--version",  # sets up, lints, checks types, and asks pytest for its version
    "pip install": "--dry-run --quiet",
    "torchrun --nproc-per-node 2 -m cptrain.train": TINY,
    "torchrun --nproc-per-node 2 -m cptrain.check": "",
    "tensorboard --logdir outputs": "--inspect",
    "python -m cptrain.train": "",
    "python -m cptrain.train --config debug --parallelism.ring_degree 1": "--dry-run",
    "python tools/bench_step.py": "--cases bare,cp2 --tokens 128 --layers 1 --dim 32 --heads 4 --rounds 1 --steps 1",
    "python tools/bench_attention.py": "--seq-lens 256 --rounds 1 --out {outputs}",
    "python tools/bench_attention.py --memory": "--tokens-per-rank 64 --ranks 4",
    "python tools/bench_documents.py": "--time --seq-lens 256 --ranks 2 --rounds 1 --packs 2 --out {outputs}",
    "python tools/bench_documents.py --time --simulate": "--seq-lens 256 --ranks 4 --rounds 1 --out {outputs}",
    "python tools/bench_documents.py --time --simulate --device cuda": (
        "--device cpu --seq-lens 256 --ranks 4 --heads 2 --dim 16 --dtype fp32 --rounds 1 --out {outputs}"
    ),
    "python tools/plant_faults.py": "--list",
}


LIBRARY = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run_library_example(rank: int, world: int, code: str, then: str = "") -> tuple[float, dict[str, list[float]]]:
    """The README's lines with a model and tokens given, as a user has them: the loss of all ranks, and gradients.

    then: lines that go on from there, with the tokens, labels and ids of packed documents.
    """
    model, tokens = small_model(), torch.arange(2 * 32).view(2, 32) % 20
    names: dict[str, Any] = {"model": model, "tokens": tokens}
    exec(code, names)
    if then:
        model.zero_grad()
        labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        ids = torch.tensor([[0] * 20 + [1] * 12, [0] * 3 + [1] * 9 + [-1] * 20])
        names |= {"tokens": tokens, "labels": labels.masked_fill(ids < 0, -100), "document_ids": ids}
        names |= {"positions": torch.arange(32).expand(2, -1), "num_tokens": (labels != -100).sum()}
        exec(then, names)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    total = names["loss"].detach().clone()
    dist.all_reduce(total)
    return total.item(), {name: p.grad.flatten().tolist() for name, p in model.named_parameters()}


def test_readme_lines_put_context_parallel_into_a_loop(pool):
    code, _ = LIBRARY
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 13
    one, two = pool.run(1, run_library_example, code)[0], pool.run(2, run_library_example, code)[1]
    assert two[0] == pytest.approx(one[0], abs=1e-10)
    for name, grad in one[1].items():
        assert two[1][name] == pytest.approx(grad, abs=1e-10), name


def test_readme_lines_pack_documents(pool):
    one, two = (pool.run(world, run_library_example, *LIBRARY)[0] for world in (1, 2))
    assert two[0] == pytest.approx(one[0], abs=1e-10)
    for name, grad in one[1].items():
        assert two[1][name] == pytest.approx(grad, abs=1e-10), name


def rule_of(command: str) -> str:
    matching = [beginning for beginning in SMALLER if command.startswith(beginning)]
    assert matching, f"no rule says how to run: {command}"
    return max(matching, key=len)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme") / "outputs"


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, outputs):
    extra = SMALLER[rule_of(command)].format(outputs=outputs)
    words = shlex.split(f"{command} {extra}")
    if words[0] == "tensorboard":
        outputs.mkdir(exist_ok=True)
        words[words.index("outputs")] = str(outputs)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_readme_installs_beside_a_torch_of_ones_own():
    (install,) = [command for command in COMMANDS if command.startswith("pip ")]
    assert "constraints" not in install, "they would replace it"


def test_readme_names_the_presets_there_are():
    listed = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    assert {path.stem for path in (ROOT / "configs").glob("*.toml")} <= listed


def test_readme_names_the_kernels_there_are():
    for kernel in KERNELS:
        assert re.search(rf"^\|.*`{kernel.name}`.*\|", README, flags=re.MULTILINE), kernel.name
