"""What a run would take, without the hardware: one step on fake tensors in a fake world of ranks."""
