"""What can go wrong in a rollout, as categories that a report counts."""

from enum import StrEnum


class Failure(StrEnum):
    """One category; a rollout counts how often each happened."""

    MALFORMED_TOOL_CALL = "malformed_tool_call"
    NO_TOOL_CALL = "no_tool_call"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    REFUSED_BEFORE_READING = "refused_before_reading"
    REFUSED_END = "refused_end"
    REPEATED_CALL = "repeated_call"
    TOOL_ERROR = "tool_error"
    TOOL_TIMEOUT = "tool_timeout"
    OBSERVATION_TRUNCATED = "observation_truncated"
    OUTPUT_CUT = "output_cut"
    CONTEXT_WINDOW_OPENED = "context_window_opened"
    CONTEXT_LENGTH_ERROR = "context_length_error"
    SANDBOX_ERROR = "sandbox_error"
    MODEL_ERROR = "model_error"
