"""The `trl-qtarget` command: TRL's own commands with ours beside them, and shell completion.

May import every room.
"""

from .main import main


__all__ = ["main"]
