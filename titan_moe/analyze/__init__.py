"""What the router and the experts of a model do: `python -m titan_moe.analyze` and the functions behind it."""
