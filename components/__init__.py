"""The pipeline's stages, one module each, and the adapters to the outside world."""
