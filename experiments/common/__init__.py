"""What the experiments share: models, data errors, comparisons, reports, and the command itself."""
