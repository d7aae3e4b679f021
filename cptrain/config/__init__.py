"""Strict TOML into frozen dataclasses. Torch is never imported here."""

from cptrain.config.binding import load
from cptrain.config.command import Command, parse_command_line, show
from cptrain.config.document import dump
from cptrain.config.error import ConfigError, fail
from cptrain.config.launcher import is_first_on_host
from cptrain.config.preset import preset_names, presets_folder
from cptrain.config.schema import Key, keys
from cptrain.config.setting import Problem, setting
from cptrain.config.suggestions import ALIASES

__all__ = [
    "ALIASES",
    "Command",
    "ConfigError",
    "Key",
    "Problem",
    "dump",
    "fail",
    "is_first_on_host",
    "keys",
    "load",
    "parse_command_line",
    "preset_names",
    "presets_folder",
    "setting",
    "show",
]
