"""The theory: what a target is, the named losses, and the float64 specification.

May import `user_code` (losses of the user's own) and, of other packages, torch alone.
"""
