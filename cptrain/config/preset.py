"""The configurations that are shipped with the package."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from cptrain.config.error import ConfigError, render


def presets_folder() -> Path:
    """The folder of the shipped TOML files: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def preset_names(folder: Path) -> list[str]:
    """The names of the presets, without `.toml`."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def find(name: str, folder: Path) -> Path:
    """The file of a `--config` argument: a path that exists, else a preset; ConfigError listing the presets."""
    names, rule = preset_names(folder), "no file or preset of this name"
    try:
        path = Path(name).expanduser()
        if path.exists() and not path.is_dir():
            return path
    except OSError as error:  # too long, or below a folder that is closed
        rule = f"cannot be read: {error.strerror}"
    except RuntimeError:
        rule = "no user of this name has a home folder"
    if name.removesuffix(".toml") in names:
        return folder / f"{name.removesuffix('.toml')}.toml"
    near = get_close_matches(Path(name).stem, names, n=1)
    fix = offer(folder) + (f"; did you mean {near[0]}?" if near else "")
    raise ConfigError([render("--config", rule, fix, value=name)])


def offer(folder: Path) -> str:
    """What `--config` may name, in words."""
    names = preset_names(folder)
    return f"presets are {', '.join(names)}" if names else f"{folder} holds no presets"


def listing(folder: Path) -> str:
    """A line per preset: its name and the first comment in it."""
    names = preset_names(folder)
    width = max(map(len, names), default=0)
    return "".join(f"{name:{width}}  {_first_comment(folder / f'{name}.toml')}".rstrip() + "\n" for name in names)


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
