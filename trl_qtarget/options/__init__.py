"""YAML files and command lines: strict parsing, checks before anything is loaded, accelerate's launcher.

May import `theory`, `files` and `compat`.
"""
