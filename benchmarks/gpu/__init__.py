"""What a GPU takes for steps, training and caching at true size; see ``__main__``."""
