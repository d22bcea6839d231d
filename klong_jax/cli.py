"""`klong`: one command for each step of the recipe, each a Hydra application over configs/."""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from klong_jax.core.errors import Preempted, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS: dict[str, str] = {
    "recipe": "The whole recipe on generated tasks: demonstrations, SFT, progressive RL, report.",
    "factory": "Generates paper-replication tasks in PaperBench's layout.",
    "distill": "Records demonstrations of tasks and keeps those that are judged well.",
    "split": "Shows how recorded trajectories split into windows, without training.",
    "sft": "Supervised fine-tuning on recorded trajectories, window by window.",
    "rl": "Progressive RL from a trained policy: stages of growing timeouts.",
    "eval": "Evaluates a policy on tasks, with a table and a report.",
    "convert": "Imports a Hugging Face model as a policy, or exports a policy for transformers.",
    "aot": "Compiles training and serving for TPUs elsewhere: does it fit, how fast at most?",
    "rubric": "Shows what rubrics ask for, and their scores if they are graded.",
    "report": "Prints the results of a run and writes its report.html again.",
    "corpora": "Lists the tokenised corpora on disk, and removes what is not used any more.",
    "sandbox": "Serves sandboxes; ps, exec, logs, rm, doctor look after them, image after theirs.",
    "bench": "Times kernels, training and sandboxes on this machine, beside their peers.",
    "doctor": "Says what this machine can do and what it lacks.",
}
"""Each is `run(settings)`, or `run(settings, *words)`, in klong_jax/pipelines/COMMAND.py, imported
when it is called; it may return an exit status."""

_EXAMPLES = """Examples:
  klong doctor                                  is everything here that I need?
  klong recipe profile=smoke seed=0             the whole recipe in minutes on two cores
  klong recipe --multirun seed=0,1,2            three runs, each in its own folder
  klong split data.path=FILE splitting.context_limit=4096 splitting.overlap=512
  klong split data.path=FILE --stats plot=corpus.svg
  klong convert source=HF_DIR output=POLICY_DIR and back with source=POLICY_DIR output=HF_DIR
  klong sandbox serve pool=8                    then klong sandbox ps, exec ID 'COMMAND', logs ID
  klong rubric path=FILE_OR_FOLDER output=rubric.json

Settings are overridden with NAME=VALUE; `klong COMMAND --help` explains each. Their defaults are
in configs/COMMAND.yaml and configs/profile/. A run lives in runs/ID: the same command resumes it,
other settings get another folder, run.fresh=true starts anew. Exit status: 0 done, 2 a mistake in
what was given (one sentence says which), 130 interrupted, 143 stopped by SIGTERM and saved."""

_QUIET = (
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
)
_SHORT = {
    "--skip-bad": ("data.skip_bad=true", ("split", "sft")),
    "--stats": ("stats=true", ("split",)),
}
"""Our own options: the setting that each stands for, and the commands that have it."""
_FLAGS = ("--multirun", "-m", *_SHORT, "--help", "-h")
# Hydra's own; those with a value take it as the next word or after "=".
_HYDRA_FLAGS = ("--resolve", "--hydra-help")
_HYDRA_OPTIONS = ("--cfg", "-c", "--package", "-p", "--info", "-i")


_WITH_WORDS = ("sandbox",)
"""Commands whose arguments are not settings alone; the others are words of their own."""
_SETTING = re.compile(r"[+~]*[a-z_.]+=\S*")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(overview())
        return
    command, *rest = arguments
    try:
        sys.exit(_dispatch(command, rest))
    except UserError as error:
        _say(command if command in COMMANDS else "", error)
        sys.exit(2)
    except Preempted as stopped:
        print(f"stopped by SIGTERM and saved; {_again(stopped)}", file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted; {_again(interrupt)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # What is done is on disk. Tearing the interpreter down while a program of the engine runs
        # may never end.
        os._exit(130)


def overview() -> str:
    """What `klong --help` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {said}" for name, said in COMMANDS.items()]
    return "\n".join(
        [
            "klong trains LLM agents for tasks that overflow the context window and run for hours.",
            "",
            "  klong COMMAND [NAME=VALUE ...]",
            "",
            *rows,
            "",
            _EXAMPLES,
        ]
    )


def _say(command: str, error: UserError) -> None:
    sentence = " ".join(str(error).split())
    stop = "" if sentence.endswith((".", "?")) else "."
    print(f"klong{command and ' '}{command}: {sentence}{stop}", file=sys.stderr)


def _again(stopped: BaseException) -> str:
    # A run started with run.fresh=true tells its name: the same command would start another.
    changed = f" with {stopped}" if str(stopped) else ""
    return f"run the same command again{changed} to resume"


def _dispatch(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        names = ", ".join(COMMANDS)
        raise UserError(f"there is no command {command!r}; choose one of {names}")
    if "--help" in arguments or "-h" in arguments:
        from klong_jax.pipelines.compose import help_text

        print(help_text(command, [word for word in arguments if word not in _FLAGS]))
        return 0
    words = _words(arguments) if command in _WITH_WORDS else []
    settings = [word for word in arguments if word not in words]
    return _run_hydra(command, _hydra_arguments(command, settings), words)


def _words(arguments: list[str]) -> list[str]:
    """Those that are neither settings nor options, nor the value of one."""
    return [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if not (word.startswith("-") or _SETTING.fullmatch(word) or before in _HYDRA_OPTIONS)
    ]


def _hydra_arguments(command: str, arguments: list[str]) -> list[str]:
    """Refuses unknown options in a sentence, not a page of usage; maps ours to settings."""
    words: list[str] = []
    previous = ""
    for word in arguments:
        name = word.partition("=")[0]
        known = word in (*_FLAGS, *_HYDRA_FLAGS) or name in _HYDRA_OPTIONS
        if word.startswith("-") and previous not in _HYDRA_OPTIONS and not known:
            raise UserError(
                f"there is no option {name}; settings are given as NAME=VALUE, see "
                f"klong {command} --help"
            )
        if word in _SHORT:
            setting, commands = _SHORT[word]
            if command not in commands:
                having = " and ".join(f"klong {name}" for name in commands)
                raise UserError(f"{word} is an option of {having} only")
            word = setting
        words.append(word)
        previous = word
    if previous in _HYDRA_OPTIONS:
        raise UserError(f"{previous} needs a value, as in --cfg job")
    return words


def _run_hydra(command: str, arguments: list[str], words: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from klong_jax.pipelines.compose import COMPOSE_ERRORS, config_dir, mistake, validate

    status = 0

    def job(composed: "DictConfig") -> None:
        nonlocal status
        try:
            settings = validate(command, composed, HydraConfig.get().overrides.task)
            module = importlib.import_module(f"klong_jax.pipelines.{command}")
            status = max(status, module.run(settings, *words) or 0)
        except UserError as error:
            # Said here, so that one bad job of a multirun does not end the others.
            _say(command, error)
            status = 2

    # Hydra then raises what it would print with a hint at this variable; it is said below.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with tempfile.TemporaryDirectory(prefix="klong-sweep-") as sweep:
        # Hydra insists on a folder a sweep; results go to the runs' own folders.
        own = [*_QUIET, f"hydra.sweep.dir={sweep}"]
        sys.argv = [f"klong {command}", *arguments, *own]
        try:
            hydra.main(str(config_dir()), command, version_base="1.3")(job)()
        except COMPOSE_ERRORS as error:
            raise mistake(command, error) from None
    return status


if __name__ == "__main__":
    main()
