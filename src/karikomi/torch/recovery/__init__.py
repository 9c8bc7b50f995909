"""Fine-tuning, distillation and batch-norm recalibration after compression."""
