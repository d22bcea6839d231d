"""One configured decoder and a small file a model family."""
