"""The scaffold: one task, one model, one sandbox, one trajectory."""
