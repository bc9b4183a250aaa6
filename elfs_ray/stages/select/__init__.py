"""select: scores from training dynamics, coresets from scores."""
