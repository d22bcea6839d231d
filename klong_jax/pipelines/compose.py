"""From configs/ and the command line to validated settings, to help, and to one-sentence errors."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from klong_jax.core.errors import UserError
from klong_jax.pipelines.config.commands import CONFIGS
from klong_jax.pipelines.config.section import Section

_WIDTH = 36  # of a setting beside its explanation in the help
# Everything that composing and overriding raise for a user's mistake.
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def config_dir() -> Path:
    """The folder of configs: inside an installed package, at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def validate(command: str, composed: DictConfig, given: Sequence[str] = ()) -> Section:
    """Turns a composed configuration into the command's settings.

    Args:
        command: The command.
        composed: The values of all its settings.
        given: The overrides among them, as NAME=VALUE: some settings exclude each other's.

    Raises:
        UserError: Something is missing, unknown, of the wrong type or contradictory.
    """
    try:
        for path in sorted(OmegaConf.missing_keys(composed)):
            said = explain(command).get(path, "").rstrip(".")
            raise UserError(f"{path} is not given: add {path}=VALUE ({said})")
        values = OmegaConf.to_container(composed, resolve=True)
        # Through JSON, whose strict reading takes lists for tuples and strings for paths.
        names = [override.partition("=")[0].lstrip("+~") for override in given]
        return CONFIGS[command].model_validate_json(json.dumps(values), context={"given": names})
    except OmegaConfBaseException as error:
        raise mistake(command, error) from None
    except ValidationError as error:
        first, *others = error.errors()
        path = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(others)} more)" if others else ""
        if first["type"] == "extra_forbidden":
            raise UserError(unknown(command, path) + more) from None
        if first["type"] == "missing":
            raise UserError(f"{path} is missing: add {path}=VALUE{more}") from None
        said = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"{path}={json.dumps(first['input'])} does not fit: {said}{more}; "
            f"see klong {command} --help"
        ) from None


def explain(command: str) -> dict[str, str]:
    """Dotted name of each setting to its explanation."""
    return dict(_explanations(CONFIGS[command], ""))


def _explanations(section: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield prefix + name, (kind.__doc__ or "").splitlines()[0]
            yield from _explanations(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, " ".join((info.description or "").split())


def unknown(command: str, path: str) -> str:
    """Says that there is no such setting, and which one was meant if that can be guessed."""
    names = list(explain(command))
    near = difflib.get_close_matches(path, names, n=1)
    near = near or [name for name in names if name.endswith(f".{path}")][:1]
    meant = f", did you mean {near[0]}?" if near else f"; see klong {command} --help"
    return f"{path} is no setting of klong {command}{meant}"


def mistake(command: str, error: Exception) -> UserError:
    """Says in one sentence what Hydra or OmegaConf says in several lines."""
    text = str(error)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return UserError(f"{mark.name}:{mark.line + 1}: not valid YAML ({error.problem}); mend it")
    if isinstance(error, MissingConfigException):
        if missing := re.search(r"Could not find '(?P<group>[^'/]+)/(?P<name>[^']+)'", text):
            group, name = missing["group"], missing["name"]
            choices = ", ".join(sorted(p.stem for p in (config_dir() / group).glob("*.yaml")))
            return UserError(f"{group}={name}: there is no such {group}; choose one of {choices}")
        return UserError(f"{lines[0].rstrip('.')}; see klong {command} --help")
    if found := re.search(r"Could not (?:override|append to config|delete)[^']*'([^']+)'", text):
        if lines[0].startswith("Could not override"):
            return UserError(unknown(command, found[1].partition("=")[0]))
        return UserError(f"{lines[0].rstrip('.')}; write {found[1].lstrip('+~')}=VALUE")
    if ambiguous := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return UserError(
            f"{ambiguous[1]} holds a comma: add --multirun to run each value, or quote the value"
        )
    if isinstance(error, OverrideParseException):
        return UserError(
            f"cannot read the override: {lines[0].rstrip('.')}; write NAME=VALUE and quote values "
            "with special characters, as in NAME='\"a,b\"'"
        )
    return UserError(f"{lines[0].rstrip('.')}; see klong {command} --help")


def help_text(command: str, overrides: Sequence[str]) -> str:
    """The composed settings of a command, each with its explanation."""
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose(command, list(overrides))
    except COMPOSE_ERRORS as error:
        raise mistake(command, error) from None
    values = OmegaConf.to_container(composed)
    assert isinstance(values, dict)
    rows = list(_help_rows(explain(command), values, "", ""))
    width = min(_WIDTH, max(len(left) for left, _ in rows))
    groups = [
        f"  {folder.name}={'|'.join(sorted(path.stem for path in folder.glob('*.yaml')))}"
        for folder in sorted(config_dir().iterdir())
        if folder.is_dir() and folder.name in values
    ]
    return "\n".join(
        [
            (CONFIGS[command].__doc__ or "").strip(),
            "",
            f"  klong {command} [NAME=VALUE ...] [--multirun]",
            "",
            "Settings and their values here (??? must be given):",
            "",
            *(line for left, said in rows for line in _with_comment(left, said, width)),
            "",
            *(["Groups of settings:", "", *groups, ""] if groups else []),
            "Override a setting with NAME=VALUE, nested ones with dots, as in a.b=1.",
            "With --multirun, NAME=A,B runs once with each value.",
            "--cfg job prints the settings as YAML.",
            f"Defaults: {config_dir() / command}.yaml",
        ]
    )


def _with_comment(left: str, said: str, width: int) -> list[str]:
    if not said:
        return [f"  {left}"]
    if len(left) > width:
        return [f"  {'':<{width}}  # {said}", f"  {left}"]
    return [f"  {left:<{width}}  # {said}"]


def _help_rows(
    explanations: dict[str, str], values: dict[Any, Any], prefix: str, indent: str
) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        said = explanations.get(f"{prefix}{name}", "")
        if isinstance(value, dict):
            yield f"{indent}{name}:", said
            yield from _help_rows(explanations, value, f"{prefix}{name}.", indent + "  ")
        else:
            shown = value if isinstance(value, str) else json.dumps(value)
            yield f"{indent}{name}: {shown}", said
