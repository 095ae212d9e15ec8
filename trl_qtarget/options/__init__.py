"""YAML files and command lines: strict parsing, checks before anything is loaded, accelerate's launcher.

May import `cache` (the name of its manifest), `theory`, `files` and `compat`.
"""
