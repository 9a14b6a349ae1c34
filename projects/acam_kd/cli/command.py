"""A subcommand: its options come from dataclasses, a YAML file and the command line, the last of which wins."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..core.errors import ConfigError, Names
from ..fields import add_options, defaults, required
from ..tv.names import option
from ..yaml_file import load_yaml

__all__ = ["Command", "Parser", "Values"]

Values = Mapping[str, Any]
"""The name of a field -> the value of its option."""


class Parser(argparse.ArgumentParser):
    """argparse's, which says where the options came from that it refuses, and which command refuses them."""

    source = ""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; of those that a subcommand does not know, tell with its own usage and example."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            getattr(found, "parser", self).error(f"unrecognized arguments: {' '.join(left)}")
        return found

    def error(self, message: str) -> NoReturn:
        """End the program with usage and message."""
        super().error(f"{self.source}{message}")


@dataclass(frozen=True)
class Command:
    """One of the subcommands.

    Args:
        name: the word after ``acam-kd``.
        help: one line for the list of all.
        run: does it.
        options: dataclasses whose fields are its options.
        example: the command line that ``--help`` begins with.
        again: the words for the command that resumes this one.
        names: the name of an argument -> the option, for messages.
        either: two fields that say the same in two ways; one of them may be given.
    """

    name: str
    help: str
    run: Callable[[Values], None]
    options: tuple[type, ...]
    example: str
    again: str = "the same command"
    names: Names = option
    either: tuple[str, str] | None = None

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:
        """Add the parser of this command."""
        parser = commands.add_parser(
            self.name,
            help=self.help,
            usage=f"acam-kd {self.name} [options]; for example:\n  {self.example}",
            description=f"{self.help[:1].upper()}{self.help[1:]}.",
        )
        parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with options; those given here win")
        add_options(parser, *self.options)
        parser.set_defaults(command=self, parser=parser)

    def values(self, args: argparse.Namespace) -> dict[str, Any]:
        """Return the values of all options: as given, else of the file, else the defaults.

        Raises:
            ConfigError: the file cannot be read, or has an unknown option.
            SystemExit: a value in the file is wrong, or a required option is missing.
        """
        given = vars(args)
        parser: Parser = given["parser"]
        file = self._read(args.config, parser) if args.config else {}
        for one, other in (self.either, self.either[::-1]) if self.either else ():
            if one in given:  # else the other one of the file would win over it
                file.pop(other, None)
        values = {**defaults(*self.options), **file, **given}
        missing = [flag for name, flag in required(*self.options).items() if name not in values]
        if self.either and all(values[name] for name in self.either):
            one, other = self.either
            hint = f"choose one of {{{one}}} and {{{other}}}"
            raise ConfigError(one, values[one], f"none beside {self.names(other)}", hint)
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        return values

    def _read(self, path: Path, parser: Parser) -> dict[str, Any]:
        """Read a file of options as if they were given as arguments."""
        try:
            content = load_yaml(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError("config", f"{path}, which cannot be read ({reason})", "a YAML file") from error
        known = {text.lstrip("-"): action for action in parser._actions for text in action.option_strings}
        known = {name: action for name, action in known.items() if name not in ("h", "help", "config")}
        if not isinstance(content, dict):
            raise ConfigError("config", f"{path}, which is no mapping", "lines of OPTION: VALUE")
        arguments: list[str] = []
        for key, value in content.items():
            name = str(key).replace("_", "-")
            if name not in known:
                raise ConfigError("config", f"{key} in {path}", f"one of the options {', '.join(known)}")
            arguments += _arguments(f"--{name}", value, known[name])
        parser.source = f"{path}: "
        read = vars(parser.parse_args(arguments))
        parser.source = ""
        return {name: value for name, value in read.items() if name not in ("command", "parser", "config")}


def _arguments(flag: str, value: Any, action: argparse.Action) -> list[str]:
    """Write an option of a file as arguments; none for an empty value, or a switch that is off."""
    if isinstance(value, dict):
        raise ConfigError("config", f"a mapping under {flag[2:]}", "a value, or a list of values")
    if action.nargs == 0:
        if str(value).lower() not in ("true", "false"):
            raise ConfigError("config", f"{flag[2:]}: {value}", "true or false")
        return [flag] if str(value).lower() == "true" else []
    if action.nargs is None:
        text = "\n".join(map(str, [*value, ""])) if isinstance(value, list) else value  # names of classes
        return [f"{flag}={text}"] if text not in ("", "null", "~") else []
    texts = [str(part) for part in (value if isinstance(value, list) else [value])]
    return [flag, *texts] if texts and texts not in ([""], ["null"]) else []
