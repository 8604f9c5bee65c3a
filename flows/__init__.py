"""Prefect flows: when things run, and who is told. What runs is defined in dvc.yaml."""

import components as components  # of `python -m flows` too: Ctrl-C counts from here on
from flows import masking

masking.begin()  # a worker imports a flow, and Prefect's first lines come before it is called
