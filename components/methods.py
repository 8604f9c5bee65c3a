"""The ways of sampling that results set side by side."""

METHODS = {"unguided": "unguided", "cfg": "CFG", "guided": "guided"}  # name -> label
