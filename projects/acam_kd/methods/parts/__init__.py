"""The parts that several methods share: losses, logits, generation, wavelets, tokens."""
