"""YAML files and command lines: strict parsing, checks before anything is loaded, accelerate's launcher.

May import `theory`, `data`, `files` and `compat`.
"""
