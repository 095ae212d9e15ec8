"""`python -m trl_qtarget.compat` prints what an issue report needs."""

from .releases import report


if __name__ == "__main__":
    report()
