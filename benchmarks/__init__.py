"""Measurements behind the tables: run from a checkout, not part of the installed packages."""
