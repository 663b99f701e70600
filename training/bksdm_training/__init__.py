"""Training: the demo teacher, and distillation of block-removed students."""
