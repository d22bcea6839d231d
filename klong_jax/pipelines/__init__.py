"""One module a command; each reads its settings, does its work and can be run again."""
