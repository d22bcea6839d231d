"""Hugging Face directories: read straight onto a mesh, written so that transformers loads them."""
