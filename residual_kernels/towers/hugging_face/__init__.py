"""transformers' vision towers, their text side, and how an adapter stands in for them."""
