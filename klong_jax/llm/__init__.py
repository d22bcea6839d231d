"""Clients of chat models behind one protocol."""
