"""Megatron-Core's format: its distributed checkpoints, both ways, and MaxVio of its models."""
