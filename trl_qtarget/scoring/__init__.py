"""Filling a teacher cache: the rows that a recipe's trainer would train on, and a teacher that scores them.

May import `training` and everything that `training` may import; not `options`; nothing here prints its results.
"""
