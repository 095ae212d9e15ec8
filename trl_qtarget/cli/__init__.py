"""The `trl-qtarget` command: TRL's commands and those of this package, and completion for shells.

May import every room.
"""

from .main import main


__all__ = ["main"]
