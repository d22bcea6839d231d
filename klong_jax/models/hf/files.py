"""The files beside the weights: what a Hugging Face directory needs to speak."""

import shutil
from pathlib import Path

from klong_jax.core.errors import UserError

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_side_files(source: Path, target: Path, *others: str) -> None:
    """Copies the tokenizer's and the generation's files that are there, and `others`.

    Raises:
        UserError: One cannot be read or written; names it.
    """
    for name in (*SIDE_FILES, *others):
        try:
            if (source / name).is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target / name)
        except OSError as error:
            raise UserError(
                f"{source / name}: cannot be copied to {target} ({error.strerror}); free space or "
                "choose another output."
            ) from None
