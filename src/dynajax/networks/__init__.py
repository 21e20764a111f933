"""Networks in flax.linen, and what they are made of."""
