"""The command line: actions, presets, world size, help, and how it ends on an error."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_config_schema import Settings

from cptrain.config import (
    Command,
    ConfigError,
    dump,
    fail,
    load,
    parse_command_line,
    preset_names,
    presets_folder,
    setting,
    show,
)


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two presets; the working directory is another one."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "debug.toml").write_text("# A tiny run\n# on one machine\n[training]\nsteps = 3\n")
    (folder / "llama_128k.toml").write_text("\n[training]\nseq_len = 4096\n# not the first line\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def parse(presets: Path, *argv: str, **environ: str) -> Command[Settings]:
    return parse_command_line(argv, Settings, prog="toy", version="1.2", presets=presets, environ=environ)


def problems_of(presets: Path, *argv: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(presets, *argv, **environ)
    return list(caught.value.problems)


def steps_and_length(command: Command[Settings]) -> tuple[int, int]:
    assert command.settings is not None
    return command.settings.training.steps, command.settings.training.seq_len


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "debug"], (3, 2048)),
        (["--config=debug.toml"], (3, 2048)),
        (["--config", "debug", "llama_128k"], (3, 4096)),
        (["--config", "debug", "--config", "llama_128k.toml"], (3, 4096)),
        (["--config", "debug", "mine.toml"], (7, 1024)),
        (["--config", "mine.toml", "debug"], (3, 1024)),
        (["--training.steps=9", "--config", "debug", "mine.toml"], (9, 1024)),
        (["--config", "./llama_128k"], (8, 2048)),
    ],
)
def test_config_command_merges_presets_files_and_flags(
    presets: Path, argv: list[str], expected: tuple[int, int]
) -> None:
    Path("mine.toml").write_text("training = {steps = 7, seq_len = 1024}")
    Path("llama_128k").write_text("training.steps = 8")
    if argv[-1] != "./llama_128k":
        Path("llama_128k").unlink()
    command = parse(presets, *argv)
    assert command.action == "run"
    assert steps_and_length(command) == expected


def test_config_command_prefers_a_path_that_exists(presets: Path) -> None:
    Path("debug").mkdir()  # a folder of that name is no file
    assert parse(presets, "--config", "debug").files == (presets / "debug.toml",)
    Path("debug.toml").write_text("training.steps = 99")
    command = parse(presets, "--config", "debug.toml")
    assert steps_and_length(command)[0] == 99
    assert command.files == (Path("debug.toml"),)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "--config: is not given; name a preset or a TOML file; presets are debug, llama_128k"),
        (["--config"], "--config: is not given; name a preset or a TOML file; presets are debug, llama_128k"),
        (
            ["--config", "lama128k"],
            '--config = "lama128k": no file or preset of this name; presets are debug, llama_128k; '
            "did you mean llama_128k?",
        ),
        (
            ["--config", "x/debug.toml"],
            '--config = "x/debug.toml": no file or preset of this name; presets are debug, llama_128k; '
            "did you mean debug?",
        ),
        (
            ["--config", "../configs/debug"],  # would be found from any folder
            '--config = "../configs/debug": no file or preset of this name; presets are debug, llama_128k; '
            "did you mean debug?",
        ),
        (
            ["--config", "~nobody_here/x.toml"],
            '--config = "~nobody_here/x.toml": no user of this name has a home folder; presets are debug, llama_128k',
        ),
        (
            ["--config", "x" * 5000],
            f'--config = "{"x" * 56}...: cannot be read: File name too long; presets are debug, llama_128k',
        ),
        (["--config", "zzz"], '--config = "zzz": no file or preset of this name; presets are debug, llama_128k'),
        (["--config=debug", "--dry-rum"], "--dry-rum: unknown flag; did you mean --dry-run?"),
        (["--config=debug", "--worldsize", "3"], "--worldsize: unknown flag; did you mean --world-size?"),
        (
            ["--config=debug", "--config.x=1"],
            'config.x = "1" (flag --config.x): unknown key; sections are training, parallelism, compile, data',
        ),
        (["--config=debug", "--print-config", "x"], "--print-config: takes no value"),
        (
            ["--config=debug", "--print-config", "--dry-run"],
            "--print-config: cannot go with --dry-run; choose one of them",
        ),
        (["--config=debug", "--world-size", "0"], "--world-size = 0: must be an integer of at least 1"),
        (["--config=debug", "--world-size=two"], '--world-size = "two": must be an integer of at least 1'),
        (["--config=debug", "--world-size"], '--world-size = "": must be an integer of at least 1'),
        (
            ["--config=debug", "--training.steps=0"],
            "training.steps = 0 (flag --training.steps): must be positive; set it to 1",
        ),
    ],
)
def test_config_command_reports_what_is_wrong(presets: Path, argv: list[str], problem: str) -> None:
    assert problems_of(presets, *argv) == [problem]


def test_config_command_reports_its_own_problems_with_those_of_the_settings(presets: Path) -> None:
    found = problems_of(presets, "--config", "debug", "--world-size=x", "--training.steps=0", "--foo", "--dryrun")
    assert [problem.split()[0] for problem in found] == ["--dryrun:", "--world-size", "foo", "training.steps"]


def test_config_command_runs_no_checks_without_a_config(presets: Path) -> None:
    found = problems_of(presets, "--training.steps=0", "--training.stpes=0", "--config", "debug", "nope")
    assert [problem.split()[0] for problem in found] == ["--config", "training.stpes"]


@pytest.mark.parametrize(
    ("argv", "environ", "world_size"),
    [
        ([], {}, 1),
        (["--world-size", "6", "--dry-run"], {}, 6),
        (["--world-size=6", "--dry-run"], {"WORLD_SIZE": "8"}, 6),
        (["--world-size=6", "--print-config"], {"WORLD_SIZE": "8"}, 6),
        (["--world-size=8"], {"WORLD_SIZE": "8"}, 8),
        ([], {"WORLD_SIZE": "8"}, 8),
        ([], {"WORLD_SIZE": "", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 4),
        ([], {"SLURM_NTASKS": "4"}, 1),  # the shell of salloc
        ([], {"WORLD_SIZE": "8", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 8),
        (["--dry-run"], {}, 1),
    ],
)
def test_config_command_checks_for_the_world_size(
    presets: Path, argv: list[str], environ: dict[str, str], world_size: int
) -> None:
    assert parse(presets, "--config", "debug", *argv, **environ).world_size == world_size
    too_many = ("--config", "debug", "--parallelism.context_parallel_degree=5", *argv)
    assert problems_of(presets, *too_many, **environ) == [
        "parallelism.context_parallel_degree = 5 (flag --parallelism.context_parallel_degree): must divide the world "
        f"size {world_size}; use 1"
    ]


@pytest.mark.parametrize(
    "environ",
    [{"WORLD_SIZE": "x"}, {"SLURM_NTASKS": "x", "SLURM_PROCID": "0"}],
    ids=lambda environ: next(iter(environ)),
)
def test_config_command_names_a_bad_world_size_of_the_environment(presets: Path, environ: dict[str, str]) -> None:
    assert problems_of(presets, "--config=debug", **environ) == [
        f'{next(iter(environ))} = "x": must be an integer of at least 1'
    ]


def test_config_command_checks_nothing_by_a_bad_world_size(presets: Path) -> None:
    flags = ["--config=debug", "--world-size=0", "--parallelism.context_parallel_degree=5"]
    assert problems_of(presets, *flags) == ["--world-size = 0: must be an integer of at least 1"]


@pytest.mark.parametrize(("environ", "started"), [({}, 1), ({"WORLD_SIZE": "8"}, 8)])
def test_config_command_runs_on_no_other_world_size_than_was_started(
    presets: Path, environ: dict[str, str], started: int
) -> None:
    assert problems_of(presets, "--config=debug", "--world-size=2", **environ) == [
        f"--world-size = 2: the number of ranks that were started is {started}; start 2 with the launcher, or add "
        "--dry-run"
    ]


def test_config_command_print_config_loads_again(presets: Path) -> None:
    command = parse(presets, "--config", "debug", "--print-config", "--parallelism.context_parallel_degree=5")
    assert command.action == "print-config"
    Path("resolved.toml").write_text(command.text)
    assert load(Settings, [Path("resolved.toml")]) == command.settings
    assert command.text == dump(command.settings)


def test_config_command_print_config_checks_a_world_size_that_is_given(presets: Path) -> None:
    assert problems_of(
        presets, "--config=debug", "--print-config", "--world-size=4", "--parallelism.context_parallel_degree=5"
    )


def test_config_command_dry_run_is_told_to_the_program(presets: Path) -> None:
    command = parse(presets, "--config", "debug", "--dry_run", "--world-size", "2")
    assert (command.action, command.text, command.world_size) == ("dry-run", "", 2)


def test_config_command_lists_presets(presets: Path) -> None:
    command = parse(presets, "--list-configs", "--whatever")
    assert (command.action, command.settings) == ("list-configs", None)
    assert command.text == "debug       A tiny run\nllama_128k  not the first line\n"


def test_config_command_tells_the_version(presets: Path) -> None:
    assert parse(presets, "--version") == Command(action="version", text="toy 1.2\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_config_command_help_is_an_overview(presets: Path, flag: str) -> None:
    text = parse(presets, flag, "--nonsense").text
    assert text.startswith("usage: toy --config")
    for needed in [
        "--list-configs",
        "--dry-run",
        "--world-size N",
        "  [training] How long and on how much.\n",
        "  [compile]\n",
    ]:
        assert needed in text
    assert "    seq_len, steps, max_norm, stages\n" in text
    assert "ulysses_degree, kernel.name, kernel.window [compile] enable" in " ".join(text.split())


def test_config_command_help_of_a_large_root_is_short() -> None:
    fields = [(f"key_with_a_long_name_{i}", int, setting(0, "help")) for i in range(15)]
    section = dataclasses.make_dataclass("Section", fields, frozen=True, kw_only=True)
    section.__doc__ = "A line about the section."
    sections = [(f"section_{i}", section, setting(section(), "")) for i in range(15)]
    root = dataclasses.make_dataclass("Root", sections, frozen=True, kw_only=True)
    lines = parse_command_line(["--help"], root, prog="toy").text.splitlines()
    assert len(lines) < 90
    assert max(map(len, lines)) <= 120


def test_config_command_help_of_a_section_explains_its_keys(presets: Path) -> None:
    assert parse(presets, "--help", "compile").text == (
        "[compile]\n\n"
        "  compile.enable = false\n      compile every block (true or false)\n\n"
        '  compile.dynamic = "auto"\n      shapes that change (true or false or "auto")\n\n'
        "  compile.level = 1\n      how hard (one of 0, 1, 2)\n"
    )


@pytest.mark.parametrize(
    ("topic", "keys"),
    [
        ("training.stages", ["training.stages", "training.stages[].steps", "training.stages[].seq_len"]),
        ("data.field-name", ["data.field_name"]),
        ("parallelism.kernel", ["parallelism.kernel.name", "parallelism.kernel.window"]),
    ],
)
def test_config_command_help_of_a_key_shows_only_that(presets: Path, topic: str, keys: list[str]) -> None:
    lines = parse(presets, f"--help={topic}").text.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == keys


def test_config_command_help_says_what_has_to_be_set(presets: Path) -> None:
    assert "training.stages[].steps  (has to be set)\n" in parse(presets, "--help", "training").text


@pytest.mark.parametrize(
    ("topic", "fix"),
    [
        ("trainin", "did you mean --help training?"),
        ("data.path", "did you mean --help data.paths?"),
        ("zzz", "sections are training, parallelism, compile, data"),
    ],
)
def test_config_command_help_of_an_unknown_topic_suggests(presets: Path, topic: str, fix: str) -> None:
    assert problems_of(presets, "--help", topic) == [f'--help = "{topic}": no section or key of this name; {fix}']


@pytest.mark.parametrize(
    ("environ", "speaks"),
    [
        ({}, True),
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, False),
        ({"SLURM_LOCALID": "3"}, False),
        ({"LOCAL_RANK": ""}, True),
    ],
)
def test_config_command_speaks_from_one_rank_per_host(environ: dict[str, str], speaks: bool) -> None:
    stderr, stdout = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as ended:
        fail(ConfigError(["a: b"]), stream=stderr, environ=environ, head_start_s=0)
    show(Command(action="help", text="text\n"), stdout, environ=environ)
    assert ended.value.code == 2
    assert stderr.getvalue() == ("1 problem in the settings:\n  a: b\n" if speaks else "")
    assert stdout.getvalue() == ("text\n" if speaks else "")


@pytest.mark.parametrize(
    ("environ", "prefix"),
    [
        ({}, ""),
        ({"RANK": "0", "LOCAL_RANK": "0"}, ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, "[rank 8] "),
        ({"RANK": "9", "LOCAL_RANK": "1"}, "[rank 9] "),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, "[rank 5] "),
    ],
)
def test_config_command_tells_an_error_of_one_rank_from_it(environ: dict[str, str], prefix: str) -> None:
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as ended:
        fail(RuntimeError("step 3: a"), on_all=False, stream=stderr, environ=environ, head_start_s=0)
    assert (ended.value.code, stderr.getvalue()) == (2, f"{prefix}step 3: a\n")


def test_config_command_ranks_that_are_silent_let_the_speaking_one_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for local_rank in ("0", "1"):
        with pytest.raises(SystemExit):
            fail(ConfigError(["a"]), stream=io.StringIO(), environ={"LOCAL_RANK": local_rank})
    assert slept == [3.0]


def test_config_command_presets_folder_is_the_packages_or_the_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert presets_folder().name == "configs"
    package = tmp_path / "cptrain"
    (package / "config").mkdir(parents=True)
    monkeypatch.setattr("cptrain.config.preset.__file__", str(package / "config" / "preset.py"))
    assert presets_folder() == tmp_path / "configs"
    (package / "configs").mkdir()
    assert presets_folder() == package / "configs"
    (package / "configs" / "b.toml").touch()
    (package / "configs" / "a.toml").touch()
    assert preset_names(presets_folder()) == ["a", "b"]


PROGRAM = """
import sys
from test_config_schema import Settings
from cptrain.config import ConfigError, fail, parse_command_line, show
try:
    show(parse_command_line(sys.argv[1:], Settings, prog="toy"), sys.stdout)
except ConfigError as error:
    fail(error)
assert not {"torch", "numpy"} & sys.modules.keys()
"""


def run(*argv: str, **environ: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The ended process of a toy program, and its seconds."""
    tests = Path(__file__).parent
    command = [sys.executable, "-c", PROGRAM, *argv]
    environ = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", **environ}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    return done, time.perf_counter() - start


def test_config_command_help_takes_under_a_second_without_torch() -> None:
    runs = [run("--help") for _ in range(2)]
    for done, _ in runs:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: toy")
    assert min(seconds for _, seconds in runs) < 1  # the machine may be busy with something else for a while


def test_config_command_ends_with_code_2_and_no_traceback() -> None:
    done, _ = run("--config", "nowhere.toml", "--cp_size=4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("2 problems in the settings:\n  --config = ")
    assert "Traceback" not in done.stderr


def test_config_command_prints_in_an_encoding_without_a_character_what_loads_again(presets: Path) -> None:
    name = "日本🙂é\\"
    arguments = ["--config", str(presets / "debug.toml"), "--print-config", "--data.field_name", name]
    done, _ = run(*arguments, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    Path("printed.toml").write_text(done.stdout)
    assert load(Settings, [Path("printed.toml")]).data.field_name == name


def test_config_command_ends_quietly_where_nobody_reads_on() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    tests = Path(__file__).parent
    environ = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--help"], stdout=writer, stderr=subprocess.PIPE, check=False, env=environ
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
