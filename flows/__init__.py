"""Prefect flows: when things run, and who is told. What runs is defined in dvc.yaml."""
