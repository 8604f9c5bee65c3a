"""The guide at equal cost beside everything that costs as much: see docs/frontier.md."""
