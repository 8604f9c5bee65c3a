"""What the pipeline does when something breaks: `python -m benchmarks.faults`."""
