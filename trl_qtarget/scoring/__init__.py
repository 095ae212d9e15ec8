"""How `trl-qtarget cache` fills a cache: the rows that a trainer would make, and a teacher that reads them.

May import `training` and everything that `training` may import.
"""
