"""Tasks on disk, in PaperBench's layout.

- config.yaml: id, title; of ours, where wanted: instructions, finish_check, image
- paper.md: the paper, in sections that "# " headings open
- addendum.md: may be missing
- blacklist.txt: one resource a line; may be missing
- rubric.json: the tree of requirements
- workspace/: the files that the workspace starts with; may be missing
"""

from pathlib import Path
from typing import Any

import yaml

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_text
from klong_jax.core.rubric import load_rubric, save_rubric
from klong_jax.core.task import Task

DEFAULT_INSTRUCTIONS = "Read every section of the paper, then replicate it in the workspace."


def load_task(path: Path) -> Task:
    """Reads one task directory.

    Raises:
        UserError: A file is missing or wrong; the message names it.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such task directory; check the path.")
    config = _read_config(path / "config.yaml")
    for name, what in (("rubric.json", "rubric"), ("paper.md", "paper")):
        if not (path / name).is_file():
            raise UserError(f"{path}: task without {what}; add {name}.")
    sections = split_sections(_read_text(path / "paper.md"))
    if not sections:
        raise UserError(f"{path / 'paper.md'}: the paper is empty; add its text.")
    lines = [line.strip() for line in _read_text(path / "blacklist.txt", missing="").splitlines()]
    return Task(
        task_id=config["id"],
        title=config.get("title", config["id"]),
        instructions=config.get("instructions", DEFAULT_INSTRUCTIONS),
        paper=sections,
        addendum=_read_text(path / "addendum.md", missing=""),
        # PaperBench writes "none" where nothing is forbidden.
        blacklist=tuple(line for line in lines if line not in ("", "none")),
        rubric=load_rubric(path / "rubric.json"),
        root=path,
        workspace=_read_workspace(path / "workspace"),
        finish_check=config.get("finish_check", ""),
        image=config.get("image"),
    )


def load_tasks(path: Path) -> list[Task]:
    """Reads every task directory in `path`, by name; names that begin with "_" or "." are not.

    Raises:
        UserError: There is none, one cannot be read, or two share an id.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory of tasks; check the path.")
    tasks: dict[str, Task] = {}
    for directory in sorted(path.iterdir()):
        if not directory.is_dir() or directory.name.startswith(("_", ".")):
            continue
        task = load_task(directory)
        if task.task_id in tasks:
            raise UserError(
                f"{directory / 'config.yaml'}: id {task.task_id!r} is also that of "
                f"{tasks[task.task_id].root}; give one of them another."
            )
        tasks[task.task_id] = task
    if not tasks:
        raise UserError(f"{path}: holds no task directory; check the path.")
    return list(tasks.values())


def save_task(task: Task, path: Path) -> None:
    """Writes a task so that `load_task` reads an equal one, its root apart.

    Raises:
        UserError: The disk refuses; the message names the path.
    """
    config = {"id": task.task_id, "title": task.title, "instructions": task.instructions}
    if task.finish_check:
        config["finish_check"] = task.finish_check
    if task.image is not None:
        config["image"] = task.image
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
    write_text(path / "config.yaml", text)
    write_text(path / "paper.md", "\n\n".join(f"# {section}" for section in task.paper) + "\n")
    if task.addendum:
        write_text(path / "addendum.md", task.addendum)
    if task.blacklist:
        write_text(path / "blacklist.txt", "".join(f"{line}\n" for line in task.blacklist))
    save_rubric(task.rubric, path / "rubric.json")
    for name, content in task.workspace.items():
        write_text(path / "workspace" / name, content)


def split_sections(markdown: str) -> tuple[str, ...]:
    """Cuts a paper at its "# " headings.

    Returns:
        The sections without the mark "# " and outer blank lines, so each begins with its title.
        Text before the first heading is a section of its own. A "# " inside a fenced code block
        is a comment there, not a heading.
    """
    sections: list[list[str]] = [[]]
    fence = ""
    for line in markdown.splitlines():
        mark = line.lstrip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
        if line.startswith("# ") and not fence:
            sections.append([line[2:]])
        else:
            sections[-1].append(line)
    return tuple(text for lines in sections if (text := "\n".join(lines).strip()))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML; mend it.") from None
    if not isinstance(config, dict) or "id" not in config:
        raise UserError(f"{path}: has no field 'id'; add one that names the task.")
    for name in ("id", "title", "instructions", "finish_check", "image"):
        if name in config and not (isinstance(config[name], str) and config[name].strip()):
            raise UserError(f"{path}: {name} must be text; put it in quotes or leave it out.")
    return config


def _read_text(path: Path, missing: str | None = None) -> str:
    if missing is not None and not path.exists():
        return missing
    try:
        # Not read_text: a script's line ends are content.
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; add it.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert or remove it.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove it.") from None


def _read_workspace(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _read_text(path) for path in files}
