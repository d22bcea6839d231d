"""Images of sandboxes: their lists and Dockerfiles, and what builds, lists, checks, prunes them."""
