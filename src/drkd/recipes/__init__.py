"""Typed recipes and the use cases that assemble everything from them: one function a verb of the command line."""
