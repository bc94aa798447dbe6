"""What router and experts of a model do: `python -m titan_moe.analyze`."""
