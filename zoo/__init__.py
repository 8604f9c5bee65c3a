"""The embedded world: open emoji art in several styles, and small models trained on it."""
