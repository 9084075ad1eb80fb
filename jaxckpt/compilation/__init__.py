"""Compile for a target and read the bytes: the one place where anything is compiled."""
