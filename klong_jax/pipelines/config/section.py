"""The base of all settings.

The sentence under a field is its explanation in `klong COMMAND --help`.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Settings that belong together; an unknown name or a wrong type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )
